"""Calls of compressed layers without gradients, where the kernel checks the tensors instead of Python."""

import statistics
import time

import pytest
import torch
from helpers import sparse_linear
from layer_kinds import EVERY, KINDS, FloatInputs, make
from torch import nn

import sparsekit as sk
from sparsekit.nn import ArrangedLinear24, Int8Linear, Linear24, Nf4Linear, QuantizedLinear24, TieredLinear
from sparsekit.ops import backends

COMPILED = pytest.mark.skipif(backends()["linear24"]["cpu"] == "reference", reason="needs the compiled extension")
EACH_LOSSY = pytest.mark.parametrize("kind", [QuantizedLinear24, FloatInputs, Int8Linear])
EACH_SPARSE = pytest.mark.parametrize("kind", [Linear24, TieredLinear], ids=["linear24", "tiered"])


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@EVERY
@pytest.mark.parametrize("shape", [(), (3,), (20,), (2, 5), (0,)], ids=str)
def test_it_is_what_the_checked_call_computes(kind, shape):
    layer, linear = make(kind)
    x = torch.randn(*shape, 80)
    assert torch.equal(layer(x), layer._multiply(x))
    torch.testing.assert_close(layer(x), linear(x))


@COMPILED
@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if kind is not Nf4Linear])  # which has no kernel
def test_it_is_taken(kind, monkeypatch):
    layer = make(kind)[0]
    monkeypatch.setattr(kind, "_multiply", None)
    assert layer(torch.randn(3, 80)).shape == (3, 96)


@EVERY
def test_inputs_of_every_sort(kind):
    layer, linear = make(kind)
    complex_input = torch.randn(3, 80, dtype=torch.complex64)
    for x in (
        torch.randn(80, 3).t(),
        torch.randn(80).expand(20, 80),
        complex_input.conj().imag,  # whose sign torch has yet to change
        torch.randn(3, 80).relu().to_sparse(),
        nn.Parameter(torch.randn(3, 80)),
    ):
        torch.testing.assert_close(layer(x), linear(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 80)).dtype == torch.bfloat16
    with torch.inference_mode():
        x = torch.randn(3, 80)
        torch.testing.assert_close(layer(x), linear(x))
    x = torch.randn(4, 3, 80)
    torch.testing.assert_close(torch.vmap(layer)(x), linear(x))


@EVERY
@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (torch.randn(3, 81), ValueError, "x must have 80 columns"),
        (torch.randn(3, 79), ValueError, "x must have 80 columns"),  # as many blocks as 80 have
        (torch.randn(3, 78), ValueError, "x must have 80 columns"),  # as many values and bytes of bits as 80 have
        (torch.randn(3, 80, dtype=torch.float64), TypeError, "float64"),
        (torch.randn(3, 80).half(), TypeError, "float16"),
        (torch.tensor(1.0), ValueError, "x must have"),
    ],
    ids=["81", "79", "78", "float64", "float16", "scalar"],
)
def test_what_does_not_fit_is_named(kind, x, error, match):
    with pytest.raises(error, match=match):
        make(kind)[0](x)


@EACH_SPARSE
def test_another_device_is_named(kind):
    layer = make(kind)[0]
    with pytest.raises(ValueError, match="must be on meta, got cpu"):
        layer(torch.randn(3, 80, device="meta"))
    with pytest.raises(ValueError, match="must be on cpu, got meta"):
        layer.to("meta")(torch.randn(3, 80))


@EACH_SPARSE
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda tensor: tensor.double(), TypeError),
        (lambda tensor: tensor.half(), TypeError),
        (lambda tensor: tensor[:-1], ValueError),
        (lambda tensor: tensor[..., :-1], ValueError),
        (lambda tensor: tensor.unsqueeze(0), ValueError),
    ],
    ids=["float64", "float16", "rows", "columns", "dimensions"],
)
@pytest.mark.parametrize("name", ["values", "bias"])
def test_a_weight_that_was_broken_by_hand_is_named(kind, name, change, error):
    layer = make(kind)[0]
    layer.get_parameter(name).data = change(layer.get_parameter(name).data)
    with pytest.raises(error, match=f"{name}|bitmask"):
        layer(torch.randn(3, 80))
    layer = make(kind)[0]
    setattr(layer, name, nn.Parameter(change(layer.get_parameter(name))))
    with pytest.raises(error, match=f"{name}|bitmask"):
        layer(torch.randn(3, 80))


@EACH_LOSSY
@pytest.mark.parametrize(
    "change", [torch.Tensor.double, torch.Tensor.half, lambda bias: bias[:-1], lambda bias: bias[:1]]
)
def test_a_bias_that_was_broken_by_hand_is_named(kind, change):
    layer = make(kind)[0]
    layer.bias = nn.Parameter(change(layer.bias))
    with pytest.raises((TypeError, ValueError), match="bias must"):
        layer(torch.randn(3, 80))


def test_a_bitmask_that_was_broken_by_hand_is_named():
    for change in (torch.Tensor.int, lambda bits: bits[:, :-1], lambda bits: bits[:-1]):
        layer = make(Linear24)[0]
        layer.bitmask = change(layer.bitmask)
        with pytest.raises((TypeError, ValueError), match="bitmask"):
            layer(torch.randn(3, 80))


@EVERY
def test_what_was_replaced_is_multiplied_by(kind):
    layer, linear = make(kind)
    x = torch.randn(3, 80)
    layer.bias = nn.Parameter(torch.ones(96))
    torch.testing.assert_close(layer(x), linear(x) - linear.bias + 1)
    layer.bias.data = torch.zeros(96)
    torch.testing.assert_close(layer(x), linear(x) - linear.bias)
    layer.bias = None
    torch.testing.assert_close(layer(x), linear(x) - linear.bias)
    if isinstance(layer, Linear24) and not isinstance(layer, ArrangedLinear24):
        y = layer(x)
        layer.values = nn.Parameter(2 * layer.values)
        torch.testing.assert_close(layer(x), 2 * y)
        layer.values.data = layer.values.data * 2
        torch.testing.assert_close(layer(x), 4 * y)
        changed = torch.func.functional_call(layer, {"values": 3 * layer.values}, (x,))
        torch.testing.assert_close(changed, 12 * y)


class Twice(nn.Module):
    def forward(self, tensor):
        return 2 * tensor


@pytest.mark.parametrize(("kind", "name"), [(Linear24, "bias"), (TieredLinear, "bias"), (TieredLinear, "dense")])
def test_a_parametrization_is_applied(kind, name):
    layer = make(kind)[0]
    changed = make(kind)[0]
    changed.load_state_dict(layer.state_dict())
    changed.get_parameter(name).mul_(2)
    nn.utils.parametrize.register_parametrization(layer, name, Twice())
    x = torch.randn(3, 80)
    assert torch.equal(layer(x), changed(x))


@COMPILED
def test_the_kernels_refuse_what_does_not_fit():
    layer, tiered = Linear24.from_linear(sparse_linear(80, 96)), make(TieredLinear)[0]
    x, quantized = torch.randn(3, 80), sk.quantize24(layer.packed)
    for op, tensors in (
        (torch.ops.sparsekit.linear24, [x, layer.values, layer.bitmask, layer.bias]),
        (torch.ops.sparsekit.linear24q, [x, *quantized[:3], layer.bias, "int8", 64]),
        (torch.ops.sparsekit.linear24q_int8, [x, sk.tile24(quantized).tiles, layer.bias, 96, "int8", 64]),
        (torch.ops.sparsekit.linear_tiered, [x, *tiered.packed.tensors, tiered.bias, 96]),
    ):
        assert op(*tensors).shape == (3, 96)
        for index, tensor in enumerate(tensors):
            if not isinstance(tensor, torch.Tensor):
                continue
            for wrong in (tensor[..., None], tensor[..., :-18], tensor.double(), torch.tensor(1.0)):
                with pytest.raises(RuntimeError, match=r"must fit x|dimension"):
                    op(*tensors[:index], wrong, *tensors[index + 1 :])


@pytest.mark.slow
@COMPILED
@pytest.mark.parametrize(("kind", "most"), [(Linear24, 20 / 17), (QuantizedLinear24, 2), (FloatInputs, 2)])
def test_a_call_costs_hardly_more_than_one_of_linear(kind, most, threads):
    threads(1)
    linear = sparse_linear(16, 16)
    layer, x = kind.from_linear(linear), torch.randn(1, 16)
    seconds = {linear: [], layer: []}
    for _ in range(200):
        for call, times in seconds.items():
            call(x)
            begin = time.perf_counter()
            for _ in range(100):
                call(x)
            times.append(time.perf_counter() - begin)
    plain, own = (statistics.median(times) for times in seconds.values())
    assert own <= most * plain, f"{own / plain:.2f} of a call of nn.Linear"
