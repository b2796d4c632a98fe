"""The distributed classes on real engines: MPI processes, and a gloo group; what they do when a rank fails."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import psutil
import pytest
from conftest import missing
from rank_jobs import RANKS, STUCK_TIMEOUT

SCRIPT = Path(__file__).parent / "rank_jobs.py"
ROOT = SCRIPT.parent.parent
# Ranks share the cores: more threads would only wait for each other.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
START_SECONDS = 60.0  # for the ranks of a busy machine to import what they need
END_SECONDS = 30.0  # within which every rank has to end once one has failed

pytestmark = pytest.mark.slow


def mpiexec() -> str:
    if importlib.util.find_spec("mpi4py") is None:
        missing("mpi4py")
    beside = Path(sysconfig.get_path("scripts")) / "mpiexec"  # pip's mpich
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        missing("mpiexec")
    assert found is not None
    return found


def segments(process: psutil.Process) -> set[str]:
    """The files of shared memory that a process has mapped and that still have a name."""
    try:
        maps = {place.path for place in process.memory_maps()}
    except psutil.Error:
        return set()
    return {path for path in maps if path.startswith("/dev/shm/") and not path.endswith("(deleted)")}


def run(engine: str, job: str, folder: Path, ranks: int = RANKS) -> tuple[int, str]:
    """Run a job on all ranks; return the exit status and what they have written. Nothing may stay behind."""
    command = [sys.executable, str(SCRIPT), engine, job, str(folder / "store")]
    if engine == "mpi":
        command = [mpiexec(), "-n", str(ranks), *command]
    elif importlib.util.find_spec("torch") is None:
        missing("torch")
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    ours = psutil.Process(process.pid)
    seen: set[psutil.Process] = set()
    mapped: set[str] = set()
    try:
        while process.poll() is None and time.monotonic() - start < START_SECONDS + END_SECONDS:
            seen.update(ours.children(recursive=True))
            mapped.update(*map(segments, seen))
            time.sleep(0.1)
        assert process.poll() is not None, "the ranks did not end"
    except psutil.NoSuchProcess:
        pass
    finally:
        process.kill()
        output = process.communicate()[0]
        _, alive = psutil.wait_procs(seen, timeout=5)
        for left in alive:
            left.kill()
    assert not alive, f"processes left behind: {alive}\n{output}"
    left_over = [path for path in mapped if os.path.exists(path)]
    assert not left_over, f"shared memory left behind: {left_over}\n{output}"
    return process.wait(), output


ENGINES = ["mpi", "gloo"]
# In one start of the ranks, as that takes longer than any of them.
GOOD = {
    "mpi": "whole,in_pieces,in_the_background,device_buffers,bad_seeds,differences",
    "gloo": "whole,in_the_background,bad_seeds,differences",
}


@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_get_what_one_process_has(engine, tmp_path):
    """Also in the background; and what one rank alone has wrong is told to all, which go on."""
    status, output = run(engine, GOOD[engine], tmp_path)
    assert status == 0 and output.count("is done") == RANKS, output


@pytest.mark.parametrize("ranks", [1, 4])
def test_any_number_of_mpi_ranks(ranks, tmp_path):
    status, output = run("mpi", "whole,in_the_background", tmp_path, ranks)
    assert status == 0 and output.count("is done") == ranks, output


@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_survive_what_they_catch(engine, tmp_path):
    """Every rank hears of the cause, and can make another communicator; MPI, which has lost messages, is aborted."""
    status, output = run(engine, "caught", tmp_path)
    assert output.count("is done") == RANKS and (status == 0) == (engine == "gloo"), output


FAILURES = {
    "raised": dict.fromkeys(ENGINES, "rank 1 gave up: IndexError"),
    "stuck": {
        "mpi": f"rank 1 did not come to sampling, hop 1 within {STUCK_TIMEOUT:g} s",
        "gloo": "rank 1 did not come",
    },
    "killed": {"mpi": "Killed (signal 9)", "gloo": "rank 1 died or ended"},
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("job", FAILURES)
def test_a_rank_that_fails_ends_all(engine, job, tmp_path):
    """Every rank ends, with the cause; `run` gives them half a minute after the start."""
    status, output = run(engine, job, tmp_path)
    assert status != 0 and "is done" not in output
    assert FAILURES[job][engine] in output, output
