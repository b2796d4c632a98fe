"""What spans add up to: the time of each stage that is its own, and the part of it that training hid."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from gglspeedup.trace import CONVERSION, TRAINING, WAITING, Span

Interval = tuple[int, int]


class Segment(NamedTuple):
    """A time in which a thread was at one stage: the last begun of those it had begun and not ended.

    Attributes
    ----------
    stage : str
        Which.
    thread : int
        The thread.
    begin, end : int
        Nanoseconds.
    training : bool
        Whether this is time of a training loop, which stages in other threads may be hidden behind.
    """

    stage: str
    thread: int
    begin: int
    end: int
    training: bool


class Stage(NamedTuple):
    """What the spans of a stage add up to.

    Attributes
    ----------
    times : int
        How many spans there are.
    seconds : float
        Time in them, without that of other stages within them.
    hidden : float
        Seconds of these that passed while another thread was training.
    num_bytes : int
        What they moved, as far as they say.
    """

    times: int
    seconds: float
    hidden: float
    num_bytes: int


def segments(spans: Iterable[Span], period: Interval) -> list[Segment]:
    """Return what each thread was at, moment by moment; the rest of the period it was at nothing that is known.

    Examples
    --------
    >>> whole = Span("training", 0, 0, 9, None, 0), Span("push", 0, 4, 6, None, 0)
    >>> [(segment.stage, segment.begin, segment.end) for segment in segments(whole, (0, 9))]
    [('training', 0, 4), ('push', 4, 6), ('training', 6, 9)]
    """
    by_thread = defaultdict(list)
    for span in spans:
        begin, end = max(span.begin, period[0]), min(span.end, period[1])
        if begin < end:
            by_thread[span.thread].append((begin, end, span.stage))
    return [segment for thread in sorted(by_thread) for segment in _segments_of(thread, by_thread[thread])]


def _segments_of(thread: int, spans: list[tuple[int, int, str]]) -> list[Segment]:
    # Spans of a thread need not nest: of two loops that are read in turn, each trains while the other is waited for.
    # Of those that begin together, the longest is the outermost.
    spans.sort(key=lambda span: (span[0], -span[1]))
    moments = sorted(
        [(begin, 1, number) for number, (begin, _, _) in enumerate(spans)]
        + [(end, 0, number) for number, (_, end, _) in enumerate(spans)]
    )
    found, open_spans = list[Segment](), list[int]()
    for (at, begins, number), (following, _, _) in itertools.pairwise([*moments, (moments[-1][0], 0, 0)]):
        if begins:
            open_spans.append(number)
        else:
            open_spans.remove(number)
        if open_spans and at < following:
            stage = spans[open_spans[-1]][2]
            within = any(spans[other][2] == TRAINING for other in open_spans)
            found.append(Segment(stage, thread, at, following, within and stage not in (WAITING, CONVERSION)))
    return found


def stages(spans: Sequence[Span], period: Interval) -> dict[str, Stage]:
    """Return what the spans of each stage add up to, in the order of their first ends.

    Examples
    --------
    >>> found = stages([Span("training", 0, 0, 10**9, 0, 0), Span("gathering", 1, 0, 2 * 10**9, 1, 64)], (0, 2 * 10**9))
    >>> found["gathering"]
    Stage(times=1, seconds=2.0, hidden=1.0, num_bytes=64)
    """
    of_threads = segments(spans, period)
    training = [segment for segment in of_threads if segment.training]
    behind = {
        thread: _joined((segment.begin, segment.end) for segment in training if segment.thread != thread)
        for thread in {segment.thread for segment in of_threads}
    }
    own, hidden = defaultdict[str, int](int), defaultdict[str, int](int)
    for thread, group in itertools.groupby(of_threads, key=lambda segment: segment.thread):
        by_stage = defaultdict(list)
        for segment in group:
            by_stage[segment.stage].append((segment.begin, segment.end))
        for stage, intervals in by_stage.items():
            own[stage] += sum(end - begin for begin, end in intervals)
            hidden[stage] += _shared(intervals, behind[thread])
    times, num_bytes = defaultdict[str, int](int), defaultdict[str, int](int)
    for span in spans:
        times[span.stage] += 1
        num_bytes[span.stage] += span.num_bytes
    return {name: Stage(times[name], own[name] / 1e9, hidden[name] / 1e9, num_bytes[name]) for name in times}


def _joined(times: Iterable[Interval]) -> list[Interval]:
    """Return the times that some intervals cover, in order and apart from each other."""
    joined: list[Interval] = []
    for begin, end in sorted(times):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined


def _shared(one: Sequence[Interval], other: Sequence[Interval]) -> int:
    """Return how long two lists, of intervals in order and apart from each other, coincide."""
    shared = at = 0
    for begin, end in one:
        while at < len(other) and other[at][1] <= begin:
            at += 1
        following = at
        while following < len(other) and other[following][0] < end:
            shared += min(end, other[following][1]) - max(begin, other[following][0])
            following += 1
    return shared
