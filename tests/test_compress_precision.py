"""compress_ with a lower precision: lossy forms, and what the report says of them."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from compressing import decisions
from torch import nn

import sparsekit as sk
from sparsekit.compress import lossy, tune
from sparsekit.nn import Int8Linear, QuantizedLinear24
from sparsekit.ops import backends


@pytest.fixture
def int8(ratios):
    """The measurement is replaced, with int8 the fastest."""
    ratios["int8"] = 4.0
    return ratios


OPS = ("linear24q", "linear24q_int8")


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(80, 96), nn.ReLU(), nn.Linear(96, 80)).eval()


def test_nothing_is_lossy_unless_asked_for(int8):
    net = model()
    report = sk.compress_(net, torch.randn(4, 80))
    assert decisions(report) == {"0": "prepacked", "2": "prepacked"} and report.change is None
    assert "lossy" not in str(report) and "error" not in str(report).splitlines()[0]
    assert all("int8" not in measured for layer in report.layers for measured in layer.timings.values())


def test_int8_is_a_candidate_beside_the_others(int8, tmp_path):
    net, x = model(), torch.randn(4, 80)
    with torch.no_grad():
        expected = net(x)
    report = sk.compress_(net, x, precision="int8")
    assert decisions(report) == {"0": "int8", "2": "int8"} and type(net[0]) is Int8Linear
    assert [layer.error.of for layer in report.layers] == ["outputs", "outputs"]
    assert all(0 < layer.error.error < 0.03 for layer in report.layers)
    with torch.no_grad():
        change = (net(x) - expected).norm() / expected.norm()
    assert report.change.error == pytest.approx(float(change), rel=1e-4) and report.change.agreement is None
    assert report.layers[0].bytes_after == 96 * 80 + 4 * 96 and not report.layers[0].sparse
    text = str(report)
    assert "2 lossy, of which decompress_ returns the rounded weights: relative error of the outputs at most" in text
    assert f"outputs of the whole model: a relative change of {report.change.error:.2%} on the batches" in text
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["change"]["agreement"] is None
    int8["int8"] = 1.0
    assert set(decisions(sk.compress_(model(), x, precision="int8")).values()) == {"prepacked"}


def test_decompress_returns_the_weight_that_was_multiplied_by(int8):
    net, x = model(), torch.randn(4, 80)
    layer, weight = net[0], net[0].weight
    sk.compress_(net, x, precision="int8")
    rounded = net[0].weight.clone()
    assert sk.decompress_(net) == ("0", "2") and net[0] is layer and net[0].weight is weight
    assert torch.equal(net[0].weight, rounded)


def test_what_fails_gives_the_weights_back_as_they_were(int8):
    net = model()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    int8["whole"] = 0.5
    report = sk.compress_(net, torch.randn(4, 80), precision="int8")
    assert set(decisions(report).values()) == {"plain"} and report.change is None
    assert all(layer.error is None for layer in report.layers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_without_batches_the_error_is_that_of_the_weight(int8):
    report = sk.compress_(model(), precision="int8")
    assert {layer.error.of for layer in report.layers} == {"weight"} and report.change is None
    assert all(0 < layer.error.error < 0.006 for layer in report.layers)


def test_logits_are_compared_by_the_largest(int8):
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(80, 96)

        def forward(self, x):
            return SimpleNamespace(logits=self.head(x), loss=None) if self.attribute else {"logits": self.head(x)}

    for attribute in (False, True):
        net = Language().eval()
        net.attribute = attribute
        report = sk.compress_(net, torch.randn(40, 80), precision="int8")
        assert 0.8 < report.change.agreement <= 1 and "and the largest logit stays at" in str(report)


def test_what_cannot_be_int8(int8):
    net = nn.Sequential(nn.Linear(80, 96), nn.Linear(96, 80))
    with torch.no_grad():
        net[1].weight[0, 0] = float("inf")
    int8["prepacked"] = 0.5
    report = sk.compress_(net, torch.randn(4, 80), precision="int8")
    assert "int8: it cannot be trained, and the layer is in training mode" in report.layers[0].reason
    report = sk.compress_(net.eval(), torch.randn(4, 80), precision="int8")
    assert "int8: its weight has an Inf or a NaN" in report.layers[1].reason
    with pytest.raises(ValueError, match=r"precision must be None or one of \('int8',.*got 'int3'"):
        sk.compress_(net, precision="int3")


def test_a_wrong_kernel_is_refused(monkeypatch):
    x, plain = torch.randn(4, 80), nn.Linear(80, 96).eval()
    layer = Int8Linear.from_linear(plain)
    options = {"dense": (), "clock": tune._timing.clock(x.device, evict_cache=False), "budget": 0.01}
    assert tune.measure({"int8": layer}, plain, x, **options)["int8"] is not None
    multiply = Int8Linear._multiply
    monkeypatch.setattr(Int8Linear, "_multiply_directly", lambda self, x: multiply(self, x) * 1.01)
    assert tune.measure({"int8": layer}, plain, x, **options)["int8"] is None


@pytest.fixture
def compiled(int8, monkeypatch):
    """As if there were compiled kernels of quantized 2:4, the fastest of all."""
    monkeypatch.setattr(lossy, "backends", lambda: {name: {"cpu": "avx2"} for name in OPS})
    int8 |= {f"2:4 {kind}": 5.0 for kind in ("int8", "int4", "nf4")}
    int8 |= {f"2:4 {kind}, float inputs": 1.0 for kind in ("int8", "int4", "nf4")}
    return int8


def pruned():
    net = model()
    sk.prune_(net, sk.Magnitude("2:4"))
    return net


def test_quantized_24_wins_where_a_layer_is_24(compiled):
    net, x = pruned(), torch.randn(4, 80)
    report = sk.compress_(net, x, precision="int8")
    assert decisions(report) == {"0": "2:4 int8", "2": "2:4 int8"} and type(net[0]) is QuantizedLinear24
    assert (net[0].quant_type, net[0].inputs) == ("int8", "int8") and report.layers[0].sparse
    assert "sparse (2:4 or tiered): 2 layers" in str(report)
    assert report.layers[0].bytes_after == pytest.approx(96 * (40 + 2 * 2 + 10), rel=0.7)  # tiles are padded to 64
    compiled["2:4 int8, float inputs"] = 6.0
    net = pruned()
    report = sk.compress_(net, x, precision="int8")
    assert net[0].inputs == "float" and report.layers[0].kernels == {4: "2:4 int8, float inputs"}
    assert decisions(sk.compress_(model(), x, precision="int8")) == {"0": "int8", "2": "int8"}


def test_four_bits_are_of_the_kind_with_the_smaller_error(compiled):
    compiled |= {"2:4 int4": 6.0, "2:4 nf4": 6.0}
    net, x = pruned(), torch.randn(4, 80)
    weight = net[2].weight.data
    weight.copy_(weight.sign() * torch.randint(1, 8, weight.shape))  # which int4 holds exactly where a 7 is among 64
    net[0].weight.data = torch.where(net[0].weight != 0, torch.randn(96, 80), 0)
    report = sk.compress_(net, x, precision="int4")
    assert decisions(report) == {"0": "2:4 nf4", "2": "2:4 int4"}
    assert re.search(r"2:4 int4: an error of the weight of \d+\.\d%, nf4 has \d+\.\d%", report.layers[0].reason)
    assert 0.02 < report.layers[0].error.error < 0.12 and report.layers[1].error.error < 0.02
    assert all("2:4 int4" not in layer.timings[4] for layer in sk.compress_(pruned(), x, precision="int8").layers)


def test_without_a_compiled_kernel_it_is_not_measured(int8, monkeypatch):
    answers = backends() | {name: {"cpu": "reference"} for name in OPS}
    monkeypatch.setattr(lossy, "backends", lambda: answers)
    report = sk.compress_(pruned(), torch.randn(4, 80), precision="int8")
    assert "2:4 int8: no compiled kernel of quantized 2:4 for cpu" in report.layers[0].reason


def test_dense_copies_stay_with_the_forms_that_compute_the_same(compiled):
    compiled |= {"2:4 int8": lambda tokens: 9.0 if tokens == 1 else 0.5, "dense": 1.0}
    batches = [torch.randn(1, 80), torch.randn(64, 80)]
    report = sk.compress_(pruned(), batches, precision="int8", keep_dense=True)
    assert set(decisions(report).values()) == {"int8"}
