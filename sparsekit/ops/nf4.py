"""The nf4 format, 4-bit codes of a dense weight as bitsandbytes stores them, and the linear layer on it."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._define import (
    DTYPES,
    call_op,
    check_ints,
    check_like,
    check_weight,
    define,
    define_gradient,
    linear_fp32,
    no_autocast,
)
from .linear24q import check_product, gradients
from .quant24 import NF4_LEVELS, ZERO_CODE

BLOCK = 64


class Nf4Weight(NamedTuple):
    """A dense weight whose entries are 4-bit codes that share a scale in blocks: 0.5625 bytes a weight.

    An entry is one of the 16 levels of QLoRA (https://arxiv.org/abs/2305.14314, appendix E) times the largest magnitude
    of its block. The blocks run over the flattened weight. The bytes are those of bitsandbytes 0.50.2.

    Attributes:
        codes: uint8 ``[ceil(rows * cols / 2)]``, two codes in a byte, the first one in the high bits.
        absmax: float32 ``[ceil(rows * cols / block)]``, the largest magnitude of each block.
        shape: rows and columns of the dense weight.
        block: how many entries share a scale, a multiple of 8.
        dtype: that of the weight before it was quantized, and of what ``to_dense`` returns.
    """

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, int]
    block: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors."""
        return self.codes.nbytes + self.absmax.nbytes

    def to(self, device: torch.device | str) -> "Nf4Weight":
        """Returns a copy of the weight on a device, or the same tensors if they are there."""
        return self._replace(codes=self.codes.to(device), absmax=self.absmax.to(device))

    def to_dense(self) -> Tensor:
        """Rebuilds the dense weight; an entry that was 0 is exactly 0.

        Returns:
            ``[rows, cols]`` in ``dtype``, contiguous.

        Raises:
            TypeError: a wrong dtype.
            ValueError: tensors that do not have the shapes that ``shape`` asks for, or are on two devices.
        """
        check_nf4(self)
        with no_autocast(self.absmax):
            return dequantize_nf4(self.codes, self.absmax, *self.shape, self.block).to(self.dtype)


def _levels(device: torch.device) -> Tensor:
    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


def _fit_blocks(entries: Tensor, block: int) -> Tensor:
    """Returns entries as ``[blocks, block]``, the last block filled up with zeros."""
    return F.pad(entries, (0, -len(entries) % block)).view(-1, block)


def dequantize_nf4(codes: Tensor, absmax: Tensor, rows: int, cols: int, block: int) -> Tensor:
    """Returns the dense weight, float32 ``[rows, cols]``."""
    byte = torch.arange(256, device=codes.device)
    levels = _levels(codes.device)
    # Both levels of a byte are looked up at once, as one complex number, which takes a quarter of the time.
    pairs = torch.complex(levels[byte >> 4], levels[byte & 15])
    entries = torch.view_as_real(pairs.index_select(0, codes.int())).flatten()[: rows * cols]
    full = entries.numel() // block
    whole = entries[: full * block].view(full, block) * absmax[:full, None]
    if rows * cols == full * block:
        return whole.view(rows, cols)
    return torch.cat([whole.flatten(), entries[full * block :] * absmax[full]]).view(rows, cols)


def linear_nf4_reference(
    x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None, rows: int, block: int
) -> Tensor:
    return linear_fp32(x, dequantize_nf4(codes, absmax, rows, x.shape[-1], block), bias)


def _fake(x: Tensor, codes: Tensor, absmax: Tensor, bias: Tensor | None, rows: int, block: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


_linear_nf4 = define(linear_nf4_reference, _fake, compiled=False)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, codes, absmax, _, ctx.rows, ctx.block = inputs
    ctx.cols = x.shape[-1]
    ctx.save_for_backward(*((codes, absmax) if ctx.needs_input_grad[0] else (None, None)))


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    codes, absmax = ctx.saved_tensors

    def weight() -> Tensor:
        return dequantize_nf4(codes, absmax, ctx.rows, ctx.cols, ctx.block)

    of_x, _, _, of_bias, *_ = ctx.needs_input_grad
    grad_x, grad_bias = gradients(grad, weight if of_x else None, of_bias)
    return grad_x, None, None, grad_bias, None, None


define_gradient(_linear_nf4, _setup, _backward)


def linear_nf4(x: Tensor, packed: Nf4Weight, bias: Tensor | None = None) -> Tensor:
    """Computes ``x @ W.T + bias`` where ``W`` is given as nf4, by rebuilding ``W`` at every call.

    This saves memory, not time: a call takes at least as long as the dense product, and for few tokens many times as
    long. Weights are levels times scales, unrounded, and sums run in fp32, whatever the dtype. Differentiable in ``x``
    and ``bias``; the backward pass rebuilds ``W`` again instead of keeping it.

    Args:
        x: ``[..., cols]``, float32, float16 or bfloat16, any strides.
        packed: ``W``, ``[rows, cols]``, as ``quantize_nf4`` returns it, of any ``dtype``.
        bias: ``[rows]`` in ``x``'s dtype, or None.

    Returns:
        ``[..., rows]`` in ``x``'s dtype.

    Raises:
        TypeError: a wrong dtype, or dtypes that differ.
        ValueError: shapes that do not fit together, or two devices.
    """
    check_weight("x", x)
    check_nf4(packed, x)
    check_product(x, bias, *packed.shape)
    return call_op(_linear_nf4, x, packed.codes, packed.absmax, bias, packed.shape[0], packed.block)


@torch.no_grad()
def quantize_nf4(weight: Tensor, *, block: int = BLOCK) -> Nf4Weight:
    """Quantizes a dense weight to nf4, with the bytes that bitsandbytes 0.50.2 writes.

    Every block of the flattened weight is divided by its largest magnitude, and each entry becomes the nearest of 16
    levels, the lower one of two that are as near. An entry of 0 stays exactly 0, so a pruned weight keeps its zeros.

    Args:
        weight: ``[rows, cols]``, float32, float16 or bfloat16. Not differentiable.
        block: how many entries share a scale, a multiple of 8. Fewer are more exact and take more memory.

    Raises:
        TypeError: a wrong dtype.
        ValueError: the weight is no matrix or has an Inf or a NaN, or ``block`` is no
            positive multiple of 8.
    """
    check_weight("weight", weight, 2)
    check_block(block)
    if not weight.is_meta and not bool(weight.isfinite().all()):
        raise ValueError("weight must be finite to be quantized, got an Inf or a NaN")
    with no_autocast(weight):
        entries = weight.reshape(-1).float()
        blocks = _fit_blocks(entries, block)
        largest = blocks.abs().amax(-1, keepdim=True)
        step = largest.clamp(min=1e-38)
        ratios = blocks * (1 / step)
        if rest := len(entries) % block:  # bitsandbytes divides here, and multiplies by the reciprocal above
            ratios[-1, :rest] = blocks[-1, :rest] / step[-1]
            largest[-1] = step[-1]
        levels = _levels(weight.device)
        codes = torch.bucketize(ratios.clamp(-1, 1), (levels[:-1] + levels[1:]) / 2, out_int32=True)
        codes = codes.flatten()[: len(entries)].to(torch.uint8)
        codes = F.pad(codes, (0, len(entries) % 2), value=ZERO_CODE["nf4"])
        packed = codes[::2] << 4 | codes[1::2]
    rows, cols = weight.shape
    return Nf4Weight(packed, largest.flatten(), (rows, cols), block, weight.dtype)


def quantized_rightly(rows: int, cols: int, block: int = BLOCK) -> bool:
    """Returns whether bitsandbytes 0.50.2 computes a weight of this shape rightly on every CPU.

    It refuses rows that are no multiple of 32 on a CPU with AVX-512 BF16, and reads the blocks of a weight with a
    multiple of 16, but not of 64, columns wrongly on one with AVX-512.
    """
    return block == BLOCK and min(rows, cols) > 0 and rows % 32 == 0 and cols % 64 == 0


def check_block(block: int) -> None:
    """Raises unless ``block`` is a positive multiple of 8."""
    check_ints(block=block)
    if block <= 0 or block % 8:
        raise ValueError(f"block must be a positive multiple of 8, got {block}")


def check_nf4(packed: Nf4Weight, x: Tensor | None = None) -> None:
    """Rejects anything but an ``Nf4Weight`` whose tensors have the dtypes and shapes that its shape asks for.

    If ``x`` is given, the tensors must be on its device.
    """
    if not isinstance(packed, Nf4Weight):
        raise TypeError(f"packed must be an Nf4Weight, as quantize_nf4 returns it, got {type(packed).__name__}")
    codes, absmax, shape, block, dtype = packed
    check_block(block)
    if len(shape) != 2:
        raise ValueError(f"packed.shape must be rows and columns, got {tuple(shape)}")
    if dtype not in DTYPES:
        raise TypeError(f"packed.dtype must be float32, float16 or bfloat16, got {dtype}")
    entries, like = math.prod(shape), absmax if x is None else x
    check_like("packed.codes", codes, torch.uint8, (-(-entries // 2),), like)
    check_like("packed.absmax", absmax, torch.float32, (-(-entries // block),), like)
