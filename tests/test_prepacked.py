"""PrepackedLinear and its ops: gradients, state, the form it holds."""

import pytest
import torch
import torch.nn.functional as F
from helpers import outputs_and_gradients, sparse_linear
from torch import nn

from sparsekit.nn import PrepackedLinear
from sparsekit.ops.prepacked import prepack, prepacked_dense, prepacked_linear

# torch warns about its own use of torch.jit while it compiles.
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_prepacked_literal():
    layer = PrepackedLinear(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), nn.Parameter(torch.tensor([10.0, 20.0])))
    assert layer.eval()(torch.tensor([1.0, 1.0, 1.0])).tolist() == [16, 35]
    assert layer.state_dict()["weight"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert not isinstance(layer._parameters.get("weight"), nn.Parameter)


def test_prepacked_state_dict_errors():
    layer = PrepackedLinear.from_linear(sparse_linear())
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        layer.load_state_dict({"bias": layer.bias})
    with pytest.raises(RuntimeError, match=r"weight must have shape \(48, 40\), got \(40, 48\)"):
        layer.load_state_dict({"weight": torch.zeros(40, 48), "bias": layer.bias})
    with pytest.raises(RuntimeError, match="weight must be a tensor, got int"):
        layer.load_state_dict({"weight": 3, "bias": layer.bias})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"extra"'):
        layer.load_state_dict({**layer.state_dict(), "extra": torch.zeros(1)})


@compiles
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_prepacked_gradients_reach_x_and_bias(compiled):
    linear = sparse_linear()
    layer, x = PrepackedLinear.from_linear(linear), torch.randn(2, 3, 40)
    layer.bias = nn.Parameter(linear.bias.detach().clone())
    y, grad_x = outputs_and_gradients(torch.compile(layer, fullgraph=True) if compiled else layer, x)
    expected_y, expected_grad_x = outputs_and_gradients(linear, x)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(grad_x, expected_grad_x)
    torch.testing.assert_close(layer.bias.grad, linear.bias.grad)


def test_prepacked_refuses_to_train():
    layer = PrepackedLinear.from_linear(sparse_linear().train())
    x = torch.randn(3, 40)
    with pytest.raises(RuntimeError, match=r"cannot train its weight: call model.eval\(\)"):
        layer(x)
    with torch.no_grad():
        assert layer(x).shape == (3, 48)
    frozen = sparse_linear().train().requires_grad_(False)
    assert PrepackedLinear.from_linear(frozen)(x).shape == (3, 48)


def test_prepacked_weight_is_bit_exact():
    weight = torch.randn(7, 9)
    weight[0, :4] = torch.tensor([float("nan"), -0.0, 1e-42, float("inf")])
    layer = PrepackedLinear(weight)
    assert torch.equal(layer.weight.view(torch.int32), weight.view(torch.int32))


def test_prepacked_holds_one_form():
    linear = sparse_linear()
    layer = PrepackedLinear.from_linear(linear)
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    tensors = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 1 and tensors[0].is_mkldnn
    assert not list(layer.buffers())


@compiles
def test_compiled_prepacked_follows_autocast_and_gives_its_weight():
    torch._dynamo.reset()
    layer, x = PrepackedLinear.from_linear(sparse_linear()), torch.randn(5, 40)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), rtol=2e-2, atol=2e-2)
    with torch.no_grad():
        assert torch.equal(torch.compile(lambda: layer.weight + 1, fullgraph=True)(), layer.weight + 1)


def test_prepacked_ops_pass_opcheck():
    weight = torch.randn(6, 5)  # plain: opcheck looks at storages, which an opaque tensor has not
    for args in ((torch.randn(2, 5), weight, None), (torch.randn(2, 5, requires_grad=True), weight, torch.randn(6))):
        torch.library.opcheck(torch.ops.sparsekit.prepacked_linear.default, args)
    torch.library.opcheck(torch.ops.sparsekit.prepacked_dense.default, (weight,))


def test_prepacked_gradient_is_right():
    weight, bias = torch.randn(6, 5), torch.randn(6, requires_grad=True)
    packed, x = prepack(weight, 4), torch.randn(2, 5, requires_grad=True)
    assert torch.equal(prepacked_dense(packed), weight)
    upstream = torch.randn(2, 6)
    got = torch.autograd.grad(prepacked_linear(x, packed, bias), (x, bias), upstream)
    expected = torch.autograd.grad(F.linear(x, weight, bias), (x, bias), upstream)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
