"""Sparse training on a real GPU: right in every layout, checkpointed, compiled, captured."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparsekit as sk
from sparsekit.ops import hardware_layouts
from sparsekit.ops.hardware24 import MULTIPLES
from sparsekit.train import layouts
from sparsekit.train.product import Recipe, multiply

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
backwards = pytest.mark.parametrize("backward", ["straight_through", "transposable"])


@pytest.fixture(scope="module")
def device():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(autouse=True)
def _measure_anew(monkeypatch):
    layouts.RATIOS.clear()


def step(model, run, x):
    """Returns the output and all gradients."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = run(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(parameter.grad.clone() for parameter in model.parameters())]


def assert_close(actual, expected, tolerance=2e-2):
    for one, other in zip(actual, expected, strict=True):
        assert (one - other).float().norm() <= tolerance * other.float().norm()


@backwards
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("shape", [(256, 128), (768, 3072)], ids=str)
def test_output_and_gradients(device, shape, dtype, backward):
    recipe, (rows, cols) = Recipe(backward, 0.01), shape
    for layout in (None, *(name for name in hardware_layouts(device).names if name in MULTIPLES)):
        for tokens in (1, 13, 512):
            x, weight, bias = (
                torch.randn(*size, device=device).to(dtype).requires_grad_()
                for size in ((2, tokens, cols), shape, (rows,))
            )
            grad = torch.randn(2, tokens, rows, device=device).to(dtype)
            y = multiply(x, weight, bias, recipe, layout)
            actual = y, *torch.autograd.grad(y, (x, weight, bias), grad)
            mask = recipe.mask(weight.detach())
            pruned = (weight.detach() * mask).double()
            flat, upstream = x.detach().double().flatten(0, 1), grad.double().flatten(0, 1)
            decayed = 0.01 * (weight.detach().double() - pruned)
            assert_close(
                actual,
                (
                    F.linear(x.detach().double(), pruned, bias.detach().double()),
                    (upstream @ pruned).view_as(x),
                    upstream.t() @ flat + decayed,
                    upstream.sum(0),
                ),
            )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # by torch itself, while it compiles
@backwards
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["autocast", "bf16"])
def test_checkpointed_and_compiled(device, backward, stored):
    """The first step measures, inside the checkpoint; a compiled model may take another product."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(1024, 2048), nn.GELU(), nn.Linear(2048, 1024)).to(device, stored)
    training = sk.sparse_training_(model, backward=backward)
    x = torch.randn(512, 1024, device=device, dtype=stored)
    with torch.autocast("cuda", torch.bfloat16, enabled=stored == torch.float32):
        first = step(model, lambda x: checkpoint(model, x, use_reentrant=False), x)
        assert_close(step(model, model, x), first, 1e-6)
        assert_close(step(model, torch.compile(model, fullgraph=True), x), first)
        names = hardware_layouts(device).names
        if any(name in MULTIPLES for name in names):
            assert len(layouts.RATIOS) == 2, str(training)


@backwards
def test_captured_by_a_cuda_graph(device, backward):
    """A captured graph does not measure a layout whose time is unknown."""
    model = nn.Linear(1024, 1024).to(device, torch.bfloat16)
    sk.sparse_training_(model, backward=backward)
    x = torch.randn(64, 1024, device=device).bfloat16()
    for known in (True, False):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(model, model, x)
        torch.cuda.current_stream().wait_stream(stream)
        if not known:
            layouts.RATIOS.clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            y = model(x)
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight), alpha=0.1)
            graph.replay()
            mask = model.recipe.mask(model.weight)
            expected = F.linear(x.double(), (model.weight * mask).double(), model.bias.double())
        assert_close([y], [expected])
        assert known or not any(layouts.RATIOS.values())
