"""The measurement, and its verdict."""

import pytest
import torch
from torch import nn

from sparsekit import _timing
from sparsekit._timing import CpuClock, Timing
from sparsekit.compress.tune import measure

ANSWER = {"plain": Timing(1.0, 1.0, 0.0, 1.0, 0.1), "prepacked": Timing(0.5, 2.0, 1.0, 1.0, 0.1), "2:4": None}


class Clock:
    """Stands in for the module ``time``: only ``Slowed`` lets it pass."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture(autouse=True)
def fake_time(monkeypatch):
    fake = Clock()
    monkeypatch.setattr(_timing, "time", fake)
    monkeypatch.setattr(Slowed, "clock", fake)


class Slowed(nn.Module):
    clock = None

    def __init__(self, linear, seconds=0.001, factor=1.0):
        super().__init__()
        self.linear, self.seconds, self.factor = linear, seconds, factor

    def forward(self, x):
        self.clock.now += self.seconds
        return self.linear(x) * self.factor


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


@pytest.mark.parametrize(
    ("ratio", "wins", "spread", "undecided"),
    [
        (1.0, 0.5, 0.51, True),
        (1.0, 0.5, 0.5, False),
        (2.0, 1.0, 0.9, False),
        (0.6, 0.1, 0.8, True),
        (0.5, 0.1, 1.0, False),
    ],
)
def test_undecided(ratio, wins, spread, undecided):
    assert Timing(1.0, ratio, wins, 1.0, spread).undecided is undecided


def test_the_plain_layer_shows_how_much_the_machine_was_disturbed():
    linear = nn.Linear(8, 4)

    class Disturbed(Slowed):
        turn = 0

        def forward(self, x):
            self.turn += 1
            self.seconds = 0.004 if self.turn // 2 % 2 else 0.001  # every second call is timed
            return super().forward(x)

    timings = race(Disturbed(linear), torch.randn(3, 8), budget=1e-9, other=Slowed(linear))
    assert timings["plain"].ratio == 1 and timings["plain"].spread > 0.5


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
        _timing.pessimistic(first, second)
        == worse
        == _timing.pessimistic(second | {"plain": first["plain"]}, first | {"plain": second["plain"]})
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
            return super().forward(x) + (self.turn > 1 + _timing.MIN_ROUNDS)

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
    assert count == 1 + 2 * _timing.MIN_ROUNDS + 1  # a check, the rounds with an untimed call in each, and a check


def test_last_level_cache_is_plausible():
    assert 2**18 <= _timing.last_level_cache() <= 2**31
    assert _timing.cache_bytes(torch.device("cpu")) == _timing.last_level_cache()


def test_a_weight_that_stays_in_the_cache_is_timed_from_there():
    calls = []
    clock = CpuClock(False)
    clock.seconds(lambda x: calls.append(x), torch.randn(1))
    assert len(calls) == clock.calls + 1  # the first one brings it back, after what took its turn before
