"""The dense linear layer on an 8-bit weight with inputs that are rounded as well: PyTorch's own int8 products."""

import os
import secrets
import warnings
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from ._define import call_op, check_like, check_weight, define, define_gradient, straight_through
from ._rounding import round_to_integers
from .linear24q import gradients

# Inputs are unsigned integers around a zero: with oneDNN on a CPU with VNNI from -127 to 127, else with fbgemm from -63
# to 63. Its `vpmaddubsw` adds two products with weights of -127 to 127 in 16 bits. Of inputs from 0 to 127 they are at
# most 32258, which fits; of 8 bits they would saturate (https://github.com/pytorch/pytorch/issues/44939).
LARGEST_INPUT = {"onednn": 127, "fbgemm": 63}
MANY_TOKENS = 128  # for which oneDNN lays the weight out; others are as fast

# The packed weights by number: a graph that `torch.compile` makes can hold a number, and no packed weight.
_packed: "WeakValueDictionary[int, PackedInt8]" = WeakValueDictionary()


class PackedInt8:
    """A dense weight of 8-bit integers with a scale for each row, in the order in which the product reads it.

    Args:
        values: int8 ``[rows, cols]``, from -127 to 127.
        scales: float32 ``[rows]``: a weight is its integer times the scale of its row.
    """

    def __init__(self, values: Tensor, scales: Tensor):
        self.shape, self.scales = values.shape, scales
        self.number = secrets.randbits(62)  # an address would be another weight's, once this one is gone
        self.plain: Tensor | None = values
        self.engine = engine() if values.device.type == "cpu" and values.numel() else None
        self.packed: Any = None
        self.zeros = torch.zeros(len(values), dtype=torch.int32, device=values.device)
        if self.engine is not None:
            self.packed, self.plain = _PREPACK[self.engine](values, scales), None
        _packed[self.number] = self

    @property
    def values(self) -> Tensor:
        """The integers, as they were given."""
        if self.plain is not None:
            return self.plain
        if self.engine == "onednn":
            return self.packed.to_dense().t().contiguous()
        return torch.ops.quantized.linear_unpack(self.packed)[0].int_repr()

    @property
    def nbytes(self) -> int:
        """The bytes of the integers and the scales."""
        return self.shape.numel() + self.scales.nbytes

    def to_dense(self) -> Tensor:
        """Returns the weight, float32 ``[rows, cols]``: one op, which traces and transforms take as a whole."""
        weight: Tensor = _int8_weight(self.scales, self.number, self.shape[1])
        return weight


def engine() -> str | None:
    """Returns which product PyTorch has for this CPU, "onednn" with VNNI, else "fbgemm"; None for other than x86."""
    if not hasattr(torch, "_make_per_channel_quantized_tensor"):
        return None
    limited = any(name in os.environ for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"))  # to what lacks VNNI
    if "onednn" in torch.backends.quantized.supported_engines and torch.cpu._is_vnni_supported() and not limited:
        return "onednn"
    return "fbgemm" if "fbgemm" in torch.backends.quantized.supported_engines else None


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds a weight to integers from -127 to 127 times the largest magnitude of its row over 127, ties to even.

    Args:
        weight: ``[rows, cols]``, any floating dtype.

    Returns:
        The integers, int8 ``[rows, cols]``, and the scales, float32 ``[rows]``.
    """
    weight = weight.detach().float()
    largest = weight.abs().amax(1) if weight.numel() else weight.new_zeros(len(weight))
    scales = torch.where(largest > 0, largest / 127, 1)
    return (weight / scales[:, None]).round().clamp_(-127, 127).to(torch.int8), scales


def _prepack_onednn(values: Tensor, scales: Tensor) -> Tensor:
    return torch.ops.onednn.qlinear_prepack(values.contiguous(), [MANY_TOKENS, values.shape[1]])


def _prepack_fbgemm(values: Tensor, scales: Tensor) -> torch.ScriptObject:
    zeros, engine = torch.zeros(len(values), dtype=torch.long, device="cpu"), torch.backends.quantized.engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are to be removed (pytorch/pytorch/issues/184982)
        quantized = torch._make_per_channel_quantized_tensor(values.contiguous(), scales.double(), zeros, 0)
    try:
        torch.backends.quantized.engine = "fbgemm"  # 2 to 4 times as fast as oneDNN's on a CPU without VNNI
        return torch.ops.quantized.linear_prepack(quantized, None)
    finally:
        torch.backends.quantized.engine = engine


_PREPACK = {"onednn": _prepack_onednn, "fbgemm": _prepack_fbgemm}


def round_tokens_reference(x: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    integers, largest = round_to_integers(x.float(), limit)
    return (integers + (limit + 1)).to(torch.uint8), largest / limit


# Rounds each token to integers from -limit to limit, ties to even. Returns them plus limit + 1, and the step of each
# token, which is NaN where the token has an Inf or a NaN.
_round_tokens = define(
    round_tokens_reference,
    lambda x, limit: (x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(len(x), 1, dtype=torch.float32)),
)


def _product_onednn(codes: Tensor, limit: int, packed: PackedInt8) -> Tensor:
    quant: Any = (packed.packed, packed.scales, packed.zeros, None, 1.0, 0, torch.float32, "none", [], "")
    return torch.ops.onednn.qlinear_pointwise(codes, 1.0, limit + 1, *quant)


def _product_fbgemm(codes: Tensor, limit: int, packed: PackedInt8) -> Tensor:
    inputs = codes.float() - (limit + 1)
    return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(inputs, 1.0, limit + 1, packed.packed)


_PRODUCT = {"onednn": _product_onednn, "fbgemm": _product_fbgemm}


def _find(number: int) -> PackedInt8:
    packed = _packed.get(number)
    if packed is None:
        raise RuntimeError("the Int8Linear that this graph was made of does not exist any more: make the graph again")
    return packed


def int8_weight_reference(scales: Tensor, weight: int, cols: int) -> Tensor:
    return _find(weight).values.float() * scales[:, None]


_int8_weight = define(
    int8_weight_reference, lambda scales, weight, cols: scales.new_empty(len(scales), cols), compiled=False
)


def int8_linear_reference(x: Tensor, scales: Tensor, bias: Tensor | None, weight: int) -> Tensor:
    packed = _find(weight)
    x = x if x.layout == torch.strided else x.to_dense()
    if packed.engine is not None and not torch._C._are_functorch_transforms_active():
        return multiply_packed(x, packed, bias)
    dense = packed.to_dense()
    plain = F.linear(x, dense.to(x.dtype), bias)
    if packed.engine is None:
        return plain
    limit = LARGEST_INPUT[packed.engine]
    codes, step = round_tokens_reference(x.detach(), limit)
    y = F.linear(codes.float() - (limit + 1), dense) * step
    return straight_through((y if bias is None else y + bias).to(x.dtype), plain)


def multiply_packed(x: Tensor, packed: PackedInt8, bias: Tensor | None) -> Tensor:
    """Computes ``int8_linear`` of a weight that PyTorch has packed, below autograd."""
    limit = LARGEST_INPUT[packed.engine]  # type: ignore[index]
    codes, step = _round_tokens._op(x.reshape(-1, x.shape[-1]), limit)
    y = _PRODUCT[packed.engine](codes, limit, packed)  # type: ignore[index]
    y = y.mul_(step) if bias is None else torch.addcmul(bias.float(), y, step, out=y)
    return y.to(x.dtype).view(*x.shape[:-1], len(packed.scales))


_int8_linear = define(
    int8_linear_reference,
    lambda x, scales, bias, weight: x.new_empty(*x.shape[:-1], len(scales)),
    compiled=False,
)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.packed = _packed[inputs[3]]


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    of_x, _, of_bias, _ = ctx.needs_input_grad
    grad_x, grad_bias = gradients(grad, ctx.packed.to_dense if of_x else None, of_bias)
    return grad_x, None, grad_bias, None


define_gradient(_int8_linear, _setup, _backward)


def int8_linear(x: Tensor, packed: PackedInt8, bias: Tensor | None = None) -> Tensor:
    """Computes ``x @ W.T + bias`` with an 8-bit weight, every token of ``x`` rounded to 8 bits, or to 7 without VNNI.

    A token is rounded to integers from -127 to 127 times its largest magnitude over 127, without VNNI from -63 to 63
    over 63, and the products are summed exactly, so that the result of a token does not depend on other tokens. All
    results of a token that has an Inf or a NaN are NaN. Differentiable in ``x`` and ``bias``, as if ``x`` were not
    rounded. Without an int8 product the weight is multiplied as float, and ``x`` stays as it is.

    Args:
        x: ``[..., cols]``, float32, float16 or bfloat16, any strides.
        packed: ``W``, ``[rows, cols]``.
        bias: ``[rows]`` in ``x``'s dtype, or None.

    Raises:
        TypeError: a wrong dtype, or dtypes that differ.
        ValueError: shapes that do not fit together, or two devices.
    """
    check_weight("x", x)
    rows, cols = packed.shape
    if x.shape[-1] != cols:
        raise ValueError(f"x must have {cols} columns for a weight of {rows} x {cols}, got shape {tuple(x.shape)}")
    check_like("scales", packed.scales, torch.float32, (rows,), x)
    if bias is not None:
        check_like("bias", bias, x.dtype, (rows,), x)
    return call_op(_int8_linear, x, packed.scales, bias, packed.number)
