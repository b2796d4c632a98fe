"""`one_ahead`: the next item's work is begun before one's is waited for, and nothing that was begun is left behind."""

from __future__ import annotations

import pytest

from gglspeedup.in_flight import InFlight, one_ahead


class Device:
    """Notes what is begun, finished and abandoned; `fails` are items with an error, `room` how many go at once."""

    def __init__(self, fails=(), room=2, broken=()):
        self.fails, self.room, self.broken = fails, room, broken
        self.log, self.open = [], 0

    def alone(self, item):
        assert self.open == 0
        return self.begin(item).finish()

    def begin(self, item):
        self.log.append(f"begin {item}")
        if item in self.fails:
            raise ValueError(f"item {item}")
        if self.open == self.room:
            raise MemoryError(f"no room for {item}")
        self.open += 1

        def end(what):
            self.open -= 1
            self.log.append(f"{what} {item}")
            if item in self.broken and what == "finish":
                raise RuntimeError(f"broken {item}")
            return 10 * item

        return InFlight(lambda: end("finish"), lambda: end("abandon"))


def run(device, items):
    made = []
    try:
        for result in one_ahead(items, device.begin, device.alone):
            made.append(result)
            device.log.append("given")
    except (ValueError, RuntimeError, MemoryError, OSError) as error:
        made.append(str(error))
    assert device.open == 0
    return made


def test_each_is_begun_before_the_one_before_is_finished():
    device = Device()
    assert run(device, range(3)) == [0, 10, 20]
    assert device.log == [
        "begin 0", "begin 1", "finish 0", "given", "begin 2", "finish 1", "given", "finish 2", "given",
    ]  # fmt: skip
    assert run(Device(), []) == [] and run(Device(), [5]) == [50]


@pytest.mark.parametrize("place", range(4))
def test_an_error_comes_in_its_place(place):
    before = [0, 10, 20, 30][:place]
    device = Device(fails=[place])
    assert run(device, range(4)) == [*before, f"item {place}"]
    assert f"begin {place + 1}" not in device.log
    assert run(Device(broken=[place]), range(4)) == [*before, f"broken {place}"]

    def source():
        yield from range(place)
        raise OSError("no more")

    assert run(Device(), source()) == [*before, "no more"]


def test_what_has_no_room_beside_another_is_begun_again_alone():
    device = Device(room=1)
    assert run(device, range(4)) == [0, 10, 20, 30]
    assert device.log.count("begin 1") == 2 and device.log.count("begin 3") == 2
    assert run(Device(room=0), range(4)) == ["no room for 0"]


@pytest.mark.parametrize("taken", range(4))
def test_what_was_begun_is_abandoned_when_nobody_wants_it(taken):
    device = Device()
    made = one_ahead(range(9), device.begin, device.alone)
    assert [next(made) for _ in range(taken)] == [0, 10, 20][:taken]
    made.close()
    assert device.open == 0
    assert [entry for entry in device.log if "abandon" in entry] == ([f"abandon {taken}"] if taken else [])
