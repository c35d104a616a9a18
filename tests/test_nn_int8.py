"""The dense linear layer on an 8-bit weight."""

import copy
import gc
import pickle

import pytest
import torch
from helpers import DTYPES, assert_same, dtype_id, hostile, opcheck
from torch import nn

from sparsekit.nn import Int8Linear
from sparsekit.ops import int8_linear as ops

compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # by torch itself, which uses torch.jit
needs_int8 = pytest.mark.skipif(ops.engine() is None, reason="the int8 products are for x86")


@pytest.fixture(params=["onednn", "fbgemm"])
def engine(request, monkeypatch):
    """Both products of PyTorch: fbgemm's also runs where oneDNN's is chosen."""
    best = ops.engine()
    if best is None or (request.param == "onednn" and best != "onednn"):
        pytest.skip("this CPU has no VNNI" if best else "the int8 products are for x86")
    monkeypatch.setattr(ops, "engine", lambda: request.param)
    return request.param


def make(cols=80, rows=96, bias=True, dtype=torch.float32):
    linear = nn.Linear(cols, rows, bias, dtype=dtype).eval()
    return Int8Linear.from_linear(linear), linear


def test_literal(engine):
    linear = nn.Linear(3, 2).eval()
    linear.weight.data = torch.tensor([[127.0, -2.4, 0.5], [0.0, 0.0, 0.0]])  # steps of 1: 127, -2, 0
    linear.bias.data = torch.tensor([0.5, 3.0])
    layer = Int8Linear.from_linear(linear)
    assert layer.state_dict()["values"].tolist() == [[127, -2, 0], [0, 0, 0]]
    assert layer.state_dict()["scales"].tolist() == [1, 1]
    largest = ops.LARGEST_INPUT[engine]  # which makes steps of 1 again, so that 10.4 is 10
    assert layer(torch.tensor([[10.4, largest, 7.0]])).tolist() == [[10 * 127 - 2 * largest + 0.5, 3.0]]


@pytest.mark.parametrize("shape", [(5, 80), (1, 80), (80,), (2, 3, 80), (0, 80), (300, 80)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
def test_forward_is_its_reference(engine, shape, dtype, bias):
    (layer, linear), x = make(bias=bias, dtype=dtype), torch.randn(shape).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(y.double(), layer.reference(x), rtol=tolerance, atol=tolerance)
    if x.numel():
        error = (y - linear(x)).norm() / linear(x).norm()
        assert error < 0.03
    assert (layer.weight - linear.weight).norm() / linear.weight.norm() < 0.006


def test_the_largest_sums_do_not_saturate(engine):
    linear = nn.Linear(4096, 8, bias=False).eval()
    linear.weight.data.fill_(1.0)
    layer = Int8Linear.from_linear(linear)
    x = torch.ones(2, 4096)
    x[1] = -1
    torch.testing.assert_close(layer(x), torch.tensor([[4096.0] * 8, [-4096.0] * 8]))


def test_a_token_depends_on_no_other(engine, threads):
    (layer, _), x = make(), torch.randn(40, 80) * torch.logspace(-3, 3, 40)[:, None]
    whole = layer(x)
    for count in (1, 2):
        threads(count)
        for token in range(0, 40, 13):
            assert torch.equal(layer(x[token : token + 1]), whole[token : token + 1])
    x[3, 5], x[7, 0] = float("nan"), float("-inf")
    assert layer(x).isnan().all(-1).nonzero().flatten().tolist() == [3, 7]


def test_gradients_are_those_of_the_weight_it_multiplies_by():
    (layer, _), x = make(), torch.randn(5, 80, requires_grad=True)
    layer(x).square().sum().backward()
    y = layer(x).detach()
    torch.testing.assert_close(x.grad, 2 * y @ layer.weight.clone())
    torch.testing.assert_close(layer.bias.grad, 2 * y.sum(0))
    trained = Int8Linear.from_linear(nn.Linear(8, 8))
    with pytest.raises(RuntimeError, match="Int8Linear cannot train its weight"):
        trained(torch.randn(2, 8))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_equal_and_apart(engine, clone):
    (layer, _), x = make(), torch.randn(3, 80)
    other = clone(layer)
    expected = layer(x)
    del layer
    gc.collect()
    assert torch.equal(other(x), expected)


def test_state_dict_round_trip_and_what_is_refused():
    layer, other = make()[0], make()[0]
    state, x = layer.state_dict(), torch.randn(3, 80)
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        "values": torch.int8,
        "scales": torch.float32,
        "bias": torch.float32,
    }
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))
    for change, match in (
        ({"values": state["values"].float()}, r"values must be torch.int8, got torch.float32"),
        ({"scales": state["scales"][:3]}, r"scales must have shape \(96,\), got \(3,\)"),
        ({"values": torch.full_like(state["values"], -128)}, "values must be from -127 to 127, got -128"),
        ({"values": 3}, "values must be a tensor, got int"),
    ):
        with pytest.raises(RuntimeError, match=match):
            other.load_state_dict(state | change)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({"bias": state["bias"], "scales": state["scales"]})
    assert torch.equal(other(x), layer(x))


def test_to_dtype_keeps_the_integers():
    layer, _ = make()
    before = layer.state_dict()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16 and layer(torch.randn(2, 80).bfloat16()) is not None
    assert torch.equal(layer.state_dict()["values"], before["values"])
    assert torch.equal(layer.state_dict()["scales"], before["scales"])
    with pytest.raises(TypeError, match=r"not torch\.float64"):
        layer.double()


@needs_int8
def test_autocast_follows_linear():
    (layer, linear), x = make(), torch.randn(3, 80)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == linear(x).dtype == torch.bfloat16


@needs_int8
@compiles
def test_compiled_and_exported_it_computes_the_same():
    (layer, _), x = make(), torch.randn(7, 80)
    model = nn.Sequential(layer)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), layer(x))
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), layer(x))
        torch.testing.assert_close(torch.vmap(layer)(x), layer(x))


def test_bad_inputs_and_weights():
    layer, _ = make()
    with pytest.raises(ValueError, match=r"x must have 80 columns for a weight of 96 x 80, got shape \(3, 81\)"):
        layer(torch.randn(3, 81))
    with pytest.raises(TypeError, match=r"x must be torch\.float32, as the weight, got torch\.int64"):
        layer(torch.ones(3, 80, dtype=torch.long))
    linear = nn.Linear(8, 8)
    linear.weight.data[2, 3] = float("inf")
    with pytest.raises(ValueError, match="weight must be finite to be quantized, got an Inf or a NaN"):
        Int8Linear.from_linear(linear)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(("rows", "cols"), [(0, 8), (8, 0), (1, 1), (7, 13)])
def test_odd_and_empty_shapes(engine, rows, cols):
    layer, x = make(cols, rows)[0], torch.randn(3, cols)
    torch.testing.assert_close(layer(x).double(), layer.reference(x), rtol=1e-5, atol=1e-5)


@needs_int8
def test_transposed_stands_for_conv1d():
    linear = nn.Linear(80, 96).eval()
    turned = nn.Linear(96, 80, bias=False).eval()
    turned.weight.data, turned.bias = linear.weight.detach().t().contiguous(), linear.bias
    layer, x = Int8Linear.from_linear(turned, transposed=True), torch.randn(3, 80)
    assert torch.equal(layer(x), Int8Linear.from_linear(linear)(x)) and layer.weight.shape == (80, 96)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_round_tokens_literal(simd, dtype):
    x = torch.tensor([[1, 2.4, 2.5, 3.5, -127], [0, 0, -254, 1, 3], [0, 0, 0, 0, 0]], dtype=dtype)
    codes, steps = torch.ops.sparsekit.round_tokens(x, 127)
    assert (codes.int() - 128).tolist() == [[1, 2, 2, 4, -127], [0, 0, -127, 0, 2], [0] * 5]  # ties to even
    assert steps.tolist() == torch.tensor([[1.0], [2.0], [1e-30 / 127]]).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("limit", ops.LARGEST_INPUT.values())
def test_round_tokens_is_its_reference(simd, dtype, limit):
    round_tokens = torch.ops.sparsekit.round_tokens
    for x in (hostile(40, 53, dtype=dtype), torch.randn(3, 1).to(dtype), torch.randn(5, 1000).to(dtype)[:, ::3]):
        for got, expected in zip(round_tokens(x, limit), ops.round_tokens_reference(x, limit), strict=True):
            assert_same(got, expected)
    assert [each.shape for each in round_tokens(torch.empty(0, 3), limit)] == [(0, 3), (0, 1)]
    opcheck(round_tokens.default, (torch.randn(4, 8).to(dtype), limit))


def test_a_limit_on_onednn_takes_the_product_of_7_bits(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert ops.engine() in (None, "fbgemm")
