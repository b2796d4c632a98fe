"""What was done when, as a picture: a row a stage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from importlib.util import find_spec

from gglspeedup.errors import MissingPackageError, explain
from gglspeedup.page_file import beside
from gglspeedup.span_times import Segment
from gglspeedup.trace import TRAINING, WAITING

_ENDS = {TRAINING: 0, WAITING: 1}  # the rows of the reader lie lowest


def draw(path: str, segments: Sequence[Segment], origin: int, begin: float, end: float) -> None:
    """Draw segments to a PNG file, which appears whole or not at all.

    Parameters
    ----------
    path : str
        The file.
    segments : sequence of Segment
        What threads were at.
    origin : int
        Which nanosecond is 0.
    begin, end : float
        What is drawn, in seconds from there.

    Raises
    ------
    MissingPackageError
        matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        remedy = "pip install matplotlib, or write a chrome_trace(path)"
        raise MissingPackageError(explain("plot", "the package matplotlib", "none installed", remedy))
    # The object interface needs no display and leaves pyplot's global state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = defaultdict(list)
    for segment in segments:
        first, last = (segment.begin - origin) / 1e9, (segment.end - origin) / 1e9
        if last > begin and first < end:
            bars[segment.stage].append((first, last - first))
    names = sorted(bars, key=lambda name: (_ENDS.get(name, len(_ENDS)), bars[name][0]))
    figure = Figure(figsize=(12, 1.5 + 0.5 * max(len(names), 1)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    for row, name in enumerate(names):
        # Unlike edges, which are as wide as a pixel at least, faces show a short bar as what it is.
        axes.broken_barh(bars[name], (row - 0.4, 0.8), color=f"C{row % 10}", linewidth=0)
    busy = [sum(min(first + length, end) - max(first, begin) for first, length in bars[name]) for name in names]
    labels = [f"{name} ({seconds / (end - begin):.0%})" for name, seconds in zip(names, busy, strict=True)]
    axes.set_yticks(range(len(names)), labels)
    axes.set(xlim=(begin, end), ylim=(-0.6, max(len(names), 1) - 0.4), xlabel="seconds")
    axes.grid(axis="x", alpha=0.3)
    with beside(path) as file:
        canvas.print_png(file)
