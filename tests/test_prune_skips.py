"""Layers that ``prune_`` leaves alone, and the reasons it gives."""

import pytest
import torch
from pruning import stack
from torch import nn

import sparsekit as sk
from sparsekit.masks import get_mask


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.inner(self.embedding(tokens)))


def test_tied_weights_are_skipped():
    model = Tied()
    embedding = model.embedding.weight.detach().clone()
    report = sk.prune_(model, sk.Wanda("2:4"), [torch.arange(12)])
    assert [layer.name for layer in report.layers] == ["inner"]
    assert [(layer.name, layer.reason) for layer in report.skipped] == [
        ("head", "its weight is tied to embedding.weight"),
        ("embedding", "it is an embedding"),
    ]
    assert torch.equal(model.head.weight, embedding) and get_mask(model.head) is None


def test_a_module_used_twice_is_not_tied():
    layer = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": nn.Sequential(layer, nn.Tanh()), "b": nn.Sequential(layer)})
    x = torch.randn(5, 8)
    norm = torch.cat([x, model["a"](x)]).square().mean(0).sqrt()
    weight = layer.weight.detach().clone()
    sk.prune_(
        model, sk.Wanda("2:4"), [x], calibration=sk.Calibration(forward=lambda model, x: model["b"](model["a"](x)))
    )
    assert torch.equal(get_mask(layer), sk.nm_mask(weight.abs() * norm, 2, 4))


def test_what_an_attention_reads_itself_is_skipped_and_what_an_encoder_calls_is_pruned():
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 2, enable_nested_tensor=False
    )
    model = nn.ModuleDict({"encoder": model, "head": nn.Linear(8, 4)})
    report = sk.prune_(model, sk.Magnitude("2:4"))
    linear = [f"encoder.layers.{layer}.{name}" for layer in (0, 1) for name in ("linear1", "linear2")]
    assert [layer.name for layer in report.layers] == [*linear, "head"]
    reasons = {layer.name.removeprefix("encoder.layers.0."): layer.reason for layer in report.skipped}
    assert reasons["self_attn.out_proj"] == "MultiheadAttention reads its weight without calling it"
    assert reasons["self_attn.in_proj_weight"].startswith("it belongs to a MultiheadAttention, and only Linear")
    assert len(report.skipped) == 4


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), "a convolution of 8 groups"),
        (nn.Conv2d(3, 8, 3), "its 3 inputs do not fill one group of 2:4"),
        (nn.Linear(8, 8, dtype=torch.float64), "float64, not float32"),
        (nn.Linear(8, 8, device="meta"), "meta device"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "not a parameter but computed"),
    ],
    ids=["groups", "small", "float64", "meta", "parametrized"],
)
def test_unfit_layers_are_skipped(module, reason):
    report = sk.prune_(nn.ModuleList([nn.Linear(8, 8), module]), sk.Magnitude("2:4"))
    assert len(report.layers) == 1 and len(report.skipped) == 1
    assert report.skipped[0].name == "1" and reason in report.skipped[0].reason
    with pytest.raises(ValueError, match=f"nothing to prune.*{reason}"):
        sk.prune_(module, sk.Magnitude("2:4"))


def test_where_selects():
    model = stack(8, 8, 8, 8)
    report = sk.prune_(model, sk.Magnitude("2:4"), where=lambda name, module: name != "2")
    assert [layer.name for layer in report.layers] == ["0", "4"] and report.skipped == ()
    assert (model[2].weight != 0).all()
    with pytest.raises(ValueError, match="nothing to prune: where selects no layer"):
        sk.prune_(model, sk.Magnitude("2:4"), where=lambda *_: False)


def test_a_layer_that_no_batch_reaches_stays_dense():
    model = nn.ModuleDict({"used": nn.Linear(8, 8), "unused": nn.Linear(8, 8)})

    def forward(model, x):
        model["unused"](x[:0])  # an expert that got no token
        return model["used"](x)

    for sequential in (True, False):
        report = sk.prune_(
            model,
            sk.Wanda("2:4"),
            [torch.randn(3, 8)],
            calibration=sk.Calibration(forward=forward, sequential=sequential),
        )
        assert [layer.name for layer in report.layers] == ["used"]
        assert [(layer.name, layer.reason) for layer in report.skipped] == [
            ("unused", "no calibration batch reached it")
        ]
        assert (model["unused"].weight != 0).all() and get_mask(model["unused"]) is None
    report = sk.prune_(
        model, sk.Magnitude("2:4"), [torch.randn(3, 8)], calibration=sk.Calibration(forward=forward)
    )  # it needs no input
    assert {layer.name: layer.error is None for layer in report.layers} == {"used": False, "unused": True}
    with pytest.raises(ValueError, match="no calibration batch reached any"):
        sk.prune_(model, sk.Wanda("2:4"), [torch.randn(3, 8)], calibration=sk.Calibration(forward=lambda *_: None))


def test_compressed_layers_are_skipped(ratios):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    sk.compress_(model, where=lambda name, module: name == "0")
    report = sk.prune_(model, sk.Magnitude("2:4"))
    assert [(layer.name, layer.reason) for layer in report.skipped] == [
        ("0", "it is compressed: call decompress_ first")
    ]
    assert [layer.name for layer in report.layers] == ["1"]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_empty_weights_are_skipped():
    report = sk.prune_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 0)), sk.Magnitude("2:4"))
    assert [(layer.name, layer.reason) for layer in report.skipped] == [("1", "its weight is empty")]
