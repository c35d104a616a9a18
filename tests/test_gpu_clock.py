"""The clock of a GPU, and the key of its measurements, on an acted GPU."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from sparsekit import _timing
from sparsekit._timing import Timing
from sparsekit.compress.cache import remembered

KEY = {"shape": (4, 8), "tokens": 1}
ANSWER = {"plain": Timing(1.0, 1.0, 0.0, 1.0, 0.1)}


def never():
    raise AssertionError("measured again")


class Gpu:
    """Stands in for ``torch.cuda``: work takes the time that it says, events read the device's own clock."""

    now = 0.0

    def Event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace(synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: (end.at - event.at) * 1e3
        return event

    def device(self, device):
        return nullcontext()

    def _sleep(self, cycles):
        self.now += cycles / 2e9

    def get_device_properties(self, device):
        return SimpleNamespace(
            name="GPU 9", major=9, minor=0, multi_processor_count=132, L2_cache_size=50 * 2**20, gcnArchName=""
        )


@pytest.mark.parametrize("evict_cache", [False, True], ids=["", "evicted"])
@pytest.mark.parametrize(
    ("host", "device", "graphs", "expected"),
    [(0.001, 0.003, False, 0.003), (0.004, 0.003, False, 0.004), (0.004, 0.003, True, 0.003)],
)
def test_a_gpu_is_as_slow_as_its_device_or_its_host(monkeypatch, evict_cache, host, device, graphs, expected):
    gpu, now = Gpu(), 0.0
    monkeypatch.setattr(torch, "cuda", gpu)
    monkeypatch.setattr(_timing, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(_timing, "cache_bytes", lambda device: 1024)

    def call(x):
        nonlocal now
        now += host
        gpu.now += device

    timer = _timing.GpuClock(torch.device("cpu"), evict_cache, graphs)
    assert timer.evicted.nbytes == (2048 if evict_cache else 0)
    timer.start(call, torch.randn(2, 3))
    assert timer.seconds(call, torch.randn(2, 3)) == pytest.approx(expected)


def test_a_clock_for_every_device(monkeypatch):
    assert type(_timing.clock(torch.device("cpu"), evict_cache=True, graphs=True)) is _timing.CpuClock
    monkeypatch.setattr(_timing, "GpuClock", lambda *args: args)
    device = torch.device("cuda", 0)
    assert _timing.clock(device, evict_cache=False, graphs=True) == (device, False, True)


def test_the_key_of_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEKIT_TUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch, "cuda", Gpu())
    device = torch.device("cuda", 0)
    assert _timing.cache_bytes(device) == 50 * 2**20
    remembered(KEY, lambda: ANSWER, device)
    assert remembered(KEY, never, torch.device("cuda", 1)) == ANSWER  # the same model
    (file,) = tmp_path.iterdir()
    key = json.loads(file.read_text())["key"]
    assert {"device", "capability", "torch", "cuda", "cusparselt", "triton", "kernels", "sparsekit"} <= key.keys()
    assert key["device"] == "GPU 9" and key["capability"] == [9, 0]
    with pytest.raises(AssertionError, match="measured again"):
        remembered(KEY, never)  # on the CPU
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 9999)
    with pytest.raises(AssertionError, match="measured again"):
        remembered(KEY, never, device)
