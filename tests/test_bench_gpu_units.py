"""The pieces of the GPU bench, against answers that a person can check."""

import itertools
import json
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_bench_gpu import LAB, ActedKernelClock

from bench.gpu.checks import check_close, check_same, reference
from bench.gpu.clock import KernelClock, Times
from bench.gpu.rows import Rows, read
from bench.gpu.tune import keep, tune
from bench.timing import ratio
from bench.usual import rank_mask24, topk_scatter
from sparsekit.ops.nm import nm_mask_reference
from sparsekit.triton_kernels._launch import TABLES, Table, _measured, user_table


def test_rows_are_on_disk_at_once_and_say_what_is_left_out(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl", 60)
    rows.write(first=1)
    assert read(rows.path) == [{"first": 1}]

    def do(item):
        rows.end = 0.0 if item == 2 else rows.end
        return {"item": item}

    rows.for_each({"a": 1, "b": 2, "c": 3}, do)
    assert read(rows.path)[1:] == [{"item": 1}, {"item": 2}, {"cut": "2 of 3, the time was up before c"}]
    with rows.path.open("a") as file:
        file.write('{"half": ')
    assert len(read(rows.path)) == 4
    assert read(tmp_path / "never.jsonl") == []


def test_an_exception_becomes_a_row(tmp_path):
    def fail(message):
        raise ValueError(message)

    rows = Rows(tmp_path / "rows.jsonl", 60)
    rows.for_each({"one": "\nwrong\nin two lines", "other": "too"}, fail)
    assert read(rows.path) == [
        {"what": "one", "error": "ValueError: wrong"},
        {"what": "other", "error": "ValueError: too"},
    ]


def test_calls_that_differ_in_their_buffers_are_timed_as_one(monkeypatch):
    now = [0.0]

    def call(seconds):
        now[0] += seconds

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    times = ActedKernelClock().time_in_turns(
        {"own": [partial(call, 1.0), partial(call, 2.0)], "slow": [partial(call, 3.0)]}
    )
    assert times.device == {"own": [1.5, 1.5], "slow": [3.0, 3.0]} and times.host == times.device
    assert Times({"a": [1.0, 4.0]}, {"a": [2.0, 3.0]}).eager() == {"a": [2.0, 4.0]}


def test_inputs_exceed_the_cache():
    clock = ActedKernelClock()
    clock.cache = 60 * 2**20
    lab = replace(LAB, clock=clock)
    assert [len(lab.sets(list, nbytes)) for nbytes in (2**25, 2**20, 2**30)] == [6, 64, 1]


class FakeCuda:
    """As much of torch.cuda as the clock asks for: events read a clock that calls advance."""

    def __init__(self, capturable=True):
        self.now, self.slept, self.capturable, self.captured = 0.0, [], capturable, []

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=100)

    def synchronize(self, device=None):
        return

    def _sleep(self, cycles):
        self.slept.append(cycles)

    def Event(self, enable_timing):
        event = SimpleNamespace(at=None, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: (end.at - event.at) * 1e3
        return event

    def CUDAGraph(self):
        def replay():
            self.now += 0.5

        return SimpleNamespace(replay=replay)

    @contextmanager
    def graph(self, graph):
        if not self.capturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.captured.append(graph)
        yield


@pytest.mark.parametrize("capturable", [True, False])
def test_clock_queues_up_or_replays(monkeypatch, capturable):
    fake = FakeCuda(capturable)
    monkeypatch.setattr("bench.gpu.clock.torch.cuda", fake)

    def call():
        fake.now += 1.0

    clock = KernelClock(torch.device("cuda", 0))
    assert clock.cache == 100
    times = clock.time_in_turns({"own": [call, call]}, budget=0, capture=True)
    assert times.device["own"] == pytest.approx([0.25 if capturable else 1.0] * 7)
    assert ("own" in times.host) != capturable and len(fake.captured) == capturable
    assert all(cycles >= 50e-6 * 2.1e9 - 1 for cycles in fake.slept)
    assert clock.seconds([call]) == pytest.approx(1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_clock_on_a_gpu():
    device = torch.device("cuda", 0)
    clock, x = KernelClock(device), torch.randn(2048, 2048, device=device)
    times = clock.time_in_turns({"small": [lambda: x[:64] + 1] * 4, "large": [lambda: x @ x] * 4}, 0.05, capture=True)
    assert not times.host and ratio(times.device, "small", "large") > 2


def test_wrong_results_are_named():
    check_same((torch.ones(2), 3), [torch.ones(2)])
    with pytest.raises(ValueError, match=r"1 of 2 entries of result 1 differ"):
        check_same((torch.ones(2), torch.ones(2)), (torch.ones(2), torch.tensor([1.0, 0.0])))
    with pytest.raises(ValueError, match=r"result 0 is torch.float32 \(2,\), not torch.float64 \(2,\)"):
        check_same(torch.ones(2), torch.ones(2).double())
    check_close(torch.tensor([[2.0]]), torch.tensor([[2.0]]))
    with pytest.raises(ValueError, match=r"a relative error of 0\.5"):
        check_close(torch.tensor([[1.0]]), torch.tensor([[2.0]]))
    with pytest.raises(ValueError, match="a relative error of nan"):
        check_close(torch.tensor([[float("nan")]]), torch.tensor([[2.0]]))
    with pytest.raises(ValueError, match=r"has shape \(1,\), not \(2,\)"):
        check_close(torch.ones(1), torch.ones(2))


def test_references_are_found_by_name():
    assert reference("nm_mask") is nm_mask_reference
    with pytest.raises(LookupError, match="no op is called nm_msk"):
        reference("nm_msk")


def test_rank_by_comparisons_is_the_mask():
    every = torch.tensor(list(itertools.product([-2.0, -1.0, 0.0, 1.0], repeat=4)))
    assert torch.equal(rank_mask24(every), nm_mask_reference(every, 2, 4))
    distinct = torch.randn(16, 64)
    assert torch.equal(rank_mask24(distinct), topk_scatter(distinct, 2, 4))


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Tunes calls; returns the rows, and what the user's table has then."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    keep("", "toy", "large", "slow")
    known = set()

    def run(calls, check):
        rows = Rows(tmp_path / "rows.jsonl", 60)
        tune(ActedKernelClock(), rows, known, calls, check)
        return read(rows.path), json.loads(user_table().read_text())

    yield run
    _measured.cache_clear()


def test_tune_times_what_is_right_and_keeps_the_fastest(tuned, monkeypatch):
    monkeypatch.delitem(TABLES, "toy", raising=False)
    table = Table("toy", {"slow": {"spin": 3}, "fast": {"spin": 1}, "wrong": {"spin": 0}}, {"small": "slow"})
    x, clock = torch.zeros(1), [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def call():
        spin = table.config(x, "small")["spin"]
        clock[0] += spin
        return torch.tensor(spin > 0)

    def check(got):
        check_same(got, torch.tensor(True))

    (row,), kept = tuned([call, call], check)
    assert kept == {"": {"toy": {"small": "fast", "large": "slow"}}}
    assert row["seconds"] == {"slow": 3.0, "fast": 1.0} and row["best"] == "fast" and row["before"] == "slow"
    assert row["wrong"].keys() == {"wrong"}
    assert table.name("", "small") == "fast"
    assert tuned([call, call], check)[0] == []  # this run has chosen
    TABLES.pop("toy")


@pytest.mark.triton
def test_tune_finds_the_table_of_a_real_kernel(tuned, gpu):
    nm_mask = pytest.importorskip("sparsekit.triton_kernels.nm").nm_mask
    score = torch.randn(16, 32, device=gpu)
    expected = nm_mask_reference(score, 2, 4)
    (row,), kept = tuned([partial(nm_mask, score, 2, 4)], lambda got: check_same(got, expected))
    assert row["seconds"].keys() == TABLES[row["kernel"]].configs.keys() and not row["wrong"]
    assert {row["class"]: row["best"]} in [kernels.get(row["kernel"]) for kernels in kept.values()]
