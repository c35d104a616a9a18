"""The linear layer on a weight in tiers."""

from typing import Any

import torch
from torch import Tensor

from ._define import call_op, check_like, check_weight, define, define_gradient, linear_fp32
from .bits import nonzero
from .sparse24 import _pack_at
from .tiered import TieredWeight, check_packed, order_of, to_blocks, unpack_blocks


def linear_tiered_reference(
    x: Tensor,
    tiers: Tensor,
    dense: Tensor,
    values: Tensor,
    bitmask: Tensor,
    topk: Tensor,
    positions: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    out_features: int,
) -> Tensor:
    shape = out_features, x.shape[-1]
    packed = TieredWeight(tiers, dense, values, bitmask, topk, positions, starts, shape)
    return linear_fp32(x, unpack_blocks(packed), bias)


def _linear_fake(x: Tensor, *inputs: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], inputs[-1])


_linear_tiered = define(linear_tiered_reference, _linear_fake)


def _linear_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, *parts, _, ctx.out_features = inputs
    of_weight, of_x = any(ctx.needs_input_grad[2:6]), ctx.needs_input_grad[0]
    ctx.cols = x.shape[-1]
    ctx.save_for_backward(x if of_weight else None, *(part if of_weight or of_x else None for part in parts))


def _linear_backward(ctx, grad):  # type: ignore[no-untyped-def]
    # Read only once, because activation checkpointing frees them after that.
    x, tiers, dense, values, bitmask, topk, positions, starts = ctx.saved_tensors
    shape = ctx.out_features, ctx.cols
    packed = TieredWeight(tiers, dense, values, bitmask, topk, positions, starts, shape)
    tokens = torch.atleast_2d(grad).flatten(0, -2)  # [tokens, rows]
    grad_x = grad_dense = grad_values = grad_topk = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ unpack_blocks(packed)
    if any(ctx.needs_input_grad[2:6]):
        blocks = to_blocks(tokens.t() @ torch.atleast_2d(x).flatten(0, -2), packed.block)
        dense, sparse24, topk = (blocks[order] for order in order_of(packed))
        grad_dense = dense
        grad_values = _pack_at(sparse24.flatten(0, 1), packed.bitmask.flatten(0, 1)).view_as(packed.values)
        stored = (packed.positions != 0) | nonzero(packed.topk)  # padding stays zero
        grad_topk = torch.where(stored, topk.flatten(1).gather(1, packed.positions.long()), 0)
    if ctx.needs_input_grad[8]:
        grad_bias = tokens.sum(0)
    return grad_x, None, grad_dense, grad_values, None, grad_topk, None, None, grad_bias, None


define_gradient(_linear_tiered, _linear_setup, _linear_backward)


def linear_tiered(x: Tensor, packed: TieredWeight, bias: Tensor | None = None) -> Tensor:
    """Computes ``x @ W.T + bias`` where ``W`` is given in its tiered form.

    Sums run in fp32 whatever the dtype. Differentiable in ``x``, ``packed.dense``, ``packed.values``, ``packed.topk``
    and ``bias``; the padding of ``topk``, which is value 0 at position 0, has no gradient. Entries that are not stored
    count as 0, as in the dense product: times an input that is Inf or NaN they are NaN. The top-k blocks on a GPU are
    an exception: there an Inf or NaN may reach other rows of its block than in the dense product.

    The result of a token does not depend on the other tokens or on the number of threads, bit for bit, as long as the
    same kernel computes it. On a CPU another kernel runs from 16 tokens on with AVX-512, and from 7 without; on a GPU,
    above 32 tokens (64 for blocks of 32 rows), the weight is unpacked and PyTorch's dense product runs.

    Args:
        x: ``[..., cols]``, float32, float16 or bfloat16, any strides.
        packed: ``W``, ``[rows, cols]``, as ``pack_tiered`` or ``TieredWeight.from_parts`` returns it, in ``x``'s dtype.
        bias: ``[rows]`` in ``x``'s dtype, or None.

    Returns:
        ``[..., rows]`` in ``x``'s dtype.

    Raises:
        TypeError: a wrong dtype, or dtypes that differ.
        ValueError: shapes that do not fit together, or two devices; on a CPU, ``starts`` that do not count the blocks.
    """
    check_weight("x", x)
    check_packed(packed)
    rows, cols = packed.shape
    if x.shape[-1] != cols:
        raise ValueError(f"x must have {cols} columns for a weight of {rows} x {cols}, got shape {tuple(x.shape)}")
    check_like("packed.dense", packed.dense, x.dtype, packed.dense.shape, x)
    if bias is not None:
        check_like("bias", bias, x.dtype, (rows,), x)
    return call_op(_linear_tiered, x, *packed.tensors, bias, rows)
