"""Sparse layers with a dense copy: who answers which call, and everything that the sparse layer can do."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import sparse_linear
from tiering import tiered_linear
from torch import nn

import sparsekit as sk
from sparsekit.nn import (
    Linear24,
    Plan,
    Route,
    Routed,
    RoutedLinear24,
    RoutedTieredLinear,
    TieredLinear,
    routed,
)

PLAN = Plan((Route(4, "sparse"), Route(16, "dense"), Route(64, "sparse")))
KINDS = pytest.mark.parametrize("kind", [RoutedLinear24, RoutedTieredLinear], ids=["2:4", "tiered"])


def make(kind, dtype=torch.float32, **kwargs):
    if kind is RoutedLinear24:
        linear = sparse_linear(40, 48, dtype=dtype, **kwargs)
    else:
        linear = tiered_linear(40, 48, dtype=dtype, **kwargs).eval()
    return linear, kind.from_linear(linear).follow(PLAN)


@pytest.fixture
def dense_calls(monkeypatch):
    """The numbers of tokens of the calls that the dense copy answered."""
    calls = []

    def recorded(function):
        def call(x, *args):
            calls.append(x.numel() // 40)
            return function(x, *args)

        return call

    class Recorded:
        linear = staticmethod(recorded(F.linear))

    monkeypatch.setattr(routed, "prepacked_linear", recorded(routed.prepacked_linear))
    monkeypatch.setattr(routed, "F", Recorded)
    return calls


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@KINDS
@pytest.mark.parametrize(
    ("leading", "dense"),
    [((1,), False), ((2, 2), False), ((5,), True), ((4, 4), True), ((17,), False), ((), False), ((0,), False)],
    ids=str,
)
def test_the_token_count_chooses(dense_calls, kind, leading, dense):
    linear, layer = make(kind)
    x = torch.randn(*leading, 40)
    with torch.no_grad():
        close(layer(x), linear(x))
    assert bool(dense_calls) is dense


@KINDS
def test_it_is_the_sparse_layer_to_everybody_else(kind):
    linear, layer = make(kind)
    plain = (Linear24 if kind is RoutedLinear24 else TieredLinear).from_linear(linear)
    assert isinstance(layer, type(plain)) and isinstance(layer, Routed)
    assert {key: tensor.tolist() for key, tensor in layer.state_dict().items()} == {
        key: tensor.tolist() for key, tensor in plain.state_dict().items()
    }
    assert torch.equal(layer.to_linear().weight, linear.weight)
    assert "routes=(sparse to 4, dense to 16, then sparse)" in str(layer)


@KINDS
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_apart(dense_calls, kind, clone):
    linear, layer = make(kind)
    twin, x = clone(layer), torch.randn(9, 40)
    with torch.no_grad():
        expected = linear(x)
        close(twin(x), expected)
        layer.load_state_dict(
            {
                key: torch.zeros_like(part) if part.is_floating_point() else part
                for key, part in layer.state_dict().items()
            }
        )
        close(twin(x), expected)
        assert not layer(x).any() and len(dense_calls) == 3


@KINDS
def test_the_copy_follows_loading_and_moving(dense_calls, kind):
    (_, layer), x = make(kind), torch.randn(9, 40)
    state = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    for key, tensor in state.items():
        if tensor.is_floating_point():
            state[key] = 2 * tensor
    with torch.no_grad():
        expected = 2 * layer(x)
        layer.load_state_dict(state)
        close(layer(x), expected)
        layer.bfloat16()
        assert layer.copy.dtype == torch.bfloat16
        torch.testing.assert_close(layer(x.bfloat16()).float(), expected, rtol=0.1, atol=0.1)
        assert layer.to("meta")(x.bfloat16().to("meta")).shape == (9, 48)
    assert len(dense_calls) == 4


@KINDS
def test_it_cannot_be_trained_but_passes_gradients_on(dense_calls, kind):
    linear, layer = make(kind)
    x = torch.randn(9, 40).requires_grad_()
    assert layer.trainable and not any(weight.requires_grad for weight in layer._weights())
    close(torch.autograd.grad(layer(x).sum(), x)[0], torch.autograd.grad(linear(x).sum(), x)[0])
    assert dense_calls
    layer.train()
    with pytest.raises(RuntimeError, match=r"cannot train its weight: call model\.eval\(\).*decompress_"):
        layer(x)
    with torch.no_grad():
        layer(x)
    assert layer.to_linear().weight.requires_grad
    frozen, _ = make(kind)
    frozen.weight.requires_grad_(False)
    layer = kind.from_linear(frozen.train()).follow(PLAN)
    assert not layer.trainable and layer(x).shape == (9, 48)


@KINDS
def test_autocast_takes_the_sparse_weight(dense_calls, kind):
    _, layer = make(kind)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(9, 40))
    assert y.dtype == torch.bfloat16 and not dense_calls


@KINDS
def test_rejects_what_the_sparse_layer_rejects(kind):
    _, layer = make(kind)
    with pytest.raises(ValueError, match="column"):
        layer(torch.randn(9, 41))
    with pytest.raises(TypeError, match="float64"):
        layer(torch.randn(9, 40, dtype=torch.float64))


@KINDS
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_whole_for_any_token_count(kind):
    torch._dynamo.reset()
    linear, layer = make(kind)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        for tokens in (2, 9, 40):
            x = torch.randn(tokens, 40)
            close(compiled(x), linear(x))


@KINDS
def test_saved_as_the_sparse_layer_and_loaded_into_either(dense_calls, kind, tmp_path):
    linear, layer = make(kind)
    sk.save(nn.Sequential(layer), tmp_path / "model.safetensors")
    other, x = nn.Sequential(make(kind)[1]), torch.randn(9, 40)
    fresh = nn.Sequential(nn.Linear(40, 48))
    for model in (other, fresh):
        sk.load(model, tmp_path / "model.safetensors")
        with torch.no_grad():
            close(model(x), linear(x))
    assert type(other[0]) is kind and other[0].plan == PLAN and not isinstance(fresh[0], Routed)
    assert dense_calls == [9] and other[0].trainable


def _called_with_another(layer, x):
    return torch.func.functional_call(layer, {name: 3 * weight for name, weight in _weights(layer)}, (x,))


def _called_with_many(layer, x):
    many = {name: torch.stack([weight, 3 * weight]) for name, weight in _weights(layer)}
    return torch.vmap(lambda weights: torch.func.functional_call(layer, weights, (x,)))(many)[1]


def _replaced(layer, x):
    for name, weight in _weights(layer):
        setattr(layer, name, nn.Parameter(3 * weight, requires_grad=False))
    return layer(x)


def _given_other_data(layer, x):
    for name, weight in _weights(layer):
        layer.get_parameter(name).data = 3 * weight
    return layer(x)


def _weights(layer):
    return [(name, weight.detach()) for name, weight in layer.named_parameters() if name != "bias"]


@KINDS
@pytest.mark.parametrize("call", [_called_with_another, _called_with_many, _replaced, _given_other_data])
@torch.no_grad()
def test_a_dense_copy_does_not_answer_for_another_weight(kind, call):
    linear, layer = make(kind)
    x = torch.randn(16, 40)  # so many that the copy answers
    expected = linear(x)
    close(layer(x), expected)
    close(call(layer, x) - layer.bias, 3 * (expected - linear.bias))
    close(layer(x), F.linear(x, layer.weight.plain(), layer.bias))
