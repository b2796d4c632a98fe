"""The set-up script: what it decides; that it sets up a fresh machine is tried by CI, which runs it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bootstrap

ROOT = bootstrap.ROOT


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have been run, all of which succeed."""
    commands: list[list[str]] = []

    def run(command: Any, cwd: Path | None = None) -> int:
        commands.append([*map(str, command)])
        return 0

    monkeypatch.setattr(bootstrap, "run", run)
    return commands


@pytest.mark.parametrize("version", [(3, 9), (3, 0), (2, 7)])
def test_old_python_is_refused_with_what_to_do(version: tuple[int, int]) -> None:
    with pytest.raises(bootstrap.SetupError, match=rf"3\.10 or later .* {version[0]}\.{version[1]}.* newer python3"):
        bootstrap.check_python(version)


@pytest.mark.parametrize("version", [(3, 10), (3, 14), (4, 0)])
def test_new_python_is_taken(version: tuple[int, int]) -> None:
    bootstrap.check_python(version)


def test_an_old_python_can_read_the_script_up_to_the_check() -> None:
    ast.parse((ROOT / "bootstrap.py").read_text(encoding="utf-8"), feature_version=(3, 7))


def test_only_the_standard_library_is_imported() -> None:
    tree = ast.parse((ROOT / "bootstrap.py").read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


@pytest.mark.parametrize("arguments", [[], ["build"], ["--help"], ["torch"], ["demo", "caffe"]])
def test_unknown_job_prints_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert bootstrap.main(arguments) == 2
    assert "demo" in capsys.readouterr().err


def test_jobs_pass_options_on() -> None:
    python = Path("python")
    for arguments, framework in ((["--epochs", "3"], "torch"), (["jax", "--epochs", "3"], "jax"), ([], "torch")):
        job, options = bootstrap.parse(["demo", *arguments])
        assert job == framework and options == arguments[-2:]
    for framework in bootstrap.EXTRAS:
        (demo,) = bootstrap.commands(framework, python, ["--epochs", "3"])
        assert Path(demo[1]).is_file() and demo[2:] == ["--epochs", "3"]
    tests = bootstrap.commands("test", python, ["-m", "not slow"])
    assert [command[2] for command in tests] == ["ruff", "mypy", "pytest"]
    assert tests[-1][-2:] == ["-m", "not slow"]


def test_failing_command_ends_the_job(monkeypatch: pytest.MonkeyPatch, ran: list[list[str]]) -> None:
    monkeypatch.setattr(bootstrap, "prepare", lambda venv, job: Path("python"))
    monkeypatch.setattr(bootstrap, "run", lambda command, cwd=None: 3 if "mypy" in command else 0)
    assert bootstrap.main(["test"]) == 3


def test_second_call_installs_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ran: list[list[str]]
) -> None:
    venv = tmp_path / "venv"
    python = venv / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    monkeypatch.setattr(bootstrap, "works", lambda python, statement="import pip": statement == "import pip")
    assert bootstrap.prepare(venv, "torch") == python
    assert [command[-1] for command in ran] == ["torch==2.13.0", f"{ROOT}[demo,pyg]"]
    bootstrap.prepare(venv, "torch")
    assert len(ran) == 2
    bootstrap.prepare(venv, "test")
    assert ran[-1][-1] == f"{ROOT}[test]"
    monkeypatch.setattr(bootstrap, "TORCH", "torch==0")
    bootstrap.prepare(venv, "torch")
    assert ran[-2][-1] == "torch==0"
    bootstrap.prepare(venv, "paddle")  # which needs no torch
    assert ran[-2][-1] == f"{ROOT}[demo,pyg]" and ran[-1][-1] == f"{ROOT}[demo,paddle]"


@pytest.mark.parametrize("importable", [True, False])
def test_packages_are_shared_only_for_the_sake_of_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ran: list[list[str]], importable: bool
) -> None:
    monkeypatch.setattr(bootstrap, "works", lambda python, statement="import pip": importable)
    bootstrap.make_venv(tmp_path / "venv", tmp_path / "venv" / "python")
    assert ("--system-site-packages" in ran[0]) == importable


def test_missing_ensurepip_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(bootstrap, "importlib", fake)
    with pytest.raises(bootstrap.SetupError, match="python3-venv"):
        bootstrap.make_venv(tmp_path, tmp_path / "python")


def test_failed_install_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "run", lambda command, cwd=None: 1)
    with pytest.raises(bootstrap.SetupError, match="pip could not install torch"):
        bootstrap.pip_install(Path("python"), "torch")


def test_run_prints_the_command(capfd: pytest.CaptureFixture[str]) -> None:
    assert bootstrap.run([sys.executable, "-c", "import sys; sys.exit(5)"]) == 5
    assert "import sys; sys.exit(5)" in capfd.readouterr().out


def test_a_shared_package_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = tmp_path / "site-packages"
    packages.mkdir()
    (packages / "only_here.py").touch()
    monkeypatch.setattr(sys, "path", [str(packages)])
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    assert not bootstrap.works(python, "import only_here")
    bootstrap.share_packages(python)
    assert bootstrap.works(python, "import only_here")
    # What looks for shared libraries asks `site`: it is told of the folders, too.
    assert bootstrap.works(python, f"import site, sys; sys.exit({sys.prefix!r} not in site.PREFIXES)")


def test_no_index_is_wired_in() -> None:
    for name in ("bootstrap.py", "setup.py", "demo/datasets.py"):
        assert "index-url" not in (ROOT / name).read_text(encoding="utf-8")
