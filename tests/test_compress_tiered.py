"""compress_, save and load of layers in tiers."""

import pytest
import torch
from compressing import Conv1D, assert_same, blocks, decisions, reasons, snapshot
from table_clock import install_clock, up_to_16
from tiering import prune_tiers, tiered_linear
from torch import nn
from vendor import Vendor, install

import sparsekit as sk
from sparsekit.compress import cache, candidates, tune
from sparsekit.compress.tiers import TierShares
from sparsekit.masks import get_mask_info, remove_mask
from sparsekit.nn import Route, RoutedTieredLinear, TieredLinear
from sparsekit.ops import backends
from sparsekit.tiers import Ratios, Step, TierMap, tier_iteration


def stack(**sizes):
    return nn.Sequential(tiered_linear(80, 96, **sizes), nn.ReLU(), tiered_linear(96, 80, bias=False, **sizes)).eval()


def test_literal(ratios):
    model = nn.Sequential(nn.Linear(16, 16, bias=False)).eval()
    model[0].weight.data.zero_()[2, 3] = 5
    assert decisions(sk.compress_(model, torch.ones(1, 16))) == {"0": "2:4"}  # which holds it too
    sk.decompress_(model)
    model[0].weight.data[2, :4] = torch.tensor([5.0, 6.0, 7.0, 0.0])
    report = sk.compress_(model, torch.ones(1, 16))
    assert decisions(report) == {"0": "tiered"} and reasons(report)["0"].startswith("fastest; 2:4: not 2:4")
    assert model[0](torch.ones(1, 16)).tolist() == [[0, 0, 18, *[0] * 13]]
    assert report.bytes_before == 256 * 4
    assert report.bytes_after == 10 * (4 + 1) + 1 + 2 * 3 * 4  # a block, its tier, and the starts
    assert sk.decompress_(model) == ("0",)
    assert model[0].weight[2].tolist() == [5, 6, 7, *[0] * 13]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_compress_and_back(ratios, dtype):
    model = stack(dtype=dtype)
    before, x = snapshot(model), torch.randn(5, 80, dtype=dtype)
    expected = model(x)
    report = sk.compress_(model, x)
    assert decisions(report) == {"0": "tiered", "2": "tiered"} and report.swapped == ("0", "2")
    assert type(model[0]) is TieredLinear and get_mask_info(model[0]) is not None
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(model(x), expected, rtol=tolerance, atol=tolerance)
    masks = 96 * 10 + 80 * 12
    packed = sum(model[at].packed.nbytes for at in (0, 2))
    assert report.bytes_after == packed + masks + 96 * dtype.itemsize
    assert sk.decompress_(model) == ("0", "2")
    assert_same(snapshot(model), before)


def test_packed_bytes_at_the_shares_of_the_schedule():
    for dtype, most in ((torch.float32, 0.605), (torch.bfloat16, 0.63)):
        layer = TieredLinear.from_linear(tiered_linear(640, 640, bias=False, dtype=dtype))
        assert layer.packed.nbytes <= most * 640 * 640 * dtype.itemsize
        assert TierShares.of(layer).bytes_of_dense(dtype.itemsize) == pytest.approx(
            (layer.packed.nbytes - layer.tiers.nbytes - layer.starts.nbytes) / (640 * 640 * dtype.itemsize)
        )


@pytest.mark.parametrize(
    ("ratio", "decision"),
    [(1.05, "tiered"), (1.04, "plain"), (None, "plain"), (lambda tokens: 3.0 if tokens == 1 else 1.0, "plain")],
)
def test_the_rule(ratios, ratio, decision):
    ratios |= {"tiered": ratio, "prepacked": 0.9}
    report = sk.compress_(stack(), [torch.randn(1, 80), torch.randn(64, 80)])
    assert set(decisions(report).values()) == {decision}
    if ratio is None:
        assert "tiered: a wrong result at 1 token" in report.layers[0].reason


def test_the_faster_provider_wins(ratios):
    ratios["prepacked"] = 4.0
    report = sk.compress_(stack(), torch.randn(1, 80))
    assert set(decisions(report).values()) == {"prepacked"}
    assert "tiered: faster than plain, but slower" in report.layers[0].reason


def test_what_is_refused_and_why(ratios, monkeypatch):
    ratios |= {"2:4": 0.5, "tiered": 0.5, "prepacked": 0.5}

    def reason(linear):
        (text,) = reasons(sk.compress_(nn.Sequential(linear).eval(), torch.randn(1, linear.in_features))).values()
        return text

    assert "tiered: hardly sparse" in reason(nn.Linear(64, 64))
    assert "tiered: hardly sparse" in reason(tiered_linear(160, 160, shares=(0.95, 0.05)))
    assert "tiered: its blocks take 91% of the dense bytes" in reason(tiered_linear(160, 160, shares=(0.8, 0.2)))
    assert "tiered: its whole weight is 2:4" in reason(tiered_linear(64, 64, shares=(0.0, 1.0)))
    assert "tiered: block must have sides of 8 to 128" in reason(tiered_linear(64, 64, block=(4, 4), k=2))
    lying = tiered_linear(64, 64)
    lying.weight.data.fill_(1)
    assert "tiered: its weight is not zero where its mask drops it" in reason(lying)
    half = nn.Linear(64, 64)
    sk.prune_(nn.Sequential(half), sk.Magnitude("50%"))
    assert "tiered: its blocks take 100% of the dense bytes" in reason(half)
    assert "tiered: 0.50x, 0% won at 1 token" in reason(tiered_linear(64, 64))
    none = {"cpu": "reference"}
    monkeypatch.setattr(candidates, "backends", lambda: {"linear24": none, "linear_tiered": none})
    assert "tiered: no compiled tiered kernel for cpu" in reason(tiered_linear(64, 64))


def test_zeros_without_a_mask_and_sparse_blocks_are_packed_too(ratios):
    """What others pruned, and what was loaded from a plain checkpoint."""
    bare, blocked = tiered_linear(64, 64), nn.Linear(64, 64)
    remove_mask(bare)
    sk.prune_(nn.Sequential(blocked), sk.Magnitude("50% 16x16"))
    report = sk.compress_(nn.Sequential(bare, blocked).eval(), torch.randn(1, 64))
    assert set(decisions(report).values()) == {"tiered"}


@pytest.fixture
def kinds(ratios, monkeypatch):
    """The kinds that are measured, and the layers that are measured for them."""
    found, measure = {}, tune.measure

    def record(calls, plain, x, **options):
        found["plain"].append(plain)
        return measure(calls, plain, x, **options)

    def remembered(key, compute, device):
        found["keys"].append(key)
        return compute()

    found |= {"keys": [], "plain": []}
    monkeypatch.setattr(tune, "measure", record)
    monkeypatch.setattr(cache, "remembered", remembered)
    return found


def test_layers_with_like_shares_are_measured_together(kinds):
    shares = [(0.35, 0.45), (0.36, 0.44), (0.50, 0.30)]
    layers = [tiered_linear(320, 320, shares=each) for each in shares]
    layers += [tiered_linear(320, 320, block=(32, 32)), tiered_linear(320, 320, k=12)]
    sk.compress_(nn.Sequential(*layers).eval(), torch.randn(1, 320))
    assert [key["tiers"] for key in kinds["keys"] if key["repeat"] == 0] == [
        {"block": (16, 16), "k": 10, "shares": (0.35, 0.45)},
        {"block": (16, 16), "k": 10, "shares": (0.5, 0.3)},
        {"block": (32, 32), "k": 10, "shares": (0.35, 0.45)},
        {"block": (16, 16), "k": 12, "shares": (0.35, 0.45)},
    ]


@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_measured_is_like_the_layer(kinds, transposed):
    layer = nn.Linear(160, 320, bias=False)
    if transposed:
        layer = make_conv1d(layer)
    prune_tiers(layer, block=(16, 32), k=6, shares=(0.3, 0.4), axis=0 if transposed else 1)
    weight = layer.weight.detach().clone()
    sk.compress_(nn.Sequential(layer).eval(), torch.randn(2, 160))
    plain, again = kinds["plain"]
    assert torch.equal(plain.weight, again.weight)
    packed = TieredLinear.from_linear(plain, transposed=transposed)
    assert (packed.block, packed.k) == ((16, 32), 6)
    assert [len(packed.dense), len(packed.values), len(packed.topk)] == [30, 40, 30]
    assert plain.weight.shape == weight.shape and not torch.equal(plain.weight, weight)


def make_conv1d(linear):
    layer = Conv1D(*linear.weight.shape)
    layer.weight.data = linear.weight.detach().t().contiguous()
    return layer


def test_shares_round_to_a_whole():
    for dense in range(0, 101):
        for middle in range(0, 101 - dense):
            tiers = TierShares((16, 16), 10, (dense / 100, middle / 100)).rounded()
            assert sum(tiers.shares) <= 1 + 1e-9
            assert all(abs(share * 20 - round(share * 20)) < 1e-9 for share in tiers.shares)


@pytest.mark.parametrize("transposed", [False, True])
def test_tier_map_of_a_layer_is_the_one_it_was_demoted_to(transposed):
    layer = nn.Linear(64, 96)
    model, x = nn.Sequential(make_conv1d(layer) if transposed else layer), torch.randn(50, 64)
    maps, _ = tier_iteration(
        model, Step(1, Ratios(0.25, 0.5, 0.25), 0.75, 0.25, 0), [x], options=sk.tiers.TierOptions(block=(16, 32), k=6)
    )
    found = TierMap.of(model[0])
    assert torch.equal(found.tiers, maps["0"].tiers) and found.counts == (3, 6, 3)
    assert (found.shape, found.block, found.k) == ((96, 64), (16, 32), 6)
    packed = TieredLinear.from_linear(model[0], transposed=transposed)
    assert torch.equal(TierMap.of(packed).tiers, found.tiers)


def test_tier_map_of_a_layer_without_tiers():
    with pytest.raises(ValueError, match="as progressive_tiers leaves it, got no mask"):
        TierMap.of(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="got one of '2:4'"):
        TierMap.of(blocks(1)[0].up)


@pytest.mark.parametrize(
    ("seconds", "keep_dense", "decision", "ratio"),
    [
        (0.5, False, "tiered", 2.0),
        (up_to_16(0.5, 0.99), False, "plain", 1 / 0.99),
        (up_to_16(0.5, 0.99), True, "tiered", 1.0),
    ],
    ids=["always", "up_to_16", "keep dense"],
)
def test_on_a_gpu_it_is_one_module_for_all_counts(ratios, monkeypatch, seconds, keep_dense, decision, ratio):
    monkeypatch.undo()  # of the measurement
    install(monkeypatch, Vendor())
    compiled = {"linear_tiered": {"cpu": "acted"}, "linear24": {"cpu": "acted"}}
    monkeypatch.setattr(candidates, "backends", lambda: compiled)
    table = install_clock(monkeypatch)
    table |= {"tiered": seconds, "linear24": 0.5, "other": 0.5}
    model = nn.Sequential(tiered_linear(64, 64), nn.Linear(64, 64)).half().eval()
    sk.prune_(model, sk.Magnitude("2:4"), where=lambda name, _: name == "1")
    before, batches = snapshot(model), [torch.randn(tokens, 64).half() for tokens in (1, 300)]
    report = sk.compress_(model, batches, keep_dense=keep_dense)
    assert decisions(report) == {"0": decision, "1": "2:4"}
    assert report.layers[0].timing(512).ratio == pytest.approx(ratio)
    assert (type(model[0]) is RoutedTieredLinear) is keep_dense
    if keep_dense:
        assert model[0].plan.routes == (Route(1, "sparse"), Route(512, "dense"))
    if decision == "plain":
        lost = "tiered: 1.01x, 100% won at 512 tokens (1.05x is needed), faster at 1: try keep_dense=True"
        assert report.layers[0].reason == f"2:4: not 2:4; {lost}"
    sk.decompress_(model)
    assert_same(snapshot(model), before)


def test_measured_for_real_on_small_layers():
    model, x = stack(), torch.randn(3, 80)
    expected = model(x)
    report = sk.compress_(model, x, measure=sk.Measure(budget=0.01))
    compiled = backends()["linear_tiered"]["cpu"] != "reference"
    for layer in report.layers:
        assert layer.timings[4].keys() == {"plain", "prepacked"} | ({"tiered"} if compiled else set())
        assert None not in layer.timings[4].values()  # every candidate gave the right result
    torch.testing.assert_close(model(x), expected)
