"""The linear layer on a quantized 2:4 weight with inputs that are rounded to 8 bits, so that products are integers."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._define import call_op, check_weight, define, define_gradient, linear_fp32, straight_through
from ._rounding import round_to_integers
from .linear24q import check_product, gradients
from .quant24 import levels
from .tiled24 import TiledWeight24, check_tiled24, split_tiles, tile_columns


def linear24q_int8_reference(
    x: Tensor, tiles: Tensor, bias: Tensor | None, rows: int, quant_type: str, group: int
) -> Tensor:
    x = x if x.layout == torch.strided else x.to_dense()
    x32 = F.pad(torch.atleast_2d(x).flatten(0, -2).float(), (0, 1))  # a column of zeros, for padding
    integers, largest = round_to_integers(x32, 127)
    inputs, steps = integers.double(), largest / (127 * 127 if quant_type == "nf4" else 127)
    codes, index, scales = split_tiles(tiles, quant_type)
    numbers = integer_codes(codes, quant_type).double()
    weight = numbers.new_zeros(*numbers.shape[:-1], 4).scatter_(-1, index, numbers).flatten(-2)  # [rows, tiles, 64]
    inputs = inputs[:, tile_columns(x.shape[-1], group, x.device)]  # [tokens, tiles, 64]
    # Each tile's columns in two lanes, by turns of 8: [2, tokens or rows, tiles, 32]
    inputs, weight = (each.unflatten(-1, (4, 2, 8)).movedim(-2, 0).flatten(-2) for each in (inputs, weight))
    totals = x32.new_zeros(2, inputs.shape[1], rows)
    for tile in range(tiles.shape[1]):
        totals += (inputs[:, :, tile] @ weight[:, :rows, tile].mT).float() * scales[:rows, tile].float()
    y = totals.sum(0) * steps
    return (y if bias is None else y + bias.float()).to(x.dtype).view(*x.shape[:-1], rows)


def integer_codes(codes: Tensor, quant_type: str) -> Tensor:
    """Returns the integers that stand for codes: for ``"nf4"`` its levels in steps of 1/127, to the nearest."""
    if quant_type == "int8":
        return codes
    numbers = levels(quant_type, codes.device)
    return (numbers if quant_type == "int4" else (127 * numbers).round()).to(torch.int8)[codes.long()]


def _fake(x: Tensor, tiles: Tensor, bias: Tensor | None, rows: int, quant_type: str, group: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


_linear24q_int8 = define(linear24q_int8_reference, _fake)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, tiles, _, rows, quant_type, group = inputs
    ctx.kind = (rows, x.shape[-1]), quant_type, group, torch.float32
    ctx.save_for_backward(tiles if ctx.needs_input_grad[0] else None)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    (tiles,) = ctx.saved_tensors
    of_x, _, of_bias, *_ = ctx.needs_input_grad
    weight = TiledWeight24(tiles, *ctx.kind).to_dense if of_x else None
    grad_x, grad_bias = gradients(grad, weight, of_bias)
    return grad_x, None, grad_bias, None, None, None


define_gradient(_linear24q_int8, _setup, _backward)


def linear24q_int8(x: Tensor, packed: TiledWeight24, bias: Tensor | None = None) -> Tensor:
    """Computes ``x @ W.T + bias`` where ``W`` is a quantized 2:4 weight, with every token of ``x`` rounded to 8 bits.

    A token is rounded to integers from -127 to 127 times its largest magnitude over 127, ties to even, and the levels
    of ``"nf4"`` to multiples of 1/127. The 64 columns of a tile are two lanes, by turns of 8 columns. The products of a
    lane are summed exactly, as integers, and scaled; these sums are added in fp32 from the first tile to the last, and
    then both lanes. So the result is the same, bit for bit, for every kernel, number of threads and batch. All results
    of a token that has an Inf or a NaN are NaN.

    Differentiable in ``x`` and ``bias``, as if ``x`` were not rounded. Arguments, result and errors are those of
    ``linear24q``, except that ``packed`` is ``W`` as ``tile24`` returns it.
    """
    check_weight("x", x)
    check_tiled24(packed, x)
    rows, cols = packed.shape
    check_product(x, bias, rows, cols)
    y = call_op(_linear24q_int8, x, packed.tiles, bias, rows, packed.quant_type, packed.group)
    if torch._C._are_functorch_transforms_active():  # where the reference runs, with the derivatives of rounding
        y = straight_through(y, linear_fp32(x, packed._replace(dtype=torch.float32).to_dense(), bias))
    return y
