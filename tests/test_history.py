"""HistoryStore: equal to the obvious tables under any interleaving, and files that survive what can happen to them."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading

import naive
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gglspeedup import GGLSpeedupError, HistoryStore
from gglspeedup.errors import HistoryFileError
from gglspeedup.history import history_file

NODES = 13
DIMS = [3, 1]
STORAGES = ["device", "pinned", "mmap"]
DTYPES = ["float32", "float16", "bfloat16"]


def made(tmp_path, storage="device", **options) -> HistoryStore:
    path = {"path": tmp_path / "histories"} if storage == "mmap" else {}
    return HistoryStore(**{"num_nodes": NODES, "dims": DIMS, "device": "cpu", "storage": storage, **path, **options})


def contents(store: HistoryStore) -> list:
    return [(table.pull(np.arange(NODES)).tolist(), table.age().tolist()) for table in store]


class Interleavings(RuleBasedStateMachine):
    """Any order of pushes, pulls that wait, prefetches, ages, saves and restores."""

    device: str | int = "cpu"

    @initialize(
        storage=st.sampled_from(STORAGES), dtype=st.sampled_from(DTYPES), pool_size=st.sampled_from([None, 1, 3]),
        buffer_size=st.sampled_from([None, 0, 2, 100]), slow=st.booleans(),
    )  # fmt: skip
    def make(self, storage, dtype, pool_size, buffer_size, slow):
        import tempfile

        self.folder = tempfile.TemporaryDirectory()
        options = {"path": f"{self.folder.name}/mapped"} if storage == "mmap" else {}
        self.store = HistoryStore(
            NODES, DIMS, self.device, storage=storage, dtype=dtype, pool_size=pool_size, buffer_size=buffer_size,
            **options,
        )
        self.slow = slow
        self.tables = [naive.History(NODES, dim, history_file.numpy_dtype(dtype)) for dim in DIMS]
        self.rng = np.random.default_rng(0)
        self.pending: list = []
        self.saved: list | None = None
        self.ahead: dict = {}

    def values(self, count: int, dim: int):
        return (self.rng.random((count, dim)) * 100).astype(self.rng.choice(["float32", "float64", "float16"]))

    def hold_up(self) -> None:
        """Keep the thread busy for a moment, so that what follows has to queue."""
        if self.slow:
            self.store._lane.submit(lambda: threading.Event().wait(0.002))

    @rule(table=st.sampled_from([0, 1]), n_id=st.lists(st.integers(0, NODES - 1), max_size=20))
    def push(self, table, n_id):
        self.hold_up()
        values = self.values(len(n_id), DIMS[table])
        self.store[table].push(values, n_id)
        self.tables[table].push(values, n_id)
        values[...] = -1  # what was pushed is what the values were

    @rule(
        table=st.sampled_from([0, 1]),
        ranges=st.lists(st.tuples(st.integers(0, NODES), st.integers(0, NODES)), max_size=4),
    )
    def push_ranges(self, table, ranges):
        offset = [min(a, b) for a, b in ranges]
        count = [max(a, b) - min(a, b) for a, b in ranges]
        values = self.values(sum(count), DIMS[table])
        self.store[table].push(values, offset=offset, count=np.array(count, np.int32))
        self.tables[table].push(values, [o + i for o, c in zip(offset, count, strict=True) for i in range(c)])
        values[...] = -1

    @rule(table=st.sampled_from([0, 1]), n_id=st.lists(st.integers(0, NODES - 1), max_size=20))
    def pull(self, table, n_id):
        expected = self.ahead.pop(table)[1] if self.ahead.get(table, [None])[0] == n_id else None
        got = self.store[table].pull(n_id)
        expected = self.tables[table].pull(n_id) if expected is None else expected
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert got.tobytes() == expected.tobytes()  # CuPy's arrays have it, too

    @rule(table=st.sampled_from([0, 1]), n_id=st.lists(st.integers(0, NODES - 1), max_size=20))
    def start_pull(self, table, n_id):
        if len(self.pending) < 2:
            self.hold_up()
            self.pending.append((self.store[table].pull_async(n_id), self.tables[table].pull(n_id)))

    @precondition(lambda self: self.pending)
    @rule()
    def end_pull(self):
        pending, expected = self.pending.pop()
        assert pending.wait().tobytes() == expected.tobytes()
        assert pending.wait().tobytes() == expected.tobytes()

    @rule(n_id=st.lists(st.integers(0, NODES - 1), max_size=20))
    def prefetch(self, n_id):
        self.store.prefetch(n_id)
        self.ahead = {table: (n_id, self.tables[table].pull(n_id)) for table in (0, 1)}

    @rule(table=st.sampled_from([0, 1]), n_id=st.lists(st.integers(0, NODES - 1), max_size=20))
    def age(self, table, n_id):
        age = self.store.age(n_id, table)
        assert age.dtype == np.int64 and age.tolist() == self.tables[table].age(n_id)
        summary = self.store.staleness(n_id, table)
        known = [value for value in age.tolist() if value >= 0]
        assert summary.never == len(n_id) - len(known)
        assert (summary.mean, summary.largest) == ((np.mean(known), max(known)) if known else (0.0, 0))

    @rule()
    def synchronize(self):
        self.store.synchronize()
        assert not self.store._lane.busy

    @rule()
    def save(self):
        self.store.save(f"{self.folder.name}/saved")
        self.saved = pickle.loads(pickle.dumps(self.tables))
        loaded = HistoryStore.load(f"{self.folder.name}/saved", device="cpu")
        assert [loaded[t].pull(range(NODES)).tobytes() for t in (0, 1)] == [
            table.pull(range(NODES)).tobytes() for table in self.tables
        ]

    @precondition(lambda self: self.saved is not None)
    @rule()
    def restore(self):
        self.store.restore(f"{self.folder.name}/saved")
        self.tables = pickle.loads(pickle.dumps(self.saved))
        self.ahead = {}

    @invariant()
    def whole(self):
        if hasattr(self, "store"):
            assert [table.pushes for table in self.store] == [table.pushes for table in self.tables]

    def teardown(self):
        if hasattr(self, "store"):
            for table in (0, 1):
                expected = self.tables[table].pull(range(NODES))
                self.ahead.clear()
                self.store[table].forget()
                assert self.store[table].pull(range(NODES)).tobytes() == expected.tobytes()
            self.store.close()
            self.folder.cleanup()


Interleavings.TestCase.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)
TestInterleavings = Interleavings.TestCase


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_larger_tables_equal_numpy(tmp_path, storage, dtype):
    """Enough rows for every thread, repeated ids among them."""
    rng = np.random.default_rng(1)
    with made(tmp_path, storage, num_nodes=5000, dims=[17], dtype=dtype) as store:
        expected = np.zeros((5000, 17), history_file.numpy_dtype(dtype))
        for _ in range(8):
            n_id = rng.integers(0, 5000, 9000)
            values = rng.standard_normal((9000, 17), dtype=np.float32)
            store[0].push(values, n_id)
            for row, node in zip(values.astype(expected.dtype), n_id, strict=True):
                expected[node] = row
            asked = rng.integers(0, 5000, 3000)
            got = store[0].pull(asked)
            assert got.tobytes() == expected[asked].tobytes() and got.ctypes.data % 64 == 0


@pytest.mark.parametrize("storage", STORAGES)
def test_threads_push_and_pull_at_once(tmp_path, storage):
    """Each thread its own rows: every one sees its own writes, and none is lost."""
    store = made(tmp_path, storage, num_nodes=400, dims=[5], pool_size=2)
    wrong: list = []

    def work(thread: int) -> None:
        n_id = np.arange(thread * 100, thread * 100 + 100)
        for step in range(30):
            values = np.full((100, 5), thread * 1000 + step, np.float32)
            store[0].push(values, n_id)
            if store[0].pull(n_id).tolist() != values.tolist():
                wrong.append((thread, step))

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and store[0].pushes == 120
    store.close()


def test_a_pull_started_before_a_push_does_not_see_it(tmp_path):
    store = made(tmp_path)
    gate = threading.Event()
    store._lane.submit(gate.wait)
    pending = store[0].pull_async([4])
    store[0].push(np.ones((1, 3)), [4])  # has to wait its turn behind the pull
    assert store._lane.busy
    gate.set()
    assert pending.wait().tolist() == [[0, 0, 0]]
    assert store[0].pull([4]).tolist() == [[1, 1, 1]]


def test_gradients_and_tensors_of_torch_are_taken(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is optional")
    store = made(tmp_path)
    values = torch.ones(2, 3, requires_grad=True) * 2
    store[0].push(values, torch.tensor([1, 2]))
    assert store[0].pull(torch.tensor([2], dtype=torch.int32)).tolist() == [[2, 2, 2]]


def test_a_mapped_store_is_found_again(tmp_path):
    with made(tmp_path, "mmap") as store:
        store[0].push(np.ones((2, 3)), [5, 6])
        store[1].push([[7.0]], [0])
        expected = contents(store)
    with made(tmp_path, "mmap") as store:
        assert contents(store) == expected and store[0].pushes == 1
        store[0].push(np.zeros((1, 3)), [5])
        assert store.age([5, 6]).tolist() == [0, 1]
    with pytest.raises(ValueError, match="store needs to be open"):
        store[0].pull([1])
    store.close()


def test_letting_go_of_a_mapped_store_closes_it(tmp_path):
    store = made(tmp_path, "mmap")
    store[0].push(np.ones((1, 3)), [3])
    del store
    gc.collect()
    with made(tmp_path, "mmap") as store:
        assert store[0].pull([3]).tolist() == [[1, 1, 1]]


WRITER = """
import os, sys, numpy as np
from gglspeedup import HistoryStore
store = HistoryStore(13, [3, 1], "cpu", storage="mmap", path=sys.argv[1])
store[0].push(np.ones((1, 3)), [3])
store.synchronize()
print("pushed", flush=True)
if sys.argv[2] == "wait":
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_killed_writer_is_found_out(tmp_path):
    path = str(tmp_path / "histories")
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, path, "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "pushed\n"
    for opening in (lambda: made(tmp_path, "mmap"), lambda: HistoryStore.load(path, "cpu")):
        with pytest.raises(HistoryFileError, match="did not close"):
            opening()  # it is being written at this very moment
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with pytest.raises(HistoryFileError, match=r"did not close.*delete the file"):
        made(tmp_path, "mmap")
    os.unlink(path)
    # One that ends in the ordinary way needs no close().
    subprocess.run([sys.executable, "-c", WRITER, path, "end"], check=True, stdout=subprocess.DEVNULL)
    with made(tmp_path, "mmap") as store:
        assert store[0].pull([3]).tolist() == [[1, 1, 1]]


def damaged(path, change) -> None:
    data = bytearray(path.read_bytes())
    data = change(data) or data
    path.write_bytes(data)


DAMAGES = {
    "foreign": lambda data: data.__setitem__(slice(0, 8), b"NOTHISTO"),
    "empty": lambda data: bytearray(b"\0"),
    "short": lambda data: data[:-1],
    "long": lambda data: data + b"x",
    "header": lambda data: data.__setitem__(30, data[30] ^ 1),
    "length": lambda data: data.__setitem__(slice(8, 16), (1 << 62).to_bytes(8, "little")),
    "negative": lambda data: data.__setitem__(slice(8, 16), b"\xff" * 8),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_are_not_trusted(tmp_path, damage):
    made(tmp_path).save(tmp_path / "saved")
    damaged(tmp_path / "saved", DAMAGES[damage])
    store = made(tmp_path)
    before = contents(store)
    for reading in (
        lambda: HistoryStore.load(tmp_path / "saved", "cpu"),
        lambda: store.restore(tmp_path / "saved"),
        lambda: made(tmp_path, "mmap", path=tmp_path / "saved"),
    ):
        with pytest.raises(HistoryFileError) as caught:
            reading()
        assert isinstance(caught.value, ValueError) and "path needs" in str(caught.value)
    assert contents(store) == before


@pytest.mark.parametrize(
    "fields",
    [
        {"num_nodes": -1}, {"num_nodes": 1 << 50}, {"num_nodes": 1.5}, {"num_nodes": True}, {"dims": []},
        {"dims": [1 << 50, 1]}, {"dims": "ab"}, {"dtype": "object"}, {"dtype": 5}, {"pushes": [1]}, {"more": 1},
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(tmp_path, fields):
    import json
    import struct
    import zlib

    made(tmp_path).save(tmp_path / "saved")
    header = history_file.read_header(str(tmp_path / "saved"))
    text = json.dumps({**header._asdict(), **fields}).encode()
    page = history_file._MAGIC + struct.pack("<q", len(text)) + text
    page += struct.pack("<I", zlib.crc32(page))
    damaged(tmp_path / "saved", lambda data: data.__setitem__(slice(0, len(page)), page))
    with pytest.raises(HistoryFileError, match="sound header"):
        HistoryStore.load(tmp_path / "saved", "cpu")


def test_other_sizes_are_refused(tmp_path):
    made(tmp_path).save(tmp_path / "saved")
    for options in ({"num_nodes": 14}, {"dims": [3]}, {"dims": [3, 2]}, {"dtype": "float16"}):
        store = made(tmp_path, **options)
        with pytest.raises(HistoryFileError, match="path needs a file of"):
            store.restore(tmp_path / "saved")
        with pytest.raises(HistoryFileError, match="path needs a file of"):
            made(tmp_path, "mmap", path=tmp_path / "saved", **options)
    with made(tmp_path, "mmap", path=tmp_path / "saved") as store:
        assert store[0].pushes == 0  # a saved file may be opened for writing


def test_a_crash_while_saving_leaves_the_last_file_whole(tmp_path, monkeypatch):
    store = made(tmp_path)
    store[0].push(np.ones((1, 3)), [3])
    store.save(tmp_path / "saved")
    store[0].push(np.zeros((1, 3)), [3])

    def failing(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(HistoryFileError, match=r"room on its disk.*No space left"):
        store.save(tmp_path / "saved")
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]
    assert HistoryStore.load(tmp_path / "saved", "cpu")[0].pull([3]).tolist() == [[1, 1, 1]]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits to file sizes to set")
def test_a_full_disk_is_found_before_anything_is_written(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    try:
        with pytest.raises(HistoryFileError, match="room on its disk"):
            made(tmp_path, "mmap", num_nodes=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_saving_over_the_mapped_file_is_refused(tmp_path):
    with made(tmp_path, "mmap") as store, pytest.raises(ValueError, match="path needs another file"):
        store.save(tmp_path / "histories")


def test_pickling_copies_memory_and_refuses_files(tmp_path):
    store = made(tmp_path)
    store[0].push(np.ones((1, 3)), [3])
    copy = pickle.loads(pickle.dumps(store))
    assert contents(copy) == contents(store)
    copy[0].push(np.zeros((1, 3)), [3])
    assert store[0].pull([3]).tolist() == [[1, 1, 1]]
    with made(tmp_path, "mmap") as mapped, pytest.raises(ValueError, match="one process"):
        pickle.dumps(mapped)


def test_an_error_in_the_background_is_raised_at_the_next_call(tmp_path, monkeypatch):
    with made(tmp_path, "mmap") as store:

        def failing(*arguments):
            raise OSError("disk on fire")

        monkeypatch.setattr(store[0]._table, "push_rows", failing)
        store[0].push(np.ones((1, 3)), [3])
        with pytest.raises(OSError, match="on fire"):
            store.synchronize()
        store.synchronize()
        monkeypatch.undo()
        store[0].push(np.ones((1, 3)), [3])
        assert store[0].pull([3]).tolist() == [[1, 1, 1]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_its_own_thread(tmp_path):
    store = made(tmp_path)
    store[0].push(np.ones((1, 3)), [3])
    store[0].pull_async([3]).wait()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            store[0].push(np.zeros((1, 3)), [3])
            status = int(store[0].pull_async([3]).wait().tolist() != [[0, 0, 0]])
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert store[0].pull([3]).tolist() == [[1, 1, 1]]


BAD = [
    (lambda s: HistoryStore(-1, [1], "cpu"), ValueError, "num_nodes needs at least 0"),
    (lambda s: HistoryStore(1, [], "cpu"), ValueError, "dims needs at least one width"),
    (lambda s: HistoryStore(1, 4, "cpu"), TypeError, "dims needs one width a table"),
    (lambda s: HistoryStore(1, [1.5], "cpu"), TypeError, "dims needs an integer"),
    (lambda s: HistoryStore(1, [1], "cpu", dtype="int8"), ValueError, "dtype needs one of float32"),
    (lambda s: HistoryStore(1, [1], "cpu", storage="tape"), ValueError, "storage needs one of"),
    (lambda s: HistoryStore(1, [1], "cpu", storage="mmap"), TypeError, "path needs the file"),
    (lambda s: HistoryStore(1, [1], "cpu", pool_size=0), ValueError, "pool_size needs at least 1"),
    (lambda s: HistoryStore(1 << 45, [64], "cpu"), ValueError, "storage needs .* GiB for histories.*pass path="),
    (lambda s: s[0].push(np.ones((2, 3)), [1]), ValueError, r"values needs shape \(1, 3\), got shape \(2, 3\)"),
    (lambda s: s[0].push(np.ones((1, 2)), [1]), ValueError, r"values needs shape \(1, 3\)"),
    (lambda s: s[0].push([["a", "b", "c"]], [1]), TypeError, "values needs real numbers"),
    (lambda s: s[0].push(np.ones((1, 3)), [13]), IndexError, "n_id needs ids from 0 to 12, got 13 at position 0"),
    (lambda s: s[0].push(np.ones((1, 3)), [0.5]), TypeError, "n_id needs integers"),
    (lambda s: s[0].push(np.ones((1, 3))), TypeError, "n_id needs to be given, or offset and count"),
    (lambda s: s[0].push(np.ones((1, 3)), [1], offset=[1], count=[1]), TypeError, "n_id needs to be given"),
    (lambda s: s[0].push(np.ones((1, 3)), offset=[1]), TypeError, "n_id needs to be given"),
    (lambda s: s[0].push(np.ones((3, 3)), offset=[11], count=[3]), ValueError, "ranges within 0 to 13, got 11 and 3"),
    (lambda s: s[0].push(np.ones((3, 3)), offset=[2, -1], count=[1, 2]), ValueError, "position 1"),
    (lambda s: s[0].push(np.ones((3, 3)), offset=[2], count=[1, 2]), ValueError, "count needs a length for each"),
    (lambda s: s[0].pull([-1]), IndexError, "n_id needs ids from 0 to 12"),
    (lambda s: s[0].pull_async([[1]]), ValueError, "n_id needs one dimension"),
    (lambda s: s.prefetch([99]), IndexError, "n_id needs ids from 0 to 12"),
    (lambda s: s.age([99]), IndexError, "n_id needs ids from 0 to 12"),
    (lambda s: HistoryStore(1, [1], "cuda:77"), RuntimeError, "device needs a usable CUDA device"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments_change_nothing(tmp_path, call, error, message):
    store = made(tmp_path)
    store[0].push(np.ones((1, 3)), [3])
    before = contents(store)
    with pytest.raises(error, match=message) as caught:
        call(store)
    assert isinstance(caught.value, GGLSpeedupError)
    assert contents(store) == before and store[0].pushes == 1


def test_dtypes_by_any_name(tmp_path):
    for dtype in ("float16", np.float16, np.dtype("float16")):
        assert made(tmp_path, dtype=dtype).dtype == "float16"


def test_empty_stores_and_rows(tmp_path):
    for storage in ("device", "mmap"):
        with made(tmp_path, storage, num_nodes=0) as store:
            assert store[0].pull([]).shape == (0, 3)
            store[0].push(np.ones((0, 3)), [])
        os.path.exists(tmp_path / "histories") and os.unlink(tmp_path / "histories")
        with made(tmp_path, storage, dims=[0]) as store:
            store[0].push(np.ones((2, 0)), [1, 2])
            assert store[0].pull([1]).shape == (1, 0) and store.age([1, 3]).tolist() == [0, -1]


def test_repr_says_what_it_is(tmp_path):
    store = made(tmp_path)
    assert "13" in repr(store) and "float32" in repr(store) and "0 pushes" in repr(store[0])
    assert len(store) == 2 and [table.shape for table in store] == [(13, 3), (13, 1)]
