"""PartBook: which part of a graph owns a node, and which of the part's rows the node is."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup.arguments import check_count, check_ids, check_range, host_array, host_ids, out_of_range
from gglspeedup.errors import ArgumentValueError, explain
from gglspeedup.kernels.bounds import MAX_NODES, MAX_PARTS, OWNERS_A_COUNT
from gglspeedup.memory import kernel_view
from gglspeedup.threads import announce_compilation, launching, numba

Array = npt.NDArray[Any]
Ids = npt.NDArray[np.int64]

_CHUNK = 1 << 20  # owners looked at in one go
_IDS_A_THREAD = 1 << 14  # waking a thread costs as much as these


class PartBook:
    """Which part owns a node, and which of the part's rows it is.

    Ids are those of the whole graph and are never renumbered; a part keeps its rows in rising order of node id. Made
    by :meth:`contiguous` or :meth:`from_owners`.

    Attributes
    ----------
    num_nodes : int
        Of the whole graph.
    num_parts : int
        1 to 65536; parts may be empty.
    ptr : int64 array [num_parts + 1] or None
        Part i owns ``ptr[i]:ptr[i + 1]``, if the parts are ranges of nodes.
    owners : uint8 or uint16 array [num_nodes] or None
        The part of each node, if they are not.

    Examples
    --------
    >>> book = PartBook.from_owners([1, 0, 1, 1], 2)
    >>> book.owner_of([3, 1]).tolist(), book.rows_of(1, [0, 3]).tolist(), book.nodes_of(1).tolist()
    ([1, 0], [0, 2], [0, 2, 3])
    """

    num_nodes: int
    num_parts: int
    ptr: Ids | None
    owners: Array | None
    _counts: Ids
    _before: tuple[int, Ids] | None  # the part that rows were last asked of, and its counts

    def __init__(self, ptr: Ids | None, owners: Array | None, counts: Ids) -> None:
        self.ptr, self.owners, self._counts, self._before = ptr, owners, counts, None
        self.num_nodes, self.num_parts = int(counts.sum()), len(counts)

    @classmethod
    def contiguous(cls, ptr: Any) -> PartBook:
        """Return the book of parts that are ranges of nodes; it holds the bounds alone.

        Parameters
        ----------
        ptr : int array [num_parts + 1]
            Part i owns ``ptr[i]:ptr[i + 1]``; rises from 0 to the number of nodes, empty parts allowed.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            They are no such bounds.

        Examples
        --------
        >>> PartBook.contiguous([0, 2, 2, 5]).owner_of([1, 2, 4]).tolist()
        [0, 2, 2]
        """
        bounds = host_ids(ptr, "ptr").copy()
        remedy = "pass the first node of each part, and the number of nodes"
        if not 2 <= len(bounds) <= MAX_PARTS + 1:
            needs = f"the bounds of 1 to {MAX_PARTS} parts"
            raise ArgumentValueError(explain("ptr", needs, f"{len(bounds)} numbers", remedy))
        if bounds[0] != 0 or bounds[-1] > MAX_NODES or bool((bounds[1:] < bounds[:-1]).any()):
            needs, got = f"bounds that rise from 0 to at most {MAX_NODES}", "others"
            raise ArgumentValueError(explain("ptr", needs, got, remedy))
        return cls(bounds, None, np.diff(bounds))

    @classmethod
    def from_owners(cls, owners: Any, num_parts: int) -> PartBook:
        """Return the book of parts of any shape.

        Parameters
        ----------
        owners : int array [num_nodes]
            The part of each node. Kept in 1 byte a node for up to 256 parts, else 2; a view where it is that already.
        num_parts : int
            1 to 65536.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError, ArgumentIndexError
            Wrong dtype or shape, or an owner that is none of the parts.
        """
        count = check_count(num_parts, "num_parts", 1, MAX_PARTS + 1)
        given = host_array(owners, "owners")
        if given.size == 0 and given.ndim == 1:
            given = np.empty(0, np.uint8)
        check_ids(given, "owners")
        kept = given if given.dtype == owner_dtype(count) else np.empty(len(given), owner_dtype(count))
        counts = np.zeros(count, np.int64)
        for begin, part in checked_owners(given, count):
            counts += np.bincount(part, minlength=count)
            if kept is not given:
                kept[begin : begin + len(part)] = part
        return cls(None, kernel_view(np.ascontiguousarray(kept)), counts)

    def owner_of(self, ids: Any) -> npt.NDArray[np.uint16]:
        """Return the part that owns each node, uint16 [len(ids)].

        Raises
        ------
        ArgumentTypeError, ArgumentValueError, ArgumentIndexError
            `ids` is no list of node ids of this graph.
        """
        nodes = self._checked(ids)
        out = np.empty(len(nodes), np.uint16)
        numba()
        from gglspeedup.kernels.parts_cpu import find_ranges, take_owners

        announce_compilation(take_owners)
        with _launching(nodes):
            if self.ptr is not None:
                find_ranges(self.ptr, nodes, out)
            else:
                take_owners(self.owners, nodes, out)
        return out

    def rows_of(self, part: int, ids: Any) -> Ids:
        """Return which of the rows of a part each node is, int64 [len(ids)].

        For parts of any shape this keeps 1 byte for every 8 nodes of the graph, of the part asked for last.

        Parameters
        ----------
        part : int
            The part.
        ids : int array-like or tensor
            Nodes that `part` owns, which is not checked; of others the rows mean nothing.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError, ArgumentIndexError
            There is no such part, or `ids` is no list of node ids of this graph.
        """
        index = self._part(part)
        nodes = self._checked(ids)
        if self.ptr is not None:
            return nodes - self.ptr[index]
        before = self._counts_before(index)
        out = np.empty(len(nodes), np.int64)
        from gglspeedup.kernels.parts_cpu import find_rows

        with _launching(nodes):
            find_rows(self.owners, index, before, nodes, out)
        return out

    def nodes_of(self, part: int) -> Ids:
        """Return the nodes that a part owns, int64, rising: its rows in their order.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            There is no such part.
        """
        index = self._part(part)
        if self.ptr is not None:
            return np.arange(self.ptr[index], self.ptr[index + 1])
        nodes = np.empty(self._counts[index], np.int64)
        numba()
        from gglspeedup.kernels.parts_cpu import list_nodes

        list_nodes(self.owners, index, nodes)
        return nodes

    def count_of(self, part: int) -> int:
        """Return how many nodes a part owns.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            There is no such part.
        """
        return int(self._counts[self._part(part)])

    def checksum(self) -> int:
        """Return a CRC-32 of who owns what: of books of the same form, that of another partition is another."""
        whole = self.ptr if self.ptr is not None else self.owners
        assert whole is not None
        return zlib.crc32(np.array([self.num_parts], "<i8").tobytes() + whole.dtype.str.encode(), crc_of(whole))

    def __repr__(self) -> str:
        form = "ranges" if self.ptr is not None else "any shape"
        return f"PartBook(num_nodes={self.num_nodes}, num_parts={self.num_parts}, parts of {form})"

    def _part(self, part: int) -> int:
        return check_count(part, "part", 0, self.num_parts)

    def _checked(self, ids: Any) -> Ids:
        nodes = host_ids(ids, "ids")
        check_range(nodes, self.num_nodes, "ids")
        return nodes

    def _counts_before(self, part: int) -> Ids:
        known = self._before  # read once: another thread may ask for another part
        if known is None or known[0] != part:
            numba()
            from gglspeedup.kernels.parts_cpu import count_before, find_rows

            announce_compilation(find_rows)
            counts = np.empty(-(-self.num_nodes // OWNERS_A_COUNT), np.int64)
            count_before(self.owners, part, counts)
            known = self._before = (part, counts)
        return known[1]


def owner_dtype(num_parts: int) -> np.dtype[Any]:
    """Return the dtype that owners are kept in."""
    return np.dtype(np.uint8 if num_parts <= 256 else np.uint16)


def checked_owners(owners: Array, num_parts: int, first: int = 0) -> Iterator[tuple[int, Array]]:
    """Give owners in pieces, each with where it begins; raise ArgumentIndexError for one that is none of the parts.

    The first of them is that of node `first`.
    """
    for begin in range(0, len(owners), _CHUNK):
        part = np.asarray(owners[begin : begin + _CHUNK])
        if int(part.min()) < 0 or int(part.max()) >= num_parts:
            at = int(np.argmax((part < 0) | (part >= num_parts)))
            raise out_of_range("owners", first + begin + at, int(part[at]), num_parts)
        yield begin, part


def crc_of(array: Array, crc: int = 0) -> int:
    """Return the CRC-32 of the little-endian bytes of a C-contiguous array, continued from another."""
    return zlib.crc32(array.astype(array.dtype.newbyteorder("<"), copy=False).data, crc) if array.size else crc


def _launching(ids: Ids) -> Any:
    return launching(1 + len(ids) // _IDS_A_THREAD)
