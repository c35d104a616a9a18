"""The linear layer on a quantized 2:4 weight."""

import copy
import pickle

import pytest
import torch
from helpers import sparse_linear
from torch import nn

import sparsekit as sk
from sparsekit.masks import get_mask
from sparsekit.nn import QuantizedLinear24
from sparsekit.nn.layer_weight import kept_entries, store_weight

compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # by torch itself, which uses torch.jit
EACH = pytest.mark.parametrize(
    ("quant_type", "inputs"),
    [("int8", "int8"), ("int8", "float"), ("int4", "int8"), ("nf4", "int8"), ("nf4", "float")],
)
ERRORS = {"int8": 0.01, "int4": 0.13, "nf4": 0.11}


def make(quant_type="int8", inputs="int8", cols=80, rows=96, **options):
    linear = sparse_linear(cols, rows, **options)
    return QuantizedLinear24.from_linear(linear, quant_type=quant_type, inputs=inputs), linear


def test_literal():
    linear = nn.Linear(8, 1).eval()
    linear.weight.data = torch.tensor([[127.0, 0.0, 0.0, -2.4, 0.0, 0.5, 0.0, 63.6]])  # steps of 1: 127, -2, 0, 64
    linear.bias.data = torch.tensor([0.5])
    layer = QuantizedLinear24.from_linear(linear)
    assert layer.state_dict()["values"].tolist() == [[127, -2, 0, 64]]
    assert layer.state_dict()["scales"].tolist() == [[1]] and layer.state_dict()["bitmask"].tolist() == [[0b10101001]]
    assert layer.weight.tolist() == [[127, 0, 0, -2, 0, 0, 0, 64]]
    # Steps of 1 again: 10.4 is 10, and so 10 * 127 - 2 * 127 + 0.5.
    assert layer(torch.tensor([[10.4, 0, 0, 127, 0, 0, 0, 0]])).tolist() == [[1016.5]]


@EACH
@pytest.mark.parametrize("shape", [(5, 80), (80,), (2, 3, 80), (0, 80), (40, 80)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_forward_is_its_reference(quant_type, inputs, shape, dtype):
    (layer, linear), x = make(quant_type, inputs, dtype=dtype), torch.randn(shape).to(dtype)
    y, tolerance = layer(x), 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(y.double(), layer.reference(x), rtol=tolerance, atol=tolerance)
    assert y.dtype == dtype
    if x.numel():
        assert (y - linear(x)).norm() / linear(x).norm() < ERRORS[quant_type] + 0.02
    assert (layer.weight - linear.weight).norm() / linear.weight.norm() < ERRORS[quant_type]


@EACH
def test_copies_state_and_conversion(quant_type, inputs):
    (layer, _), (other, _), x = make(quant_type, inputs), make(quant_type, inputs), torch.randn(3, 80)
    expected, state = layer(x), layer.state_dict()
    assert list(state) == ["values", "scales", "bitmask", "bias"]
    assert [state[name].dtype for name in state][1:] == [torch.bfloat16, torch.uint8, torch.float32]
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(clone(x), expected)
    other.load_state_dict(state)
    assert torch.equal(other(x), expected)
    other.to(torch.float16).to(torch.float32)
    assert other.weight.dtype == torch.float32 and other.state_dict()["scales"].dtype == torch.bfloat16
    assert all(torch.equal(other.state_dict()[name], state[name]) for name in ("values", "scales", "bitmask"))
    with pytest.raises(TypeError, match=r"not torch\.float64"):
        other.double()


@pytest.mark.parametrize("inputs", ["int8", "float"])
def test_one_form_is_resident(inputs):
    layer, _ = make(inputs=inputs, cols=256)
    assert sum(tensor.nbytes for tensor in layer.resident_tensors()) == pytest.approx(0.656 * 96 * 256, rel=0.01)


@EACH
@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        ("values", lambda t: t.float(), r"values must be torch\.u?int8, got torch\.float32"),
        ("scales", lambda t: t[:, :1], r"scales must have shape \(96, 2\), got \(96, 1\)"),
        ("bitmask", lambda t: t | 7, "bitmask must set two bits of every full group of four"),
        ("bitmask", lambda t: None, "bitmask must be a tensor, got str"),
    ],
)
def test_a_state_that_no_weight_has_is_refused_whole(quant_type, inputs, name, change, match):
    (layer, _), x = make(quant_type, inputs), torch.randn(3, 80)
    expected, state = layer(x), layer.state_dict()
    changed = change(state[name])
    with pytest.raises(RuntimeError, match=match):
        layer.load_state_dict({**state, name: "x" if changed is None else changed})
    assert torch.equal(layer(x), expected)


def test_codes_that_no_weight_has_are_refused():
    for quant_type, code, match in (("int8", -128, "-127 to 127, got -128"), ("int4", 0x80, "-7 to 7, got -8")):
        layer, _ = make(quant_type)
        state = layer.state_dict()
        state["values"][3, 3] = code
        with pytest.raises(RuntimeError, match=match):
            layer.load_state_dict(state)


def test_gradients_and_training():
    (layer, _), x = make(), torch.randn(5, 80, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * y.detach() @ layer.weight.clone())
    torch.testing.assert_close(layer.bias.grad, 2 * y.detach().sum(0))
    with pytest.raises(RuntimeError, match="QuantizedLinear24 cannot train its weight"):
        layer.train()(x)
    with torch.no_grad():
        assert torch.equal(layer(x), y)


@compiles
@pytest.mark.parametrize("inputs", ["int8", "float"])
def test_compiled_and_exported_it_computes_the_same(inputs):
    (layer, _), x = make(inputs=inputs), torch.randn(7, 80)
    model = nn.Sequential(layer)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), layer(x))
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), layer(x))


def test_autocast_and_transposed():
    (layer, linear), x = make(), torch.randn(3, 80)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    turned = nn.Linear(96, 80, bias=False).eval()
    turned.weight.data, turned.bias = linear.weight.detach().t().contiguous(), linear.bias
    other = QuantizedLinear24.from_linear(turned, transposed=True)
    assert torch.equal(other(x), layer(x)) and other.weight.shape == (80, 96)


def test_masks_and_other_weights():
    model = nn.Sequential(nn.Linear(80, 96).eval())
    sk.prune_(model, sk.Magnitude("2:4"))
    layer = QuantizedLinear24.from_linear(model[0])
    assert torch.equal(get_mask(layer), get_mask(model[0])) and torch.equal(kept_entries(layer), get_mask(model[0]))
    other = torch.where(get_mask(model[0]), torch.randn(96, 80), 0)
    store_weight(layer, other)
    assert (layer.weight - other).norm() / other.norm() < 0.01
    dense = layer.to_linear()
    assert torch.equal(dense.weight, layer.weight.clone()) and torch.equal(get_mask(dense), get_mask(layer))


def test_what_is_refused():
    linear = sparse_linear(80, 96)
    with pytest.raises(ValueError, match="inputs must be 'int8' or 'float', got 'int4'"):
        QuantizedLinear24.from_linear(linear, inputs="int4")
    with pytest.raises(ValueError, match="quant_type must be one of"):
        QuantizedLinear24.from_linear(linear, quant_type="int3")
    with pytest.raises(ValueError, match="2:4 needs at most 2"):
        QuantizedLinear24.from_linear(nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"x must have 80 columns"):
        make()[0](torch.randn(3, 81))
