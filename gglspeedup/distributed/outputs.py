"""Files of a partition while they are written: each front to back, with checksums, so that a run can go on.

Until a partition is finished its files have other names, and no header.
"""

from __future__ import annotations

import os
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup import page_file
from gglspeedup.distributed.part_file import CHECKED_BYTES, WHOLE, ArrayFile, header, part_folder

Array = npt.NDArray[Any]
Progressed = dict[str, list[Any]]  # path -> [bytes written, CRC-32 of the last piece so far, those of whole pieces]

UNFINISHED = ".partial"


class Outputs:
    """The files that a run writes.

    Parameters
    ----------
    folder : path
        Where they go.
    states : dict
        How far each file is, as JSON holds it; a run goes on from there. Kept up to date in place.
    """

    def __init__(self, folder: str, states: Progressed) -> None:
        self._folder, self.states = folder, states
        self._touched: set[str] = set()

    def create(self, array: ArrayFile) -> None:
        """Make a file of its full size, if it is not there."""
        path = self.path(array)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        if array.path not in self.states or not os.path.exists(path):
            with open(path, "wb") as file:
                page_file.reserve(file, page_file.PAGE + array.num_bytes)
            self.states[array.path] = [0, 0, []]

    def append(self, array: ArrayFile, values: Array) -> int:
        """Write the next elements of a file, and return their bytes."""
        if values.size == 0:
            return 0
        data = np.ascontiguousarray(values, array.dtype).reshape(-1).view(np.uint8)
        state, path = self.states[array.path], self.path(array)
        with open(path, "r+b", buffering=0) as file:
            file.seek(page_file.PAGE + state[0])
            rest = data.data
            while rest:
                rest = rest[file.write(rest) :]
        self._touched.add(path)
        begin = 0
        while begin < len(data):
            end = min(len(data), begin + CHECKED_BYTES - state[0] % CHECKED_BYTES)
            state[0] += end - begin
            state[1] = zlib.crc32(data[begin:end].data, state[1])
            if state[0] % CHECKED_BYTES == 0:
                state[2].append(state[1])
                state[1] = 0
            begin = end
        return len(data)

    def sync(self) -> None:
        """Wait until all that was written is on the disk."""
        for path in self._touched:
            with open(path, "r+b") as file:
                os.fsync(file.fileno())
        self._touched.clear()

    def checksums(self, array: ArrayFile) -> list[int]:
        """Return the checksums of a file that is whole."""
        position, last, done = self.states[array.path]
        assert position == array.num_bytes, f"{array.path} is short"
        return [*done, last] if position % CHECKED_BYTES else list(done)

    def finish(self, array: ArrayFile, fingerprint: str) -> None:
        """Write the header of a file."""
        path = self.path(array)
        with open(path, "r+b") as file:
            file.write(header(array, fingerprint))
            file.flush()
            os.fsync(file.fileno())

    def reveal(self, part: int) -> None:
        """Give the files of a part, or the owners, their names."""
        name = "owners" if part == WHOLE else part_folder(part)
        hidden = os.path.join(self._folder, name + UNFINISHED)
        if os.path.exists(hidden):
            os.replace(hidden, os.path.join(self._folder, name))

    def path(self, array: ArrayFile) -> str:
        """Return where a file is now: under its own name only once it has been given that."""
        hidden = os.path.join(self._folder, array.path.replace("/", UNFINISHED + "/"))
        hidden = hidden + UNFINISHED if array.part == WHOLE else hidden
        final = os.path.join(self._folder, array.path)
        return final if os.path.exists(final) else hidden
