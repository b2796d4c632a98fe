"""What our files share: a header of one page that is checked before it is believed, sections on page boundaries, and
files that appear whole or not at all.

A header is little-endian: 8 bytes of magic, an int64 length and so many bytes of JSON, their uint32 CRC-32. The rest
of the page is zeros; its last byte is the owner's to use.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
import uuid
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, Any

from gglspeedup.errors import ArgumentValueError, explain

PAGE = 4096
LIMIT = 1 << 48  # of any size in a header: sums of them stay far inside int64
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def pages(size: int) -> int:
    """Return a size rounded up to whole pages.

    Examples
    --------
    >>> pages(1), pages(4096), pages(0)
    (4096, 4096, 0)
    """
    return -(-size // PAGE) * PAGE


def layout(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Return where sections behind the header begin, and the size of the file, in bytes.

    Examples
    --------
    >>> layout([8, 5000])
    ([4096, 8192], 16384)
    """
    begins, at = [], PAGE
    for size in sizes:
        begins.append(at)
        at += pages(size)
    return begins, at


def pack(magic: bytes, fields: Any) -> bytes | None:
    """Return the page of a header, None if it has no room for the fields."""
    text = json.dumps(fields).encode()
    head = magic + struct.pack("<q", len(text)) + text
    head += struct.pack("<I", zlib.crc32(head))
    return head + bytes(PAGE - len(head)) if len(head) < PAGE else None


def unpack(page: bytes, magic: bytes, path: str, error: type[ArgumentValueError], kind: str, remedy: str) -> Any:
    """Return the fields of a header, of which nothing is known but that they are JSON; raise `error` if it is none."""
    if len(page) < PAGE or page[:8] != magic:
        raise error(explain("path", kind, f"{path!r}, which does not start as one", remedy))
    (length,) = struct.unpack("<q", page[8:16])
    if not 0 <= length <= PAGE - 21 or struct.unpack("<I", page[16 + length : 20 + length])[0] != zlib.crc32(
        page[: 16 + length]
    ):
        raise error(explain("path", "a whole header", f"{path!r}, whose header is damaged", remedy))
    try:
        return json.loads(page[16 : 16 + length])
    except (ValueError, RecursionError) as found:
        raise error(explain("path", "a sound header", f"{path!r}, whose header is not", remedy)) from found


def reserve(file: IO[bytes], size: int) -> None:
    """Give a file its full size: a disk that is too small is found here, not while it is written."""
    if hasattr(os, "posix_fallocate") and size > 0:
        os.posix_fallocate(file.fileno(), 0, size)
    file.truncate(size)


@contextlib.contextmanager
def beside(path: str) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` that takes its place if all goes well, and goes away if not."""
    temporary = f"{path}.{uuid.uuid4().hex}.part"
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def telling_room(argument: str, error: type[ArgumentValueError], remedy: str) -> Iterator[None]:
    """Turn the system's word that a disk is full into `error`."""
    try:
        yield
    except OSError as found:
        if found.errno not in NO_ROOM:
            raise
        raise error(explain(argument, "room on its disk", f"{found}", remedy)) from found
