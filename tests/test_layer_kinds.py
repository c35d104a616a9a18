"""Which layers every verb refuses, and the reason that all of them give."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import sparsekit as sk
from sparsekit._layers import shared_weight_reasons, unsupported_reason


class Own(nn.Linear):
    def forward(self, t, x):
        return super().forward(x) * t


class Grandchild(Own):
    pass


class Standardized(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Plain(nn.Linear):
    """Changes nothing of what is computed."""


class Tagged(torch.Tensor):
    pass


def replaced(layer):
    layer.forward = lambda x: x
    return layer


def with_weight(weight, trains=True):
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(weight, requires_grad=trains)
    return layer


def masked_by_hand(**kwargs):
    layer = nn.Linear(8, 8)
    if kwargs:
        layer.register_buffer("weight_mask", torch.ones(8, 8), **kwargs)
    else:
        layer.weight_mask = torch.ones(8, 8)
    return layer


REFUSED = {
    "own": (lambda: Own(8, 8), "Own has a forward of its own"),
    "inherited": (lambda: Grandchild(8, 8), "Grandchild has a forward of its own"),
    "convolution": (lambda: Standardized(8, 8, 3), "Standardized has a _conv_forward of its own"),
    "replaced": (lambda: replaced(nn.Linear(8, 8)), "its forward is replaced"),
    "lazy": (lambda: nn.LazyLinear(8), "its weight is not initialized: run the model on a batch first"),
    "lazy-conv": (lambda: nn.LazyConv2d(8, 3), "its weight is not initialized: run the model on a batch first"),
    "computed": (lambda: parametrizations.spectral_norm(nn.Linear(8, 8)), "its weight is not a parameter but computed"),
    "subclass": (lambda: with_weight(torch.randn(8, 8).as_subclass(Tagged)), "its weight is a Tagged, not a plain"),
    "meta": (lambda: nn.Linear(8, 8, device="meta"), "its weight is on the meta device: load it first"),
    "float64": (lambda: nn.Linear(8, 8).double(), "its weight is torch.float64, not float32"),
    "sparse": (lambda: with_weight(torch.randn(8, 8).to_sparse()), "its weight is torch.sparse_coo, not strided"),
    "flat": (lambda: with_weight(torch.randn(64)), r"its weight has the shape (64,), not 2 dimensions"),
    "own-mask": (lambda: masked_by_hand(persistent=True), "it has a weight_mask of its own"),
    "own-attribute": (masked_by_hand, "it has a weight_mask of its own"),
    "expanded": (lambda: with_weight(torch.randn(8).expand(8, 8)), "its weight is expanded"),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_every_verb_refuses_it_with_the_reason(make, reason, ratios):
    model = nn.ModuleDict({"layer": make(), "good": nn.Linear(8, 8)}).eval()
    names = list(model.state_dict())
    assert unsupported_reason(model["layer"]).startswith(reason)
    pruned = sk.prune_(model, sk.Magnitude("2:4"))
    assert [layer.name for layer in pruned.layers] == ["good"]
    assert [(layer.name, layer.reason.startswith(reason)) for layer in pruned.skipped] == [("layer", True)]
    if isinstance(model["layer"], nn.Linear):
        compressed = sk.compress_(model)
        assert [layer.name for layer in compressed.layers] == ["layer", "good"]
        assert compressed.layers[0].reason.startswith(reason) and compressed.layers[1].decision != "plain"
        sk.decompress_(model)
    if make not in (REFUSED["meta"][0], REFUSED["lazy-conv"][0], REFUSED["convolution"][0]):
        training = sk.sparse_training_(model)
        assert {layer.name: layer.product != "plain" for layer in training.layers} == {"layer": False, "good": True}
    assert list(model.state_dict()) == names


def test_what_keeps_the_forward_of_its_kind_is_pruned():
    model = nn.ModuleDict({"plain": Plain(8, 8), "torch": nn.modules.linear.NonDynamicallyQuantizableLinear(8, 8)})
    assert [layer.name for layer in sk.prune_(model, sk.Magnitude("2:4")).layers] == ["plain", "torch"]


def test_a_layer_that_accelerate_hooks_is_pruned():
    hooks = pytest.importorskip("accelerate.hooks")
    model = nn.Sequential(nn.Linear(8, 8), Own(8, 8))
    for layer in model:
        hooks.add_hook_to_module(layer, hooks.ModelHook())
    report = sk.prune_(model, sk.Magnitude("2:4"))
    assert [layer.name for layer in report.layers] == ["0"] and "forward of its own" in report.skipped[0].reason


def test_what_trains_sparse_is_not_pruned_meanwhile():
    model = nn.Sequential(nn.Linear(8, 8))
    with sk.sparse_training_(model), pytest.raises(ValueError, match=r"0: it trains sparse: call finish\(\) or undo"):
        sk.prune_(model, sk.Magnitude("2:4"))
    assert sk.prune_(model, sk.Magnitude("2:4")).layers


def test_a_computed_weight_is_never_read(ratios):
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 8)).train()
    before = copy.deepcopy(model.state_dict())
    for verb in (
        lambda: sk.prune_(model[0], sk.Magnitude("2:4")),
        lambda: sk.prune_(model, sk.Magnitude("2:4"), where=lambda name, _: name == "0"),
        lambda: sk.sparse_training_(model, where=lambda name, _: name == "0"),
    ):
        with pytest.raises(ValueError, match=r"nothing to (prune|train).*Parametrized"):
            verb()
    sk.compress_(model, where=lambda name, _: name == "0")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def views():
    """q, k and v as views of one matrix that is a parameter too; and a, b as columns of one that is not."""
    model = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in ("q", "k", "v", "a", "b")})
    model["qkv"] = nn.Linear(8, 24, bias=False)
    for index, name in enumerate("qkv"):
        model[name].weight = nn.Parameter(model["qkv"].weight.data[8 * index : 8 * index + 8])
    wide = torch.randn(8, 16)
    model["a"].weight, model["b"].weight = nn.Parameter(wide[:, ::2]), nn.Parameter(wide[:, 1::2])
    return model


def test_overlap_in_memory_is_sharing_and_lying_between_is_not():
    model = views()
    report = sk.prune_(model, sk.Magnitude("2:4"))
    assert [layer.name for layer in report.layers] == ["a", "b"]
    assert {layer.name: layer.reason for layer in report.skipped} == {
        **dict.fromkeys("qkv", "its weight shares memory with qkv.weight"),
        "qkv": "its weight shares memory with q.weight, k.weight, v.weight",
    }
    training = sk.sparse_training_(model)
    assert {layer.name for layer in training.layers if layer.product == "plain"} == {"q", "k", "v", "qkv"}


def test_a_buffer_may_share_and_one_byte_is_enough():
    memory = torch.zeros(200)
    model = nn.ModuleDict({"first": nn.Linear(8, 8), "second": nn.Linear(8, 8), "apart": nn.Linear(8, 8)})
    for name, start in (("first", 0), ("second", 63), ("apart", 127)):
        model[name].weight = nn.Parameter(memory[start : start + 64].view(8, 8))
    model["apart"].register_buffer("other", model["apart"].bias.data)
    reasons = {
        name: reason
        for (module, key), reason in shared_weight_reasons(model).items()
        for name, known in model.items()
        if known is module and key == "weight"
    }
    assert reasons == {
        "first": "its weight shares memory with second.weight",
        "second": "its weight shares memory with first.weight",
    }
    model["apart"].register_buffer("other", model["first"].weight.data)
    assert "is tied to apart.other" in shared_weight_reasons(model)[model["first"], "weight"]


def test_where_must_be_a_function(ratios):
    model = nn.Sequential(nn.Linear(8, 8))
    for verb in (
        sk.compress_,
        sk.sparse_training_,
        lambda model, where: sk.prune_(model, sk.Magnitude("2:4"), where=where),
    ):
        with pytest.raises(TypeError, match=r"where must be a function of \(name, module\).*got 'mlp'"):
            verb(model, where="mlp")


def test_where_is_asked_of_layers_and_what_it_cannot_say_of_others_is_no():
    model = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8))
    report = sk.prune_(model, sk.Magnitude("2:4"), where=lambda name, module: module.in_features > 4)
    assert [layer.name for layer in report.layers] == ["1"] and report.skipped == ()
    with pytest.raises(AttributeError, match="nothing"):
        sk.prune_(model, sk.Magnitude("2:4"), where=lambda name, module: module.nothing)


def test_who_left_nothing():
    with pytest.raises(ValueError, match=r"nothing to prune: the model has no layer.*it is an embedding"):
        sk.prune_(nn.Embedding(8, 8), sk.Magnitude("2:4"))
    with pytest.raises(ValueError, match="nothing to train: the model has no layer"):
        sk.sparse_training_(nn.ReLU())
    with pytest.raises(ValueError, match="nothing to train: where selects no layer"):
        sk.sparse_training_(nn.Linear(8, 8), where=lambda *_: False)


def test_a_pruned_encoder_computes_the_same_with_and_without_its_fast_path():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    report = sk.prune_(model, sk.Wanda("2:4"), [{"src": x, "src_key_padding_mask": padding}])
    assert [layer.name for layer in report.layers] == ["layers.0.linear1", "layers.0.linear2"]
    assert all(layer.error for layer in report.layers) and torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(model(x).detach(), fast)


def test_weights_made_in_inference_mode_are_pruned_and_not_trained():
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="0: its weight was made in inference mode, and autograd refuses it"):
        sk.sparse_training_(model)
    report = sk.prune_(model, sk.Wanda("2:4"), torch.randn(4, 8))
    assert report.sparsity == 0.5 and int((model[0].weight == 0).sum()) == 32
