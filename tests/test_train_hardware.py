"""Sparse training in the hardware layouts, on a CPU with the reference of each op."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparsekit as sk
from sparsekit.ops import train24, transposable_mask24
from sparsekit.train import layouts
from sparsekit.train.product import Recipe, multiply

LAYOUTS = ("cusparselt_sm90", "cusparselt_sm80", "cutlass_sm80")
backwards = pytest.mark.parametrize("backward", ["straight_through", "transposable"])


each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture
def products(monkeypatch):
    """The shapes of the inputs of all sparse products."""
    seen, product = [], train24._product
    monkeypatch.setattr(train24, "_product", lambda x, *rest: seen.append(tuple(x.shape)) or product(x, *rest))
    return seen


def expected(x, weight, bias, backward, grad):
    """Returns the dense results in the precision of tensor cores: 16-bit operands, float32 sums."""
    mask = transposable_mask24(weight) if backward == "transposable" else sk.nm_mask(weight, 2, 4)
    pruned = (weight * mask).to(x.dtype)
    y = F.linear(x.float(), pruned.float(), None if bias is None else bias.float()).to(x.dtype)
    tokens, inputs = grad.flatten(0, -2), x.flatten(0, -2)
    return y, grad @ pruned, tokens.t() @ inputs, tokens.sum(0)


@each_layout
@backwards
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_output_and_gradients(layout, products, backward, dtype):
    x, weight, bias = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((2, 5, 128), (256, 128), (256,)))
    y = multiply(x, weight, bias, Recipe(backward, 0.0), layout)
    grad = torch.randn(2, 5, 256).to(dtype)
    y.backward(grad)
    both = [(2, 5, 128), (2, 5, 256)]  # forward, and if the transpose is 2:4 also the gradient of x
    assert products == (both if backward == "transposable" else both[:1])
    with torch.no_grad():
        for actual, wanted in zip(
            (y, x.grad, weight.grad, bias.grad), expected(x, weight, bias, backward, grad), strict=True
        ):
            assert actual.dtype == dtype
            torch.testing.assert_close(actual, wanted, atol=0.1, rtol=0.02)
        assert torch.equal(weight.grad, grad.flatten(0, -2).t() @ x.flatten(0, -2))


@each_layout
@backwards
@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_frozen_tensors_get_no_gradient(layout, backward, frozen):
    tensors = {"x": torch.randn(3, 128), "weight": torch.randn(128, 128), "bias": torch.randn(128)}
    tensors = {name: tensor.bfloat16().requires_grad_(name != frozen) for name, tensor in tensors.items()}
    multiply(**tensors, recipe=Recipe(backward, 0.0), layout=layout).sum().backward()
    assert {name for name, tensor in tensors.items() if tensor.grad is None} == {frozen}


@each_layout
@backwards
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast(layout, products, backward, stored):
    """Masks are ranked in the stored dtype, products are 16-bit, gradients have the dtypes of the parameters."""
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((5, 128), (128, 128), (128,)))
    weight = weight.detach().to(stored).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = multiply(x, weight, bias, Recipe(backward, 0.0), layout)
    grad = torch.randn(5, 128).bfloat16()
    y.backward(grad)
    assert products
    with torch.no_grad():
        wanted = expected(x.bfloat16(), weight, bias.bfloat16(), backward, grad)
    for actual, value, dtype in zip(
        (y, x.grad, weight.grad, bias.grad), wanted, (torch.bfloat16, torch.float32, stored, torch.float32), strict=True
    ):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, value.to(dtype), atol=0.1, rtol=0.02)


@each_layout
@backwards
def test_decay(layout, backward):
    x, weight = torch.randn(8, 128).bfloat16(), torch.randn(128, 128).bfloat16().requires_grad_()
    grads = []
    for decay in (0.0, 0.5):
        weight.grad = None
        multiply(x, weight, None, Recipe(backward, decay), layout).sum().backward()
        grads.append(weight.grad)
    mask = Recipe(backward, 0.0).mask(weight.detach())
    assert torch.equal(grads[1], torch.add(grads[0], weight.detach().masked_fill(mask, 0), alpha=0.5))


@each_layout
@backwards
def test_empty_input(layout, backward):
    x, weight = torch.randn(0, 128).bfloat16().requires_grad_(), torch.randn(128, 128).bfloat16().requires_grad_()
    y = multiply(x, weight, None, Recipe(backward, 0.0), layout)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 128) and (weight.grad == 0).all()


@each_layout
def test_second_gradients(layout):
    """The dense product of a straight-through backward has second gradients; the packed transpose raises."""
    x, weight = torch.randn(4, 128).bfloat16().requires_grad_(), torch.randn(128, 128).bfloat16()
    y = multiply(x, weight, None, Recipe("straight_through", 0.0), layout)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    pruned = sk.nm_prune(weight.float(), 2, 4)[0]
    wanted = (2 * pruned.t() @ pruned).sum(0).expand(4, 128)
    assert (second.float() - wanted).norm() < 0.02 * wanted.norm()
    y = multiply(x, weight, None, Recipe("transposable", 0.0), layout)
    with pytest.raises(RuntimeError, match="train_linear24 has no second gradients with transposable masks"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@each_layout
@backwards
def test_a_model_trains_as_with_masked_dense_products(layout, backward, products, monkeypatch):
    """This holds plain, compiled and checkpointed, in bfloat16, up to the order in which sums are rounded."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.Tanh(), nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 3)).bfloat16()
    x = torch.randn(16, 128).bfloat16()
    monkeypatch.setattr(layouts, "hardware_layouts", lambda device: ((layout,), ""))
    monkeypatch.setattr(layouts, "is_faster", lambda kind, tokens: True)
    handle = sk.sparse_training_(model, backward=backward, decay=0.01)
    assert [layer.product for layer in handle.layers] == [layout, layout, "masked dense"]

    def step(run):
        model.zero_grad()
        run(x).float().square().sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).float()

    sparse = step(model)
    assert len(products) == (3 if backward == "transposable" else 2)  # the first layer's input needs no gradient
    products.clear()
    assert torch.equal(step(torch.compile(model, fullgraph=True, backend="aot_eager")), sparse)
    assert products
    assert torch.equal(step(lambda x: checkpoint(model, x, use_reentrant=False)), sparse)
    monkeypatch.setattr(layouts, "is_faster", lambda kind, tokens: False)
    products.clear()
    dense = step(model)
    assert not products
    assert (sparse - dense).norm() < 0.02 * dense.norm()


def test_rejects():
    """Wrong shapes, which padding would hide, and dtypes that the libraries would misread are rejected."""
    x, weight = torch.randn(4, 128).bfloat16(), torch.randn(128, 128).bfloat16()
    for wrong, error, message in (
        (x[:, :120], ValueError, r"weight must have shape \(128, 120\), got \(128, 128\)"),
        (x.half(), TypeError, r"weight must be torch\.float16, got torch\.bfloat16"),
    ):
        with pytest.raises(error, match=message):
            multiply(wrong, weight, None, Recipe("straight_through", 0.0), LAYOUTS[0])
    with pytest.raises(ValueError, match=r"bias must have shape \(128,\), got \(120,\)"):
        multiply(x, weight, x[0, :120], Recipe("transposable", 0.0), LAYOUTS[0])


@backwards
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_train_linear24_is_a_proper_op(backward, bias):
    x, weight = torch.randn(4, 128).bfloat16().requires_grad_(), torch.randn(128, 128).bfloat16().requires_grad_()
    arguments = (x, weight, torch.randn(128).bfloat16() if bias else None, backward == "transposable", LAYOUTS[0])
    torch.library.opcheck(torch.ops.sparsekit.train_linear24.default, arguments)
