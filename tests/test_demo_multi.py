"""The demos in several processes: gradients averaged, the accuracy reached, nothing left behind however they end."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import missing

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo_multi import processes
from demo_multi.processes import ProcessError
from demo_multi.shares import RanksDifferError, compare_gradients

ROOT = Path(__file__).resolve().parent.parent

# What each demo is said to need; of these packages it may load those alone.
NEEDS = {
    "sage_torch_ddp": {"torch", "torch_geometric"},
    "sage_paddle_spawn": {"paddle"},
    "sage_tensorflow_workers": {"tensorflow", "keras"},
}
FRAMEWORKS = set.union(*NEEDS.values()) | {"tensorlayerx", "gammagl", "jax", "lightning", "cupy"}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
REPORTED = ("gradients", "weights", "graph", "framework", "test accuracy", "training epoch", "time", "written")
GRADIENTS = re.compile(r"^gradients +apart by (\S+), after averaging by (\S+), and (\S+) from their mean", re.MULTILINE)
ENDING_SECONDS = 30  # in which all processes end once one has failed


# --- programs and what they leave ----------------------------------------------------------------------------------


def demo_file(name: str) -> Path:
    """The file of a demo; whoever lacks one of its packages may skip it, but the file has to be there."""
    file = ROOT / "demo_multi" / f"{name}.py"
    assert file.is_file()
    for package in sorted(NEEDS[name]):
        if importlib.util.find_spec(package) is None:
            missing(package)
    return file


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    """A program in a session of its own, by which the processes that it starts can be found."""
    return subprocess.Popen(
        [sys.executable, *command, "--device", "cpu"], cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def living(session: int) -> set[int]:
    """The processes of a session that have not ended; of none where the system does not list them."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue  # it has ended meanwhile
        if int(of) == session and state != "Z":
            found.add(int(stat.parent.name))
    return found


def named_memory() -> set[Path]:
    return set(Path("/dev/shm").iterdir()) if Path("/dev/shm").is_dir() else set()


@pytest.fixture(autouse=True)
def nothing_left_in_shared_memory() -> Iterator[None]:
    """What is there afterwards was there before, or belongs to somebody else, who removes it."""
    before = named_memory()
    yield
    end = time.monotonic() + 20
    while named_memory() - before and time.monotonic() < end:
        time.sleep(0.2)
    assert named_memory() <= before


def ends_alone(process: subprocess.Popen[str], seconds: float = 600) -> tuple[str, str]:
    """Wait for a program and all that it has started; return what it has written, to both streams."""
    try:
        out, errors = process.communicate(timeout=seconds)
        end = time.monotonic() + 10
        while living(process.pid) and time.monotonic() < end:
            time.sleep(0.1)
        assert not living(process.pid), errors[-3000:]
    finally:
        for left in living(process.pid):
            os.kill(left, signal.SIGKILL)
    return out, errors


@pytest.fixture
def toy(tmp_path: Path) -> list[str]:
    """Options for a graph of 151 nodes whose neighbours mostly share their class.

    By default split, 91 nodes are judged by: the shares of two processes overlap in one.
    """
    rng = np.random.default_rng(0)
    y = np.minimum(np.arange(151) // 50, 2)
    same = rng.integers(0, 50, (151, 4)) + 50 * y[:, None]
    indices = np.where(rng.random((151, 4)) < 0.9, same, rng.integers(0, 151, (151, 4)))
    x = (np.eye(8)[y] + rng.random((151, 8))).astype(np.float32)
    path = tmp_path / "toy.npz"
    np.savez(path, indptr=np.arange(0, 605, 4), indices=indices.ravel(), x=x, y=y)
    return ["--dataset", str(path), "--batch-size", "16", "--hidden", "8", "--fanouts", "3", "3", "--quiet"]


# --- the demos -----------------------------------------------------------------------------------------------------


def test_every_demo_is_tested() -> None:
    assert {path.stem for path in (ROOT / "demo_multi").glob("sage_*.py")} == set(NEEDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_runs_as_a_file(name: str, toy: list[str], tmp_path: Path) -> None:
    process = start(["-X", "importtime", str(demo_file(name)), *toy, "--epochs", "3"], tmp_path)
    out, errors = ends_alone(process)
    assert process.returncode == 0, errors[-3000:]
    for label in REPORTED:
        assert sum(line.startswith(f"{label} ") for line in out.splitlines()) == 1, out
    found = GRADIENTS.search(out)
    assert found, out
    before, after, off = map(float, found.groups())
    assert before > 0.01 and after <= 1e-5 and off <= 1e-5, out
    table = (tmp_path / "out" / "sage_toy.csv").read_text().splitlines()
    assert len(table) == 1 + 3 and np.isfinite([float(value) for value in table[-1].split(",")]).all()
    imported = set(re.findall(r"^import time:.*\| +([a-z_]+)$", errors, re.MULTILINE)) & FRAMEWORKS
    # TensorFlow Lite, which is part of TensorFlow, imports JAX itself where it is installed.
    assert imported - ({"jax"} if "tensorflow" in NEEDS[name] else set()) == NEEDS[name]


@pytest.mark.slow
def test_reaches_the_accuracy_of_one_process(shared_data: Path, tmp_path: Path) -> None:
    options = ["--root", str(shared_data), "--seeds", "2", "--quiet", "--out", str(tmp_path)]
    process = start([str(demo_file("sage_torch_ddp")), *options], tmp_path)
    out, errors = ends_alone(process)
    assert process.returncode == 0, errors[-3000:]
    accuracy = re.search(r"^test accuracy +(\d\.\d+) ± \d\.\d+ \(2 seeds\)$", out, re.MULTILINE)
    assert accuracy and abs(float(accuracy[1]) - 0.766) <= 0.02, out  # the README has that of one process


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fault", "message"),
    # What the others wait in when one dies is the framework's; an exception is told to all by the same lines of ours.
    [("sage_torch_ddp", "failed", "ValueError: this process has had enough"),
     *((name, "killed", "process 1 ended with SIGKILL") for name in NEEDS)],
)  # fmt: skip
def test_one_that_fails_ends_all(name: str, fault: str, message: str, toy: list[str], tmp_path: Path) -> None:
    demo_file(name)
    script = str(Path(__file__).parent / "demo_multi_fault.py")
    process = start([script, fault, name, *toy, "--epochs", "100000"], tmp_path)
    assert process.stdout is not None and process.stdout.readline().startswith("gradients ")
    out, errors = ends_alone(process, ENDING_SECONDS)
    assert process.returncode == 1 and message in errors, errors[-3000:]
    assert "weights" not in out and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "whom"), [("sage_paddle_spawn", "all, by Ctrl-C"), ("sage_tensorflow_workers", "the first")]
)
def test_interrupted_programs_leave_nothing(name: str, whom: str, toy: list[str], tmp_path: Path) -> None:
    process = start([str(demo_file(name)), *toy, "--epochs", "100000"], tmp_path)
    assert process.stdout is not None and process.stdout.readline().startswith("gradients ")
    if whom == "the first":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)
    _, errors = ends_alone(process, ENDING_SECONDS)
    assert process.returncode == (-signal.SIGKILL if whom == "the first" else -signal.SIGINT), errors[-3000:]


@pytest.mark.slow
def test_bad_options_are_refused_without_a_process(toy: list[str], tmp_path: Path) -> None:
    process = start([str(demo_file("sage_torch_ddp")), *toy, "--seed", "-1"], tmp_path)
    _, errors = ends_alone(process)
    assert process.returncode == 1 and errors.splitlines()[-1].startswith("demo: seed "), errors


# --- gradients -----------------------------------------------------------------------------------------------------


def test_wrong_averages_are_refused() -> None:
    own = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32)
    mean = np.repeat(own.mean(0, keepdims=True), 3, 0)
    assert " 0 from" not in compare_gradients(own, mean + 1e-7)
    one, summed, nan = mean.copy(), 3 * mean, mean.copy()
    one[1, 7] += 1e-3
    nan[:, 3] = np.nan
    for wrong in (one, summed, nan, own):
        with pytest.raises(RanksDifferError, match="from their mean"):
            compare_gradients(own, wrong)
    assert compare_gradients(np.zeros((2, 3)), np.zeros((2, 3)))


# --- processes -----------------------------------------------------------------------------------------------------


def doubled(rank: int, values: np.ndarray) -> np.ndarray:
    return values * 2 + rank


def failing(rank: int, how: str) -> Any:
    if rank == 1:
        if how == "raises":
            raise ValueError("no more")
        if how == "leaves":
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def losing_a_peer(rank: int, file: Path) -> None:
    """The death of a process looks to its peers like an error of theirs."""
    if rank == 1:
        file.with_suffix(".part").write_text(str(os.getpid()))
        file.with_suffix(".part").rename(file)
        time.sleep(600)
    while not file.exists():
        time.sleep(0.01)
    os.kill(int(file.read_text()), signal.SIGKILL)
    raise ConnectionError("nobody there")


def test_answers_come_in_order_whatever_their_size() -> None:
    values = np.arange(100_000)  # more than a pipe holds
    for rank, answer in enumerate(processes.run(processes.spawn, doubled, (values,), 3)):
        np.testing.assert_array_equal(answer, values * 2 + rank)


@pytest.mark.parametrize(
    ("how", "message"), [("raises", "ValueError: no more"), ("leaves", "exit code 0"), ("dies", "with SIGKILL")]
)
def test_a_failure_ends_all(how: str, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(ProcessError, match=rf"(?s)process 1 .*{message}"):
        processes.run(processes.spawn, failing, (how,), 2)
    assert time.monotonic() - began < ENDING_SECONDS
    assert not processes.multiprocessing.active_children()


def test_a_death_is_the_cause_of_its_peers_errors(tmp_path: Path) -> None:
    with pytest.raises(ProcessError, match="process 1 ended with SIGKILL"):
        processes.run(processes.spawn, losing_a_peer, (tmp_path / "peer",), 2)


def test_what_cannot_be_started_is_ended() -> None:
    def half(target: Any, arguments: tuple[Any, ...], count: int) -> processes.Started:
        processes.spawn(target, arguments, count - 1)
        raise OSError("no more processes")

    with pytest.raises(OSError, match="no more processes"):
        processes.run(half, failing, ("",), 2)
    assert not processes.multiprocessing.active_children()
