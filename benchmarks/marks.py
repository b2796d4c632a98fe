"""The part of a document that a command makes, between two marks."""

from __future__ import annotations

from pathlib import Path


def replace(path: Path, begin: str, end: str, made: str) -> None:
    """Put text between the first `begin` and the first `end` of a file that has both, in place of what is there."""
    old = path.read_text(encoding="utf-8")
    path.write_text(f"{old.split(begin)[0]}{begin}\n{made}\n{end}{old.split(end)[1]}", encoding="utf-8")
