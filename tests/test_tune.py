"""The measurement and its cache."""

import json
import multiprocessing
import os

import pytest
import torch
from torch import nn

from sparsekit.compress import cache, clock, tune
from sparsekit.compress.cache import remembered
from sparsekit.compress.clock import CpuClock
from sparsekit.compress.tune import Timing, measure

KEY = {"shape": (4, 8), "candidates": ("prepacked",), "tokens": 1, "evict_cache": False}
ANSWER = {"plain": Timing(1.0, 1.0, 0.0, 1.0, 0.1), "prepacked": Timing(0.5, 2.0, 1.0, 1.0, 0.1), "2:4": None}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEKIT_TUNE_CACHE", str(tmp_path / "tune"))
    return tmp_path / "tune"


class Clock:
    """Stands in for the module ``time``: only ``Slowed`` lets it pass."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture(autouse=True)
def fake_time(monkeypatch):
    fake = Clock()
    monkeypatch.setattr(tune, "time", fake)
    monkeypatch.setattr(clock, "time", fake)
    monkeypatch.setattr(Slowed, "clock", fake)


class Slowed(nn.Module):
    clock = None

    def __init__(self, linear, seconds=0.001, factor=1.0):
        super().__init__()
        self.linear, self.seconds, self.factor = linear, seconds, factor

    def forward(self, x):
        self.clock.now += self.seconds
        return self.linear(x) * self.factor


def never():
    raise AssertionError("measured again")


def race(plain, x, budget=0.01, evict_cache=False, dense=(), **calls):
    return measure(calls, plain, x, dense=dense, clock=CpuClock(evict_cache), budget=budget)


@pytest.mark.parametrize("evict_cache", [False, True], ids=["warm", "cold"])
def test_measures_ratio_wins_and_best_dense(evict_cache):
    linear = nn.Linear(8, 4)
    calls = {
        "fast": Slowed(linear, 0.001),
        "middle": Slowed(linear, 0.002),
        "wrong": Slowed(linear, 0.0, 1.01),
    }
    timings = race(
        Slowed(linear, 0.004), torch.randn(3, 8), evict_cache=evict_cache, dense=("middle", "wrong"), **calls
    )
    assert list(timings) == ["plain", "fast", "middle", "wrong"]
    assert timings["wrong"] is None
    for name, seconds, ratio, wins, best_dense in (
        ("plain", 0.004, 1.0, 0.0, 0.5),
        ("fast", 0.001, 4.0, 1.0, 2.0),
        ("middle", 0.002, 2.0, 1.0, 1.0),
    ):
        expected = Timing(seconds, ratio, wins, best_dense, 0.0)
        for field, value in vars(timings[name]).items():
            assert value == pytest.approx(vars(expected)[field], abs=1e-6), (name, field)


def test_medians_and_wins_of_an_uneven_race():
    linear = nn.Linear(8, 4)

    class Uneven(Slowed):
        turn = 0

        def forward(self, x):
            self.turn += 1
            self.seconds = 0.008 if self.turn % 3 == 0 else 0.001  # loses every third
            return super().forward(x)

    timing = race(Slowed(linear, 0.004), torch.randn(3, 8), budget=1e-9, uneven=Uneven(linear))["uneven"]
    assert timing.wins == pytest.approx(6 / 9)
    assert timing.ratio == pytest.approx(4)
    assert timing.spread == pytest.approx((4 - 0.5) / 4)
    assert not timing.faster


@pytest.mark.parametrize(
    ("ratio", "wins", "faster"), [(1.05, 0.8, True), (1.04, 1.0, False), (2.0, 0.79, False), (9.0, 1.0, True)]
)
def test_the_rule_of_being_faster(ratio, wins, faster):
    assert Timing(1.0, ratio, wins, 1.0, 0.0).faster is faster


def test_the_worse_of_two_measurements():
    first = {
        "plain": Timing(1.0, 1.0, 0.0, 1.0, 0.1),
        "a": Timing(0.2, 5.0, 0.7, 2.0, 0.3),
        "b": None,
        "c": ANSWER["plain"],
    }
    second = {
        "plain": Timing(3.0, 1.0, 0.0, 1.0, 0.2),
        "a": Timing(0.4, 2.0, 0.9, 1.0, 0.1),
        "b": first["a"],
        "c": None,
    }
    worse = {
        "plain": Timing(2.0, 1.0, 0.0, 1.0, 0.2),  # the larger spread
        "a": Timing(pytest.approx(0.3), 5.0, 0.7, 2.0, 1.5),  # they are that far apart
        "b": None,
        "c": None,
    }
    assert (
        tune.pessimistic(first, second)
        == worse
        == tune.pessimistic(second | {"plain": first["plain"]}, first | {"plain": second["plain"]})
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_a_number_is_wrong(bad):
    linear = nn.Linear(8, 4)
    assert race(Slowed(linear), torch.randn(1, 8), bad=Slowed(linear, 0.0, bad))["bad"] is None


@pytest.mark.parametrize("row", [0, 2, 4])
def test_a_wrong_first_middle_or_last_row_is_found(row):
    class Wrong(nn.Module):
        def forward(self, x):
            y = linear(x)
            y[row] += 1
            return y

    linear = nn.Linear(8, 4)
    assert race(Slowed(linear), torch.randn(5, 8), bad=Wrong())["bad"] is None


def test_what_is_wrong_only_at_the_end_is_found():
    class Flaky(Slowed):
        turn = 0

        def forward(self, x):
            self.turn += 1
            return super().forward(x) + (self.turn > 1 + tune.MIN_ROUNDS)

    linear = nn.Linear(8, 4)
    assert race(Slowed(linear), torch.randn(5, 8), budget=1e-9, flaky=Flaky(linear))["flaky"] is None


def test_budget_bounds_the_rounds(monkeypatch):
    count = 0

    class Counted(Slowed):
        def forward(self, x):
            nonlocal count
            count += 1
            return super().forward(x)

    linear = nn.Linear(8, 4)
    race(Slowed(linear, 0.002), torch.randn(1, 8), budget=1e-9, counted=Counted(linear, 0.002))
    assert count == 1 + tune.MIN_ROUNDS + 1  # a check, the rounds, and a check


def test_remembers(folder):
    assert remembered(KEY, lambda: ANSWER) == ANSWER
    assert remembered(KEY, never) == ANSWER
    (file,) = folder.iterdir()
    key = json.loads(file.read_text())["key"]
    assert {
        "device",
        "threads",
        "simd",
        "torch",
        "sparsekit",
        "extension",
        "shape",
        "tokens",
        "evict_cache",
    } <= key.keys()


@pytest.mark.parametrize("other", [{"tokens": 2}, {"evict_cache": True}, {"shape": (8, 4)}], ids=str)
def test_another_key_is_measured(folder, other):
    remembered(KEY, lambda: ANSWER)
    changed = {"plain": ANSWER["plain"]}
    assert remembered({**KEY, **other}, lambda: changed) == changed
    assert remembered(KEY, never) == ANSWER


def test_threads_are_part_of_the_key(folder, monkeypatch):
    remembered(KEY, lambda: ANSWER)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.raises(AssertionError, match="measured again"):
        remembered(KEY, never)


def test_an_unsteady_measurement_is_not_kept(folder):
    unsteady = {"plain": ANSWER["plain"], "prepacked": Timing(0.5, 2.0, 1.0, 1.0, 0.9)}
    assert remembered(KEY, lambda: unsteady) == unsteady
    assert not folder.exists()


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"key": 1}', b'{"key": {}, "timings": {}}', b"null"],
    ids=["empty", "cut", "list", "bytes", "foreign", "other key", "null"],
)
def test_a_damaged_file_is_written_anew(folder, damage):
    remembered(KEY, lambda: ANSWER)
    (file,) = folder.iterdir()
    file.write_bytes(damage)
    assert remembered(KEY, lambda: ANSWER) == ANSWER
    assert remembered(KEY, never) == ANSWER


def test_damaged_timings_are_measured_again(folder):
    remembered(KEY, lambda: ANSWER)
    (file,) = folder.iterdir()
    entry = json.loads(file.read_text())
    for timings in ([], {"plain": {}}, {"plain": {"seconds": 1}}, {"plain": 3}):
        file.write_text(json.dumps({**entry, "timings": timings}))
        assert remembered(KEY, lambda: ANSWER) == ANSWER


def test_switched_off(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("SPARSEKIT_TUNE_CACHE", "0")
    assert remembered(KEY, lambda: ANSWER) == ANSWER
    assert not list(tmp_path.iterdir())


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("SPARSEKIT_TUNE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remembered(KEY, lambda: ANSWER)
    assert len(list((tmp_path / "sparsekit" / "tune").iterdir())) == 1


def test_a_folder_that_cannot_be_made_costs_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SPARSEKIT_TUNE_CACHE", str(tmp_path / "file"))
    assert remembered(KEY, lambda: ANSWER) == ANSWER


def test_a_failing_measurement_leaves_nothing(folder):
    with pytest.raises(KeyboardInterrupt):
        remembered(KEY, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not folder.exists()


def _hammer(folder, process, mistakes):
    os.environ["SPARSEKIT_TUNE_CACHE"] = folder
    for turn in range(150):
        key = {**KEY, "tokens": turn % 5}
        timings = remembered(key, lambda turn=turn: {"plain": Timing(float(turn % 5), 1.0, 0.0, 1.0, 0.0)})
        if timings["plain"].seconds != turn % 5:
            mistakes.put((process, turn))
        if turn % 3 == process:  # a third party that damages what is there
            for file in cache.Path(folder).glob("*.json"):
                file.unlink(missing_ok=True)


@pytest.mark.slow
def test_two_processes_share_a_cache(tmp_path):
    context = multiprocessing.get_context("spawn")
    mistakes = context.Queue()
    processes = [context.Process(target=_hammer, args=(str(tmp_path), number, mistakes)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert mistakes.empty()
    assert not list(tmp_path.glob("*.tmp"))


def test_last_level_cache_is_plausible():
    assert 2**18 <= clock.last_level_cache() <= 2**31
    assert clock.cache_bytes(torch.device("cpu")) == clock.last_level_cache()
