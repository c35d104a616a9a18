"""The runtime on a real GPU: every kernel of a 2:4 layer is right, captured, compiled, and never slower than dense."""

import copy
import statistics

import pytest
import torch
import torch.nn.functional as F
from helpers import dtype_id
from torch import nn

import sparsekit as sk
from bench import shapes
from sparsekit import _timing
from sparsekit.nn import Plan, Route, RoutedLinear24
from sparsekit.ops import hardware_layouts
from sparsekit.ops.layouts import device_name

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
SHAPES = pytest.mark.parametrize("shape", shapes.GPU_LINEAR, ids=shapes.name)
CAPABLE = torch.cuda.is_available() and torch.version.hip is None and torch.cuda.get_device_capability()[0] >= 8


@pytest.fixture(scope="module")
def device():
    return torch.device("cuda", torch.cuda.current_device())


def sparse(shape, dtype, device):
    """A 2:4 layer with a bias."""
    rows, cols = shape
    linear = nn.Linear(cols, rows, device=device, dtype=dtype).eval().requires_grad_(False)
    sk.nm_prune_(linear.weight, 2, 4)
    return linear


def kernels(device):
    return (None, *hardware_layouts(device).names)


def routed(linear, layout):
    kernel = "sparse" if layout is None else "hardware"
    weight = linear.weight
    plan = Plan((Route(1, kernel),), device_name(weight.device), weight.dtype, layout)
    return RoutedLinear24.from_linear(linear).follow(plan)


def assert_right(y, linear, x):
    exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1e-2}[x.dtype]
    assert (y.double() - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.skipif(not CAPABLE, reason="needs 2:4 tensor cores")
def test_the_gpu_has_a_layout(device):
    found = hardware_layouts(device)
    assert found.names, found.remark
    assert found.remark == "", found.remark  # the closed forms hold


@HALF
@SHAPES
def test_every_kernel_is_right(device, shape, dtype):
    linear = sparse(shape, dtype, device)
    for layout in kernels(device):
        layer = routed(linear, layout)
        assert torch.equal(layer.weight, linear.weight)
        for tokens in (1, 7, 16, 100, 1024):
            x = torch.randn(tokens, shape[1], device=device).to(dtype)
            with torch.no_grad():
                assert_right(layer(x), linear, x)


@HALF
@pytest.mark.parametrize("shape", [(1, 4), (100, 70), (129, 132), (50, 129), (1000, 4100)], ids=str)
def test_odd_shapes(device, shape, dtype):
    linear = sparse(shape, dtype, device)
    for layout in kernels(device):
        layer = routed(linear, layout)
        wide = torch.randn(37, shape[1] + 3, device=device).to(dtype)
        for x in (wide[:, 3:], wide[:5, : shape[1]], wide[3, 1 : 1 + shape[1]], wide[:0, 3:]):
            with torch.no_grad():
                y = layer(x)
            assert y.shape == (*x.shape[:-1], shape[0])
            if x.numel():
                assert_right(y, linear, x)


def test_gradients_of_a_frozen_layer(device):
    linear = sparse((768, 3072), torch.bfloat16, device)
    x = torch.randn(2, 50, 3072, device=device).bfloat16().requires_grad_()
    for layout in kernels(device):
        (grad,) = torch.autograd.grad(routed(linear, layout)(x).sum(), x)
        torch.testing.assert_close(grad, linear.weight.float().sum(0).bfloat16().expand_as(x), rtol=2e-2, atol=2e-2)


def assert_captured_and_compiled(layer, linear, x):
    """A CUDA graph of the layer takes another input, and torch.compile takes the layer whole."""
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert_right(y, linear, x)
        torch._dynamo.reset()
        assert_right(torch.compile(layer, fullgraph=True, dynamic=False)(x), linear, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_every_kernel_is_captured_and_compiled(device):
    linear = sparse(shapes.BERT_UP, torch.bfloat16, device)
    for layout in kernels(device):
        assert_captured_and_compiled(routed(linear, layout), linear, torch.randn(16, 768, device=device).bfloat16())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
@SHAPES
def test_compressed_layers_are_captured_and_compiled(device, shape):
    linear = sparse(shape, torch.bfloat16, device)
    model = nn.Sequential(copy.deepcopy(linear)).eval()
    batches = [torch.randn(tokens, shape[1], device=device).bfloat16() for tokens in (1, 1024)]
    sk.compress_(model, batches, measure=sk.Measure(budget=0.1, graphs=True), keep_dense=True)
    for x in batches:
        assert_captured_and_compiled(model[0], linear, x)


def test_to_the_cpu_and_back(device):
    linear = sparse(shapes.BERT, torch.bfloat16, device)
    for layout in kernels(device):
        layer = routed(linear, layout)
        packed = layer.hardware
        layer.cpu()
        assert layer.hardware is None and torch.equal(layer.weight, linear.weight.cpu())
        layer.to(device)
        assert torch.equal(layer.weight, linear.weight)
        assert packed is None or torch.equal(layer.hardware.view(torch.int16), packed.view(torch.int16))


@pytest.mark.parametrize("keep_dense", [False, True], ids=["", "keep dense"])
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@SHAPES
def test_never_slower_than_dense(device, shape, graphs, keep_dense):
    """Measured again, at every token count that was seen, by the clock that decided."""
    model = nn.Sequential(sparse(shape, torch.bfloat16, device)).eval()
    dense = copy.deepcopy(model)
    batches = [torch.randn(tokens, shape[1], device=device).bfloat16() for tokens in (1, 16, 128, 2048)]
    report = sk.compress_(model, batches, measure=sk.Measure(budget=0.1, graphs=graphs), keep_dense=keep_dense)
    if not report.swapped:
        pytest.skip(f"nothing was faster than dense: {report.layers[0].reason}")
    timer = _timing.clock(device, evict_cache=report.bytes_before > _timing.cache_bytes(device), graphs=graphs)
    for x in batches:
        with torch.no_grad():
            assert_right(model(x), dense[0], x)
            ratios = []
            while len(ratios) < 3 and max(ratios, default=0) < 0.97:
                pairs = [timer.seconds(dense, x) / timer.seconds(model, x) for _ in range(21)]
                ratios.append(statistics.median(pairs))
        assert max(ratios) >= 0.97, f"{ratios} at {len(x)} tokens, compress_ measured {report.layers[0].timing(len(x))}"


def test_layers_survive_save_and_decompress(device, tmp_path):
    model = nn.Sequential(sparse(shapes.BERT_UP, torch.bfloat16, device)).eval()
    dense, x = copy.deepcopy(model), torch.randn(9, 768, device=device).bfloat16()
    sk.compress_(model, x, measure=sk.Measure(budget=0.05), keep_dense=True)
    sk.save(model, tmp_path / "model.safetensors")
    sk.decompress_(model)
    assert torch.equal(model[0].weight, dense[0].weight)
    sk.load(model, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert_right(model(x), dense[0], x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor:UserWarning")
def test_torch_multiplies_by_our_tensors(device):
    linear = sparse(shapes.BERT, torch.float16, device)
    x = torch.randn(64, 768, device=device).half()
    for layout in hardware_layouts(device).names:
        weight = sk.to_sparse_semi_structured(sk.pack24(linear.weight), layout=layout)
        assert_right(F.linear(x, weight, linear.bias), linear, x)
