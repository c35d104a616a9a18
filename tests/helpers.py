"""Hostile inputs, and comparisons that forgive nothing."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsekit as sk
from sparsekit.ops.nm import nm_prune_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DTYPE_CHECKS = ("test_schema", "test_faketensor")  # of torch.library.opcheck, those that a dtype can fail
SPECIAL = (float("nan"), -float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, -6e-8, 1.0, -1.0)


def dtype_id(value: object) -> str:
    return str(value).removeprefix("torch.").replace(" ", "")


def shape_id(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def pattern_id(pattern: tuple[int, int]) -> str:
    return f"{pattern[0]}of{pattern[1]}"


def ties(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small integers, so that most groups have equal magnitudes."""
    return torch.randint(-3, 4, shape).to(dtype)


def hostile(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, ties, NaNs of both signs, infinities, zeros of both signs and denormals."""
    special = torch.tensor(SPECIAL, dtype=dtype)[torch.randint(len(SPECIAL), shape)]
    kind = torch.randint(3, shape)
    return torch.where(
        kind == 0, torch.randn(shape).to(dtype), torch.where(kind == 1, ties(*shape, dtype=dtype), special)
    )


def sparse24(rows: int, cols: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A normal weight pruned to 2:4 by the reference, and its mask."""
    return nm_prune_reference(torch.randn(rows, cols).to(dtype), 2, 4, None)


def sparse_linear(cols=40, rows=48, bias=True, dtype=torch.float32):
    """A layer whose weight is 2:4."""
    linear = nn.Linear(cols, rows, bias, dtype=dtype).eval()
    sk.nm_prune_(linear.weight.data, 2, 4)
    return linear


def outputs_and_gradients(module, x):
    module.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = module(x)
    y.float().square().sum().backward()
    return y.detach(), x.grad


def assert_linear_gradients(layer, linear, x):
    """Output, and gradients of the input and the bias, are those of ``linear``; both then hold their gradients."""
    layer.bias = nn.Parameter(linear.bias.detach().clone())
    (y, grad_x), (expected, expected_grad_x) = (outputs_and_gradients(module, x) for module in (layer, linear))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(grad_x, expected_grad_x)
    torch.testing.assert_close(layer.bias.grad, linear.bias.grad)


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def _sliced(tensor: Tensor) -> Tensor:
    """A window of a larger tensor of NaNs, off the alignment of vectors."""
    larger = tensor.new_full([size + 3 for size in tensor.shape], float("nan") if tensor.is_floating_point() else 1)
    window = larger[tuple(slice(1, size + 1) for size in tensor.shape)]
    return window.copy_(tensor)


def _strided(tensor: Tensor) -> Tensor:
    wide = tensor.new_full(
        (*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan") if tensor.is_floating_point() else 1
    )
    return wide[..., ::2].copy_(tensor)


LAYOUTS = {"contiguous": Tensor.contiguous, "transposed": _transposed, "sliced": _sliced, "strided": _strided}


def poison(*likes: Tensor) -> None:
    """Leaves freed memory of the sizes of these tensors full of ones, which are NaNs, for the next call to find."""
    buffers = [torch.full((like.nbytes,), 255, dtype=torch.uint8) for like in likes for _ in range(4)]
    del buffers


def opcheck(op: torch._ops.OpOverload, args: tuple[object, ...]) -> None:
    """``torch.library.opcheck``. Two of its checks trace: they take most of the time, and see no dtype and no data."""
    first = args[0] if isinstance(args[0], Tensor) else torch.ones(1)
    traces = first.dtype == torch.float32 and first.numel()
    torch.library.opcheck(op, args, **({} if traces else {"test_utils": DTYPE_CHECKS}))


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Same dtype, shape and bits, NaN payloads and the sign of zero included; bools are stored as 0 and 1."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert actual.is_contiguous()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[actual.element_size()]
    assert torch.equal(actual.view(bits), expected.contiguous().view(bits))


def assert_same_sums(actual: Tensor, expected: Tensor) -> None:
    """Same dtype, shape and values, the sign of zero included; which NaN a sum is, is up to the processor."""
    assert actual.is_contiguous()
    actual = actual.cpu()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(actual.signbit() & ~actual.isnan(), expected.signbit() & ~expected.isnan())


def assert_product(actual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Compares ``x @ weight.T + bias`` with float64, allowing fp32 sums in any order and one rounding to the dtype."""
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    size = F.linear(x.abs().double(), weight.abs().double(), None if bias is None else bias.abs().double())
    bound = size * (weight.shape[1] + 2) * 2**-24 + exact.abs() * torch.finfo(x.dtype).eps + 1e-7
    assert actual.dtype == x.dtype and actual.shape == exact.shape and actual.is_contiguous()
    assert ((actual.double() - exact).abs() <= bound).all()


def magnitude_order(values: list[float]) -> list[int]:
    """Indices by falling magnitude: NaN first, ties by index. Written for the tests, from the docstring alone."""
    return sorted(range(len(values)), key=lambda index: (values[index] == values[index], -abs(values[index]), index))
