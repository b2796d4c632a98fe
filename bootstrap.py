#!/usr/bin/env python3
"""Sets up an environment in `.venv` and runs a demo or the tests in it.

    python3 bootstrap.py demo [name] [options of the demo]
    python3 bootstrap.py test [options of pytest]

The demos are GraphSAGE in torch (the default), pyg, lightning, tensorflow, paddle, tensorlayerx and jax; gas, which is
GNNAutoScale's small benchmark; its examples gas_gcnii, gas_gin, gas_lightning, gas_tensorlayerx and gas_jax; and
GraphSAGE in several processes: multi_torch, multi_paddle, multi_tensorflow, and dist, which `.venv/bin/mpiexec` starts
more of.

It needs Python 3.10 or later and a package index that pip knows, nothing else. What is set up already is not set up
again, so a second call starts at once.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST = (3, 10)
# A newer torch brings gigabytes of CUDA packages; this is what the results in the README were measured with.
TORCH = "torch==2.13.0"
# What setup.py calls the packages that each demo needs beside those of all demos.
EXTRAS = {
    "torch": "pyg",
    "pyg": "pyg",
    "lightning": "lightning",
    "tensorflow": "tensorflow",
    "paddle": "paddle",
    "tensorlayerx": "tensorlayerx",
    "jax": "jax",
    "gas": "pyg,metis",
    "gas_gcnii": "pyg,metis",
    "gas_gin": "pyg,metis",
    "gas_lightning": "lightning,metis",
    "gas_tensorlayerx": "tensorlayerx,metis",
    "gas_jax": "jax,metis",
    "multi_torch": "pyg",
    "multi_paddle": "paddle",
    "multi_tensorflow": "tensorflow",
    "dist": "pyg,mpi",
}
WITH_TORCH = ("torch", "pyg", "lightning", "gas", "gas_gcnii", "gas_gin", "gas_lightning", "multi_torch", "dist")
# Where the others are, sage_NAME.py in demo.
PROGRAMS = {
    "gas": "demo/gas_small.py",
    "multi_torch": "demo_multi/sage_torch_ddp.py",
    "multi_paddle": "demo_multi/sage_paddle_spawn.py",
    "multi_tensorflow": "demo_multi/sage_tensorflow_workers.py",
    "dist": "demo_multi/dist_sage.py",
}
USAGE = f"usage: python3 bootstrap.py demo [{'|'.join(EXTRAS)}] [options of the demo] | test [options of pytest]"


class SetupError(Exception):
    """The environment cannot be made; the message says what to do."""


def main(arguments: Sequence[str]) -> int:
    """Run the command line; return its exit status."""
    job, options = parse(arguments)
    if job is None:
        print(USAGE, file=sys.stderr)
        return 2
    try:
        check_python(sys.version_info[:2])
        python = prepare(ROOT / ".venv", job)
    except SetupError as error:
        print(f"bootstrap: {error}", file=sys.stderr)
        return 1
    for command in commands(job, python, options):
        # The demo runs in the caller's folder, so that paths among its options mean what they say.
        status = run(command, cwd=ROOT if job == "test" else None)
        if status:
            return status
    return 0


def parse(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the job, ``test`` or the name of a demo, and the options to pass on; no job if there is none such."""
    job, options = (arguments[0] if arguments else None), list(arguments[1:])
    if job == "demo":
        job = "torch" if not options or options[0].startswith("-") else options.pop(0)
        return (job if job in EXTRAS else None), options
    return (job if job == "test" else None), options


def check_python(version: tuple[int, ...]) -> None:
    """Raise SetupError if this Python is too old."""
    if version < OLDEST:
        found, oldest = (".".join(map(str, numbers)) for numbers in (version, OLDEST))
        raise SetupError(f"Python {oldest} or later is needed, this is {found}; run it with a newer python3")


def commands(job: str, python: Path, options: Sequence[str]) -> list[list[str]]:
    """Return what a job runs, in order."""
    if job != "test":
        usual = f"demo/{job}.py" if job.startswith("gas_") else f"demo/sage_{job}.py"
        return [[str(python), str(ROOT / PROGRAMS.get(job, usual)), *options]]
    # A process a core; a file's tests share one, as they share what it sets up.
    tests = ["pytest", "-n", "auto", "--dist", "loadfile", *options]
    return [[str(python), "-m", *tool] for tool in (["ruff", "check"], ["mypy"], tests)]


def prepare(venv: Path, job: str) -> Path:
    """Return the Python of the environment, made and filled as far as it is not yet."""
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = venv / f"bootstrap-{job}.stamp"
    wanted = requirements_digest(job)
    if python.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    if not works(python):
        make_venv(venv, python)
    if (job == "test" or job in WITH_TORCH) and not works(python, "import torch"):
        pip_install(python, TORCH)
    pip_install(python, "-e", f"{ROOT}[{'test' if job == 'test' else 'demo,' + EXTRAS[job]}]")
    stamp.write_text(wanted, encoding="utf-8")
    return python


def requirements_digest(job: str) -> str:
    """Return a digest of all that decides what has to be installed for a job, and where."""
    digest = hashlib.sha256(f"{job} {TORCH} {ROOT} {sys.version_info[:2]}".encode())
    for name in ("setup.py", "pyproject.toml"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def works(python: Path, statement: str = "import pip") -> bool:
    """Return whether a Python is there and can run a statement."""
    if not python.exists():
        return False
    done = subprocess.run([str(python), "-c", statement], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return done.returncode == 0


def make_venv(venv: Path, python: Path) -> None:
    """Make the environment; it sees the packages of this Python if these include torch."""
    if importlib.util.find_spec("ensurepip") is None:
        raise SetupError(
            "this Python has no ensurepip, so it cannot make an environment; install it "
            "(on Debian and Ubuntu: apt install python3-venv) or run bootstrap.py with another python3"
        )
    shared = works(Path(sys.executable), "import torch")
    command = [sys.executable, "-m", "venv", "--clear", *(["--system-site-packages"] if shared else []), str(venv)]
    if run(command):
        raise SetupError(f"{venv} could not be made; see the message above")
    if shared and not works(python, "import torch"):
        # This Python runs in an environment itself, whose packages are not the system's.
        share_packages(python)


def share_packages(python: Path) -> None:
    """Let the environment see the folders that this Python takes its packages from."""
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    inside = subprocess.run([str(python), "-c", ask], check=True, capture_output=True, text=True).stdout.strip()
    outside = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    # What looks for shared libraries (CuPy, for NVRTC) asks `site` for its folders, not sys.path.
    prefix = f"import site; site.PREFIXES.append({sys.prefix!r})"
    (Path(inside) / "bootstrap.pth").write_text("\n".join([*outside, prefix]) + "\n", encoding="utf-8")


def pip_install(python: Path, *what: str) -> None:
    """Install into the environment."""
    if run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *what]):
        raise SetupError(f"pip could not install {' '.join(what)}; see its message above, and whether it has an index")


def run(command: Sequence[str], cwd: Path | None = None) -> int:
    """Print a command, run it, and return its exit status."""
    print("+ " + shlex.join(command), flush=True)
    return subprocess.run(command, cwd=cwd).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
