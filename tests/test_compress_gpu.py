"""compress_ on a GPU, acted on the CPU: which plan a layer gets, and that it can be undone, saved and loaded."""

import copy
import itertools

import pytest
import torch
from compressing import Conv1D, assert_same, blocks, decisions, snapshot
from table_clock import batches_of, install_clock, model_of, up_to_16
from torch import nn
from vendor import Vendor, install

import sparsekit as sk
from sparsekit.compress import gpu
from sparsekit.nn import Linear24, Route, RoutedLinear24

SM90 = "cusparselt_sm90"


@pytest.fixture
def table(monkeypatch):
    return install_clock(monkeypatch)


@pytest.fixture(autouse=True)
def vendor(monkeypatch):
    return install(monkeypatch, Vendor())


def test_different_token_counts_get_different_kernels(table, vendor):
    table |= {"linear24": up_to_16(0.5), (2, 1, -1): lambda tokens: 0.4 if tokens > 16 else 0.9}
    model = model_of()
    before, batches = snapshot(model), batches_of(1, 16, 64, 300)
    expected = [model(batch) for batch in batches]
    report = sk.compress_(model, batches)
    assert decisions(report) == {"0.up": "2:4", "0.down": "2:4"}
    layer = model[0].up
    assert type(layer) is RoutedLinear24
    assert layer.plan.layout == SM90
    assert layer.plan.routes == (Route(16, "sparse"), Route(512, "hardware", 2))
    name = f"{SM90}:2:1:-1"
    assert report.layers[0].kernels == {1: "linear24", 16: "linear24", 64: name, 512: name}
    assert report.layers[0].timing(64).ratio == 2.5
    assert f"fastest: linear24 at 1, linear24 at 16, {name} at 64, {name} at 512 tokens" in report.layers[0].reason
    assert "2.50x" in str(report)
    vendor.calls.clear()
    with torch.no_grad():
        for batch, y in zip(batches, expected, strict=True):
            torch.testing.assert_close(model(batch), y, rtol=2e-2, atol=2e-2)
    assert vendor.calls == [(64, 2, 1, -1)] * 2 + [(304, 2, 1, -1)] * 2
    assert sk.decompress_(model) == ("0.up", "0.down")
    assert_same(snapshot(model), before)


def test_bytes_are_values_metadata_and_bits(table):
    table["other"] = 0.5
    model = nn.Sequential(nn.Linear(128, 64, bias=False)).half().eval()
    sk.prune_(model, sk.Magnitude("2:4"))
    masks = 64 * 128 // 8  # pruning stored them; the layer's own bits are the same buffer
    report = sk.compress_(model, torch.randn(4, 128).half())
    assert report.bytes_before == 64 * 128 * 2 + masks
    assert report.bytes_after == 64 * 128 * 2 * 9 // 16 + masks
    sk.decompress_(model)
    table |= {"linear24": up_to_16(0.5, 9.0), "other": 9.0}
    report = sk.compress_(model, batches_with(128, 1, 64), keep_dense=True)
    assert report.layers[0].decision == "2:4" and model[0].hardware is None
    assert report.bytes_after == 64 * 128 * 2 * 3 // 2 + masks  # values, and the dense copy


def batches_with(cols, *tokens):
    return [torch.randn(count, cols).half() for count in tokens]


@pytest.mark.parametrize("keep_dense", [False, True], ids=["", "keep dense"])
def test_a_count_at_which_nothing_is_faster(table, keep_dense):
    table |= {"linear24": up_to_16(0.5), (1, 1, -1): 0.97}
    model = model_of()
    dense, batches = copy.deepcopy(model), batches_of(1, 64, 512)
    report = sk.compress_(model, batches, keep_dense=keep_dense)
    if not keep_dense:
        assert set(decisions(report).values()) == {"plain"}
        assert "2:4: 1.03x, 100% won at 64 tokens" in report.layers[0].reason
        assert report.layers[0].timing(64).ratio == pytest.approx(1 / 0.97)
        return
    assert model[0].up.plan.routes == (Route(1, "sparse"), Route(512, "dense"))
    assert model[0].up.plan.layout is None
    assert report.layers[0].kernels == {1: "linear24", 64: "dense", 512: "dense"}
    assert torch.equal(model[0].up.copy, dense[0].up.weight)
    with torch.no_grad():
        for batch in batches:
            torch.testing.assert_close(model(batch), dense(batch), rtol=2e-2, atol=2e-2)
    sk.decompress_(model)
    assert_same(
        snapshot(model)[1],
        [(n, id(q), *p[2:]) for p, (n, q) in zip(snapshot(dense)[1], model.named_parameters(), strict=True)],
    )


def test_a_dense_copy_that_costs_the_host_too_much_is_not_kept(table, vendor):
    vendor.algorithms = 1
    table |= {"linear24": up_to_16(0.5), "dense": 1.04}
    report = sk.compress_(model_of(), batches_of(1, 64), keep_dense=True)
    assert set(decisions(report).values()) == {"plain"}
    table["dense"] = 1.03
    assert set(decisions(sk.compress_(model_of(), batches_of(1, 64), keep_dense=True)).values()) == {"2:4"}


def test_where_nothing_is_ever_faster_no_dense_copy_is_kept(table):
    report = sk.compress_(model_of(), batches_of(1, 64), keep_dense=True)
    assert set(decisions(report).values()) == {"plain"}


def test_a_dense_copy_needs_eval_mode(table):
    table["other"] = 0.5
    model = model_of().train()
    report = sk.compress_(model, batches_of(4), keep_dense=True)
    assert "training mode: call model.eval() first" in report.layers[0].reason
    assert (
        set(decisions(report).values()) == {"2:4"}
        and model[0].up.copy is None
        and "dense" not in report.layers[0].timings[4]
    )


def test_token_counts_of_a_gpu(table, vendor):
    vendor.algorithms = 1
    table["other"] = 0.5
    report = sk.compress_(model_of(), [*batches_of(700), torch.randn(9000, 16).half()])
    assert report.layers[0].calls == {1024: 1, 8192: 1}
    report = sk.compress_(model_of())
    assert set(report.layers[0].timings) == {1, 16, 128, 2048}


def test_a_layout_that_only_another_gpu_of_the_model_has(table, monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEKIT_TUNE_CACHE", str(tmp_path))
    monkeypatch.setattr("sparsekit.compress.cache._gpu", lambda device: {})
    table |= {"linear24": 0.7, "other": 0.5}
    sk.compress_(model_of(), batches_of(8))
    monkeypatch.setattr(gpu, "hardware_layouts", lambda device: ((), "none on this one"))
    report = sk.compress_(model := model_of(), batches_of(8))
    assert model[0].up.plan.routes == (Route(8, "sparse"),) and model[0].up.plan.layout is None
    assert f"{SM90}:0:1:-1" in report.layers[0].timings[8]  # remembered
    said = "fastest: linear24 at 8 tokens; none on this one; tiered: its whole weight is 2:4"
    assert report.layers[0].reason == said


def test_layers_of_one_kind_are_measured_once(table):
    sk.compress_(blocks(3).half(), batches_of(4))
    assert len(table["clocks"]) == 2


def test_conv1d_is_a_transposed_linear(table):
    table["other"] = 0.5
    model = nn.Sequential(Conv1D(24, 16)).half().eval()
    model[0].weight.data = sk.nm_prune(model[0].weight.data.t(), 2, 4)[0].t().contiguous()
    before, x = snapshot(model), torch.randn(4, 16).half()
    expected = model(x)
    report = sk.compress_(model, x)
    assert decisions(report) == {"0": "2:4"}
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
    sk.decompress_(model)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("keep_dense", [False, True], ids=["", "keep dense"])
def test_save_and_load(table, tmp_path, vendor, keep_dense):
    table |= {"linear24": up_to_16(0.5), "other": up_to_16(0.9, 0.5) if not keep_dense else 9.0}
    model, batches = model_of(), batches_of(4, 64)
    sk.compress_(model, batches, keep_dense=keep_dense)
    sk.save(model, tmp_path / "model.safetensors")
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
    fresh = model_of()
    sk.load(fresh, tmp_path / "model.safetensors")
    assert type(fresh[0].up) is Linear24
    other = model_of()
    sk.compress_(other, batches, keep_dense=keep_dense)
    routes = other[0].up.plan
    sk.load(other, tmp_path / "model.safetensors")
    assert other[0].up.plan == routes
    vendor.calls.clear()
    with torch.no_grad():
        for batch, y in zip(batches, expected, strict=True):
            assert torch.equal(other(batch), y)
            torch.testing.assert_close(fresh(batch), y, rtol=2e-2, atol=2e-2)
    assert bool(vendor.calls) is not keep_dense
    sk.decompress_(other)
    for mine, theirs in zip(other.parameters(), sk.decompress_(model) and model.parameters(), strict=True):
        assert torch.equal(mine, theirs) and mine.requires_grad == theirs.requires_grad


def test_failure_while_building_leaves_the_model_as_it_was(table, monkeypatch):
    table["other"] = 0.5
    model = model_of()
    before = snapshot(model)
    follow, turns = RoutedLinear24.follow, iter(range(3))

    def fail(self, plan):
        if next(turns, None) is None:
            raise KeyboardInterrupt("injected")
        return follow(self, plan)

    monkeypatch.setattr(RoutedLinear24, "follow", fail)
    with pytest.raises(KeyboardInterrupt, match="injected"):
        sk.compress_(model, batches_of(4))
    assert_same(snapshot(model), before)


def test_a_busy_gpu_is_no_verdict(table):
    table["linear24"] = lambda tokens: 0.5 if next(turns) else 2.5
    turns = itertools.cycle([True, False, False])
    report = sk.compress_(model_of(torch.float32), batches_of(4, dtype=torch.float32))
    assert report.swapped == () and report.undecided == ("0.up", "0.down")
    assert "2:4: undecided, the machine is busy" in report.layers[0].reason and "2 undecided" in str(report)


@pytest.mark.parametrize(("objective", "decision"), [("speed", "plain"), ("size", "2:4")])
def test_for_size_what_is_no_slower_is_taken(table, objective, decision):
    table |= {"linear24": 1.02, "other": 9.0}
    report = sk.compress_(model_of(), batches_of(1, 64), objective=objective)
    assert set(decisions(report).values()) == {decision}
