"""Loaders' workers: the batches of threads, bit for bit, in memory that is lent; and processes that always end."""

from __future__ import annotations

import gc
import importlib.util
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import missing
from test_loader import GRAPH, SEEDS, X, Y, content, epochs, loader

import gglspeedup
from gglspeedup import NodeLoader, SubgraphLoader, partition, permute
from gglspeedup.errors import WorkerError
from gglspeedup.prefetch import ForkedError
from gglspeedup.threads import holding_launches, launching

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workers are forked, on Linux alone")


def workers() -> list:
    return [process for process in multiprocessing.active_children() if "gglspeedup-worker" in process.name]


@pytest.fixture(autouse=True)
def _no_process_left():
    yield
    gc.collect()
    assert not workers()


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"batch_size": 7, "prefetch": 1}, {"drop_last": True, "prefetch": 30}])
def test_batches_are_those_of_threads(count, options):
    made = loader(workers=count, **options)
    assert epochs(made, 3) == epochs(loader(**options), 3)
    assert len(workers()) == count


def test_batches_of_parts_are_those_of_threads():
    perm, ptr = partition(GRAPH, 9, "random")
    graph, weight = permute(GRAPH, perm), np.arange(GRAPH.num_edges, dtype=np.float32)

    def made(**options) -> SubgraphLoader:
        return SubgraphLoader(graph, X, Y, ptr=ptr, batch_size=2, edge_weight=weight, device="cpu", **options)

    def all_of(batches) -> list:
        kinds = ("x", "y", "n_id", "edge_weight", "offset", "count", "parts")
        return [[getattr(b, kind).tolist() for kind in kinds] + [b.adj.edge_index.tolist()] for b in batches]

    ours, theirs = made(workers=2), made()
    for _ in range(2):
        assert all_of(ours) == all_of(theirs)
    assert all_of(ours.evaluation()) == all_of(theirs.evaluation())


def test_as_many_rows_are_counted_as_threads_count():
    ours, theirs = loader(workers=2), loader()
    epochs(ours, 2), epochs(theirs, 2)
    assert ours.features.stats() == theirs.features.stats() and ours.labels.stats() == theirs.labels.stats()


def test_no_seeds_and_fewer_batches_than_workers():
    assert list(loader(workers=2, seeds=[])) == []
    assert epochs(loader(workers=4, seeds=SEEDS[:30])) == epochs(loader(seeds=SEEDS[:30]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float64", ">f4", "strided", "mapped", "vector", "none"])
def test_features_of_any_kind(dtype, tmp_path):
    x: object = X
    if dtype == "bfloat16":
        x = X.astype(pytest.importorskip("ml_dtypes").bfloat16)
    elif dtype == "strided":
        x = np.repeat(X, 2, axis=1)[:, ::2]
    elif dtype == "mapped":
        np.save(tmp_path / "x.npy", X)
        x = np.load(tmp_path / "x.npy", mmap_mode="r")
    elif dtype == "vector":
        x = X[:, 0].copy()
    elif dtype == "none":
        x = None
    else:
        x = X.astype(dtype)
    options = {"seeds": SEEDS, "sizes": [3], "batch_size": 20, "device": "cpu"}
    for ours, theirs in zip(NodeLoader(GRAPH, x, workers=1, **options), NodeLoader(GRAPH, x, **options), strict=True):
        assert (ours.x is None) == (x is None)
        if x is not None:
            assert ours.x.dtype == theirs.x.dtype
            np.testing.assert_array_equal(ours.x, theirs.x)


@pytest.mark.parametrize(
    "backend", ["torch", *(pytest.param(name, marks=pytest.mark.slow) for name in ("paddle", "jax"))]
)
def test_tensors_of_every_framework(backend):
    """Tensors share the memory: it is lent while they live, and forking among a framework's threads is no matter.

    TensorFlow is among the backends of `gammagl_script.py`.
    """
    if importlib.util.find_spec(backend) is None:
        missing(backend)
    assert run(FRAMEWORK.format(backend=backend)).stdout == "same\n"


FRAMEWORK = """
    import numpy as np
    from gglspeedup.arguments import host_array
    from test_loader import content, loader

    def host(batch):
        batch.x, batch.y, batch.n_id = (host_array(part, "x") for part in (batch.x, batch.y, batch.n_id))
        batch.adjs = [adj._replace(edge_index=host_array(adj.edge_index, "e"), e_id=host_array(adj.e_id, "e"))
                      for adj in batch.adjs]
        return content(batch)

    made = loader(workers=1, backend="{backend}")
    kept = [*made, *made]
    other = loader()
    expected = [content(batch) for batch in (*other, *other)]
    assert [host(batch) for batch in (*made, *made)] != expected  # epochs 2 and 3
    assert [host(batch) for batch in kept] == expected
    print("same")
"""


def test_batches_outlive_worker_and_loader():
    made = loader(workers=2)
    kept = [list(made), list(made)]
    del made
    gc.collect()
    assert not workers()
    assert [[content(batch) for batch in epoch] for epoch in kept] == epochs(loader())
    kept[0][0].x[:] = 7  # arrays are the reader's own
    assert [content(batch) for batch in kept[1]] == epochs(loader())[1]


def lent_buffers() -> int:
    maps = Path("/proc/self/maps").read_text(encoding="ascii").splitlines()
    return sum("memfd:gglspeedup" in line for line in maps)


def test_memory_is_used_again_and_given_back():
    """A loop that lets go of its batches stays within a few buffers, however many batches there are."""
    before, files = lent_buffers(), len(os.listdir("/proc/self/fd"))
    made = loader(workers=1, batch_size=4, prefetch=1)  # 26 batches
    for _batch in made:
        pass
    one = lent_buffers() - before
    assert 0 < one < 70  # of 26 batches with 7 arrays each
    for _ in range(4):
        for _batch in made:
            pass
    assert lent_buffers() - before <= one + 14
    labels = [batch.y for epoch in range(3) for batch in made]  # a part of each batch alone is kept
    assert lent_buffers() - before <= one + len(labels) + 14
    del made, labels, _batch
    gc.collect()
    assert lent_buffers() == before and len(os.listdir("/proc/self/fd")) <= files


def test_more_batches_may_be_kept_than_files_are_open():
    script = """
        import resource
        import numpy as np
        from gglspeedup import CSRGraph, NodeLoader

        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        graph = CSRGraph(np.arange(401), np.arange(400)[::-1].copy())
        made = NodeLoader(graph, np.eye(400), seeds=np.arange(400), sizes=[1], batch_size=2, device="cpu", workers=1)
        kept = list(made)
        assert len(kept) == 200 and all((b.x.argmax(1) == b.n_id).all() for b in kept)
        print("kept")
    """
    assert run(script).stdout == "kept\n"


def run(script: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(script)]
    environment = {**os.environ, "PYTHONPATH": os.fspath(Path(__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done


def test_workers_stay_for_the_next_epoch_and_end_with_the_loader():
    made = loader(workers=2)
    assert not workers()  # none before the first batch
    list(made)
    first = {process.pid for process in workers()}
    assert len(first) == 2
    list(made)
    assert {process.pid for process in workers()} == first
    del made
    gc.collect()
    assert not workers()


def test_a_loop_that_is_left_ends_its_workers():
    made = loader(workers=2)
    expected = epochs(loader())
    for _batch in made:
        break
    assert not workers()
    with pytest.raises(RuntimeError, match="of the user"):
        for _batch in made:
            raise RuntimeError("of the user")
    assert not workers()
    iterator = iter(made)
    next(iterator)
    del iterator
    assert not workers()
    made.set_epoch(0)
    assert epochs(made) == expected


def test_a_loop_that_counts_keeps_them():
    """One that takes as many batches as there are leaves nothing unmade, though it does not see the end."""
    made = loader(workers=1)
    iterator = iter(made)
    for _ in range(len(made)):
        next(iterator)
    (process,) = workers()
    del iterator
    assert workers() == [process]


def test_two_loops_at_once():
    expected = epochs(loader())
    made = loader(workers=1)
    got: tuple[list, list] = ([], [])
    for one, two in zip(made, made, strict=True):
        got[0].append(content(one))
        got[1].append(content(two))
    assert list(got) == expected
    assert len(workers()) == 1  # those of the other loop are not needed again


def test_loops_in_threads():
    made = loader(workers=2)
    results: list = []
    threads = [threading.Thread(target=lambda: results.append([content(b) for b in made])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(results, key=str) == sorted(epochs(loader(), 3), key=str)


def test_copies_and_twins_have_workers_of_their_own():
    made = loader(workers=1)
    list(made)
    twin = made.evaluation([5, 3, 9], batch_size=2)
    assert twin.workers == 1
    assert [content(b) for b in twin] == [content(b) for b in loader().evaluation([5, 3, 9], batch_size=2)]
    assert len(workers()) == 2
    other = pickle.loads(pickle.dumps(made))
    assert other.workers == 1 and epochs(other, 1) == epochs(made, 1)
    assert len(workers()) == 3


class OddError(Exception):
    """An exception that can be pickled, and not unpickled."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize("raised", [ValueError("broken batch"), OddError(1, 2), MemoryError("no room"), SystemExit(3)])
@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_an_error_comes_in_its_batchs_place(raised, count, monkeypatch):
    made = loader(workers=count)
    sampler = made.graph_sampler._made()
    sample = sampler.sample

    def failing(seeds, sizes, *, batch, **options):
        if batch == 2:
            raise raised
        return sample(seeds, sizes, batch=batch, **options)

    monkeypatch.setattr(sampler, "sample", failing)
    got = []
    with pytest.raises(WorkerError if isinstance(raised, OddError) else type(raised)) as caught:
        for batch in made:
            got.append(content(batch))
    assert got == epochs(loader(), 1)[0][:2]
    story = str(caught.value) + str(caught.value.__cause__)
    assert "in failing" in story and "gglspeedup-worker-" in story and str(raised) in story
    assert not workers()
    monkeypatch.undo()
    made.set_epoch(0)
    assert epochs(made, 1) == epochs(loader(), 1)  # by workers that have not failed


def test_a_dead_worker_is_reported():
    made = loader(workers=2, prefetch=1, batch_size=5)
    list(made)
    process = workers()[0]
    process.kill()
    process.join()
    assert [content(b) for b in made] == epochs(loader(batch_size=5), 2)[1]  # it was idle: another one takes over
    with pytest.raises(WorkerError, match=r"gglspeedup-worker-\d ended with status -9"):
        for _batch in made:
            for process in workers():
                os.kill(process.pid, signal.SIGKILL)
    assert not workers()
    made.set_epoch(0)
    assert epochs(made, 1) == epochs(loader(batch_size=5), 1)


def test_a_large_request_does_not_wait_for_answers():
    """Requests and answers fill their pipes at once, and still nobody waits for the other for ever."""
    graph = gglspeedup.CSRGraph(np.zeros(400_001, np.int64), np.empty(0, np.int64))
    options = {"seeds": np.arange(400_000), "sizes": [1], "batch_size": 20_000, "prefetch": 20, "device": "cpu"}
    seen = np.concatenate([batch.seeds for batch in NodeLoader(graph, workers=1, shuffle=False, **options)])
    np.testing.assert_array_equal(seen, np.arange(400_000))


SCRIPT = """
    import sys, time
    import numpy as np
    from gglspeedup import CSRGraph, NodeLoader
    import multiprocessing

    graph = CSRGraph(np.arange(401), np.arange(400)[::-1].copy())
    made = NodeLoader(graph, np.eye(400), seeds=np.arange(400), sizes=[1], batch_size=2, device="cpu", workers=2)
    for batch in made:
        print(*(process.pid for process in multiprocessing.active_children()), flush=True)
        {then}
"""


def gone(pids: list[int], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, "exit", "error"])
def test_workers_end_with_their_parent(how):
    then = {"exit": "sys.exit()", "error": "1 / 0"}.get(str(how), "time.sleep(60)")
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT.format(then=then))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2
    if isinstance(how, signal.Signals):
        if how == signal.SIGINT:  # as a terminal sends it: to all of them
            for pid in pids:
                os.kill(pid, how)
        process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert gone(pids), errors
    assert ("KeyboardInterrupt" in errors) == (how == signal.SIGINT)
    assert ("ZeroDivisionError" in errors) == (how == "error")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_starts_its_own():
    made = loader(workers=1)
    expected = epochs(loader())
    list(made)
    iterator = iter(made)
    next(iterator)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with pytest.raises(ForkedError, match="workers belong to another process"):
                next(iterator)
            made.set_epoch(0)
            code = 0 if epochs(made) == expected else 2
            made._team._finalizer()  # no interpreter ends here that would do so
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    rest = [content(batch) for batch in iterator]  # the parent's go on
    assert rest == expected[1][1:]


def test_locks_that_others_hold_are_free_in_a_worker():
    """Threads of other loaders may hold what a worker needs at the moment of its fork."""
    made = loader(workers=1)
    held, done = threading.Event(), threading.Event()
    pool = made.graph_sampler._made()._pool

    def hold() -> None:
        with pool._lock, made.graph_sampler._lock:
            held.set()
            done.wait(60)

    made.graph_sampler._made().sample(SEEDS[:2], (1,), seed=0, batch=0, replace=False, expand="layer")
    made._prepare()
    made._prepare = lambda: None  # which would wait here
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    try:
        got = [content(batch) for batch in made]
    finally:
        done.set()
        thread.join()
    assert got == epochs(loader(), 1)[0]


def test_a_fork_waits_for_kernels():
    """Numba's and TBB's own locks are free while no kernel runs."""
    order: list[str] = []
    running = threading.Event()

    def kernel() -> None:
        with launching():
            running.set()
            time.sleep(0.2)
            order.append("kernel")

    thread = threading.Thread(target=kernel)
    thread.start()
    running.wait(60)
    with holding_launches():
        order.append("fork")
        late = threading.Thread(target=kernel)
        late.start()
        time.sleep(0.1)
        assert order == ["kernel", "fork"]
    thread.join()
    late.join()
    assert order == ["kernel", "fork", "kernel"]


def test_ctrl_c_before_a_kernel_leaves_nothing_to_wait_for(monkeypatch):
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gglspeedup.threads._held", True)
    monkeypatch.setattr("gglspeedup.threads.time.sleep", interrupted)
    with pytest.raises(KeyboardInterrupt), launching():
        pass
    monkeypatch.undo()
    assert not gglspeedup.threads._launches


def test_threads_of_other_loaders_go_on_while_workers_start():
    other = loader(sizes=[5, 5, 5], batch_size=3, prefetch=4)
    expected = [content(batch) for batch in loader(sizes=[5, 5, 5], batch_size=3)]
    got = []
    for index, batch in enumerate(other):
        got.append(content(batch))
        if index % 8 == 0:
            assert epochs(loader(workers=1), 1) == epochs(loader(), 1)
    assert got == expected


def test_a_profile_has_what_workers_do():
    made = loader(workers=2)
    list(made)
    with gglspeedup.profile() as p:
        for _batch in made:
            pass
    found = p.summary()
    assert found.batches == len(made)
    assert found.stages["sampling"].times == found.stages["gathering"].times == len(made)
    assert found.features[0].rows == {"host": sum(len(content(b)[0]) for b in list_of_epoch(1))}
    spans = [span for span in p._spans if span.stage == "gathering"]
    assert sorted(span.batch for span in spans) == list(range(len(made)))
    names = {p._recorder.threads[span.thread] for span in spans}
    assert names == {"gglspeedup-worker-0 gglspeedup-making", "gglspeedup-worker-1 gglspeedup-making"}
    list(made)  # after the profile nothing is recorded
    with gglspeedup.profile() as q:
        for _batch in made:
            pass
    assert q.summary().stages["gathering"].times == len(made)


def list_of_epoch(epoch: int) -> list:
    other = loader()
    other.set_epoch(epoch)
    return list(other)


def test_waiting_for_a_request_is_no_sampling():
    made = loader(workers=1, prefetch=1)
    list(made)
    with gglspeedup.profile() as p:
        for _batch in made:
            time.sleep(0.05)
    found = p.summary()
    assert found.stages["training"].seconds > 0.05 * len(made) > 4 * found.stages["sampling"].seconds


@pytest.mark.parametrize("problem", ["Cannot allocate memory", "daemonic processes are not allowed to have children"])
def test_no_room_for_a_process_is_said(problem, monkeypatch):
    def full() -> int:
        raise OSError(12, problem)

    made = loader(workers=2)
    if problem.startswith("daemonic"):
        monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    else:
        monkeypatch.setattr(os, "fork", full)
    with pytest.raises(WorkerError, match=f"workers needs forks of this process, got {problem}; take fewer"):
        list(made)
    monkeypatch.undo()
    made.set_epoch(0)
    assert epochs(made, 1) == epochs(loader(), 1)


def test_kernels_have_their_share_of_the_threads(monkeypatch):
    made = loader(workers=2)
    sampler = made.graph_sampler._made()

    def telling(seeds, sizes, **options):
        raise ValueError(f"{gglspeedup.threads.get_num_threads()} threads")

    monkeypatch.setattr("gglspeedup.threads.usable_cores", lambda: 6)
    monkeypatch.setattr(made, "_prepare", lambda: None)
    monkeypatch.setattr(sampler, "sample", telling)
    with pytest.raises(ValueError, match="3 threads"):
        list(made)


def test_systems_without_fork_use_threads(monkeypatch, caplog):
    monkeypatch.setattr("gglspeedup.workers._SUPPORTED", False)
    made = loader(workers=2)
    assert "batches are made in threads" in caplog.text
    assert epochs(made) == epochs(loader()) and not workers()


BAD = [
    ({"workers": -1}, ValueError, "workers needs at least 0, got -1"),
    ({"workers": 1.5}, TypeError, "workers needs an integer"),
    ({"workers": 1, "prefetch": 0}, ValueError, "prefetch needs batches that are made ahead, with workers, got 0"),
    ({"workers": 1, "memory_limit": "64G"}, ValueError, "workers needs 0 with a memory limit"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        loader(**options)


def test_none_on_a_gpu():
    made = loader()
    made.workers = 1
    with pytest.raises(ValueError, match="workers needs 0 on cuda:0, whose streams overlap, got 1"):
        made._made_on(gglspeedup.device.Device(0))
