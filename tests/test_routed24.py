"""RoutedLinear24: routes by token count, one copy of the values, and everything a Linear24 can do."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from helpers import dtype_id, sparse_linear
from torch import nn
from vendor import Vendor, install

from sparsekit.nn import Linear24, Plan, Route, RoutedLinear24, routed, routed24

SM90 = "cusparselt_sm90"
ROUTES = (Route(4, "sparse"), Route(16, "hardware", 3), Route(64, "hardware", 1, 4, 2))
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
# torch warns about its own use of torch.jit while it compiles.
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def vendor(monkeypatch):
    return install(monkeypatch, Vendor())


def plan(dtype=torch.float16, layout=SM90, routes=ROUTES):
    return Plan(routes, "cpu", dtype, layout)


def make(cols=40, rows=48, dtype=torch.float16, routes=ROUTES, layout=SM90, **kwargs):
    linear = sparse_linear(cols, rows, dtype=dtype, **kwargs)
    return linear, RoutedLinear24.from_linear(linear).follow(plan(dtype, layout, routes))


def exact(linear, x):
    return F.linear(x.double(), linear.weight.double(), None if linear.bias is None else linear.bias.double()).to(
        x.dtype
    )


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("leading", "call"),
    [
        ((1,), None),
        ((2, 2), None),
        ((5,), (8, 3, 1, -1)),
        ((16,), (16, 3, 1, -1)),
        ((17,), (24, 1, 4, 2)),
        ((64,), (64, 1, 4, 2)),
        ((10, 30), (304, 1, 4, 2)),
        ((), None),
        ((0,), None),
    ],
    ids=str,
)
def test_the_token_count_chooses_the_kernel(vendor, leading, call):
    linear, layer = make()
    x = torch.randn(*leading, 40).half()
    with torch.no_grad():
        y = layer(x)
    assert vendor.calls == ([] if call is None else [call])
    assert_close(y, exact(linear, x))


@HALF
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("layout", [SM90, "cusparselt_sm80", "cutlass_sm80"])
@pytest.mark.parametrize("shape", [(48, 40), (128, 128), (3, 4), (65, 66), (70, 129)], ids=str)
def test_odd_shapes_are_padded(monkeypatch, dtype, bias, layout, shape):
    vendor = install(monkeypatch, Vendor(layout))
    linear, layer = make(shape[1], shape[0], dtype, (Route(1, "hardware"),), layout, bias=bias)
    for tokens in (1, 3, 8, 33):
        x = torch.randn(tokens, shape[1]).to(dtype)
        with torch.no_grad():
            assert_close(layer(x), exact(linear, x))
    assert len(vendor.calls) == 4
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.to_linear().weight, linear.weight)


@pytest.mark.parametrize("shape", [(128, 128), (65, 66)], ids=str)
def test_values_are_stored_once(shape):
    linear, layer = make(shape[1], shape[0])
    plain = Linear24.from_linear(linear)
    assert layer.values.untyped_storage().data_ptr() == layer.hardware.untyped_storage().data_ptr()
    assert torch.equal(layer.values, plain.values) and torch.equal(layer.bitmask, plain.bitmask)
    assert layer.bias is linear.bias
    assert layer.state_dict().keys() == plain.state_dict().keys()
    tensors = [tensor for tensor in vars(layer).values() if isinstance(tensor, torch.Tensor)]
    assert len(tensors) == 1 and tensors[0] is layer.hardware


def test_gradients_reach_values_and_the_packed_weight_follows(vendor):
    linear, layer = make()
    assert layer.trainable
    x = torch.randn(16, 40).half()
    layer(x).float().square().sum().backward()
    assert layer.values.grad.shape == layer.values.shape and not vendor.calls
    torch.optim.SGD([layer.values], 0.001).step()
    assert not torch.equal(layer.weight, linear.weight)
    with torch.no_grad():
        assert_close(layer(x), F.linear(x.float(), layer.weight.float(), layer.bias.float()).half())
    assert len(vendor.calls) == 1


@pytest.mark.parametrize("kernel", ["hardware", "dense", "sparse"])
@torch.no_grad()
def test_a_call_with_another_weight_is_multiplied_by_that(kernel):
    layer = make(routes=(Route(16, kernel),))[1]
    x, values = torch.randn(16, 40).half(), layer.values.detach().clone()
    expected = layer(x)
    other = torch.func.functional_call(layer, {"values": 2 * values}, (x,))
    assert_close(other - layer.bias, 2 * (expected - layer.bias))
    assert torch.equal(layer.values, values) and torch.equal(layer(x), expected)


def test_frozen_values_leave_gradients_of_x_to_the_libraries(monkeypatch):
    monkeypatch.setattr(routed24, "HARDWARE", torch.ops.sparsekit.hardware_linear24.default)
    linear, layer = make()
    layer.requires_grad_(False)
    x = torch.randn(16, 40).half().requires_grad_()
    upstream = torch.randn(16, 48).half()
    assert_close(torch.autograd.grad(layer(x), x, upstream)[0], (upstream.float() @ linear.weight.float()).half())


DENSE = (Route(4, "sparse"), Route(16, "dense"), Route(64, "hardware", 3))


def test_a_dense_copy_answers_where_it_is_faster(vendor, monkeypatch):
    linear, layer = make(routes=DENSE)
    assert torch.equal(layer.copy, linear.weight) and layer.copy.data_ptr() != linear.weight.data_ptr()
    with torch.no_grad():
        for tokens, called in ((2, 0), (9, 0), (40, 1)):
            x = torch.randn(tokens, 40).half()
            assert_close(layer(x), exact(linear, x))
            assert len(vendor.calls) == called
        layer.values.mul_(2)
        x = torch.randn(9, 40).half()
        assert_close(layer(x) - linear.bias, 2 * (exact(linear, x) - linear.bias))
        layer.values.div_(2)
        layer(x)
        layer.copy = layer.copy * 2
        assert_close(layer(x) - linear.bias, 2 * (exact(linear, x) - linear.bias))


def test_a_dense_copy_cannot_be_trained():
    linear, layer = make(routes=DENSE)
    assert layer.trainable and not layer.values.requires_grad
    assert layer.to_linear().weight.requires_grad
    layer.train()
    with pytest.raises(RuntimeError, match=r"with a dense copy cannot train its weight: call model\.eval\(\)"):
        layer(torch.randn(3, 40).half())
    with torch.no_grad():
        assert layer(torch.randn(3, 40).half()).shape == (3, 48)
    layer.follow(plan())
    assert layer.values.requires_grad and layer.copy is None and not layer.frozen
    linear.weight.requires_grad_(False)
    frozen = RoutedLinear24.from_linear(linear.train()).follow(plan(routes=DENSE))
    assert frozen(torch.randn(3, 40).half()).shape == (3, 48) and not frozen.trainable


@pytest.mark.parametrize("routes", [ROUTES, DENSE], ids=["", "dense"])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_apart(vendor, clone, routes):
    linear, layer = make(routes=routes)
    x = torch.randn(20, 40).half()
    twin = clone(layer)
    assert torch.equal(twin.hardware, layer.hardware) and twin.hardware.data_ptr() != layer.hardware.data_ptr()
    assert twin.values.untyped_storage().data_ptr() == twin.hardware.untyped_storage().data_ptr()
    assert (twin.copy is None) == (layer.copy is None) and twin.trainable
    with torch.no_grad():
        assert torch.equal(twin(x), layer(x))
        twin.values.zero_()
        assert_close(layer(x), exact(linear, x))


def test_a_pickle_holds_the_weight_once(vendor):
    linear, layer = make(256, 256, routes=DENSE)
    assert len(pickle.dumps(layer)) < len(pickle.dumps(Linear24.from_linear(linear))) + layer.hardware.nbytes // 4


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("routes", [ROUTES, DENSE], ids=["", "dense"])
def test_loading_a_state_dict_rebuilds(vendor, assign, routes):
    (_, layer), (other, _) = make(66, 65, routes=routes), make(66, 65)
    read = [tensor for tensor in (layer.hardware, layer.copy) if tensor is not None]
    layer.load_state_dict(Linear24.from_linear(other).state_dict(), assign=assign)
    for tokens in (2, 9, 40):
        x = torch.randn(tokens, 66).half()
        with torch.no_grad():
            assert_close(layer(x), exact(other, x))
    assert vendor.calls
    assert torch.equal(layer.weight, other.weight)
    for kept, tensor in zip((layer.hardware, layer.copy), read, strict=False):
        assert kept is tensor  # a captured CUDA graph goes on reading here
    assert layer.values.untyped_storage().data_ptr() == layer.hardware.untyped_storage().data_ptr()
    plain = Linear24(66, 65, dtype=torch.float16)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(plain.weight, other.weight)


def test_elsewhere_it_is_a_plain_linear24(vendor, monkeypatch):
    linear, layer = make()
    x = torch.randn(16, 40)
    with torch.no_grad():
        layer.to(torch.float32)
        assert layer.hardware is None and layer.ready_for is None
        torch.testing.assert_close(layer(x), linear.float()(x))
        layer.to(torch.bfloat16)
        assert layer(x.bfloat16()).dtype == torch.bfloat16
        assert not vendor.calls
        layer.half()
        assert layer.ready_for == torch.float16 and layer.hardware is not None
        assert_close(layer(x.half()), linear.half()(x.half()))
        assert len(vendor.calls) == 1
        packed = layer.hardware
        assert layer.to("cpu").hardware is packed  # nothing moved
        assert layer.to("meta")(x.half().to("meta")).shape == (16, 48) and layer.hardware is None
    monkeypatch.setattr(routed, "device_name", lambda device: "another GPU")
    _, layer = make()
    assert layer.hardware is None and layer.ready_for is None
    assert str(layer).endswith("bias=True, routes=(sparse))")


def test_autocast(vendor):
    linear, layer = make()
    x = torch.randn(16, 40)
    with torch.no_grad():
        with torch.autocast("cpu", torch.float16):
            y = layer(x)
        assert y.dtype == torch.float16 and len(vendor.calls) == 1
        assert_close(y, exact(linear, x.half()))
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16 and len(vendor.calls) == 1
        assert_close(y.half(), exact(linear, x.half()))


def test_rejects_inputs_that_do_not_fit():
    _, layer = make()
    with torch.no_grad():
        for tokens in (1, 16):
            with pytest.raises(ValueError, match="x must have 40 columns for a weight of 48 x 40"):
                layer(torch.randn(tokens, 41).half())
        with pytest.raises(TypeError, match=r"values must be torch\.float32, got torch\.float16"):
            layer(torch.randn(16, 40))


@compiles
@pytest.mark.parametrize("routes", [ROUTES, DENSE], ids=["", "dense"])
def test_compiles_whole_and_for_any_token_count(monkeypatch, routes):
    monkeypatch.setattr(routed24, "HARDWARE", torch.ops.sparsekit.hardware_linear24.default)
    torch._dynamo.reset()
    linear, layer = make(routes=routes)
    model = nn.Sequential(layer, nn.ReLU()).eval()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for tokens in (3, 9, 40):
            x = torch.randn(tokens, 40).half()
            assert_close(compiled(x), exact(linear, x).relu())


def test_repr():
    assert str(make(routes=DENSE)[1]).endswith(
        "out_features=48, bias=True, routes=(sparse to 4, dense to 16, then hardware))"
    )


def test_a_plan_that_cannot_be_followed_is_refused():
    with pytest.raises(ValueError, match="at least one route"):
        Plan(())
    with pytest.raises(ValueError, match="layout must name"):
        Plan((Route(16, "hardware"),))


def test_an_interrupt_while_it_packs_leaves_a_layer_that_multiplies(monkeypatch):
    linear, layer = make()
    state, x = layer.state_dict(), torch.randn(8, 40).half()

    def interrupted(packed, layout):
        raise KeyboardInterrupt("injected")

    monkeypatch.setattr(routed24, "pack_hardware24", interrupted)
    with pytest.raises(KeyboardInterrupt, match="injected"):
        layer.load_state_dict(state)
    with torch.no_grad():
        assert_close(layer(x), exact(linear, x))
