"""A profile as lines of text."""

from __future__ import annotations

from collections.abc import Sequence

from gglspeedup.profile_summary import Summary
from gglspeedup.trace import TRAINING, WAITING


def table_of(summary: Summary) -> str:
    """Return the lines: stages, what was served from where, peak memory."""
    head = f"{summary.seconds:.3f} s, {summary.batches} batches; {summary.overlap:.2f} stages at work on average"
    lines = [head]
    if summary.full:
        lines.append(f"the recording ended after {summary.spans} spans: pass a larger limit")
    rows: list[tuple[str, ...]]
    if summary.stages:
        rows = [("stage", "times", "seconds", "of the time", "each", "behind training", "bytes")]
        for name, stage in sorted(summary.stages.items(), key=lambda item: -item[1].seconds):
            hidden = "" if name in (TRAINING, WAITING) or not stage.seconds else f"{stage.hidden / stage.seconds:.0%}"
            each = f"{1e3 * stage.seconds / stage.times:.3f} ms"
            moved = f"{_bytes(stage.num_bytes)}" if stage.num_bytes else ""
            share = f"{stage.seconds / summary.seconds:.0%}"
            rows.append((name, f"{stage.times}", f"{stage.seconds:.3f}", share, each, hidden, moved))
        lines += ["", *_aligned(rows)]
    if summary.features:
        rows = [("features", "tier", "rows", "bytes", "of the rows")]
        for served in summary.features:
            total, name = sum(served.rows.values()), served.name
            for tier, count in served.rows.items():
                share = f"{count / total:.1%}" if total else ""
                rows.append((name, tier, f"{count}", _bytes(served.bytes[tier]), share))
                name = ""
        lines += ["", *_aligned(rows, left=2)]
    if summary.memory:
        rows = [("memory", "at the start", "peak")]
        rows += [(name, _bytes(peak.before), _bytes(peak.peak)) for name, peak in summary.memory.items()]
        lines += ["", *_aligned(rows)]
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Return rows as lines, the first columns to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _bytes(count: int) -> str:
    """Return a number of bytes for people.

    Examples
    --------
    >>> _bytes(512), _bytes(3 << 30)
    ('512 B', '3.00 GiB')
    """
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{count} B" if unit == "B" else f"{size:.2f} {unit}"
