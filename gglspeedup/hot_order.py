"""Which rows to keep near: node ids, hottest first, by a policy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from gglspeedup.arguments import check_range, check_unique, host_ids
from gglspeedup.device import Device
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, explain
from gglspeedup.graph import CSRGraph
from gglspeedup.sharded_graph import ShardedGraph
from gglspeedup.threads import numba

Order = npt.NDArray[np.int64]


def by_degree(graph: CSRGraph | ShardedGraph) -> Order:
    """Return the nodes by falling degree, of equal ones the lower id first."""
    return np.argsort(-graph.degree(), kind="stable")


def by_presampling(graph: CSRGraph | ShardedGraph, sampler: Any, seeds: Any, batch_size: int) -> Order:
    """Return the nodes by how many batches of one pre-sampled epoch they are in, of equal ones the lower id first.

    The policy is that of Yang et al., "GNNLab: a factored system for sample-based GNN training over GPUs"
    (EuroSys 2022), section 5: an epoch is sampled before training, and the most visited nodes are cached.

    Parameters
    ----------
    graph : CSRGraph or ShardedGraph
        What the features belong to.
    sampler : GPUSampler
        With its sizes set; its batch counter is not advanced.
    seeds : int array-like or tensor
        The seeds of an epoch; they are visited in their order.
    batch_size : int
        Seeds a batch.
    """
    ids = host_ids(seeds, "seeds")
    check_range(ids, graph.num_nodes, "seeds")
    if isinstance(batch_size, bool) or not hasattr(batch_size, "__index__") or batch_size < 1:
        raise ArgumentValueError(explain("batch_size", "an integer of at least 1", repr(batch_size), "pass 1024"))
    batches = (
        sampler.sample(ids[begin : begin + batch_size], batch=number).n_id
        for number, begin in enumerate(range(0, len(ids), batch_size))
    )
    visits = _visits_on_gpu if sampler.device.is_cuda else _visits_on_cpu
    return np.argsort(-visits(batches, graph.num_nodes, sampler.device), kind="stable")


def _visits_on_cpu(batches: Iterable[Any], num_nodes: int, _device: Device) -> npt.NDArray[np.int32]:
    numba()
    from gglspeedup.kernels.visits_cpu import count_visits

    visits = np.zeros(num_nodes, np.int32)
    for n_id in batches:
        count_visits(n_id, visits)
    return visits


def _visits_on_gpu(batches: Iterable[Any], num_nodes: int, device: Device) -> npt.NDArray[np.int32]:
    from gglspeedup.kernels.visits_gpu import count_visits

    xp: Any = device.xp
    with xp.cuda.Device(device.index):
        visits = xp.zeros(num_nodes, np.int32)
        for n_id in batches:
            count_visits(n_id, visits, xp.cuda.get_current_stream().ptr)
        return xp.asnumpy(visits)


def hot_order(graph: CSRGraph | ShardedGraph, policy: Any, sampler: Any, seeds: Any, batch_size: int) -> Order:
    """Return the node ids, hottest first, that a policy gives.

    Parameters
    ----------
    policy : str or int array-like
        ``"degree"``, ``"presample"`` (with `sampler` and `seeds`), or the order itself: unique node ids; nodes it
        leaves out are the coldest.

    Raises
    ------
    ArgumentTypeError, ArgumentValueError, ArgumentIndexError
        It is none of these.
    """
    if isinstance(policy, str):
        if policy == "degree":
            return by_degree(graph)
        if policy == "presample":
            if sampler is None or seeds is None:
                raise ArgumentTypeError(
                    explain("policy", "sampler= and seeds= beside it to presample", "none", 'or take policy="degree"')
                )
            return by_presampling(graph, sampler, seeds, batch_size)
        raise ArgumentValueError(
            explain("policy", '"degree", "presample" or an order of node ids', repr(policy), 'leave it "degree"')
        )
    order = host_ids(policy, "policy")
    check_range(order, graph.num_nodes, "policy")
    listed = check_unique(order, graph.num_nodes, "policy")
    return np.concatenate([order, np.flatnonzero(~listed)])
