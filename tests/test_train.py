"""The product of sparse training against dense arithmetic written out."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparsekit as sk
from sparsekit.ops import transposable_mask24
from sparsekit.ops.train24 import train_prune24
from sparsekit.train.product import Recipe, multiply
from tests.helpers import DTYPES, LAYOUTS, assert_same, dtype_id, hostile, ties

BACKWARDS = ("straight_through", "transposable")
backwards = pytest.mark.parametrize("backward", BACKWARDS)
SHAPES = [(8, 12, 8), (7, 5, 13), (1, 4, 4), (0, 8, 16), (3, 6, 9)]  # tokens, rows, cols


def sparse_linear(x, weight, bias, recipe):
    return multiply(x, weight, bias, recipe, None)


def mask_of(weight, backward):
    return transposable_mask24(weight) if backward == "transposable" else sk.nm_mask(weight, 2, 4)


def gradients(function, *tensors):
    """Returns the output, and the gradients of a loss that weights every output by its position."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    y.backward(torch.arange(y.numel(), dtype=y.dtype).view(y.shape) % 7 - 3)
    return y.detach(), *(leaf.grad for leaf in leaves)


def test_literal():
    weight = torch.tensor([[3.0, -4.0, 1.0, 2.0]], requires_grad=True)
    x = torch.tensor([[1.0, 10.0, 100.0, 1000.0]], requires_grad=True)
    y = sparse_linear(x, weight, torch.tensor([0.5]), Recipe("straight_through", 0.1))
    assert y.item() == 3 - 40 + 0.5
    y.backward(torch.tensor([[2.0]]))
    assert x.grad.tolist() == [[6.0, -8.0, 0.0, 0.0]]  # the gradient by the pruned weight
    dense = torch.tensor([[2.0, 20.0, 200.0, 2000.0]])  # the gradient for the dense weight
    assert torch.equal(weight.grad, dense + 0.1 * torch.tensor([[0.0, 0.0, 1.0, 2.0]]))


@backwards
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_dense_product_with_the_masked_weight(shape, dtype, bias, backward):
    tokens, rows, cols = shape
    x, weight, b = torch.randn(tokens, cols).to(dtype), torch.randn(rows, cols).to(dtype), torch.randn(rows).to(dtype)
    inputs = (x, weight, b) if bias else (x, weight)
    masked = (weight * mask_of(weight, backward)).detach()

    def sparse(x, weight, bias=None):
        return sparse_linear(x, weight, bias, Recipe(backward, 0.0))

    def dense(x, weight, bias=None):  # has the value of masked, and the gradient of weight
        return F.linear(x, masked + (weight - weight.detach()), bias)

    for actual, expected in zip(gradients(sparse, *inputs), gradients(dense, *inputs), strict=True):
        assert torch.equal(actual, expected)


@backwards
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_leading_dimensions(layout, backward):
    x, weight = LAYOUTS[layout](torch.randn(2, 3, 12)), LAYOUTS[layout](ties(8, 12))
    recipe = Recipe(backward, 0.25)
    expected = gradients(lambda x, w: sparse_linear(x, w, None, recipe), x.contiguous(), weight.contiguous())
    x.requires_grad_(), weight.requires_grad_()
    y = sparse_linear(x, weight, None, recipe)
    y.backward(torch.arange(y.numel(), dtype=y.dtype).view(y.shape) % 7 - 3)
    torch.testing.assert_close((y, x.grad, weight.grad), expected)


@backwards
def test_decay_reaches_only_what_is_dropped(backward):
    x, weight = torch.randn(6, 16), torch.randn(8, 16)
    plain = gradients(lambda w: sparse_linear(x, w, None, Recipe(backward, 0.0)), weight)[1]
    decayed = gradients(lambda w: sparse_linear(x, w, None, Recipe(backward, 0.5)), weight)[1]
    mask = mask_of(weight, backward)
    assert torch.equal(decayed[mask], plain[mask])
    torch.testing.assert_close(decayed - plain, 0.5 * weight.masked_fill(mask, 0))


def test_a_transposable_mask_is_2_of_4_in_both_directions():
    recipe, weight = Recipe("transposable", 0.0), torch.randn(32, 16)
    mask = recipe.mask(weight)
    for each in (mask, mask.t()):
        assert (each.reshape(each.shape[0], -1, 4).sum(-1) == 2).all()
    assert torch.equal(sparse_linear(torch.eye(16), weight, None, recipe).t(), weight * mask)


@backwards
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_autocast_follows_a_linear_layer(dtype, backward):
    x, weight, bias = torch.randn(5, 16), torch.randn(8, 16).to(dtype), torch.randn(8).to(dtype)
    masked = (weight * mask_of(weight, backward)).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gradients(lambda x, w, b: sparse_linear(x, w, b, Recipe(backward, 0.0)), x, weight, bias)
        expected = gradients(lambda x, w, b: F.linear(x, masked + (w - w.detach()), b), x, weight, bias)
    assert actual[0].dtype == torch.bfloat16
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_masks_are_those_of_the_stored_weight_under_autocast():
    """The larger of two weights is kept, even if they are equal in bfloat16."""
    weight = torch.tensor([[1.0, 1.0001, 3.0, 0.0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse_linear(torch.tensor([[1.0, 10.0, 0.0, 0.0]]), weight, None, Recipe("straight_through", 0.0))
    assert y.item() == 10


@backwards
@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_frozen_tensors_get_no_gradient(frozen, backward):
    tensors = {"x": torch.randn(3, 8), "weight": torch.randn(4, 8), "bias": torch.randn(4)}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name != frozen)
    sparse_linear(**tensors, recipe=Recipe(backward, 0.1)).sum().backward()
    assert {name for name, tensor in tensors.items() if tensor.grad is None} == {frozen}


def test_a_weight_changed_between_forward_and_backward_is_noticed():
    weight = torch.randn(4, 8, requires_grad=True)
    y = sparse_linear(torch.randn(3, 8), weight, None, Recipe("straight_through", 0.1))
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@backwards
def test_gradients_of_gradients(backward):
    x, weight = torch.randn(3, 8, dtype=torch.float32, requires_grad=True), torch.randn(4, 8)
    y = sparse_linear(x, weight, None, Recipe(backward, 0.0))
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    masked = weight * mask_of(weight, backward)
    torch.testing.assert_close(second, 2 * (masked.t() @ masked).sum(0).expand(3, 8))


@backwards
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_checkpointing_and_compile_change_nothing(backward, autocast):
    torch._dynamo.reset()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
    sk.sparse_training_(model, backward=backward, decay=0.1)
    x = torch.randn(6, 16)

    def step(run):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
            y = run(x)
        y.float().square().sum().backward()
        return y.detach(), *(parameter.grad.clone() for parameter in model.parameters())

    expected = step(model)
    again = step(lambda x: checkpoint(model, x, use_reentrant=False))
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))
    again = step(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))


@backwards
@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_train_prune24_is_a_proper_op(backward, decay, layout):
    weight = LAYOUTS[layout](torch.randn(8, 12)).requires_grad_()
    torch.library.opcheck(torch.ops.sparsekit.train_prune24.default, (weight, backward == "transposable", decay))


@backwards
def test_train_prune24_of_hostile_weights(backward):
    weight = hostile(16, 24)
    assert_same(
        train_prune24(weight, transposable=backward == "transposable"), weight.where(mask_of(weight, backward), 0)
    )
