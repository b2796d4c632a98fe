"""Comparing every byte of a partition on disk with its checksums."""

from __future__ import annotations

import os
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from gglspeedup import page_file
from gglspeedup.arguments import check_count, check_flag
from gglspeedup.distributed.meta import Meta, read_meta
from gglspeedup.distributed.part_file import CHECKED_BYTES, REMEDY, ArrayFile, check_file
from gglspeedup.errors import PartFileError, explain
from gglspeedup.progress import Progress
from gglspeedup.threads import usable_cores

_MOST_TOLD = 20  # of damaged places, in an error


def verify_partition(folder: str | os.PathLike[str], *, part: int | None = None, progress: bool = True) -> int:
    """Compare every byte of a partition with its checksums, and return how many bytes there were.

    Parameters
    ----------
    folder : path
        Where :func:`partition_to_disk` wrote it.
    part : int, optional
        Look at this part and the owners alone.
    progress : bool
        Whether to show a bar, if tqdm is installed, or write lines to the log.

    Raises
    ------
    PartFileError
        The folder holds no finished partition, or bytes were changed: it says in which files, and where.
    ArgumentTypeError, ArgumentValueError
        There is no such part.
    """
    where = os.fspath(folder)
    meta = read_meta(where)
    number = None if part is None else check_count(part, "part", 0, meta.request.num_parts)
    files = meta.files(number)
    damaged = []
    for file in files:
        try:
            check_file(where, file, meta.fingerprint)
        except PartFileError as error:
            damaged.append(str(error))
    if not damaged:
        total = sum(file.num_bytes for file in files)
        with Progress("verify", total, shown=check_flag(progress, "progress")) as bar:
            damaged = _compare(where, meta, files, bar)
    if damaged:
        more = f"; and {len(damaged) - _MOST_TOLD} more" if len(damaged) > _MOST_TOLD else ""
        got = "; ".join(damaged[:_MOST_TOLD]) + more
        raise PartFileError(explain("folder", "the bytes that were written", got, REMEDY))
    return sum(file.num_bytes for file in files)


def _compare(folder: str, meta: Meta, files: list[ArrayFile], bar: Progress) -> list[str]:
    """Return where files differ from their checksums, in words."""
    pieces = [(file, number) for file in files for number in range(len(meta.checksums[file.path]))]

    def check(piece: tuple[ArrayFile, int]) -> tuple[int, str | None]:
        file, number = piece
        begin = number * CHECKED_BYTES
        count = min(CHECKED_BYTES, file.num_bytes - begin)
        data = np.fromfile(os.path.join(folder, file.path), np.uint8, count, offset=page_file.PAGE + begin)
        if zlib.crc32(data.data) == meta.checksums[file.path][number]:
            return count, None
        return count, f"{file.path!r} differs in bytes {page_file.PAGE + begin} to {page_file.PAGE + begin + count}"

    damaged = []
    with ThreadPoolExecutor(usable_cores()) as pool:  # reading and zlib.crc32 both let go of the interpreter
        for count, words in pool.map(check, pieces):
            bar.add(count)
            if words is not None:
                damaged.append(words)
    return damaged
