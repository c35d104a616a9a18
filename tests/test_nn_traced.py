"""Compressed layers where torch traces, exports and transforms them, and nested inputs."""

import pytest
import torch
import torch.nn.functional as F
from layer_kinds import ALL, EACH, EVERY, SPARSE, Reads, compiles, make
from torch import nn

import sparsekit as sk
from sparsekit.nn import PrepackedLinear, QuantizedLinear24


@EVERY
def test_fx_keeps_the_layer_whole(kind):
    layer, linear = make(kind)
    traced = torch.fx.symbolic_trace(nn.Sequential(layer, nn.ReLU()))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    x = torch.randn(3, 80)
    torch.testing.assert_close(traced(x), linear(x).relu())
    with pytest.raises(ValueError, match=r"torch\.fx cannot trace a \w+ alone: trace a model that holds it"):
        torch.fx.symbolic_trace(layer)


def test_fx_keeps_a_layer_that_trains_sparse_whole():
    model, x = nn.Sequential(nn.Linear(32, 16), nn.ReLU()), torch.randn(3, 32)
    with sk.sparse_training_(model):
        traced = torch.fx.symbolic_trace(model)
        assert [node.op for node in traced.graph.nodes][1:3] == ["call_module", "call_module"]
        assert torch.equal(traced(x), model(x))


@pytest.mark.parametrize("kind", [kind for kind in ALL.values() if kind is not PrepackedLinear])
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace(kind, grad):
    layer, linear = make(kind)
    with torch.set_grad_enabled(grad):
        for model, plain in ((layer, linear), (Reads(layer), Reads(linear))):
            if kind is QuantizedLinear24 and model is not layer:
                continue
            traced = torch.jit.trace(model, torch.randn(20, 80), check_trace=False)
            x = torch.randn(5, 80)
            torch.testing.assert_close(traced(x), plain(x))


@compiles
def test_jit_trace_of_the_weight_of_tiles():
    layer, _ = make(QuantizedLinear24)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot read .* sparsekit\.decompress_\(model\) first"):
        torch.jit.trace(Reads(layer), torch.randn(20, 80), check_trace=False)


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
    torch.testing.assert_close(tangent, F.linear(x, layer.weight.clone()))
    torch.testing.assert_close(y, layer(x))


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
    torch.testing.assert_close(program.module()(x), wrap(linear)(x))


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


@EVERY
@compiles
def test_jit_script_says_what_to_do(kind):
    with pytest.raises(RuntimeError, match=r"torch\.jit\.script cannot .* use torch\.export"):
        torch.jit.script(nn.Sequential(make(kind)[0]))
