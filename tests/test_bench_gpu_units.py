"""The pieces of the GPU bench, against answers that a person can check."""

import itertools
import json
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench.gpu import counters, tune
from bench.gpu.clock import DeviceClock, HostClock, Race
from bench.gpu.lab import check_same, reference, relative_error
from bench.gpu.linear import check_close
from bench.gpu.log import Log, last_error, read
from bench.gpu.rehearsal import rehearsal_lab
from bench.usual import rank_mask24, topk_scatter
from sparsekit.ops.nm import nm_mask_reference
from sparsekit.triton_kernels._launch import TABLES, Table


def test_log_is_on_disk_at_once_and_says_what_is_left_out(tmp_path):
    log = Log(tmp_path / "rows.jsonl", 60)
    log.write(first=1)
    assert read(log.path) == [{"first": 1}]
    for _, item in log.each({"a": 1, "b": 2, "c": 3}):
        log.write(item=item)
        log.end = 0.0 if item == 2 else log.end
    assert read(log.path)[1:] == [{"item": 1}, {"item": 2}, {"cut": "2 of 3, the time was up before c"}]
    with log.path.open("a") as file:
        file.write('{"half": ')
    assert len(read(log.path)) == 4
    assert read(tmp_path / "never.jsonl") == []


def test_log_turns_an_exception_into_a_line(tmp_path):
    log = Log(tmp_path / "rows.jsonl", 60)
    with log.guard("a row"):
        raise ValueError("\nwrong\nin two lines")
    assert read(log.path) == [{"what": "a row", "error": "ValueError: wrong"}]

    def lost():
        raise RuntimeError("the device is lost")

    log.healthy = lost
    with pytest.raises(RuntimeError, match="the device is lost"), log.guard("another"):
        raise ValueError("illegal memory access")
    assert read(log.path)[1]["what"] == "another"


def test_the_last_exception_is_what_ended_a_process():
    trace = "Traceback\n  File x\ntorch.AcceleratorError: CUDA error: lost\nCompile with `TORCH_USE_CUDA_DSA`\n"
    assert last_error(trace) == "torch.AcceleratorError: CUDA error: lost"
    assert last_error("one\ntwo\n\n") == "two" and last_error("") == "it said nothing"


def test_race_takes_turns_and_counts_the_buffers(monkeypatch):
    clock, called = [0.0], []

    def call(key, seconds):
        def run():
            called.append(key)
            clock[0] += seconds

        return run

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    race = HostClock().race({"own": [call("own", 1.0)] * 2, "slow": [call("slow", 3.0)]}, budget=0)
    assert race.times == {"own": [1.0, 1.0], "slow": [3.0, 3.0]} and race.host == race.times
    assert called == ["own", "own", "slow", "slow", "own", "own", "own", "own", "slow"]  # once to warm up, two rounds
    assert race.ratios("own") == {"slow": 3.0}
    assert Race({"a": [1.0, 2.0, 3.0]}, {}).spread("a") == 1.0
    assert Race({"a": [1.0, 4.0]}, {"a": [2.0, 3.0]}).calls().times == {"a": [2.0, 4.0]}


def test_buffers_exceed_the_cache():
    clock = HostClock()
    clock.cache = 60 * 2**20
    assert [clock.sets(nbytes) for nbytes in (2**25, 2**20, 2**30)] == [6, 64, 1]


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
def test_device_clock_queues_up_or_replays(monkeypatch, capturable):
    fake = FakeCuda(capturable)
    monkeypatch.setattr("bench.gpu.clock.torch.cuda", fake)

    def call():
        fake.now += 1.0

    clock = DeviceClock(torch.device("cuda", 0))
    assert clock.sets(10) == 30
    race = clock.race({"own": [call, call]}, budget=0, capture=True)
    assert race.seconds()["own"] == pytest.approx(0.25 if capturable else 1.0)
    assert ("own" in race.host) != capturable and len(fake.captured) == capturable
    assert len(race.times["own"]) == 7 and all(cycles >= 50e-6 * 2.1e9 - 1 for cycles in fake.slept)
    assert clock.seconds([call]) == pytest.approx(1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_clock_on_a_gpu():
    device = torch.device("cuda", 0)
    clock, x = DeviceClock(device), torch.randn(2048, 2048, device=device)
    race = clock.race({"small": [lambda: x[:64] + 1] * 4, "large": [lambda: x @ x] * 4}, 0.05, capture=True)
    assert not race.host and race.ratios("small")["large"] > 2


def test_wrong_results_are_named():
    check_same((torch.ones(2), 3), [torch.ones(2)])
    with pytest.raises(ValueError, match=r"1 of 2 entries of result 1 differ"):
        check_same((torch.ones(2), torch.ones(2)), (torch.ones(2), torch.tensor([1.0, 0.0])))
    with pytest.raises(ValueError, match=r"result 0 is torch.float32 \(2,\), not torch.float64 \(2,\)"):
        check_same(torch.ones(2), torch.ones(2).double())
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 5.0])) == pytest.approx(34**-0.5)
    assert check_close(torch.tensor([[2.0]]), torch.tensor([[2.0]])) == 0
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


NCU = """==PROF== Connected to process 1
"ID","Kernel Name","gpu__time_duration.sum","launch__grid_size","sm__throughput.avg.pct_of_peak_sustained_elapsed"
"","","us","","%"
"0","sparse_gemm","120.5","132","81.25"
"""


def test_counters_are_read_from_the_raw_page():
    wanted = {"gpu__time_duration.sum": "120.5 us", "sm__throughput.avg.pct_of_peak_sustained_elapsed": "81.25 %"}
    assert counters.parse(NCU) == [{"kernel": "sparse_gemm", "counters": wanted}]
    assert counters.parse("==ERROR== no permission") == []
    row = {"shape": "4096x4096", "tokens": 4096, "numbers": [12, 4, 2]}
    assert counters.chosen([{"error": "lost"}, row]) == (12, 4, 2)
    assert counters.chosen([row | {"tokens": 1}]) == (0, 1, -1)


def test_counters_say_why_they_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(counters.shutil, "which", lambda tool: "ncu")
    said = SimpleNamespace(stdout="==ERROR== LibraryNotLoaded\n", stderr="")
    monkeypatch.setattr(counters.subprocess, "run", lambda *args, **kwargs: said)
    log = Log(tmp_path / "counters.jsonl", 60)
    counters.measure(None, log)
    assert read(log.path) == [{"name": "ncu", "result": "not measured", "reason": "==ERROR== LibraryNotLoaded"}]
    said.stdout = NCU
    counters.measure(None, log)
    assert read(log.path)[1]["kernel"] == "sparse_gemm"


def test_tune_times_what_is_right_and_keeps_the_fastest(tmp_path, monkeypatch):
    monkeypatch.delitem(TABLES, "toy", raising=False)
    table = Table("toy", {"slow": {"spin": 3}, "fast": {"spin": 1}, "wrong": {"spin": 0}}, {"small": "slow"})
    x, clock = torch.zeros(1), [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def call():
        spin = table.config(x, "small")["spin"]
        clock[0] += spin
        return torch.tensor(spin > 0)

    def workload(lab):
        return [call, call], lambda got: check_same(got, torch.tensor(True))

    lab = rehearsal_lab()
    ((row, choice),) = tune.tune(lab, workload, {})
    assert not list(tune.tune(lab, workload, choice))
    TABLES.pop("toy")
    assert choice == {"": {"toy": {"small": "fast"}}}
    assert row["seconds"] == {"slow": 3.0, "fast": 1.0} and row["best"] == "fast" and row["before"] == "slow"
    assert row["wrong"].keys() == {"wrong"}
    path = tmp_path / "table" / "triton.json"
    tune.keep({"sm_90": {"toy": {"small": "slow"}}}, path)
    tune.keep({"sm_90": {"toy": {"small": "fast"}}, "sm_80": {"toy": {"large": "slow"}}}, path)
    known = json.loads(path.read_text())
    assert known == {"sm_90": {"toy": {"small": "fast"}}, "sm_80": {"toy": {"large": "slow"}}}


@pytest.mark.triton
def test_tune_finds_the_table_of_a_real_kernel():
    nm = pytest.importorskip("sparsekit.triton_kernels.nm")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lab = replace(rehearsal_lab(), device=device, op=lambda name: getattr(nm, name))
    row, choice = next(tune.tune(lab, tune.workloads(lab)["nm_mask 2:4 16x32 bf16"], {}))
    assert row["seconds"].keys() == TABLES[row["kernel"]].configs.keys() and not row["wrong"]
    assert list(choice.values()) == [{row["kernel"]: {row["class"]: row["best"]}}]
