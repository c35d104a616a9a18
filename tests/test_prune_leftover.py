"""Everything of a model that could have been pruned and was not is in the report, and shares are of the whole."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import sparsekit as sk

OTHERS = {
    "conv1d": (lambda: nn.Conv1d(8, 8, 3), {"": "Conv1d"}),
    "conv3d": (lambda: nn.Conv3d(8, 8, 3), {"": "Conv3d"}),
    "transposed": (lambda: nn.ConvTranspose2d(8, 8, 3), {"": "ConvTranspose2d"}),
    "lstm": (lambda: nn.LSTM(8, 8), {".weight_ih_l0": "LSTM", ".weight_hh_l0": "LSTM"}),
    "cell": (lambda: nn.GRUCell(8, 8), {".weight_ih": "GRUCell", ".weight_hh": "GRUCell"}),
    "bilinear": (lambda: nn.Bilinear(8, 8, 8), {"": "Bilinear"}),
    "attention": (
        lambda: nn.MultiheadAttention(8, 2),
        {".in_proj_weight": "MultiheadAttention", ".out_proj": "MultiheadAttention reads its weight without calling"},
    ),
    "embedding": (lambda: nn.Embedding(8, 8), {"": "it is an embedding"}),
    "bag": (lambda: nn.EmbeddingBag(8, 8), {"": "it is an embedding"}),
    "positions": (
        lambda: nn.ParameterDict({"table": torch.randn(1, 5, 8)}),
        {".table": "it belongs to a ParameterDict"},
    ),
    "computed": (
        lambda: parametrizations.weight_norm(nn.Conv1d(8, 8, 3)),
        {"": "its weight is not a parameter but computed, as a ParametrizedConv1d does"},
    ),
    "small": (lambda: nn.LayerNorm(8), {}),
    "tiny": (lambda: nn.Conv1d(2, 2, 3), {}),
}


@pytest.mark.parametrize(("make", "reasons"), OTHERS.values(), ids=OTHERS)
def test_what_prune_knows_nothing_of_is_listed(make, reasons):
    model = nn.ModuleDict({"other": make(), "layer": nn.Linear(8, 8)})
    report = sk.prune_(model, sk.Magnitude("2:4"))
    assert [layer.name for layer in report.layers] == ["layer"]
    assert {layer.name for layer in report.skipped} == {f"other{name}" for name in reasons}
    for layer in report.skipped:
        assert reasons[layer.name.removeprefix("other")] in layer.reason
    selected = sk.prune_(model, sk.Magnitude("2:4"), where=lambda name, _: name == "layer")
    assert selected.skipped == ()


def test_names_in_the_model_itself():
    class Whole(nn.LSTM):
        def __init__(self):
            super().__init__(8, 8)
            self.layer = nn.Linear(8, 8)

    assert [layer.name for layer in sk.prune_(Whole(), sk.Magnitude("2:4")).skipped] == ["weight_ih_l0", "weight_hh_l0"]


def test_shares_are_of_the_layers_and_of_the_whole_model():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.LazyLinear(4))
    model[2].weight = nn.Parameter(model[1].weight.detach().clone())
    model.append(nn.Linear(8, 10, bias=False))
    model[4].weight = model[0].weight
    report = sk.prune_(model, sk.Magnitude("2:4"))
    assert report.weights == 128 and report.sparsity == 0.5
    assert report.model_weights == 80 + 72 + 64 and report.model_sparsity == 64 / 216  # a shared weight counts once
    assert "of the whole model: 29.63% of 216 parameters" in str(report)
    saved = report.to_json()
    assert saved["model_sparsity"] == 64 / 216 and saved["model_weights"] == 216


def test_many_of_one_reason_take_one_line():
    model = nn.ModuleList([*(nn.Embedding(8, 8) for _ in range(9)), nn.Linear(8, 8)])
    lines = [line for line in str(sk.prune_(model, sk.Magnitude("2:4"))).splitlines() if "skipped" in line]
    assert lines == ["skipped 0, 1, 2 and 6 more: it is an embedding"]
