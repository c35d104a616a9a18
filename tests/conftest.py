import os
import threading
from contextlib import nullcontext
from pathlib import Path

import hypothesis
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: each computes in one thread
    os.environ["OMP_NUM_THREADS"] = "1"

import torch
from process_state import process_state

if not torch.cuda.is_available():  # Triton reads it when it is first imported
    os.environ["TRITON_INTERPRET"] = "1"

from sparsekit.compress import Timing, candidates, convolutions, forms, tune, whole
from sparsekit.ops import force_simd, simd_levels

os.environ["SPARSEKIT_TUNE_CACHE"] = "0"  # the user's measurements are neither used nor changed

hypothesis.settings.register_profile(
    "sparsekit",
    deadline=None,
    database=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("sparsekit")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _leaves_the_process_as_it_was():
    before = process_state()
    yield
    assert process_state() == before


LEVELS = simd_levels() or ("reference",)


@pytest.fixture(params=LEVELS)
def every_simd(request):
    """Runs the test once at every SIMD level of this machine; once on plain PyTorch without the extension."""
    with force_simd(request.param) if simd_levels() else nullcontext():
        yield request.param


@pytest.fixture(params=[level for level in LEVELS if not level.endswith("_vnni")])
def simd(request):
    """Does what ``every_simd`` does, without the levels that differ from another one in ``linear24q_int8`` alone."""
    with force_simd(request.param) if simd_levels() else nullcontext():
        yield request.param


@pytest.fixture(scope="session")
def gpu():
    """Where Triton kernels run: the GPU, or the CPU in Triton's interpreter."""
    pytest.importorskip("triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def threads():
    """``torch.set_num_threads``, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data():
    """The folder of real data sets and checkpoints."""
    folder = os.environ.get("SPARSEKIT_DATA")
    if not folder:
        pytest.skip("SPARSEKIT_DATA names no folder of real data")
    return Path(folder)


@pytest.fixture
def ratios(monkeypatch):
    """Replaces the measurement: candidate -> ratio, or a function of the token count; records what was asked.

    ``"whole"`` is the ratio of the whole model, or a function of the names compressed and of those that they are
    compared with. ``"forms"`` is that of one form for all layers, or a function of its modules and of those chosen.
    """
    table = {"2:4": 3.0, "2:4 input pairs": 0.01, "2:4 row pairs": 0.01, "tiered": 3.0, "prepacked": 2.0}
    table |= {"dense": 1.0, "whole": 1.5, "forms": 1.0}

    def measure(calls, plain, x, *, dense, clock, budget):
        measured.append((tuple(calls), tuple(x.shape), clock.evict_cache))
        timings = {}
        for name in ("plain", *calls):
            ratio = 1.0 if name == "plain" else table[name]
            ratio = ratio(len(x)) if callable(ratio) else ratio
            timings[name] = ratio and Timing(len(x) / ratio, ratio, float(ratio > 1), ratio, 0.0)
        return timings

    def compare_passes(swap, shown, over, work):
        ratio = table["whole"](set(shown), set(over)) if callable(table["whole"]) else table["whole"]
        return tuple(Timing(1 / ratio, ratio, 1.0, ratio, 0.0) for _ in work.batches)

    def compare_forms(swap, shown, over, work):
        ratio = table["forms"](shown, over) if callable(table["forms"]) else table["forms"]
        return tuple(Timing(1 / ratio, ratio, 1.0, ratio, 0.0) for _ in work.batches)

    measured = table["measured"] = []
    monkeypatch.setattr(whole, "compare_passes", compare_passes)
    monkeypatch.setattr(forms, "compare_passes", compare_forms)
    monkeypatch.setattr(tune, "measure", measure)
    compiled = {"cpu": "avx2"}
    monkeypatch.setattr(candidates, "backends", lambda: {"linear24": compiled, "linear_tiered": compiled})
    monkeypatch.setattr(convolutions, "backends", lambda: {"conv2d24": compiled})
    return table


@pytest.fixture
def ranks():
    """Runs ``act(rank)`` in two threads that are ranks to torch.distributed; returns what they gave or raised."""

    import torch.distributed as dist
    from torch.testing._internal.distributed.multi_threaded_pg import _install_threaded_pg, _uninstall_threaded_pg

    def run(act):
        results, store = [None, None], dist.HashStore()

        def one(rank):
            try:
                dist.init_process_group("threaded", rank=rank, world_size=2, store=store)
                results[rank] = act(rank)
            except BaseException as error:
                results[rank] = error
            finally:
                if dist.is_initialized():
                    dist.destroy_process_group()

        threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads), "they wait for each other"
        return results

    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    _install_threaded_pg()
    yield run
    torch._C._distributed_c10d._set_thread_isolation_mode(False)
    _uninstall_threaded_pg()
