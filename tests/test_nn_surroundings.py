"""Compressed layers in modes that a caller may be in, converted, loaded, and called by several threads."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from layer_kinds import EACH, EVERY, SPARSE, Reads, WithoutPlan, make
from torch import nn

import sparsekit as sk
from sparsekit.nn import (
    Linear24,
    Plan,
    PrepackedLinear,
    Route,
    RoutedLinear24,
    RoutedTieredLinear,
    TieredLinear,
)
from sparsekit.nn.conversion_guard import guard_conversions


@EVERY
def test_the_input_is_named_as_by_linear(kind):
    layer, linear = make(kind)
    for tokens in (3, 20):
        x = torch.randn(tokens, 80)
        torch.testing.assert_close(layer(input=x), linear(input=x))


@EVERY
def test_what_is_no_tensor_is_refused(kind):
    with pytest.raises(TypeError, match="input must be a tensor, got list"):
        make(kind)[0]([1.0])


@EVERY
def test_sparse_inputs(kind):
    layer, linear = make(kind)
    x = torch.randn(20, 80).relu()
    torch.testing.assert_close(layer(x.to_sparse()), linear(x))


@EACH
def test_an_assigned_state_brings_its_device(kind):
    layer, linear = make(kind)
    empty = copy.deepcopy(layer).to("meta")
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, 80)
    torch.testing.assert_close(empty(x), linear(x))


@pytest.mark.parametrize("kind", [Linear24, WithoutPlan, RoutedLinear24])
@pytest.mark.parametrize(
    "name, change, match",
    [
        ("values", torch.Tensor.double, r"values must be float32, float16 or bfloat16, got torch\.float64"),
        ("bitmask", torch.Tensor.int, r"bitmask must be torch\.uint8, got torch\.int32"),
        (
            "bitmask",
            lambda bits: bits | 1,
            "bitmask must set two bits of every full group of four, and all of the tail",
        ),
        ("bitmask", torch.zeros_like, "bitmask must set two bits"),
    ],
)
def test_a_state_that_is_not_24_is_refused_whole(kind, name, change, match):
    model = nn.Sequential(make(kind)[0])
    before = copy.deepcopy(model.state_dict())
    state = before | {f"0.{name}": change(before[f"0.{name}"])}
    with pytest.raises(RuntimeError, match=f"layer 0: {match}"):
        model.load_state_dict(state, assign=True)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@SPARSE
def test_training_through_the_weight_is_training_through_the_layer(kind):
    layer, _ = make(kind)
    x = torch.randn(5, 80)
    results = []
    for model in (nn.Sequential(layer), Reads(layer)):
        model.zero_grad()
        model(x).square().sum().backward()
        results.append([parameter.grad.clone() for parameter in layer.parameters()])
    for called, read in zip(*results, strict=True):
        torch.testing.assert_close(called, read)


def test_padding_stays_zero_and_zeros_keep_their_sign():
    linear = nn.Linear(32, 16)
    linear.weight.data.zero_()
    linear.weight.data[3, 5], linear.weight.data[0, 16] = 2.0, -0.0
    mask = torch.zeros(16, 32, dtype=torch.bool)
    mask[3, 5] = mask[0, 16] = True
    packed = sk.pack_tiered(linear.weight.detach(), mask, k=3)
    layer = TieredLinear(packed)
    assert torch.equal(layer.weight.view(torch.int32), linear.weight.detach().view(torch.int32))
    F.linear(torch.randn(4, 32), layer.weight).square().sum().backward()
    assert layer.topk.grad[0].count_nonzero() == 1 and layer.topk.grad[1].count_nonzero() == 0


DTYPES = {
    "double": nn.Module.double,
    "to float64": lambda model: model.to(torch.float64),
    "type": lambda model: model.type(torch.float64),
    "tensor": lambda model: model.to(torch.zeros(1, dtype=torch.float64)),
}


def deep(kind):
    """A model in which layers come before the compressed one, which its conversion would reach first."""
    linear = make(kind)[1]
    model = nn.Sequential(nn.Linear(80, 80), nn.Sequential(nn.LayerNorm(80), linear), nn.Linear(96, 4)).eval()
    model[1][1] = kind.from_linear(linear)
    guard_conversions(model)
    return model


@SPARSE
@pytest.mark.parametrize("convert", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_dtype_without_a_kernel_is_refused_before_anything_changes(kind, convert, copied):
    model = copied(deep(kind))
    for part, name in ((model, "1.1"), (model[1], "1")):
        with pytest.raises(TypeError, match=rf"layer '{name}' is compressed and computes in .* not torch\.float64"):
            convert(part)
    with pytest.raises(TypeError, match=f"{kind.__name__} is compressed"):
        convert(model[1][1])
    assert not any(tensor.dtype == torch.float64 for tensor in model.state_dict().values())
    assert model.half() is model and model[1][0].weight.dtype == torch.float16
    assert model.bfloat16()(torch.randn(2, 80).bfloat16()).dtype == torch.bfloat16


def test_a_guard_goes_with_the_compressed_layer():
    model = deep(Linear24)
    model[1][1] = model[1][1].to_linear()
    guard_conversions(model)
    assert "_apply" not in vars(model) and model.double()[1][1].weight.dtype == torch.float64


@EVERY
def test_bits_and_positions_are_never_converted(kind):
    layer, linear = make(kind)
    before = {name: tensor.clone() for name, tensor in layer.named_buffers() if name != "data"}  # has values as well
    layer.type(torch.float16).float()
    assert all(torch.equal(layer.get_buffer(name), tensor) for name, tensor in before.items())
    linear.bias.data = linear.bias.half().float()
    if not layer.lossy:  # else the weight is codes, and keeps its value
        linear.half().float()
    torch.testing.assert_close(layer(torch.ones(1, 80)), linear(torch.ones(1, 80)))


@EVERY
def test_made_in_inference_mode_it_trains_outside(kind):
    with torch.inference_mode():
        layer, linear = make(kind)
    assert not any(tensor.is_inference() for tensor in layer._parts())
    x = torch.randn(20, 80, requires_grad=True)
    layer.bias = None  # it is the linear's own, which was made there
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.weight.sum(0).expand(20, 80).clone())


@EACH
def test_made_under_other_defaults(kind):
    linear = make(kind)[1]
    usual = kind.from_linear(linear)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            layer = kind.from_linear(linear)
            x = torch.randn(3, 80, dtype=torch.float32, device="cpu")
            y, weight, back = layer(x), layer.weight.clone(), layer.to_linear()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(y, usual(x))
    assert torch.equal(weight, usual.weight) and torch.equal(back.weight, usual.weight)


@EACH
def test_deterministic_algorithms(kind):
    layer, linear = make(kind)
    x = torch.randn(3, 80)
    torch.use_deterministic_algorithms(True)
    try:
        y = layer(x)
        if kind is not PrepackedLinear:
            F.linear(y, layer.weight.t()).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(y, linear(x))


@EVERY
def test_threads_call_one_layer_at_once(kind):
    layer, linear = make(kind)
    x, results = torch.randn(20, 80), []

    def call():
        results.extend(torch.equal(layer(x), expected) and layer.weight.shape == (96, 80) for _ in range(20))

    expected = layer(x)
    torch.testing.assert_close(expected, linear(x))
    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 80


@EVERY
def test_autocast_leaves_double_and_integers_alone_as_linear_does(kind):
    layer, linear = make(kind)
    with torch.autocast("cpu", torch.bfloat16):
        for x in (torch.ones(20, 80).double(), torch.ones(20, 80).long()):
            for module in (linear, layer):
                with pytest.raises((TypeError, RuntimeError), match=r"dtype|x must be .*float32"):
                    module(x)
        assert layer(torch.ones(20, 80).half()).dtype == linear(torch.ones(20, 80).half()).dtype == torch.bfloat16


@EACH
def test_a_compressed_layer_is_made_of_another(kind):
    for other in (Linear24, PrepackedLinear):
        source, linear = other.from_linear(make(Linear24)[1]), make(Linear24)[1]
        linear.weight.data = source.weight.clone().detach()
        layer = kind.from_linear(source)
        assert torch.equal(layer.weight, kind.from_linear(linear).weight) and layer.trainable
        assert all(type(part) in (torch.Tensor, nn.Parameter) for part in layer._parts())


@EVERY
def test_from_linear_takes_linear_layers(kind):
    for other, error, match in (
        (nn.ReLU(), TypeError, "linear must have a weight and a bias as nn.Linear has them, got ReLU"),
        (nn.Embedding(4, 4), TypeError, "got Embedding"),
        (nn.Conv2d(4, 4, 3), ValueError, r"linear must have a matrix as its weight, got shape \(4, 4, 3, 3\)"),
        (nn.LazyLinear(4), ValueError, "linear must be initialized, got a LazyLinear"),
    ):
        with pytest.raises(error, match=match):
            kind.from_linear(other)


def test_a_new_linear24_of_another_dtype_is_refused():
    for given in ({"dtype": torch.float64}, {"dtype": torch.int32}):
        with pytest.raises(TypeError, match="dtype must be float32, float16 or bfloat16, got"):
            Linear24(8, 8, **given)


@EVERY
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("wrap", [nn.Sequential, Reads], ids=["called", "read"])
def test_a_frozen_layer_keeps_no_activation(kind, autocast, wrap):
    layer = make(kind)[0].requires_grad_(False)
    model, saved = wrap(layer), []
    x = torch.randn(20, 80, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.shape), t)[1], lambda t: t):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
    assert x.shape not in saved
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(20, 80).clone(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("kind", [RoutedLinear24, RoutedTieredLinear])
def test_a_dense_copy_follows_what_is_written_to_the_weight(kind):
    layer, linear = make(kind)
    x = torch.randn(20, 80)  # so many that the copy answers
    averaged = torch.optim.swa_utils.AveragedModel(layer)
    with torch.no_grad():
        for weight in layer._weights():
            weight.mul_(3)
        torch.testing.assert_close(layer(x) - layer.bias, 3 * (linear(x) - linear.bias))
        for _ in range(3):
            averaged.update_parameters(layer)
        torch.testing.assert_close(averaged(x), layer(x))


@pytest.mark.parametrize("kind", [RoutedLinear24, RoutedTieredLinear])
def test_a_dense_copy_leaves_gradients_to_the_sparse_weight(kind):
    linear = make(kind)[1].requires_grad_(False)
    layer = kind.from_linear(linear).follow(Plan((Route(16, "dense"),))).train()
    layer.requires_grad_(True)
    layer(torch.randn(20, 80)).sum().backward()
    assert all(weight.grad is not None for weight in layer._weights())
