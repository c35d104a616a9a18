"""compress_ with a lower precision: lossy forms, and what the report says of them."""

import json
from types import SimpleNamespace

import pytest
import torch
from compressing import decisions
from torch import nn

import sparsekit as sk
from sparsekit.compress import tune
from sparsekit.nn import Int8Linear


@pytest.fixture
def int8(ratios):
    """The measurement is replaced, with int8 the fastest."""
    ratios["int8"] = 4.0
    return ratios


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
    monkeypatch.setattr(Int8Linear, "_multiply", lambda self, x: multiply(self, x) * 1.01)
    assert tune.measure({"int8": layer}, plain, x, **options)["int8"] is None
