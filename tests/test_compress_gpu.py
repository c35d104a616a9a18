"""compress_ on a GPU, acted on the CPU: what is raced, what is refused, and which plan a layer gets."""

import copy

import pytest
import torch
from compressing import assert_same, blocks, decisions, reasons, snapshot
from torch import nn
from vendor import OWN_ORDER, Vendor, install

import sparsekit as sk
from sparsekit.compress import clock
from sparsekit.nn import Linear24, Route, RoutedLinear24
from sparsekit.ops import layouts

SM90 = "cusparselt_sm90"
BIG = 1 << 62


class TableClock:
    """Tells times from a table: by ``"plain"``, ``"linear24"`` or a route, a number or a function of the tokens."""

    def __init__(self, table):
        self.table, self.cold = table, False
        self.asked = []

    def start(self, call, x):
        pass

    def seconds(self, call, x):
        name = "plain"
        if isinstance(call, RoutedLinear24):
            (route,) = call.plan.routes
            name = route[2:] if route.kernel == "hardware" else route.kernel
        seconds = self.table.get(name, self.table.get("other", 9.0))
        self.asked.append((name, len(x)))
        return seconds(len(x)) if callable(seconds) else seconds


@pytest.fixture
def table(monkeypatch):
    """Seconds by name; a library's algorithm is ``(alg_id, split_k, split_k_mode)``."""
    table = {"plain": 1.0, "dense": 1.0, "linear24": 9.0}
    table["clocks"] = []

    def make(device, *, cold, graphs):
        made = TableClock(table)
        made.cold, made.graphs = cold, graphs
        table["clocks"].append(made)
        return made

    monkeypatch.setattr(clock, "clock", make)
    return table


@pytest.fixture(autouse=True)
def vendor(monkeypatch):
    yield install(monkeypatch, Vendor())
    layouts.hardware_layouts.cache_clear()


def model_of(dtype=torch.float16, **kwargs):
    return blocks(1, **kwargs).to(dtype)


def few(seconds, otherwise=9.0):
    return lambda tokens: seconds if tokens <= 16 else otherwise


def samples(*tokens, dtype=torch.float16):
    return [torch.randn(count, 16).to(dtype) for count in tokens]


def test_different_token_counts_get_different_kernels(table, vendor):
    table |= {"linear24": few(0.5), (2, 1, -1): lambda tokens: 0.4 if tokens > 16 else 0.9}
    model = model_of()
    before, batches = snapshot(model), samples(1, 16, 64, 300)
    expected = [model(batch) for batch in batches]
    report = sk.compress_(model, batches)
    assert decisions(report) == {"0.up": "2:4", "0.down": "2:4"}
    layer = model[0].up
    assert type(layer) is RoutedLinear24
    assert layer.plan.layout == SM90
    assert layer.plan.routes == (Route(16, "linear24"), Route(512, "hardware", 2))
    name = f"{SM90}:2:1:-1"
    assert report.layers[0].names == {1: "linear24", 16: "linear24", 64: name, 512: name}
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
    table |= {"linear24": few(0.5, 9.0), "other": 9.0}
    report = sk.compress_(model, samples_of(128, 1, 64), keep_dense=True)
    assert report.layers[0].decision == "2:4" and model[0].packed is None
    assert report.bytes_after == 64 * 128 * 2 * 3 // 2 + masks  # values, and the dense copy


def samples_of(cols, *tokens):
    return [torch.randn(count, cols).half() for count in tokens]


@pytest.mark.parametrize("keep_dense", [False, True], ids=["", "keep dense"])
def test_a_count_at_which_nothing_is_faster(table, keep_dense):
    table |= {"linear24": few(0.5), (1, 1, -1): 0.97}
    model = model_of()
    dense, batches = copy.deepcopy(model), samples(1, 64, 512)
    report = sk.compress_(model, batches, keep_dense=keep_dense)
    if not keep_dense:
        assert set(decisions(report).values()) == {"plain"}
        assert "2:4: 1.03x, 100% won at 64 tokens" in report.layers[0].reason
        assert report.layers[0].timing(64).ratio == pytest.approx(1 / 0.97)
        return
    assert model[0].up.plan.routes == (Route(1, "linear24"), Route(512, "dense"))
    assert model[0].up.plan.layout is None
    assert report.layers[0].names == {1: "linear24", 64: "dense", 512: "dense"}
    assert torch.equal(model[0].up.dense, dense[0].up.weight)
    with torch.no_grad():
        for batch in batches:
            torch.testing.assert_close(model(batch), dense(batch), rtol=2e-2, atol=2e-2)
    sk.decompress_(model)
    assert_same(
        snapshot(model)[1],
        [(n, id(q), *p[2:]) for p, (n, q) in zip(snapshot(dense)[1], model.named_parameters(), strict=True)],
    )


def test_a_dense_copy_that_costs_the_host_too_much_is_not_kept(table):
    table |= {"linear24": few(0.5), "dense": 1.04}
    report = sk.compress_(model_of(), samples(1, 64), keep_dense=True)
    assert set(decisions(report).values()) == {"plain"}
    table["dense"] = 1.03
    assert set(decisions(sk.compress_(model_of(), samples(1, 64), keep_dense=True)).values()) == {"2:4"}


def test_where_nothing_is_ever_faster_no_dense_copy_is_kept(table):
    report = sk.compress_(model_of(), samples(1, 64), keep_dense=True)
    assert set(decisions(report).values()) == {"plain"}


def test_a_dense_copy_needs_eval_mode(table):
    table["other"] = 0.5
    model = model_of().train()
    report = sk.compress_(model, samples(4), keep_dense=True)
    assert "training mode: call model.eval() first" in report.layers[0].reason
    assert set(decisions(sk.compress_(model, samples(4))).values()) == {"2:4"}


def test_wrong_algorithms_are_refused(table, vendor):
    vendor.wrong = (0, 2)
    table |= {(2, 1, -1): 0.1, (1, 1, -1): 0.5}
    model = model_of()
    report = sk.compress_(model, samples(32))
    assert model[0].up.plan.routes == (Route(32, "hardware", 1),)
    assert f"{SM90}:0:1:-1: a wrong result at 32 tokens; {SM90}:2:1:-1: a wrong result" in report.layers[0].reason
    assert report.layers[0].timings[32][f"{SM90}:2:1:-1"] is None
    vendor.wrong = (0, 1, 2, 3)
    model, table["linear24"] = model_of(), 9.0
    report = sk.compress_(model, samples(32))
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
    report = sk.compress_(model, samples(32), where=lambda name, module: name == "0.up")
    assert report.layers[0].timings[32][f"{SM90}:2:1:-1"] is None
    assert model[0].up.plan.routes == (Route(32, "hardware", 1),)


def test_split_k_of_the_best_algorithms_is_searched(table):
    table |= {(3, 1, -1): 0.8, (1, 1, -1): 0.9, (3, 4, 2): 0.3, (0, 8, 1): 0.01}
    model = model_of()
    sk.compress_(model, samples(8))
    assert model[0].up.plan.routes == (Route(8, "hardware", 3, 4, 2),)
    asked = {name for made in table["clocks"] for name, _ in made.asked}
    assert {(1, 2, 1), (3, 8, 2)} <= asked and (0, 8, 1) not in asked
    assert not [name for name in asked if isinstance(name, tuple) and name[0] > 3]  # ids that it has not


def test_what_the_vendor_suggests_races_too(table, monkeypatch):
    from sparsekit.compress import gpu

    monkeypatch.setattr(gpu, "suggest", lambda *args: (0, 16, 1))
    table |= {(0, 16, 1): 0.2}
    model = model_of()
    sk.compress_(model, samples(8))
    assert model[0].up.plan.routes == (Route(8, "hardware", 0, 16, 1),)

    def refuse(*args):
        raise RuntimeError("search failed")

    monkeypatch.setattr(gpu, "suggest", refuse)
    table |= {(1, 1, -1): 0.5}
    sk.compress_(model := model_of(), samples(8))
    assert model[0].up.plan.routes == (Route(8, "hardware", 1),)


@pytest.mark.parametrize(("cutlass", "layout"), [(0.3, "cutlass_sm80"), (0.7, "cusparselt_sm80")])
def test_on_ampere_the_better_library_packs(table, vendor, monkeypatch, cutlass, layout):
    install(monkeypatch, Vendor("cusparselt_sm80"), (8, 0))
    table |= {"linear24": few(0.5, 0.9), (0, 1, -1): lambda tokens: 0.5}
    seconds = TableClock.seconds

    def by_library(self, call, x):
        if getattr(call, "layout", "") == "cutlass_sm80":
            return cutlass
        return seconds(self, call, x)

    monkeypatch.setattr(TableClock, "seconds", by_library)
    model = model_of()
    x = torch.randn(64, 16).half()
    expected = model(x)
    sk.compress_(model, samples(8, 64))
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
    assert model[0].up.plan.routes == (Route(8, "linear24"),) and model[0].up.packed is None
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
    report = sk.compress_(model_of(), samples(4))
    assert all("without cuSPARSELt" in reason for reason in reasons(report).values())
    assert set(decisions(report).values()) == {"2:4"}
    report = sk.compress_(model_of(pruned=False), samples(4))
    assert reasons(report) == {"0.up": "2:4: not 2:4", "0.down": "2:4: not 2:4"}


def test_token_counts_of_a_gpu(table):
    table["other"] = 0.5
    report = sk.compress_(model_of(), [*samples(700), torch.randn(9000, 16).half()])
    assert report.layers[0].calls == {1024: 1, 8192: 1}
    report = sk.compress_(model_of())
    assert set(report.layers[0].timings) == {1, 16, 128, 2048}


def test_graphs_and_a_cold_cache_reach_the_clock(table, monkeypatch):
    for size, cold, graphs in ((2**20, False, True), (100, True, False)):
        monkeypatch.setattr(clock, "cache_bytes", lambda device, size=size: size)
        table["clocks"].clear()
        sk.compress_(model_of(), samples(4), graphs=graphs)
        assert {(made.cold, made.graphs) for made in table["clocks"]} == {(cold, graphs)}


def test_layers_of_one_kind_are_measured_once(table):
    sk.compress_(blocks(3).half(), samples(4))
    assert len(table["clocks"]) == 2


def test_conv1d_is_a_transposed_linear(table):
    class Conv1D(nn.Module):
        def __init__(self, outputs, inputs):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.randn(outputs))

        def forward(self, x):
            return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)

    Conv1D.__module__ = "transformers.pytorch_utils"
    table["other"] = 0.5
    model = nn.Sequential(Conv1D(24, 16)).half().eval()
    model[0].weight.data = sk.nm_prune(model[0].weight.data.t(), 2, 4)[0].t().contiguous()
    before, x = snapshot(model), torch.randn(4, 16).half()
    expected = model(x)
    monkey = TableClock.seconds
    report = sk.compress_(model, x)
    assert TableClock.seconds is monkey and decisions(report) == {"0": "2:4"}
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
    sk.decompress_(model)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("keep_dense", [False, True], ids=["", "keep dense"])
def test_save_and_load(table, tmp_path, vendor, keep_dense):
    table |= {"linear24": few(0.5), "other": few(0.9, 0.5) if not keep_dense else 9.0}
    model, batches = model_of(), samples(4, 64)
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
        sk.compress_(model, samples(4))
    assert_same(snapshot(model), before)
