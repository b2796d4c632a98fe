"""Stamps of history rows: the body that the CPU and the GPU kernel share, one item of a push.

A stamp is the number of the push that wrote the row last, above the position of the row in that push; 0 is "never". The
highest stamp wins, so that of repeated ids the last one does, in whatever order the items are run.
"""

from __future__ import annotations

POSITION_BITS = 32


def stamp_of(number: int, position: int) -> int:
    """Return the stamp of item `position` of push `number`, from 1."""
    return (number << POSITION_BITS) | position
