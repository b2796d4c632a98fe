"""Evaluation in a second process: the serial scores, in order; whatever becomes of it, the training goes on."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import evaluator_jobs as jobs
import numpy as np
import pytest
from conftest import random_graph

from gglspeedup import CSRGraph, Multi_CGPUFeature, MultiGPUSampler, OverlappedEvaluator
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError
from gglspeedup.prefetch import ForkedError
from gglspeedup.shared_array import SharedArray

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the processes are ended with signals of POSIX")


@pytest.fixture(autouse=True)
def _nothing_left():
    before = set(threading.enumerate())
    yield
    assert not multiprocessing.active_children()
    assert set(threading.enumerate()) <= before


def state(do: int) -> dict[str, np.ndarray]:
    return {"do": np.array(do)}


def alive(pid: int | None) -> bool:
    """Whether a process runs; one that has ended and that nobody waited for does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except FileNotFoundError:
        return False


def gone(pid: int | None, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def test_scores_come_in_order_once_each():
    with OverlappedEvaluator(jobs.total) as evaluator:
        for step in range(5):
            evaluator.submit(step, {"a": np.full(3, step), "b": [0.5, step]})
        found = evaluator.wait()
        assert found == [(step, {"a": 3.0 * step, "b": 0.5 + step}) for step in range(5)]
        assert evaluator.results() == [] and evaluator.wait() == []
        evaluator.submit(9, {})
    assert evaluator.results() == [(9, {})]  # leaving the block waits for them
    assert evaluator.failed == [] and evaluator.dropped == [] and evaluator.error is None
    with pytest.raises(ArgumentValueError, match="open evaluator"):
        evaluator.submit(10, {})


def test_a_checkpoint_is_a_copy_of_every_dtype_and_layout():
    import torch

    weight = torch.arange(6.0).reshape(2, 3).requires_grad_()
    given = {
        "torch": weight, "transposed": weight.T, "scalar": torch.tensor(3), "half": torch.ones(2, dtype=torch.bfloat16),
        "empty": np.empty((0, 4), np.int8), "strided": np.arange(10)[::3], "flag": np.array([True]), "float": 1.5,
    }  # fmt: skip
    with OverlappedEvaluator(jobs.echo) as evaluator:
        evaluator.submit(1, given)
        with torch.no_grad():
            weight += 100  # what training does to it afterwards
        ((_, found),) = evaluator.wait()
    assert list(found) == list(given)
    assert np.array_equal(found["torch"], np.arange(6.0).reshape(2, 3)) and found["torch"].dtype == np.float32
    assert np.array_equal(found["transposed"], np.arange(6.0).reshape(2, 3).T)
    assert found["half"].dtype.name == "bfloat16" and found["half"].tolist() == [1, 1]
    for name in ("empty", "strided", "flag"):
        assert np.array_equal(found[name], given[name]) and found[name].dtype == given[name].dtype
    assert found["scalar"] == 3 and found["float"] == 1.5


def test_graph_and_features_are_shared_and_scores_serial():
    rng = np.random.default_rng(0)
    sampler = MultiGPUSampler("cpu", random_graph(rng, 40, 6), devices=["cpu", "cpu"], seed=5)
    x = Multi_CGPUFeature(0, ["cpu"], 0, sampler.graph)
    x.from_cpu_tensor(rng.random((40, 3), np.float32))
    serial = jobs.linear(sampler, x)
    weights = [rng.random((3, 2), np.float32) for _ in range(4)]
    with OverlappedEvaluator(setup=partial(jobs.linear, sampler, x), threads=1) as evaluator:
        for step, weight in enumerate(weights):
            evaluator.submit(step, {"weight": weight})
        found = evaluator.wait()
    for (step, scores), weight in zip(found, weights, strict=True):
        assert np.array_equal(scores, serial({"weight": weight})), step


def test_a_graph_of_a_file_goes_by_its_path(tmp_path):
    graph = random_graph(np.random.default_rng(1), 30, 5)
    graph.save(tmp_path / "graph")
    mapped = CSRGraph.load(tmp_path / "graph")
    with OverlappedEvaluator(setup=partial(partial, _edges, mapped)) as evaluator:
        evaluator.submit(0, {})
        assert evaluator.wait() == [(0, graph.num_edges)]


def _edges(graph: CSRGraph, _: dict) -> int:
    return graph.num_edges


def test_shared_memory_is_attached_to():
    shared = SharedArray.of(np.arange(4.0))
    with OverlappedEvaluator(jobs.Shift(shared)) as evaluator:
        evaluator.submit(1, {"x": np.ones(2)})
        assert evaluator.wait() == [(1, 9.0)]
    assert shared.array[0] == 1


def test_threads_and_device_of_the_process(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, 6")
    for device, seen in ((None, "4, 6"), ("cpu", ""), (1, "6"), ("cuda:0", "4")):
        with OverlappedEvaluator(jobs.surroundings, threads=1, device=device) as evaluator:
            evaluator.submit(0, {})
            assert evaluator.wait() == [(0, (evaluator.pid, 1, "1", seen))]
    assert os.environ["OMP_NUM_THREADS"] == "7" and os.environ["CUDA_VISIBLE_DEVICES"] == "4, 6"
    with OverlappedEvaluator(jobs.surroundings) as evaluator:
        evaluator.submit(0, {})
        assert evaluator.wait()[0][1][2] == "7"
    with pytest.raises(ArgumentValueError, match="one of the 2 GPUs"):
        OverlappedEvaluator(jobs.total, device=2)


def test_submit_returns_at_once_and_blocks_when_full():
    with OverlappedEvaluator(jobs.told, pending=1) as evaluator:
        evaluator.submit(0, state(0))
        evaluator.wait()  # it runs
        begun = time.monotonic()
        evaluator.submit(1, state(1000))
        while evaluator._desk.waiting:
            time.sleep(0.01)
        evaluator.submit(2, state(0))
        assert evaluator.results() == []  # neither of them waited for the first
        evaluator.submit(3, state(0))  # this one did
        assert time.monotonic() - begun >= 1.0
        assert [step for step, _ in evaluator.wait()] == [1, 2, 3]


def test_the_oldest_are_dropped_when_full():
    with OverlappedEvaluator(jobs.told, pending=2, when_full="drop") as evaluator:
        evaluator.submit(0, state(500))
        while evaluator._desk.waiting:
            time.sleep(0.01)
        for step in range(1, 7):
            evaluator.submit(step, state(0))
        assert [step for step, _ in evaluator.wait()] == [0, 5, 6]
    assert evaluator.dropped == [1, 2, 3, 4] and evaluator.failed == []


@pytest.mark.parametrize("do, said", [(1, "as told"), (3, "pickle"), (5, "only there")])
def test_an_evaluation_that_raises_leaves_the_others_alone(caplog, do, said):
    with caplog.at_level(logging.WARNING, "gglspeedup"), OverlappedEvaluator(jobs.told) as evaluator:
        for step, what in enumerate([0, do, 0]):
            evaluator.submit(step, state(what))
        assert [step for step, _ in evaluator.wait()] == [0, 2]
        ((step, reason),) = evaluator.failed
    assert step == 1 and said in reason and evaluator.error is None
    assert [record.getMessage()[:20] for record in caplog.records] == ["evaluation of step 1"]


# The setup has to be done in the timeout as well, on a machine that may be busy.
@pytest.mark.parametrize(
    "do, timeout, said",
    [(2, 60, "status -9"), (4, 60, "status 5"), pytest.param(3_600_000, 6, "more than 6 s", marks=pytest.mark.slow)],
)  # fmt: skip
def test_the_end_of_the_process_is_said_once_and_training_goes_on(caplog, do, timeout, said):
    with (
        caplog.at_level(logging.WARNING, "gglspeedup"),
        OverlappedEvaluator(jobs.told, timeout=timeout) as evaluator,
    ):
        for step, what in enumerate([0, do, 0, 0]):
            evaluator.submit(step, state(what))
        assert [step for step, _ in evaluator.wait()] == [0]
        evaluator.submit(9, state(0))
        pid = evaluator.pid
    assert [failure.step for failure in evaluator.failed] == [1, 2, 3, 9] and not alive(pid)
    assert said in str(evaluator.error)
    assert len(caplog.records) == 1 and "training goes on" in caplog.text


def test_killed_from_outside_while_idle():
    with OverlappedEvaluator(jobs.told) as evaluator:
        evaluator.submit(0, state(0))
        assert evaluator.wait() == [(0, 0)]
        assert evaluator.pid is not None
        os.kill(evaluator.pid, signal.SIGKILL)
        assert gone(evaluator.pid)
        evaluator.submit(1, state(0))
        assert evaluator.wait() == []
        assert "status -9" in str(evaluator.error) and [failure.step for failure in evaluator.failed] == [1]


def test_a_setup_that_fails_or_hangs():
    with OverlappedEvaluator(setup=jobs.bad_setup) as evaluator:
        evaluator.submit(1, {})
        assert evaluator.wait() == []
        assert "no data here" in str(evaluator.error)
    begun = time.monotonic()
    with OverlappedEvaluator(setup=jobs.slow_setup, timeout=1.0) as evaluator:
        evaluator.wait()
        assert "more than 1 s" in str(evaluator.error)
    OverlappedEvaluator(setup=jobs.slow_setup).close()
    assert time.monotonic() - begun < 60


def test_closing_ends_an_evaluation_and_says_which_were_given_up(caplog):
    evaluator = OverlappedEvaluator(jobs.told)
    evaluator.submit(0, state(0))
    evaluator.wait()
    for step in (1, 2):
        evaluator.submit(step, state(3_600_000))
    evaluator.close()
    evaluator.close()
    assert gone(evaluator.pid, 0.0)
    assert evaluator.failed == [(1, "the evaluator was closed"), (2, "the evaluator was closed")]
    assert evaluator.error is None and evaluator.wait() == [] and not caplog.records


def test_an_exception_of_the_training_does_not_wait():
    with pytest.raises(ZeroDivisionError), OverlappedEvaluator(jobs.told) as evaluator:
        evaluator.submit(1, state(3_600_000))
        raise ZeroDivisionError
    assert gone(evaluator.pid, 0.0)


def test_letting_go_ends_the_process():
    evaluator = OverlappedEvaluator(jobs.told)
    evaluator.submit(1, state(3_600_000))
    pid = evaluator.pid
    ring = [evaluator]
    ring.append(ring)
    del evaluator, ring
    gc.collect()
    assert not alive(pid)


def test_bad_arguments():
    for bad in ({}, {"evaluate": jobs.total, "setup": jobs.bad_setup}, {"evaluate": jobs.total, "when_full": "wait"},
                {"evaluate": jobs.total, "timeout": 0}, {"evaluate": jobs.total, "timeout": float("nan")},
                {"evaluate": jobs.total, "pending": 0}, {"evaluate": jobs.total, "threads": 0},
                {"evaluate": jobs.total, "device": "gpu"}):  # fmt: skip
        with pytest.raises(ArgumentValueError):
            OverlappedEvaluator(**bad)
    for bad in ({"evaluate": 3}, {"setup": "f"}, {"evaluate": jobs.total, "timeout": "1"}, {"evaluate": lambda s: s}):
        with pytest.raises(ArgumentTypeError):
            OverlappedEvaluator(**bad)


def test_bad_submissions_change_nothing():
    with OverlappedEvaluator(jobs.total) as evaluator:
        for step, bad in ((1, [1.0]), (1, {"a": "text"}), (1, {"a": None}), (1.5, {}), ("1", {})):
            with pytest.raises(ArgumentTypeError):
                evaluator.submit(step, bad)
        with pytest.raises(ArgumentValueError):
            evaluator.submit(-1, {})
        evaluator.submit(1, {"a": [2]})
        assert evaluator.wait() == [(1, {"a": 2.0})]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told_and_harms_nothing():
    with OverlappedEvaluator(jobs.told) as evaluator:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                evaluator.submit(1, state(0))
            except ForkedError:
                evaluator.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        evaluator.submit(1, state(0))
        assert evaluator.wait() == [(1, 0)]


SCRIPT = """
import os, sys, time
sys.path.insert(0, {folder!r})
import numpy as np
import evaluator_jobs as jobs
from gglspeedup import OverlappedEvaluator
if __name__ == "__main__":
    evaluator = OverlappedEvaluator(jobs.announced)
    evaluator.submit(0, {{"do": {do}}})
    {end}
"""


def script(tmp_path: Path, do: int, end: str) -> subprocess.Popen[str]:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(folder=str(Path(__file__).parent), do=do, end=end), encoding="utf-8")
    command = [sys.executable, str(path)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, **pipes, text=True)


@pytest.mark.parametrize("do", [0, 3_600_000])
def test_a_killed_training_leaves_no_process(tmp_path, do):
    process = script(tmp_path, do, "time.sleep(3600)")
    assert process.stdout is not None
    evaluating = int(process.stdout.readline())  # it is at work, or has done it
    assert alive(evaluating)
    process.kill()
    process.wait()
    assert gone(evaluating)
    process.communicate()


def test_at_exit_nothing_is_left_nor_said(tmp_path):
    process = script(tmp_path, 3_600_000, "sys.stdin.readline()")
    assert process.stdout is not None
    evaluating = int(process.stdout.readline())
    _, error = process.communicate("\n", timeout=60)
    assert (error, process.returncode) == ("", 0) and gone(evaluating, 0.0)


def test_ctrl_c_is_the_trainings_to_answer(tmp_path):
    process = script(tmp_path, 3_600_000, "time.sleep(3600)")
    assert process.stdout is not None
    evaluating = int(process.stdout.readline())
    os.kill(evaluating, signal.SIGINT)  # a terminal sends it to both processes
    time.sleep(0.5)
    assert alive(evaluating)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert error.count("Traceback") == 1 and "KeyboardInterrupt" in error and gone(evaluating, 0.0)


@pytest.mark.slow
def test_the_demo_gets_the_same_scores(shared_data):
    command = [sys.executable, "-m", "demo.overlapped_evaluation", "--root", str(shared_data), "--dataset", "cora"]
    options = ["--epochs", "3", "--train-nodes", "200", "--hidden", "16"]
    process = subprocess.run(
        command + options, cwd=Path(__file__).resolve().parent.parent, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "bit for bit       True" in process.stdout and process.stdout.count("accuracy") == 3
