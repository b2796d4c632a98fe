"""Launches that come again and again on a GPU, recorded as CUDA graphs."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from gglspeedup.kernels.cuda import Runtime

logger = logging.getLogger("gglspeedup")

_MAX_GRAPHS = 8

Graphs = OrderedDict[Hashable, Any]


class Recordings:
    """Runs launches, from the third time on as a graph that was recorded the second time.

    Parameters
    ----------
    runtime : Runtime
        The device.
    enabled : bool
        Whether to record at all.
    """

    def __init__(self, runtime: Runtime, enabled: bool) -> None:
        self._runtime = runtime
        self._enabled = enabled

    def run(self, graphs: Graphs, key: Hashable, enqueue: Callable[[], None]) -> None:
        """Enqueue what `enqueue` launches, the same for every call with this key; `graphs` keeps recordings."""
        if not self._enabled or key not in graphs:
            # The first batch of a kind compiles its kernels, which a recording must not.
            enqueue()
            graphs[key] = None
        else:
            if graphs[key] is None:
                graphs[key] = self._record(enqueue)
            if graphs[key] is None:
                enqueue()
            else:
                self._runtime.replay(graphs[key])
            graphs.move_to_end(key)
        if len(graphs) > _MAX_GRAPHS:
            graphs.popitem(last=False)

    def _record(self, enqueue: Callable[[], None]) -> Any:
        """Return the recorded launches, or None, from now on, if they cannot be."""
        try:
            return self._runtime.capture(enqueue)
        except Exception as error:  # of a recording nothing has run
            logger.warning("batches cannot be recorded as CUDA graphs (%s): each of their kernels is launched", error)
            self._enabled = False
            return None
