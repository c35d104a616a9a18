"""compress_ on a GPU, acted on the CPU: what is raced, and what is refused."""

import pytest
import torch
from compressing import decisions, reasons
from table_clock import TableClock, batches_of, install_clock, model_of, up_to_16
from torch import nn
from vendor import OWN_ORDER, Vendor, install

import sparsekit as sk
from sparsekit import _timing
from sparsekit.compress import gpu
from sparsekit.nn import Route

SM90 = "cusparselt_sm90"


@pytest.fixture
def table(monkeypatch):
    return install_clock(monkeypatch)


@pytest.fixture(autouse=True)
def vendor(monkeypatch):
    return install(monkeypatch, Vendor())


def test_wrong_algorithms_are_refused(table, vendor):
    vendor.wrong = (0, 2)
    table |= {(2, 1, -1): 0.1, (1, 1, -1): 0.5}
    model = model_of()
    report = sk.compress_(model, batches_of(32))
    assert model[0].up.plan.routes == (Route(32, "hardware", 1),)
    assert f"{SM90}:0:1:-1: a wrong result at 32 tokens; {SM90}:2:1:-1: a wrong result" in report.layers[0].reason
    assert report.layers[0].timings[32][f"{SM90}:2:1:-1"] is None
    vendor.wrong = (0, 1, 2, 3)
    model, table["linear24"] = model_of(), 9.0
    report = sk.compress_(model, batches_of(32))
    assert "1 more wrong results" in report.layers[0].reason and type(model[0].up) is nn.Linear


def test_an_algorithm_that_is_wrong_now_and_then_is_refused(table, vendor):
    right, count = vendor.sparse_mm, 0

    def flaky(compressed, dense, **options):
        nonlocal count
        y = right(compressed, dense, **options)
        if options["alg_id"] == 2 and options["split_k"] == 1:
            count += 1
            return y * (1 if count % 3 else 2)
        return y

    torch._cslt_sparse_mm = flaky  # undone with the vendor
    table |= {(2, 1, -1): 0.1, (1, 1, -1): 0.5}
    model = model_of()
    report = sk.compress_(model, batches_of(32), where=lambda name, module: name == "0.up")
    assert report.layers[0].timings[32][f"{SM90}:2:1:-1"] is None
    assert model[0].up.plan.routes == (Route(32, "hardware", 1),)


def test_split_k_of_the_best_algorithms_is_searched(table):
    table |= {(3, 1, -1): 0.8, (1, 1, -1): 0.9, (3, 4, 2): 0.3, (0, 8, 1): 0.01}
    model = model_of()
    sk.compress_(model, batches_of(8))
    assert model[0].up.plan.routes == (Route(8, "hardware", 3, 4, 2),)
    asked = {name for made in table["clocks"] for name, _ in made.asked}
    assert {(1, 2, 1), (3, 8, 2)} <= asked and (0, 8, 1) not in asked
    assert not [name for name in asked if isinstance(name, tuple) and name[0] > 3]  # ids that it has not


def test_what_the_vendor_suggests_races_too(table, monkeypatch):
    monkeypatch.setattr(gpu, "suggest", lambda *args: (0, 16, 1))
    table |= {(0, 16, 1): 0.2}
    model = model_of()
    sk.compress_(model, batches_of(8))
    assert model[0].up.plan.routes == (Route(8, "hardware", 0, 16, 1),)

    def refuse(*args):
        raise RuntimeError("search failed")

    monkeypatch.setattr(gpu, "suggest", refuse)
    table |= {(1, 1, -1): 0.5}
    sk.compress_(model := model_of(), batches_of(8))
    assert model[0].up.plan.routes == (Route(8, "hardware", 1),)


@pytest.mark.parametrize(("cutlass", "layout"), [(0.3, "cutlass_sm80"), (0.7, "cusparselt_sm80")])
def test_on_ampere_the_better_library_packs(table, vendor, monkeypatch, cutlass, layout):
    install(monkeypatch, Vendor("cusparselt_sm80"), (8, 0))
    table |= {"linear24": up_to_16(0.5, 0.9), (0, 1, -1): lambda tokens: 0.5}
    seconds = TableClock.seconds

    def by_library(self, call, x):
        if getattr(call, "layout", "") == "cutlass_sm80":
            return cutlass
        return seconds(self, call, x)

    monkeypatch.setattr(TableClock, "seconds", by_library)
    model = model_of()
    x = torch.randn(64, 16).half()
    expected = model(x)
    sk.compress_(model, batches_of(8, 64))
    assert model[0].up.plan.layout == layout
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)


def test_a_layout_that_only_the_vendor_knows(table, monkeypatch):
    install(monkeypatch, Vendor(OWN_ORDER))
    table["other"] = 0.5
    model, x = model_of(), torch.randn(8, 16).half()
    expected = model(x)
    report = sk.compress_(model, x)
    assert model[0].up.plan.layout == "cusparselt" and "its own compressor packs" in report.layers[0].reason
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)


def test_what_tensor_cores_do_not_take_gets_the_decode_kernel(table, vendor):
    table |= {"linear24": 0.5, "other": 0.1}
    model, x = model_of(torch.float32), torch.randn(8, 16)
    expected = model(x)
    report = sk.compress_(model, x)
    assert model[0].up.plan.routes == (Route(8, "sparse"),) and model[0].up.hardware is None
    assert "16 bits only" in report.layers[0].reason
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    odd = nn.Sequential(nn.Linear(19, 8)).half().eval()
    sk.prune_(odd, sk.Magnitude("2:4"))
    report = sk.compress_(odd, torch.randn(8, 19).half())
    assert "19 columns end in a group of three" in report.layers[0].reason and odd[0].plan.layout is None
    assert not vendor.calls


def test_without_libraries_and_for_dense_layers(table, monkeypatch):
    table["linear24"] = 0.5
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    report = sk.compress_(model_of(), batches_of(4))
    assert all("without cuSPARSELt" in reason for reason in reasons(report).values())
    assert set(decisions(report).values()) == {"2:4"}
    report = sk.compress_(model_of(pruned=False), batches_of(4))
    assert set(reasons(report).values()) == {"2:4: not 2:4; tiered: hardly sparse"}


def test_graphs_and_a_cold_cache_reach_the_clock(table, monkeypatch):
    for size, evict_cache, graphs in ((2**20, False, True), (100, True, False)):
        monkeypatch.setattr(_timing, "cache_bytes", lambda device, size=size: size)
        table["clocks"].clear()
        sk.compress_(model_of(), batches_of(4), measure=sk.Measure(graphs=graphs))
        assert {(made.evict_cache, made.graphs) for made in table["clocks"]} == {(evict_cache, graphs)}
