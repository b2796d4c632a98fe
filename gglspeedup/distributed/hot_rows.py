"""Which rows a rank should keep near, hottest first: remote ones that it copies, own ones that go to its GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from gglspeedup.arguments import check_count, check_range, check_unique, host_ids
from gglspeedup.distributed.book import PartBook
from gglspeedup.distributed.collective import Collective, even_batches
from gglspeedup.distributed.communicator import Ids
from gglspeedup.distributed.part import GraphPart
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, explain


def by_list(collective: Collective, book: PartBook, policy: Any) -> Ids:
    """Return the remote ones of a list of nodes; collective.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError, ArgumentIndexError
        They are no unique node ids; on other ranks RankError.
    """
    found: list[Ids] = []

    def check() -> Ids:
        order = host_ids(policy, "policy")
        check_range(order, book.num_nodes, "policy")
        check_unique(order, book.num_nodes, "policy")
        found.append(order[book.owner_of(order) != collective.rank])
        return _nothing(collective)

    collective.counts("DistFeature(policy=[...])", check)
    return found[0]


def by_degree(collective: Collective, part: GraphPart | PartBook, room: int) -> Ids:
    """Return the remote nodes by falling degree, of equal ones the lower id first; collective.

    Parameters
    ----------
    part : GraphPart
        That of this rank.
    room : int
        How many any rank can use: each tells the others of so many of its own.

    Raises
    ------
    ArgumentTypeError
        It is a book, which knows no degrees; on other ranks RankError.
    """
    found: list[tuple[Ids, Ids]] = []

    def check() -> Ids:
        if not isinstance(part, GraphPart):
            remedy = "pass the part, or policy=\"presample\" or a list of nodes"
            raise ArgumentTypeError(explain("part_or_book", "a GraphPart for degrees", "a PartBook", remedy))
        degree = np.diff(part.indptr)
        top = np.argsort(-degree, kind="stable")[:room]
        found.append((part.book.nodes_of(part.index)[top], degree[top]))
        counts = np.full((collective.size, 1), len(top), np.int64)
        counts[collective.rank] = 0
        return counts

    counts = collective.counts('DistFeature(policy="degree")', check)[:, 0]
    nodes, degree = found[0]
    told = np.tile(np.stack([nodes, degree], 1), (collective.size - 1, 1))
    sent = np.full(collective.size, len(nodes), np.int64)
    sent[collective.rank] = 0
    others = collective.exchange("rows", told, sent, counts)
    return others[np.lexsort((others[:, 0], -others[:, 1])), 0].copy()


def by_presampling(
    collective: Collective, book: PartBook, policy: str, sampler: Any, seeds: Any, batch_size: int
) -> Ids:
    """Return the remote nodes by how many batches of an epoch of this rank they are in; collective.

    The policy is that of Yang et al., "GNNLab: a factored system for sample-based GNN training over GPUs" (EuroSys
    2022), section 5. Nodes in no batch are left out; of equal ones the lower id comes first.

    Parameters
    ----------
    policy : str
        To be ``"presample"``.
    sampler : DistSampler
        With its sizes set; its batch counter is not advanced.
    seeds : int array-like or tensor
        Those of this rank; they are visited in their order.
    batch_size : int
        Seeds a batch.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError, ArgumentIndexError
        It is another policy, sampler or seeds are missing, or no node ids; on other ranks RankError.
    """
    from gglspeedup.kernels.visits_cpu import count_visits

    found: list[tuple[Ids, int]] = []

    def check() -> Ids:
        if policy != "presample":
            needs, remedy = '"presample", "degree" or a list of node ids', 'leave it "presample"'
            raise ArgumentValueError(explain("policy", needs, repr(policy), remedy))
        if sampler is None or seeds is None:
            needs, remedy = "sampler= and seeds= beside it to presample", 'or take policy="degree"'
            raise ArgumentTypeError(explain("policy", needs, "none", remedy))
        ids = host_ids(seeds, "seeds")
        check_range(ids, book.num_nodes, "seeds")
        found.append((ids, check_count(batch_size, "batch_size", 1)))
        return _nothing(collective)

    collective.counts('DistFeature(policy="presample")', check)
    visits = np.zeros(book.num_nodes, np.int32)
    for number, part in enumerate(even_batches(collective.communicator, *found[0])):
        count_visits(sampler.sample(part, batch=number * collective.size + collective.rank).n_id, visits)
    visited = np.flatnonzero(visits)
    visited = visited[book.owner_of(visited) != collective.rank]
    return visited[np.argsort(-visits[visited], kind="stable")]


def own_order(part_or_book: GraphPart | PartBook, rank: int, policy: Any) -> Ids:
    """Return the rows of this rank's part, hottest first: as a list of nodes says, then by degree, where it is known.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError, ArgumentIndexError
        The policy is neither text nor unique node ids.
    """
    book = part_or_book.book if isinstance(part_or_book, GraphPart) else part_or_book
    count = book.count_of(rank) if rank < book.num_parts else 0
    order = np.arange(count)
    if isinstance(part_or_book, GraphPart) and len(part_or_book.indptr) == count + 1:
        order = np.argsort(-np.diff(part_or_book.indptr), kind="stable")
    if isinstance(policy, str):
        return order
    nodes = host_ids(policy, "policy")
    check_range(nodes, book.num_nodes, "policy")
    check_unique(nodes, book.num_nodes, "policy")
    listed = book.rows_of(rank, nodes[book.owner_of(nodes) == rank]) if count else nodes[:0]
    left = np.ones(count, np.bool_)
    left[listed] = False
    return np.concatenate([listed, order[left[order]]])


def _nothing(collective: Collective) -> Ids:
    return np.empty((collective.size, 0), np.int64)
