"""Profiles: which spans are recorded and whose they are, what they add up to, and the files made of them."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import json
import os
import threading
import time
import weakref
from collections import Counter

import numpy as np
import pytest
from conftest import missing, random_graph
from hypothesis import given, settings
from hypothesis import strategies as st

import gglspeedup
from gglspeedup import HistoryStore, NodeLoader, Prefetcher, SubgraphLoader, profile, trace
from gglspeedup.errors import ArgumentTypeError, ArgumentValueError, DeviceError, MissingPackageError
from gglspeedup.span_times import segments, stages
from gglspeedup.trace import Span, span
from gglspeedup.trace_file import write_trace

GRAPH = random_graph(np.random.default_rng(0), 300, 12)
X = np.random.default_rng(1).random((300, 7), dtype=np.float32)


def loader(**options):
    return NodeLoader(GRAPH, X, **{"seeds": np.arange(100), "sizes": [4, 3], "batch_size": 20, **options}, device="cpu")


def spans_of(p):
    return p._spans


def test_nothing_is_recorded_when_off(monkeypatch):
    monkeypatch.setattr(trace, "_Open", None)  # to make one would fail
    monkeypatch.setattr(trace.Recorder, "watch", None)
    with span("anything"):
        list(loader())
    assert span("anything") is span("other", 3)


def test_spans_nest_and_belong_to_their_threads():
    def work():
        for batch in range(2):
            with span("outer", batch), span("inner", batch) as inner:
                time.sleep(0.001)
                inner.moved(7)
                inner.moved(3)

    with profile() as p:
        threads = [threading.Thread(target=work, name=f"worker {number}") for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        work()
    found = spans_of(p)
    assert Counter(s.stage for s in found) == {"outer": 8, "inner": 8}
    assert sorted(p._recorder.threads) == ["MainThread", "worker 0", "worker 1", "worker 2"]
    for thread in range(4):
        mine = [s for s in found if s.thread == thread]
        assert [(s.stage, s.batch) for s in mine] == [("inner", 0), ("outer", 0), ("inner", 1), ("outer", 1)]
        for inner, outer in (mine[:2], mine[2:]):
            assert outer.begin <= inner.begin < inner.end <= outer.end
        assert mine[1].end <= mine[3].begin
    assert p.summary().stages["inner"].num_bytes == 80


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_loader_has_its_stages(prefetch):
    epochs = loader(prefetch=prefetch)
    with profile() as p:
        for _ in range(2):
            for _ in epochs:
                time.sleep(0.001)
    summary = p.summary()
    assert {name: stage.times for name, stage in summary.stages.items()} == dict.fromkeys(
        ("sampling", "gathering", "conversion", "waiting", "training"), 10
    )
    assert summary.batches == 10 and summary.spans == 50 and not summary.full
    by_stage = {name: [s for s in spans_of(p) if s.stage == name] for name in summary.stages}
    for name in ("sampling", "gathering", "waiting", "training"):
        assert [s.batch for s in by_stage[name]] == [*range(5)] * 2
    reader = by_stage["training"][0].thread
    for name, times in by_stage.items():
        in_the_reader = name in ("training", "waiting", "conversion") or prefetch == 0
        assert {s.thread == reader for s in times} == {in_the_reader}
    for batch in range(10):  # each is made before it is waited for no more, and trained on then
        one = {name: times[batch] for name, times in by_stage.items()}
        assert one["sampling"].end <= one["gathering"].begin < one["gathering"].end <= one["waiting"].end
        assert one["waiting"].end <= one["conversion"].begin and one["training"].begin <= one["training"].end
    if prefetch == 0:
        assert summary.overlap <= 1 and all(stage.hidden == 0 for stage in summary.stages.values())


def test_numbers_add_up():
    """Stages that sleep for known times, as order relations: the machine may do other things meanwhile."""
    short, long = 0.004, 0.02

    def batches():
        for batch in range(8):
            time.sleep(short)
            yield batch

    with profile() as p:
        for _ in Prefetcher(batches, stages=[lambda batch: time.sleep(short)], names=("making", "stage")):
            time.sleep(long)
    summary = p.summary()
    assert set(summary.stages) == {"making", "stage", "waiting", "training"}
    for name, least in (("making", 8 * short), ("stage", 8 * short), ("training", 8 * long)):
        assert least <= summary.stages[name].seconds <= summary.seconds
        assert 0 <= summary.stages[name].hidden <= summary.stages[name].seconds
    assert summary.stages["training"].hidden == summary.stages["waiting"].hidden == 0
    assert summary.stages["stage"].hidden > 0  # all but the first batches are made while one is trained on
    busy = sum(stage.seconds for name, stage in summary.stages.items() if name != "waiting")
    assert summary.overlap == pytest.approx(busy / summary.seconds)
    reader = summary.stages["training"].seconds + summary.stages["waiting"].seconds
    assert reader <= summary.seconds


def test_a_loop_in_a_background_thread_is_no_training():
    with profile() as p:
        for _ in Prefetcher(loader()):
            pass
    found = p.summary().stages
    assert found["training"].times == found["waiting"].times == found["iteration"].times == found["sampling"].times == 5


def test_breaking_off_ends_the_training():
    with profile() as p:
        for _ in loader():
            break
        with span("after"):
            pass
    training, after = (next(s for s in spans_of(p) if s.stage == name) for name in ("training", "after"))
    assert training.end <= after.begin and p.summary().batches == 1


def test_prefetchers_name_their_stages():
    def double(batch):
        return 2 * batch

    assert Prefetcher([1], stages=[double, str]).names == ("iteration", "stage 1: double", "stage 2: str")
    with profile() as p:
        assert list(Prefetcher([1, 2], depth=0, stages=[double])) == [2, 4]
    assert p.summary().stages["stage 1: double"].times == p.summary().stages["iteration"].times == 2
    for names, error in [("ab", ArgumentTypeError), (3, ArgumentTypeError), (["a"], ArgumentValueError),
                         (["a", 3], ArgumentValueError)]:  # fmt: skip
        with pytest.raises(error, match="names needs"):
            Prefetcher([1], stages=[double], names=names)


def test_subgraphs_and_histories(tmp_path):
    store, filed = HistoryStore(300, [4], "cpu"), HistoryStore(300, [4], "cpu", storage="mmap", path=tmp_path / "file")
    with profile() as p:
        for batch in SubgraphLoader(GRAPH, X, ptr=[0, 100, 300], batch_size=1, device="cpu"):
            for table in (store[0], filed[0]):
                table.push(batch.x[: batch.batch_size, :4], offset=batch.offset, count=batch.count)
            store[0].pull([1, 2, 3])
            store[0].pull_async([1, 2]).wait()
            store.prefetch([5])
            store[0].pull([5])
        filed.synchronize()
    found = p.summary().stages
    assert found["sampling"].times == found["gathering"].times == 2
    assert found["history push"].times == 4 and found["history push"].num_bytes == 2 * 300 * 4 * 4
    assert found["history pull"].times == 6 and found["history pull"].num_bytes == 2 * (3 + 2 + 1) * 4 * 4
    assert found["history lane"].times == 6  # what is written to the file, and pulled ahead
    filed.close()


def test_bytes_and_hit_rate_are_those_of_the_period():
    epochs = loader()
    list(epochs)
    before = epochs.features.stats()["host"]["rows"]
    with profile() as p:
        rows = sum(len(batch.n_id) for batch in epochs)
    list(epochs)
    assert before > 0
    (served,) = p.summary().features
    assert served.rows == {"host": rows} and served.bytes == {"host": rows * 28} and served.hit_rate == 1.0
    assert served.name == "float32 [300, 7]"
    with profile() as p:
        pass
    assert p.summary().features == []


def test_two_tiers_are_told_apart():
    class Source:
        shape, dtype, count = (9, 2), np.dtype(np.int16), 1

        def stats(self):
            return {"device": {"rows": 3 * self.count, "bytes": 12 * self.count}, "pinned": {"rows": 1, "bytes": 4}}

    source = Source()
    with profile() as p:
        trace.watch(source)
        source.count = 5
        trace.watch(source)
    (served,) = p.summary().features
    assert served.rows == {"device": 12, "pinned": 0} and served.bytes == {"device": 48, "pinned": 0}
    assert served.hit_rate == 1.0 and "device    12   48 B       100.0%" in p.table()


def test_peak_memory_is_of_the_period():
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("the system does not set back a peak")
    np.ones(200 << 20, np.uint8)  # freed before
    with profile() as p:
        block = np.ones(100 << 20, np.uint8)  # more than an allocator keeps for later
        del block
    peak = p.summary().memory["process"]
    assert 90 << 20 < peak.peak - peak.before < 190 << 20


def test_two_profiles_in_turn():
    with profile() as first:
        list(loader())
    with profile() as second, span("mine"):
        pass
    assert first.summary().batches == 5 and set(second.summary().stages) == {"mine"}
    assert second.summary().features == []
    with pytest.raises(ArgumentValueError, match="profile needs to be used once"), first:
        pass
    assert trace._recorder is None


def test_one_at_a_time():
    with profile() as p:
        with pytest.raises(ArgumentValueError, match="no other one at the same time"), profile():
            pass
        with span("still recorded"):
            pass
    assert p.summary().stages["still recorded"].times == 1


def test_exceptions_pass_and_end_it():
    with pytest.raises(ZeroDivisionError), profile() as p:
        for _ in loader():
            with span("failing"):
                _ = 1 / 0
    assert trace._recorder is None
    assert p.summary().stages["failing"].times == 1
    with profile() as p, pytest.raises(RuntimeError, match="stage"):

        def failing(batch):
            raise RuntimeError("stage")

        list(Prefetcher([1], stages=[failing], names=("making", "failing")))
    assert p.summary().stages["failing"].times == 1 and p.summary().batches == 0


def test_it_is_read_when_it_has_ended(tmp_path):
    p = profile()
    with p:
        for call in (p.summary, p.table, p.as_dict, lambda: p.plot(tmp_path / "a"),
                     lambda: p.chrome_trace(tmp_path / "a")):  # fmt: skip
            with pytest.raises(ArgumentValueError, match="to have ended"):
                call()
        assert str(p) == "Profile(not ended)"
    assert str(p) == p.table()
    assert list(tmp_path.iterdir()) == []


def test_bad_arguments(tmp_path):
    for options, error in [({"limit": 0}, ArgumentValueError), ({"limit": 1.5}, ArgumentTypeError),
                           ({"device": "cuda:77"}, DeviceError), ({"device": []}, ArgumentTypeError)]:  # fmt: skip
        with pytest.raises(error):
            profile(**options)
    assert trace._recorder is None
    with profile() as p:
        time.sleep(0.001)
    for call in (p.plot, p.chrome_trace):
        with pytest.raises(ArgumentTypeError, match="path needs"):
            call(3)
    for begin, end, error in [(-1, None, ArgumentValueError), (9, None, ArgumentValueError), (0, 0, ArgumentValueError),
                              ("a", None, ArgumentTypeError), (0, "a", ArgumentTypeError)]:  # fmt: skip
        with pytest.raises(error, match=r"begin|end needs"):
            p.plot(tmp_path / "a.png", begin, end)


def test_memory_is_bounded():
    with profile(limit=10) as p:
        for number in range(50):
            with span("a", number):
                pass
    assert p.summary().full and p.summary().spans == len(spans_of(p)) == 10
    assert p._recorder.end == spans_of(p)[-1].end  # what came later does not count
    assert "the recording ended after 10 spans" in p.table()


def test_it_keeps_no_features_alive():
    epochs = loader()
    features = weakref.ref(epochs.features)
    with profile() as p:
        list(epochs)
    del epochs
    gc.collect()
    assert features() is None and p.summary().features


def test_plain_data():
    with profile() as p:
        list(loader())
    found = p.as_dict()
    assert json.loads(json.dumps(found)) == found
    assert set(found) == {"seconds", "batches", "overlap", "stages", "features", "memory", "spans", "full"}
    assert set(found["stages"]["sampling"]) == {"times", "seconds", "hidden", "num_bytes"}


def test_the_table():
    with profile() as p:
        for _ in loader():
            time.sleep(0.002)
    head, _, titles, *lines = p.table().splitlines()
    assert head.endswith("stages at work on average") and "5 batches" in head
    assert titles.split("  ")[0] == "stage"
    assert lines[0].startswith("training") and lines[0].split()[1] == "5"
    assert all(len(line) <= 100 for line in p.table().splitlines())
    for name in ("sampling", "gathering", "conversion", "waiting", "float32 [300, 7]", "process"):
        assert sum(line.startswith(name) for line in lines) == 1
    with profile() as p:
        pass
    assert "0 batches" in p.table()


# --- arithmetic ----------------------------------------------------------------------------------------------------

SPANS = st.lists(
    st.builds(
        lambda stage, thread, begin, length: Span(stage, thread, begin, begin + length, None, 0),
        st.sampled_from(["waiting", "training", "conversion", "sampling"]), st.integers(0, 2), st.integers(0, 12),
        st.integers(0, 9),
    ),
    max_size=8,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(SPANS)
def test_stages_equal_a_count_of_moments(spans):
    """Moment by moment, each thread is at the stage that it began last: the naive way of saying it."""
    begin, end = 2, 15
    own, hidden = Counter(), Counter()
    for moment in range(begin, end):
        at, training = {}, set()
        for thread in range(3):
            within = [s for s in spans if s.thread == thread and s.begin <= moment < s.end]
            # Of those that began together, the outermost is the longest; cut to the period as they are.
            within.sort(key=lambda s: (max(s.begin, begin), -min(s.end, end)))
            if within:
                at[thread] = within[-1].stage
                if any(s.stage == "training" for s in within) and at[thread] not in ("waiting", "conversion"):
                    training.add(thread)
        for thread, stage in at.items():
            own[stage] += 1
            hidden[stage] += bool(training - {thread})
    found = stages(spans, (begin, end))
    for stage in found:
        same = [s for s in spans if s.stage == stage]
        assert found[stage].times == len(same)
        assert round(found[stage].seconds * 1e9) == own[stage], stage
        assert round(found[stage].hidden * 1e9) == hidden[stage], stage
    whole = segments(spans, (begin, end))
    for one, two in itertools.pairwise(whole):
        assert one.thread < two.thread or one.end <= two.begin


# --- files ---------------------------------------------------------------------------------------------------------


def test_the_chrome_trace(tmp_path):
    epochs = loader()
    with profile() as p:
        for _ in range(2):
            for _ in epochs:
                with span("history push") as pushed:
                    pushed.moved(5)
        for _ in zip(epochs, epochs, strict=True):  # of two loops in turn, spans do not nest
            pass
    p.chrome_trace(tmp_path / "trace.json")
    written = json.loads((tmp_path / "trace.json").read_text())
    assert set(written) == {"traceEvents", "displayTimeUnit", "otherData"} and written["otherData"] == p.as_dict()
    events = written["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X"}
    times = [event for event in events if event["ph"] == "X"]
    assert len(times) == p.summary().spans
    assert Counter(event["name"] for event in times) == {n: s.times for n, s in p.summary().stages.items()}
    for event in times:
        assert {"name", "cat", "ph", "pid", "tid", "ts", "dur", "args"} == set(event)
        assert event["ts"] >= 0 and event["dur"] >= 0 and event["ts"] + event["dur"] <= p.summary().seconds * 1e6 + 1
    assert all(event["args"] == {"bytes": 5} for event in times if event["name"] == "history push")
    assert {event["args"]["batch"] for event in times if event["name"] == "training"} == set(range(5))
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert set(names) == {event["tid"] for event in times}
    # Threads of epochs that follow each other share a row; those of the two loops in turn may not.
    rows = Counter(names.values())
    assert set(rows) == {"MainThread (waiting)", "gglspeedup-prefetch (gathering)", "gglspeedup-prefetch (sampling)"}
    assert rows["MainThread (waiting)"] == 1 and max(rows.values()) <= 2
    for row in names:
        ends = []
        for event in sorted((e for e in times if e["tid"] == row), key=lambda e: (e["ts"], -e["dur"])):
            while ends and ends[-1] <= event["ts"] + 1e-3:
                ends.pop()
            assert not ends or event["ts"] + event["dur"] <= ends[-1] + 1e-3
            ends.append(event["ts"] + event["dur"])


def test_threads_that_follow_each_other_share_a_row(tmp_path):
    """Of one name and first stage; 0 and 2 do, 1 is there at the same time, 3 does something else, 4 is called so."""
    threads = ["worker", "worker", "worker", "worker", "other"]
    times = [("a", 0, 0, 5), ("b", 0, 1, 2), ("a", 1, 4, 9), ("a", 2, 5, 7), ("b", 3, 20, 21), ("a", 4, 30, 31)]
    spans = [Span(stage, thread, begin, end, None, 0) for stage, thread, begin, end in times]
    write_trace(str(tmp_path / "trace.json"), spans, threads, (0, 31), {})
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    rows = {event["ts"]: event["tid"] for event in events if event["ph"] == "X"}
    assert [rows[begin / 1e3] for _, _, begin, _ in times] == [1, 1, 2, 1, 3, 4]


def test_a_picture_needs_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr("gglspeedup.timeline.find_spec", lambda name: None)
    with profile() as p:
        list(loader())
    with pytest.raises(MissingPackageError, match="plot needs the package matplotlib"):
        p.plot(tmp_path / "none.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_picture(tmp_path):
    if importlib.util.find_spec("matplotlib") is None:
        missing("matplotlib")
    import matplotlib.image

    with profile() as p:
        for _ in loader():
            time.sleep(0.001)
    pictures = []
    for number, part in enumerate([(), (0.0, p.summary().seconds / 2), (0, 1000)]):
        path = tmp_path / f"{number}.png"
        p.plot(path, *part)
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        pictures.append(matplotlib.image.imread(path))
    training = np.array([0x1F, 0x77, 0xB4]) / 255  # the first of matplotlib's colours
    assert (np.abs(pictures[0][..., :3] - training).max(2) < 0.01).sum() > 20
    assert not np.array_equal(pictures[0], pictures[1]) and np.array_equal(pictures[0], pictures[2])
    with profile() as p:
        pass
    p.plot(tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 1000


def test_profile_is_a_function():
    assert callable(gglspeedup.profile) and gglspeedup.profile is profile
