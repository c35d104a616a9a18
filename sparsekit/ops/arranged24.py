"""2:4 weights arranged for the CPU product of few tokens, or of many, and that product."""

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from . import input_pairs24, row_pairs24
from ._define import DTYPES, call_op, check_like, check_weight, define_gradient
from .input_pairs24 import input_pairs_nbytes
from .row_pairs24 import block_count, pair_starts
from .sparse24 import Packed24, _unpack24, check_packed24

Layout = Literal["input pairs", "row pairs"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
_OPS = {"input pairs": input_pairs24, "row pairs": row_pairs24}


class Arranged24(NamedTuple):
    """A 2:4 weight as one product on a CPU reads it, and nothing else.

    Attributes:
        data: uint8, one dimension: what ``arrange24`` returns, about 5 or 5.5 bytes for every kept float32 and 3 or 3.5
            for every kept 16-bit value. Other bytes are undefined behavior.
        shape: rows and columns of the dense weight.
        dtype: of the weight.
        layout: ``"input pairs"`` or ``"row pairs"``.
    """

    data: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    layout: Layout

    @property
    def nbytes(self) -> int:
        """The bytes of the data."""
        return self.data.nbytes

    def to(self, device: torch.device | str) -> "Arranged24":
        """Returns a copy of the weight on a device, or the same tensor if it is there."""
        return self._replace(data=self.data.to(device))

    def to_packed(self) -> Packed24:
        """Rebuilds the packed weight that was arranged, bit for bit.

        Raises:
            TypeError, ValueError: the fields do not fit together.
        """
        check_arranged24(self)
        values, bitmask = _OPS[self.layout]._restore(self.data, *self.shape, self.dtype)
        return Packed24(values, bitmask, self.shape)

    def to_dense(self) -> Tensor:
        """Rebuilds the dense weight ``[rows, cols]``, contiguous, with zeros where nothing was kept.

        Raises:
            TypeError, ValueError: the fields do not fit together.
        """
        return self.to_packed().to_dense()


@torch.no_grad()
def arrange24(packed: Packed24, layout: Layout) -> Arranged24:
    """Arranges a packed 2:4 weight for inference on a CPU, as ``arranged_linear24`` reads it.

    ``"row pairs"`` is for many tokens, about 48 or more: rows are matched anew for every 48 inputs, so that two rows
    share the loads of about two thirds of their inputs. ``"input pairs"`` is for fewer: one instruction multiplies both
    kept values of a group. The bytes do not depend on the machine or the number of threads.

    Args:
        packed: the weight; two bits are set in every full group of its bitmask. It gets no gradient.
        layout: ``"input pairs"`` or ``"row pairs"``.

    Returns:
        The arranged weight; ``to_packed()`` rebuilds the packed one.

    Raises:
        TypeError: a wrong dtype.
        ValueError: there is no such layout, or shapes that do not fit together.
    """
    check_packed24(packed)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    values, bitmask, (rows, cols) = packed
    if layout == "input pairs":
        nbytes = input_pairs_nbytes(rows, cols, values.itemsize)
        data = input_pairs24._arrange(values, bitmask, cols, nbytes)
    else:
        pairs = row_pairs24._match(bitmask, cols)
        starts = pair_starts(pairs, rows, cols, values.itemsize)
        data = row_pairs24._arrange(values, bitmask, pairs, starts, cols, int(starts[-1]))
    return Arranged24(data, (rows, cols), values.dtype, layout)


def arranged_linear24(x: Tensor, arranged: Arranged24, bias: Tensor | None = None) -> Tensor:
    """Computes ``x @ W.T + bias`` where ``W`` is an arranged 2:4 weight, as ``linear24`` does for a packed one.

    Sums run in fp32 whatever the dtype; where the CPU multiplies bfloat16, input pairs use that. Differentiable in
    ``x`` and ``bias``. A dropped weight counts as 0: times an input that is Inf or NaN it is NaN. The result of a token
    does not depend on the other tokens or on the number of threads, bit for bit.

    Args:
        x: ``[..., cols]`` in the dtype of the weight, any strides, any number of tokens.
        arranged: ``W``, ``[rows, cols]``, as ``arrange24`` returns it.
        bias: ``[rows]`` in ``x``'s dtype, or None.

    Returns:
        ``[..., rows]`` in ``x``'s dtype.

    Raises:
        TypeError: a wrong dtype, or dtypes that differ.
        ValueError: shapes that do not fit together, or two devices.
    """
    check_weight("x", x)
    check_arranged24(arranged)
    rows, cols = arranged.shape
    if x.dtype != arranged.dtype:
        raise TypeError(f"x must be {arranged.dtype} as the weight, got {x.dtype}")
    if x.device != arranged.data.device:
        raise ValueError(f"x must be on {arranged.data.device}, got {x.device}")
    if x.shape[-1] != cols:
        raise ValueError(f"x must have {cols} columns for a weight of {rows} x {cols}, got shape {tuple(x.shape)}")
    if bias is not None:
        check_like("bias", bias, x.dtype, (rows,), x)
    return call_op(_OPS[arranged.layout]._linear, x, arranged.data, bias, rows)


def check_arranged24(arranged: Arranged24) -> None:
    """Rejects anything but an ``Arranged24`` whose data has the size that its shape, dtype and layout ask for.

    Does not read the data. In row pairs only the least size is known.
    """
    if not isinstance(arranged, Arranged24):
        raise TypeError(f"arranged must be an Arranged24, as arrange24 returns it, got {type(arranged).__name__}")
    data, shape, dtype, layout = arranged
    if len(shape) != 2:
        raise ValueError(f"arranged.shape must be rows and columns, got {tuple(shape)}")
    if layout not in LAYOUTS:
        raise ValueError(f"arranged.layout must be one of {LAYOUTS}, got {layout!r}")
    if dtype not in DTYPES:
        raise TypeError(f"arranged.dtype must be float32, float16 or bfloat16, got {dtype}")
    check_like("arranged.data", data, torch.uint8, (data.numel(),), data)
    rows, cols = shape
    least = 8 * (block_count(rows) + 1)
    if layout == "input pairs":
        least = input_pairs_nbytes(rows, cols, dtype.itemsize)
    if data.numel() < least or (layout == "input pairs" and data.numel() > least):
        raise ValueError(f"arranged.data must have {least} bytes for {rows} x {cols} {dtype}, got {data.numel()}")


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, data, _, ctx.rows = inputs
    ctx.cols, ctx.dtype = x.shape[-1], x.dtype
    ctx.save_for_backward(data if ctx.needs_input_grad[0] else None)


def _backward_by(restore: Any) -> Any:
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            values, bitmask = restore(ctx.saved_tensors[0], ctx.rows, ctx.cols, ctx.dtype)
            grad_x = grad @ _unpack24(values, bitmask, ctx.cols)
        if ctx.needs_input_grad[2]:
            grad_bias = torch.atleast_2d(grad).flatten(0, -2).sum(0)
        return grad_x, None, grad_bias, None

    return backward


for _ops in _OPS.values():
    define_gradient(_ops._linear, _setup, _backward_by(_ops._restore))
