"""The linear layer on a weight that is packed for a GPU's sparse tensor cores."""

import torch
from torch import Tensor

from ._define import call_op, check_ints, check_like, check_weight, define, define_gradient, linear_fp32
from .hardware24 import from_hardware24_reference, hardware_multiple
from .sparse24 import _unpack24, unpack24_reference

# The layout that `torch._cslt_compress` writes where its order of metadata is unknown: only its product can read it.
UNKNOWN = "cusparselt"


def padded_shape(rows: int, cols: int, layout: str) -> tuple[int, int]:
    """Returns the shape of a weight padded to the multiples of a hardware layout."""
    row_multiple, col_multiple = (128, 128) if layout == UNKNOWN else hardware_multiple(layout)
    return -(-rows // row_multiple) * row_multiple, -(-cols // col_multiple) * col_multiple


def hardware_linear24_reference(
    x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, layout: str, alg_id: int, split_k: int, split_k_mode: int
) -> Tensor:
    hardware_multiple(layout)  # raises for a layout that cannot be decoded here
    shape = padded_shape(rows, x.shape[-1], layout)
    weight = unpack24_reference(*from_hardware24_reference(packed, *shape, layout), shape[1])[:rows, : x.shape[-1]]
    return linear_fp32(x, weight, bias)


def _fake(
    x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, layout: str, alg_id: int, split_k: int, split_k_mode: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


_hardware_linear24 = define(hardware_linear24_reference, _fake, compiled=False)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, packed, _, ctx.rows, ctx.layout, *_ = inputs
    ctx.cols = x.shape[-1]
    ctx.save_for_backward(packed if ctx.needs_input_grad[0] else None)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ _dense(ctx.saved_tensors[0], ctx.rows, ctx.cols, ctx.layout)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, grad_bias, None, None, None, None, None


def _dense(packed: Tensor, rows: int, cols: int, layout: str) -> Tensor:
    if layout == UNKNOWN:  # only the product can read it
        identity = torch.eye(cols, dtype=packed.dtype, device=packed.device)
        return _hardware_linear24(identity, packed, None, rows, layout, 0, 1, -1).t()
    shape = padded_shape(rows, cols, layout)
    values, bitmask = torch.ops.sparsekit.from_hardware24(packed, *shape, layout)
    return _unpack24(values, bitmask, shape[1])[:rows, :cols]


define_gradient(_hardware_linear24, _setup, _backward)


def hardware_linear24(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    rows: int,
    layout: str,
    *,
    alg_id: int = 0,
    split_k: int = 1,
    split_k_mode: int = -1,
) -> Tensor:
    """Computes ``x @ W.T + bias`` on a GPU's sparse tensor cores, by cuSPARSELt or CUTLASS.

    Differentiable in ``x`` and ``bias``. The tensor cores leave out the inputs of dropped weights, Inf and NaN
    too. On a CPU the layouts of ``to_hardware24`` are decoded, slowly.

    Args:
        x: ``[..., cols]``, float16 or bfloat16, any strides.
        packed: ``[padded rows * padded cols * 9 / 16]`` of ``x``'s dtype, as ``to_hardware24`` returns it for a weight
            that was padded with zeros to multiples of ``hardware_multiple(layout)``.
        bias: ``[rows]`` of ``x``'s dtype, or None.
        rows: outputs of the layer.
        layout: a layout of ``to_hardware24``, which must be one of this GPU's ``hardware_layouts``.
        alg_id, split_k, split_k_mode: how cuSPARSELt computes, see ``torch._cslt_sparse_mm``; which is
            fastest depends on the shape, and some gave wrong results
            (https://github.com/pytorch/pytorch/issues/155333). CUTLASS ignores them.

    Returns:
        ``[..., rows]`` in ``x``'s dtype.

    Raises:
        TypeError: a wrong dtype, or dtypes that differ.
        ValueError: an unknown layout, shapes that do not fit together, or two devices.
    """
    check_weight("x", x)
    if x.dtype == torch.float32:
        raise TypeError("x must be float16 or bfloat16, got torch.float32")
    check_ints(rows=rows, alg_id=alg_id, split_k=split_k, split_k_mode=split_k_mode)
    padded_rows, padded_cols = padded_shape(rows, x.shape[-1], layout)
    check_like("packed", packed, x.dtype, (padded_rows * padded_cols // 16 * 9,), x)
    if bias is not None:
        check_like("bias", bias, x.dtype, (rows,), x)
    return call_op(_hardware_linear24, x, packed, bias, rows, layout, alg_id, split_k, split_k_mode)
