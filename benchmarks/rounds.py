"""Contestants in processes of their own, measured in turn: A B C, C B A, ... so that a drifting machine is fair.

The two halves of one protocol: :func:`play` starts the contestants and asks each for a round; :func:`serve` is what
a contestant runs. They exchange lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Contestant:
    """A label, the command that serves its rounds, and what it measured."""

    label: str
    command: list[str]
    rates: list[float] = field(default_factory=list)
    versions: str = ""
    problem: str = ""

    @property
    def median(self) -> float:
        """The median rate; 0.0 if it could not run."""
        return statistics.median(self.rates) if self.rates else 0.0


def serve(prepare: Callable[[], tuple[str, Callable[[int], tuple[float, float]]]]) -> None:
    """Answer the rounds of :func:`play` until it hangs up.

    Parameters
    ----------
    prepare : function
        Returns a text of versions, and the function that runs round k and returns (amount, seconds).
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    try:
        versions, run = prepare()
        run(-1)  # compile, fault pages in, start workers
        answers.write(json.dumps({"versions": versions}) + "\n")
    except Exception as error:
        answers.write(json.dumps({"problem": f"{type(error).__name__}: {error}"}) + "\n")
        return
    finally:
        answers.flush()
    for line in sys.stdin:
        amount, seconds = run(int(line))
        answers.write(json.dumps({"amount": amount, "seconds": seconds}) + "\n")
        answers.flush()


def play(contestants: Sequence[Contestant], rounds: int, environment: dict[str, str] | None = None) -> None:
    """Run the rounds, filling in each contestant's rates (amount a second)."""
    running = []
    for contestant in contestants:
        process: Any = subprocess.Popen(
            contestant.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, **(environment or {})}, start_new_session=True,
        )  # fmt: skip
        first = json.loads(process.stdout.readline() or '{"problem": "ended at its start"}')
        contestant.problem, contestant.versions = first.get("problem", ""), first.get("versions", "")
        if contestant.problem:
            print(f"{contestant.label}: left out, {contestant.problem}", file=sys.stderr)
        else:
            running.append((contestant, process))
    for k in range(rounds):
        for contestant, process in running if k % 2 == 0 else running[::-1]:
            process.stdin.write(f"{k}\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            contestant.rates.append(answer["amount"] / answer["seconds"])
    for _contestant, process in running:
        process.stdin.close()
        process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # workers it may have left would slow those measured next


def table(title: str, contestants: Sequence[Contestant], unit: float, name: str) -> str:
    """Return a Markdown table: median, range, and how many times faster the first contestant is."""
    lines = [f"**{title}**", "", f"| | {name} (min to max) | ours is |", "|---|---|---|"]
    ours = contestants[0].median
    for contestant in contestants:
        if not contestant.rates:
            lines.append(f"| {contestant.label} | left out: {contestant.problem} | |")
            continue
        low, high = min(contestant.rates) / unit, max(contestant.rates) / unit
        ratio = "" if contestant is contestants[0] else f"{ours / contestant.median:.1f}x"
        lines.append(f"| {contestant.label} | {contestant.median / unit:.2f} ({low:.2f} to {high:.2f}) | {ratio} |")
    return "\n".join(lines)


def machine() -> str:
    """Return a line on the processor and the system."""
    import platform

    model = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), model)
    except OSError:
        pass
    return f"{model}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
