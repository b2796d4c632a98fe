"""`DistSampler`: neighbour sampling on a graph whose rows lie on several ranks, the bits of a single machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import gglspeedup
from gglspeedup.adjs import Adj, SampledBatch
from gglspeedup.arguments import check_count, check_flag, check_sizes, host_ids
from gglspeedup.device import Device, parse_device
from gglspeedup.distributed.collective import Collective, even_batches
from gglspeedup.distributed.communicator import Communicator, Ids, RankError
from gglspeedup.distributed.hops import Batches
from gglspeedup.distributed.owner import Owner
from gglspeedup.distributed.part import GraphPart
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, explain
from gglspeedup.kernels.bounds import MAX_BATCH, MAX_FANOUT, MAX_HOPS

_EXPANSIONS = ("layer", "frontier")


class DistSampler:
    """Samples the neighbourhoods of seeds on a graph in parts, of which each rank holds one.

    Every rank calls :meth:`sample` together with the others, with seeds of its own. What it returns is, bit for bit,
    what GPUSampler returns on the whole graph for the same (seeds, sizes, replace, expand, seed, batch), whatever the
    number of ranks and whichever owns which node.

    Parameters
    ----------
    part : GraphPart
        Part i on rank i.
    communicator : Communicator
        Of all ranks; to be used by one thread at a time.
    sizes, seed, replace, expand
        As GPUSampler's; the same on all ranks.

    Raises
    ------
    RankError
        Ranks have different graphs, partitions, seeds or versions, or parts that are not their own; all ranks say so.
    CommunicatorError
        A rank has died, or did not come.
    ArgumentTypeError, ArgumentValueError
        An argument cannot be used; the message names it, and the other ranks raise RankError.

    Notes
    -----
    A rank that has fewer batches than others goes on calling with no seeds; :meth:`batches` does that. Each hop takes
    two exchanges of counts, one of the nodes whose neighbours are wanted, and one of the neighbours, between each two
    ranks; :meth:`sample_many` takes as many for several batches. Rows that a rank owns itself do not travel.

    Examples
    --------
    >>> from gglspeedup import CSRGraph
    >>> from gglspeedup.distributed import DistSampler, GraphPart, LocalCommunicator, PartBook
    >>> graph = CSRGraph([0, 2, 3, 4], [1, 2, 0, 0])
    >>> part = GraphPart.of(graph, PartBook.contiguous([0, 3]), 0)
    >>> sampler = DistSampler(part, LocalCommunicator(), [2, 2])
    >>> n_id, adjs = sampler.sample([1])
    >>> n_id.tolist(), [adj.size for adj in adjs]
    ([1, 0, 2], [(3, 2), (2, 1)])
    """

    device: Device = parse_device("cpu")

    def __init__(
        self, part: GraphPart, communicator: Communicator, sizes: Any = None, *, seed: int = 0, replace: bool = False,
        expand: str = "layer",
    ) -> None:  # fmt: skip
        self._collective = Collective(communicator)
        with self._collective.together():
            self._collective.counts("DistSampler(...)", lambda: self._check(part, sizes, seed, replace, expand))
            self._agree()
        self._batch = 0

    def _check(self, part: GraphPart, sizes: Any, seed: int, replace: bool, expand: str) -> Ids:
        if not isinstance(part, GraphPart):
            raise ArgumentTypeError(explain("part", "a GraphPart", type(part).__name__, "use GraphPart.load or .of"))
        if expand not in _EXPANSIONS:
            raise ArgumentValueError(explain("expand", f"one of {_EXPANSIONS}", repr(expand), 'leave it "layer"'))
        self.part, self.book = part, part.book
        self.seed = check_count(seed, "seed", 0, 1 << 64)
        self.replace = check_flag(replace, "replace")
        self.expand = expand
        self._sizes = None if sizes is None else check_sizes(sizes, MAX_FANOUT, MAX_HOPS)
        return np.empty((self._collective.size, 0), np.int64)

    def _agree(self) -> None:
        part, book = self.part, self.book
        facts = {
            "version": gglspeedup.__version__,
            "nodes": book.num_nodes,
            "parts": book.num_parts,
            "partition": book.checksum(),
            "graph": part.fingerprint,
            "id dtype": str(part.indices.dtype),
            "edge_ids": part.edge_ids is not None,
            "seed": self.seed,
            "sizes": self._sizes,
            "replace": self.replace,
            "expand": self.expand,
        }
        largest = _largest_edge_id(part)
        said = self._collective.same("DistSampler", facts, {"part": part.index, "largest": largest})
        check_parts([own["part"] for own in said], book.num_parts, self._collective.size)
        fits = max(own["largest"] for own in said) <= np.iinfo(np.int32).max
        self._owner = Owner(part, np.dtype(np.int32 if fits else np.int64))
        self._batches = Batches(self._owner, self._collective)

    @property
    def communicator(self) -> Communicator:
        """That of all ranks."""
        return self._collective.communicator

    @property
    def sizes(self) -> tuple[int, ...] | None:
        """Fanouts, nearest the seeds first; -1 for all neighbours; None before :meth:`set_size`."""
        return self._sizes

    def set_size(self, sizes: Any) -> None:
        """Set the fanouts, as :meth:`GPUSampler.set_size`; not collective, but all ranks have to set the same.

        Raises
        ------
        ArgumentTypeError, ArgumentValueError
            It is no such sequence.
        """
        self._sizes = check_sizes(sizes, MAX_FANOUT, MAX_HOPS)

    def sample(self, seeds: Any, batch: int | None = None, *, sizes: Any = None) -> SampledBatch:
        """Return the sampled neighbourhood of some seeds; collective.

        Parameters
        ----------
        seeds : int array-like or tensor [B]
            Unique node ids, any of the whole graph; none, if this rank has no batch left and others have.
        batch : int, optional
            0 to 2**48 - 1; each rank has its own. By default those of successive calls differ, and those of ranks.
        sizes : sequence of int, optional
            Fanouts of this call, the same on all ranks. Default: those set.

        Returns
        -------
        SampledBatch
            As GPUSampler returns it on the CPU.

        Raises
        ------
        ArgumentIndexError, ArgumentTypeError, ArgumentValueError
            The seeds of this rank are out of range, not integers or not unique, or no sizes are set.
        RankError
            Those of another rank are; the message says which, and why. Nothing was sampled, and sampling can go on.
        CommunicatorError
            A rank has died, did not come, or makes another call.
        """
        return self.sample_many([(seeds, batch)], sizes=sizes)[0]

    def sample_many(self, batches: Sequence[tuple[Any, int | None]], *, sizes: Any = None) -> list[SampledBatch]:
        """Return several batches, each as :meth:`sample` does, in as many messages as one takes; collective.

        Parameters
        ----------
        batches : sequence of (seeds, batch)
            As many or as few as this rank has.
        sizes : sequence of int, optional
            As that of :meth:`sample`, which also says what is raised.
        """
        before = self._batch
        with self._collective.together():
            try:
                given: list[tuple[Ids, int]] = []
                fanouts: list[tuple[int, ...]] = []

                def prepare() -> Ids:
                    fanouts.append(self._fanouts(sizes))
                    for seeds, number in batches:
                        given.append((host_ids(seeds, "seeds"), self._number(number)))
                    return self._batches.begin(given, fanouts[0])

                made = self._batches.sample(prepare, self.seed, self.replace, self.expand == "frontier")
            except BaseException:
                self._batch = before
                raise
        return [
            SampledBatch(n_id, [Adj(*hop) for hop in hops], len(seeds), number)
            for (n_id, hops), (seeds, number) in zip(made, given, strict=True)
        ]

    def _fanouts(self, sizes: Any) -> tuple[int, ...]:
        fanouts = self._sizes if sizes is None else check_sizes(sizes, MAX_FANOUT, MAX_HOPS)
        if fanouts is None:
            remedy = "call set_size([25, 10]) or pass sizes"
            raise ArgumentValueError(explain("sizes", "to be set before sampling", "none", remedy))
        return fanouts

    def _number(self, batch: int | None) -> int:
        if batch is not None:
            return check_count(batch, "batch", 0, MAX_BATCH)
        number = (self._batch * self._collective.size + self._collective.rank) % MAX_BATCH
        self._batch += 1
        return number

    def batches(self, seeds: Any, batch_size: int) -> Iterator[SampledBatch]:
        """Give the batches of this rank's seeds, in their order, and empty ones as long as other ranks have some.

        Parameters
        ----------
        seeds : int array-like or tensor [n]
            Those of this rank; how many may differ from rank to rank.
        batch_size : int
            Seeds a batch.

        Raises
        ------
        As :meth:`sample`.
        """
        for part in even_batches(self._collective.communicator, host_ids(seeds, "seeds"), batch_size):
            yield self.sample(part)

    def traffic(self) -> dict[str, dict[str, int]]:
        """Return what this rank has sent to others and received: bytes of counts, ids and rows, and messages.

        Rows are the sampled ones: their lengths, neighbours and edge ids.
        """
        return self._collective.traffic_by_kind()

    def __repr__(self) -> str:
        sizes = None if self._sizes is None else list(self._sizes)
        where = f"rank {self._collective.rank} of {self._collective.size}"
        return f"DistSampler({where}, {self.book!r}, sizes={sizes}, seed={self.seed})"


def check_parts(parts: Sequence[int], num_parts: int, size: int) -> None:
    """Raise RankError, on all ranks alike, unless each rank has its own part and there is one for each."""
    if num_parts != size:
        raise RankError(f"{size} ranks need {size} parts, got {num_parts}; start as many ranks as there are parts")
    wrong = [f"rank {rank} has part {part}" for rank, part in enumerate(parts) if part != rank]
    if wrong:
        raise RankError(f"each rank needs the part of its number, but {'; '.join(wrong)}")


def _largest_edge_id(part: GraphPart) -> int:
    if part.edge_ids is not None:
        ids = part.edge_ids
        return int(max(ids.max(), -int(ids.min()))) if len(ids) else 0
    return int((part.start + np.diff(part.indptr)).max()) if len(part.start) else 0
