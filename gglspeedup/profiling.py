"""`profile`: where the time of a training loop goes, what overlaps, what is served from where, and the peak memory."""

from __future__ import annotations

import contextlib
import os
import sys
from importlib import import_module
from typing import Any

from gglspeedup.arguments import check_count
from gglspeedup.device import Device, DeviceLike, parse_device
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, DeviceError, explain
from gglspeedup.memory_meter import Meter, meter_for
from gglspeedup.profile_summary import Peak, Served, Summary
from gglspeedup.profile_table import table_of
from gglspeedup.span_times import segments, stages
from gglspeedup.trace import TRAINING, WAITING, Recorder, Source, Span, start, stop

_WITH_METERS = ("torch", "tensorflow", "paddle")


class Profile:
    """A recording, made by :func:`profile`; to be read once its ``with`` block is over."""

    def __init__(self, device: Device, limit: int) -> None:
        self._device, self._limit = device, limit
        self._recorder: Recorder | None = None
        self._meters: dict[str, tuple[Meter, int]] = {}
        self._spans: list[Span] = []
        self._summary: Summary | None = None

    def __enter__(self) -> Profile:
        if self._recorder is not None:
            raise ArgumentValueError(explain("profile", "to be used once", "a second time", "call profile() again"))
        meters = _meters(self._device)
        recorder = Recorder(self._limit)
        if not start(recorder):
            remedy = "end the other one first"
            raise ArgumentValueError(explain("profile", "no other one at the same time", "a second one", remedy))
        self._recorder = recorder
        try:
            self._meters = {name: (meter, meter.start(tidy=False)) for name, meter in meters.items()}
        except BaseException:
            stop(recorder)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        recorder = self._recorder
        assert recorder is not None  # of __enter__
        stop(recorder)
        memory = {name: Peak(before, max(before, meter.peak())) for name, (meter, before) in self._meters.items()}
        self._spans = recorder.take()
        features = [_served(*source) for source in recorder.sources]
        recorder.sources.clear()  # the profile keeps no features alive
        begin, end = self._period
        seconds = max(end - begin, 1) / 1e9
        found = stages(self._spans, (begin, end))
        busy = sum(stage.seconds for name, stage in found.items() if name != WAITING)
        batches = found[TRAINING].times if TRAINING in found else 0
        self._summary = Summary(
            seconds, batches, busy / seconds, found, features, memory, len(self._spans), recorder.full
        )  # fmt: skip

    @property
    def _period(self) -> tuple[int, int]:
        recorder = self._recorder
        assert recorder is not None and recorder.end is not None  # of __enter__ and __exit__
        return recorder.begin, recorder.end

    def summary(self) -> Summary:
        """Return what was found.

        Raises
        ------
        ArgumentValueError
            The profile has not ended.
        """
        if self._summary is None:
            raise ArgumentValueError(explain("profile", "to have ended", "one that has not", "leave its with block"))
        return self._summary

    def as_dict(self) -> dict[str, Any]:
        """Return what was found as plain dicts, lists, strings and numbers, as JSON takes them."""
        return self.summary().as_dict()

    def table(self) -> str:
        """Return what was found as lines of text."""
        return table_of(self.summary())

    def chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the spans to a file that chrome://tracing and https://ui.perfetto.dev open.

        Parameters
        ----------
        path : path
            Of a JSON file in the Trace Event Format; one that is there is replaced.
        """
        from gglspeedup.trace_file import write_trace

        where, found = _path(path), self.as_dict()
        threads = self._recorder.threads if self._recorder is not None else []
        write_trace(where, self._spans, threads, self._period, found)

    def plot(self, path: str | os.PathLike[str], begin: float = 0.0, end: float | None = None) -> None:
        """Draw what was done when, a row a stage.

        Parameters
        ----------
        path : path
            Of a PNG file; one that is there is replaced.
        begin, end : float
            Seconds of the recording; by default all of it.

        Raises
        ------
        MissingPackageError
            matplotlib is not installed.
        """
        from gglspeedup.timeline import draw

        where, summary = _path(path), self.summary()
        draw(where, segments(self._spans, self._period), self._period[0], *_part(begin, end, summary.seconds))

    def __str__(self) -> str:
        return repr(self) if self._summary is None else self.table()

    def __repr__(self) -> str:
        state = "not ended" if self._summary is None else f"{self._summary.seconds:.3g} s, {len(self._spans)} spans"
        return f"Profile({state})"


def profile(device: DeviceLike = "auto", *, limit: int = 200_000) -> Profile:
    """Return a context that records what happens within it, in all threads of this process.

    Loaders, features, histories and Prefetchers have spans of their own; one's own code gets some by
    ``with gglspeedup.trace.span("forward pass"):``. Without a profile a span costs the test of a global.

    Parameters
    ----------
    device : str or int
        Whose memory is watched besides that of the process, as torch, TensorFlow or Paddle hand it out.
    limit : int
        The most spans that are kept, at about 200 bytes each; with the last of them the recording ends.

    Returns
    -------
    Profile
        With :meth:`~Profile.summary`, :meth:`~Profile.table` (which ``print`` shows), :meth:`~Profile.chrome_trace`
        and :meth:`~Profile.plot`.

    Raises
    ------
    DeviceError
        The CUDA device is not there.
    ArgumentTypeError, ArgumentValueError
        An argument cannot be used, or (on entering it) another profile has not ended.

    Notes
    -----
    A span is the time of the thread that works on it. What a GPU does is launched in that time, and may be done later.
    The peak of the process is set back when a profile begins, where the system allows that.

    Examples
    --------
    >>> import numpy as np
    >>> import gglspeedup
    >>> graph = gglspeedup.CSRGraph([0, 2, 3, 4], [1, 2, 0, 0])
    >>> loader = gglspeedup.NodeLoader(graph, np.eye(3), seeds=[0, 1, 2], sizes=[2], batch_size=1, device="cpu")
    >>> with gglspeedup.profile() as p:
    ...     for batch in loader:
    ...         pass
    >>> p.summary().batches, p.summary().stages["sampling"].times, p.summary().features[0].rows
    (3, 3, {'host': 7})
    """
    return Profile(parse_device(device), check_count(limit, "limit", 1))


def _meters(device: Device) -> dict[str, Meter]:
    """Return what measures memory here, by the name of what it measures."""
    meters: dict[str, Meter] = {}
    with contextlib.suppress(DeviceError, ImportError):  # a system that does not tell
        meters["process"] = meter_for(Device(None), "numpy")
    if device.index is None:
        return meters
    for name in _WITH_METERS:
        if name in sys.modules and import_module("gglspeedup.adapters").backend(name).sees_cuda(device.index):
            meters[f"{device} ({name})"] = meter_for(device, name)
    return meters


def _served(source: Source, before: dict[str, dict[str, int]]) -> Served:
    rows, sizes = dict[str, int](), dict[str, int]()
    for tier, counts in source.stats().items():
        known = before.get(tier, {"rows": 0, "bytes": 0})
        rows[tier], sizes[tier] = counts["rows"] - known["rows"], counts["bytes"] - known["bytes"]
    total = sum(rows.values())
    shape, dtype = list(getattr(source, "shape", [])), getattr(source, "dtype", "")
    return Served(f"{dtype} {shape}".strip(), rows, sizes, next(iter(rows.values()), 0) / total if total else 0.0)


def _path(path: Any) -> str:
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentTypeError(explain("path", "a path", type(path).__name__, "pass a str or pathlib.Path"))
    return os.fspath(path)


def _part(begin: Any, end: Any, seconds: float) -> tuple[float, float]:
    for name, value in (("begin", begin), ("end", end)):
        if not (value is None and name == "end") and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ArgumentTypeError(explain(name, "seconds of the recording", repr(value), "pass a number"))
    last = seconds if end is None else min(float(end), seconds)
    if not 0 <= begin < last:
        got = f"{begin} and {end}"
        raise ArgumentValueError(explain("begin and end", f"a part of 0 to {seconds:.3g}", got, "leave them out"))
    return float(begin), last
