"""Compressed layers where torch traces, transforms and converts them, and in modes that a caller may be in."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import sparse_linear
from tiering import tiered_linear
from torch import nn

import sparsekit as sk
from sparsekit.nn import (
    Linear24,
    Linear24WithDense,
    PrepackedLinear,
    RoutedLinear24,
    TieredLinear,
    TieredLinearWithDense,
)

KINDS = {"linear24": Linear24, "tiered": TieredLinear, "prepacked": PrepackedLinear}
ALL = KINDS | {"routed": RoutedLinear24, "24 dense": Linear24WithDense, "tiered dense": TieredLinearWithDense}
DENSE = (Linear24WithDense, TieredLinearWithDense)
EACH = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
EVERY = pytest.mark.parametrize("kind", ALL.values(), ids=ALL)
SPARSE = pytest.mark.parametrize("kind", [Linear24, TieredLinear])
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def make(kind):
    """A compressed layer of 80 inputs and 96 outputs, and the dense one it stands for."""
    linear = tiered_linear().eval() if issubclass(kind, TieredLinear) else sparse_linear(80, 96)
    layer = kind.from_linear(linear)
    return (layer.follow(((8, False), (1, True)), 16) if kind in DENSE else layer), linear


class Reads(nn.Module):
    """Multiplies by the weight of a layer that it does not call."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return F.linear(x, self.layer.weight, self.layer.bias)


@EVERY
def test_the_input_is_named_as_by_linear(kind):
    layer, linear = make(kind)
    for tokens in (3, 20):
        x = torch.randn(tokens, 80)
        torch.testing.assert_close(layer(input=x), linear(input=x))


@EVERY
def test_fx_keeps_the_layer_whole(kind):
    layer, linear = make(kind)
    traced = torch.fx.symbolic_trace(nn.Sequential(layer, nn.ReLU()))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    x = torch.randn(3, 80)
    torch.testing.assert_close(traced(x), linear(x).relu())
    with pytest.raises(ValueError, match=r"torch\.fx cannot trace a compressed layer alone"):
        torch.fx.symbolic_trace(layer)


@pytest.mark.parametrize("kind", [kind for kind in ALL.values() if kind is not PrepackedLinear])
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace(kind, grad):
    layer, linear = make(kind)
    with torch.set_grad_enabled(grad):
        for model in (layer, Reads(layer)):
            traced = torch.jit.trace(model, torch.randn(20, 80), check_trace=False)
            x = torch.randn(5, 80)
            torch.testing.assert_close(traced(x), linear(x))


@compiles
def test_jit_trace_of_what_onednn_has_reordered():
    layer, _ = make(PrepackedLinear)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot .* sparsekit\.decompress_\(model\) first"):
        torch.jit.trace(layer, torch.randn(20, 80), check_trace=False)


@EVERY
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_inputs(kind, layout):
    layer, linear = make(kind)
    parts = [torch.randn(2, 80), torch.randn(5, 80)]
    x = torch.nested.nested_tensor(parts, layout=layout, requires_grad=True)
    y = layer(x)
    assert y.is_nested and y.layout == layout
    for got, part in zip(y.unbind(), parts, strict=True):
        torch.testing.assert_close(got, linear(part))
    sum(part.sum() for part in y.unbind()).backward()
    expected = linear.weight.sum(0).expand(2, 80)
    torch.testing.assert_close(x.grad.unbind()[0], expected)
    with pytest.raises(ValueError, match=r"80 columns|for a weight of 81"):
        layer(torch.nested.nested_tensor([torch.randn(2, 81), torch.randn(3, 81)], layout=layout))


@EACH
@compiles
def test_gradients_per_sample(kind):
    layer, _ = make(kind)
    parameters, x = dict(layer.named_parameters()), torch.randn(3, 80)

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    gradients = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for index, row in enumerate(x):
        expected = torch.autograd.grad(layer(row).square().sum(), parameters.values())
        for got, grad in zip(gradients.values(), expected, strict=True):
            torch.testing.assert_close(got[index], grad)
    torch.testing.assert_close(torch.func.jacrev(layer)(x[0]), layer.weight.clone())
    y, tangent = torch.func.jvp(layer, (x,), (x,))
    torch.testing.assert_close(tangent, y - layer.bias)


@SPARSE
def test_an_ensemble_of_layers(kind):
    layer, _ = make(kind)
    stacked = {name: torch.stack([tensor, 2 * tensor]).detach() for name, tensor in layer.named_parameters()}
    x = torch.randn(3, 80)
    y = torch.vmap(lambda parameters: torch.func.functional_call(layer, parameters, (x,)))(stacked)
    torch.testing.assert_close(y, torch.stack([layer(x), 2 * layer(x)]))


@EACH
@compiles
@pytest.mark.parametrize("wrap", [nn.Sequential, Reads], ids=["calls", "reads"])
def test_export(kind, wrap):
    layer, linear = make(kind)
    shapes = {0: torch.export.Dim("tokens", min=2, max=64)}
    program = torch.export.export(wrap(layer), (torch.randn(3, 80),), dynamic_shapes=(shapes,))
    x = torch.randn(7, 80)
    torch.testing.assert_close(program.module()(x), linear(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@SPARSE
def test_aot_inductor(kind, tmp_path):
    layer, linear = make(kind)
    x = torch.randn(3, 80)
    with torch.no_grad():
        program = torch.export.export(nn.Sequential(layer, nn.ReLU()), (x,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), linear(x).relu())


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
    layer = TieredLinear(packed, in_features=32, out_features=16)
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
    sk.nn.guard_conversions(model)
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
    sk.nn.guard_conversions(model)
    assert "_apply" not in vars(model) and model.double()[1][1].weight.dtype == torch.float64


@EVERY
def test_bits_and_positions_are_never_converted(kind):
    layer, linear = make(kind)
    before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    layer.type(torch.float16).float()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.named_buffers())
    torch.testing.assert_close(layer(torch.ones(1, 80)), linear.half().float()(torch.ones(1, 80)))


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
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            layer = kind.from_linear(linear)
            x = torch.randn(3, 80, dtype=torch.float32, device="cpu")
            y, weight, back = layer(x), layer.weight.clone(), layer.to_linear()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(y, linear(x))
    assert torch.equal(weight, linear.weight) and torch.equal(back.weight, linear.weight)


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
