"""Spans as a file of the Trace Event Format, which chrome://tracing and Perfetto open."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from gglspeedup.page_file import beside
from gglspeedup.trace import Span


def write_trace(
    path: str, spans: Sequence[Span], threads: Sequence[str], period: tuple[int, int], summary: dict[str, Any]
) -> None:
    """Write spans.

    Parameters
    ----------
    path : str
        The file, which appears whole or not at all.
    spans : sequence of Span
        Spans of a thread need not nest; the file's do, as its readers need it: one that outlasts that in which it
        began is cut there.
    threads : sequence of str
        The names of the threads, by number.
    period : (int, int)
        The begin and the end of the recording, in nanoseconds: times in the file are counted from there.
    summary : dict
        Kept in the file, as what JSON has.
    """
    rows = _rows(spans, len(threads), threads)
    events = [{"name": "process_name", "ph": "M", "pid": os.getpid(), "tid": 0, "args": {"name": "gglspeedup"}}]
    named = set[int]()
    for span, begin, end in _nested(spans):
        row = rows[span.thread]
        if row not in named:
            named.add(row)
            name = f"{threads[span.thread]} ({span.stage})"
            events.append({"name": "thread_name", "ph": "M", "pid": os.getpid(), "tid": row, "args": {"name": name}})
        given = {"batch": span.batch, "bytes": span.num_bytes or None}
        events.append(
            {
                "name": span.stage, "cat": "gglspeedup", "ph": "X", "pid": os.getpid(), "tid": row,
                "ts": (begin - period[0]) / 1e3, "dur": (end - begin) / 1e3,
                "args": {name: value for name, value in given.items() if value is not None},
            }
        )  # fmt: skip
    with beside(path) as file:
        trace = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": summary}
        file.write(json.dumps(trace).encode())


def _nested(spans: Sequence[Span]) -> list[tuple[Span, int, int]]:
    """Return spans with the time in which each nests into the others of its thread, outer ones first."""
    nested, ends = [], dict[int, list[int]]()
    for span in sorted(spans, key=lambda span: (span.thread, span.begin, -span.end)):
        within = ends.setdefault(span.thread, [])
        while within and within[-1] <= span.begin:
            within.pop()
        end = min([span.end, *within[-1:]])
        within.append(end)
        nested.append((span, span.begin, end))
    return nested


def _rows(spans: Sequence[Span], count: int, names: Sequence[str]) -> list[int]:
    """Return the row of each thread.

    Every epoch has threads of its own: those that follow each other share a row, if they have the same name and begin
    with the same stage.
    """
    first: dict[int, Span] = {}
    last: dict[int, int] = {}
    for span in spans:
        if span.thread not in first or span.begin < first[span.thread].begin:
            first[span.thread] = span
        last[span.thread] = max(last.get(span.thread, 0), span.end)
    rows, free, used = [0] * count, dict[tuple[str, str], list[tuple[int, int]]](), 0
    for thread, span in sorted(first.items(), key=lambda item: item[1].begin):
        candidates = free.setdefault((names[thread], span.stage), [])
        found = next((place for place, (_, end) in enumerate(candidates) if end <= span.begin), None)
        if found is None:
            used, found = used + 1, len(candidates)
            candidates.append((used, 0))
        row = candidates[found][0]
        candidates[found] = row, last[thread]
        rows[thread] = row
    return rows
