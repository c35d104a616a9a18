"""The layers that train sparse, the reasons of the others, and the table."""

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import sparsekit as sk
from sparsekit.masks import get_mask
from sparsekit.train import layouts


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def reasons(training):
    return {layer.name: layer.reason for layer in training.layers if layer.product == "plain"}


def test_skips_each_with_its_reason():
    replaced, empty = nn.Linear(8, 8), nn.Linear(8, 8)
    replaced.forward = lambda x: x
    empty.weight = nn.Parameter(torch.empty(0, 8))
    model = nn.ModuleDict(
        {
            "good": nn.Linear(8, 8),
            "conv": nn.Conv2d(4, 4, 3),
            "subclass": Scaled(8, 8),
            "computed": parametrizations.weight_norm(nn.Linear(8, 8)),
            "replaced": replaced,
            "wide": nn.Linear(8, 8).double(),
            "empty": empty,
            "narrow": nn.Linear(3, 8),
            "tied": nn.Linear(8, 8),
            "head": nn.Linear(8, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "packed": sk.nn.Linear24(8, 8),
            "free": nn.Tanh(),
        }
    )
    model["head"].weight = model["tied"].weight
    training = sk.sparse_training_(model)
    assert reasons(training) == {
        "conv": "it is a Conv2d, only nn.Linear trains sparse",
        "subclass": "it is a Scaled, only nn.Linear trains sparse",
        "computed": "it is a ParametrizedLinear, only nn.Linear trains sparse",
        "replaced": "its forward is replaced",
        "wide": "its weight is torch.float64, not float32, float16 or bfloat16",
        "empty": "its weight is empty",
        "narrow": "its 3 inputs do not fill one group of 2:4",
        "tied": "its weight is tied to head.weight",
        "head": "its weight is tied to tied.weight",
        "attention.out_proj": "MultiheadAttention reads its weight without calling it",
        "packed": "it is compressed: call decompress_ first",
    }
    assert [layer.name for layer in training.layers if layer.product != "plain"] == ["good"]


def test_table():
    model = nn.Sequential(nn.Linear(16, 8), nn.Conv2d(4, 4, 3))
    training = sk.sparse_training_(model)
    assert str(training) == (
        "layer  shape    product       reason\n"
        "0      8x16     masked dense  cpu has no 2:4 tensor cores that PyTorch can use\n"
        "1      4x4x3x3  plain         it is a Conv2d, only nn.Linear trains sparse\n"
        "1 of 2 layers train sparse, 1 of them by a masked dense product"
    )
    training.finish()
    assert training.layers[0].product == "plain" and training.layers[0].reason == "its sparse training is over"
    assert "(model)" in str(sk.sparse_training_(nn.Linear(8, 8)))


def test_prints_how_it_trains():
    layer = nn.Linear(16, 8)
    sk.sparse_training_(layer, backward="transposable", decay=0.5)
    assert str(layer) == ("MaskedLinear(in_features=16, out_features=8, bias=True, backward=transposable, decay=0.5)")


def test_where_selects():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    training = sk.sparse_training_(model, where=lambda name, layer: name == "1" and isinstance(layer, nn.Linear))
    assert [layer.name for layer in training.layers] == ["1"] and type(model[0]) is nn.Linear


def test_a_shared_layer_trains_once():
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    training = sk.sparse_training_(model)
    x = torch.randn(3, 8)
    pruned = sk.nm_prune(layer.weight.detach(), 2, 4)[0]
    inside = torch.tanh(nn.functional.linear(x, pruned, layer.bias))
    assert torch.equal(model(x), nn.functional.linear(inside, pruned, layer.bias))
    assert len(training.layers) == 1


def test_a_stored_mask_is_forgotten():
    layer = nn.Linear(8, 8)
    sk.prune_(layer, sk.Magnitude("1:4"))
    sk.sparse_training_(layer)
    assert get_mask(layer) is None and "weight_mask" not in layer._buffers


def test_a_frozen_layer_takes_part():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    training = sk.sparse_training_(model)
    model(torch.randn(2, 8)).sum().backward()
    assert model[0].weight.grad is None and model[1].weight.grad is not None
    training.finish()
    assert get_mask(model[0]) is not None


def test_rejects():
    model = nn.Linear(8, 8)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got list"):
        sk.sparse_training_([model])
    with pytest.raises(ValueError, match='backward must be "straight_through" or "transposable", got \'dense\''):
        sk.sparse_training_(model, backward="dense")
    for decay in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=re.escape(f"decay must be a number from 0, got {decay}")):
            sk.sparse_training_(model, decay=decay)
    with pytest.raises(TypeError, match="decay must be a number, got 'a'"):
        sk.sparse_training_(model, decay="a")
    with pytest.raises(ValueError, match=r"where selects no layer that can be trained sparse$"):
        sk.sparse_training_(model, where=lambda *_: False)
    with pytest.raises(ValueError, match="sparse; 0: its 2 inputs do not fill one group of 2:4"):
        sk.sparse_training_(nn.Sequential(nn.Linear(2, 8)))
    assert type(model) is nn.Linear


def test_a_model_on_the_meta_device_can_be_prepared():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    sk.sparse_training_(model)
    model.to_empty(device="cpu")
    nn.init.normal_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    x = torch.randn(3, 8)
    assert torch.equal(model(x), x @ sk.nm_prune(model[0].weight, 2, 4)[0].t())


LAYOUTS = {  # of the device, rows, cols, transposable -> the layout
    "hopper": (("cusparselt_sm90",), 64, 32, False, "cusparselt_sm90"),
    "hopper-both": (("cusparselt_sm90",), 64, 128, True, "cusparselt_sm90"),
    "hopper-both-narrow": (("cusparselt_sm90",), 64, 32, True, None),
    "hopper-odd": (("cusparselt_sm90",), 96, 32, False, None),
    "ampere": (("cusparselt_sm80", "cutlass_sm80"), 128, 128, True, "cusparselt_sm80"),
    "ampere-small": (("cusparselt_sm80", "cutlass_sm80"), 64, 64, True, "cutlass_sm80"),
    "ampere-small-both": (("cusparselt_sm80", "cutlass_sm80"), 32, 64, True, None),
    "ampere-without": (("cutlass_sm80",), 128, 128, False, "cutlass_sm80"),
    "unknown": (("cusparselt",), 128, 128, False, None),
    "none": ((), 128, 128, False, None),
}


@pytest.mark.parametrize("names, rows, cols, transposable, layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_by_device_and_shape(monkeypatch, names, rows, cols, transposable, layout):
    monkeypatch.setattr(layouts, "hardware_layouts", lambda device: (names, "a remark"))
    arguments = (torch.Size((rows, cols)), transposable)
    for dtype in (torch.float16, torch.bfloat16):
        found, reason = layouts.hardware_layout(torch.device("cuda", 0), dtype, *arguments)
        assert found == layout and (reason == "") == (layout is not None)
    assert layouts.hardware_layout(torch.device("cuda", 0), torch.float32, *arguments)[0] is None


def test_reasons_for_a_dense_product(monkeypatch):
    def reason(dtype=torch.float16, rows=128, names=("cusparselt_sm90",)):
        monkeypatch.setattr(layouts, "hardware_layouts", lambda device: (names, "a remark"))
        return layouts.hardware_layout(torch.device("cuda", 0), dtype, torch.Size((rows, 128)), False)[1]

    assert reason(torch.float32) == "it computes in torch.float32, not float16 or bfloat16"
    assert reason(rows=100) == "100 x 128 is no multiple of the 64 x 32 of cusparselt_sm90"
    assert reason(names=()) == reason(torch.float32, names=()) == "a remark"
