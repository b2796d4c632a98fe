"""Ranks that are a process group of torch.distributed."""

from __future__ import annotations

import atexit
import contextlib
import re
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import numpy as np

from gglspeedup.distributed.communicator import (
    TIMEOUT_SECONDS,
    Communicator,
    CommunicatorError,
    Ids,
    checked_timeout,
    name_ranks,
    offsets_of,
)
from gglspeedup.errors import ArgumentValueError, MissingPackageError, explain

_KEY = "gglspeedup/communicator"
_GRACE_SECONDS = 2.0  # for the other ranks to say that they live


class TorchCommunicator(Communicator):
    """The ranks of torch.distributed, through gloo: for jobs that ``torchrun`` starts.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        One whose backend takes tensors of the host. By default all ranks, in a gloo group of its own: messages meet
        none of those of the training.
    timeout : float
        Seconds that a rank waits for another, however long it works meanwhile.

    Raises
    ------
    MissingPackageError
        torch is not installed, or was built without its distributed package.
    ArgumentValueError
        torch.distributed is not initialised.
    CommunicatorError
        Not all ranks made one.
    """

    def __init__(self, group: Any = None, *, timeout: float = TIMEOUT_SECONDS) -> None:
        try:
            import torch
            from torch import distributed
        except ImportError as error:
            remedy = "install torch, or take MpiCommunicator"
            raise MissingPackageError(explain("TorchCommunicator", "torch", f"{error}", remedy)) from error
        if not (distributed.is_available() and distributed.is_initialized()):
            remedy = 'call torch.distributed.init_process_group("gloo") first'
            raise ArgumentValueError(explain("group", "torch.distributed to be initialised", "none", remedy))
        super().__init__(distributed.get_rank(group), distributed.get_world_size(group), checked_timeout(timeout))
        self._torch, self._distributed = torch, distributed
        self._failure: str | None = None
        try:
            # The group's own timeout is the second line: the wait here says more.
            limit = timedelta(seconds=self.timeout + 5)
            self._group = distributed.new_group(backend="gloo", timeout=limit) if group is None else group
        except RuntimeError as error:
            raise CommunicatorError(f"not all ranks made a TorchCommunicator: {_short(error)}") from error
        self._store = distributed.distributed_c10d._get_default_store()
        self._name = f"{_KEY}/{getattr(self._group, 'group_name', '')}"
        if self.size > 1:
            atexit.register(self.leave)

    def exchange(self, rows: Any, send_counts: Sequence[int] | Ids, receive_counts: Sequence[int] | Ids) -> Any:
        """Send rows to all ranks and return theirs; see :class:`Communicator`."""
        if self._failure is not None:
            raise CommunicatorError(self._failure)
        offsets = offsets_of(receive_counts)
        received = self._pool.empty((int(offsets[-1]), *rows.shape[1:]), rows.dtype)
        width = rows.itemsize * int(np.prod(rows.shape[1:], dtype=np.int64))
        sent, filled = (self._torch.from_numpy(_writable_bytes(array)) for array in (rows, received))
        splits = [[width * int(count) for count in counts] for counts in (receive_counts, send_counts)]
        try:
            work = self._distributed.all_to_all_single(filled, sent, *splits, group=self._group, async_op=True)
            self._wait(work.is_completed, self.heard, self._missing)
            work.wait()
        except RuntimeError as error:
            if isinstance(error, CommunicatorError):
                raise
            raise CommunicatorError(self._lost(_short(error))) from error
        return received

    def heard(self) -> str | None:
        """Return what another rank has said of why it ends, None if none did."""
        try:
            if not self._store.check([self._key("any")]):
                return None  # as always: one question, not one a rank
            for rank in range(self.size):
                if rank != self.rank and self._store.check([self._key(rank)]):
                    return f"rank {rank} gave up: {self._store.get(self._key(rank)).decode()}"
        except RuntimeError as error:  # its host has died
            return f"the store of torch.distributed no longer answers: {_short(error)}"
        return None

    def _key(self, rank: int | str) -> str:
        return f"{self._name}/{rank}"

    def _missing(self) -> str:
        """Return which ranks were waited for in vain: those that do not say, when asked, that they wait, too."""
        self._say(self.not_come("a rank"))
        silent = self._silent()
        return name_ranks(silent) if silent else "a rank"

    def _lost(self, error: str) -> str:
        """Return what to say of a connection that broke: which rank it was, and why, if it could say so."""
        reason = f"lost the connection to another rank in {self.step} ({error})"
        said = self.heard()
        self.abort(reason)
        if said is not None and "lost the connection" not in said:
            return said
        silent = self._silent()
        return f"{name_ranks(silent)} died or ended: {reason}" if silent else reason

    def _silent(self) -> list[int]:
        """Return the ranks that say nothing while others have time to."""
        silent = [rank for rank in range(self.size) if rank != self.rank]
        deadline = time.monotonic() + _GRACE_SECONDS
        try:
            while silent and time.monotonic() < deadline:
                silent = [rank for rank in silent if not self._store.check([self._key(rank)])]
                time.sleep(0.02)
        except RuntimeError:
            return []  # the store's host has died, and nobody can be asked
        return silent

    def _say(self, reason: str) -> None:
        with contextlib.suppress(RuntimeError):  # its host has died: the others see that, too
            self._store.set(self._key(self.rank), reason)
            self._store.set(self._key("any"), "")

    def abort(self, reason: str) -> None:
        """Tell the other ranks that this one cannot go on."""
        if self._failure is not None:
            return
        self._failure = reason
        self._say(reason)

    def leave(self) -> None:
        """As Python ends by an exception, tell the others."""
        raised = getattr(sys, "last_value", None)
        if raised is not None:
            self.abort(f"{type(raised).__name__}: {raised}")


def _writable_bytes(array: Any) -> Any:
    """Return the bytes of a C-contiguous array as torch takes them; what is sent is only read."""
    flat = array.reshape(-1).view(np.uint8)
    return flat if flat.flags.writeable else flat.copy()


def _short(error: Exception) -> str:
    """Return what an error of gloo says, without the place in its sources and its advice."""
    return re.sub(r"\[/[^]]*\] ?", "", f"{error}".splitlines()[0]).partition(". This is typically")[0]
