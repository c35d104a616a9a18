"""The sparse products of the libraries that PyTorch ships: cuSPARSELt, and CUTLASS on GPUs of compute capability 8."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .hardware_linear24 import padded_shape

TOKEN_MULTIPLE = 8  # the tokens of a 16-bit dense operand must be a multiple of this
ALIGNMENT = 16  # bytes, declared to both libraries for every operand
ONE_KERNEL, TWO_KERNELS = 1, 2  # how cuSPARSELt adds up the partial sums of split-K


def hardware_linear24(
    x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, layout: str, alg_id: int, split_k: int, split_k_mode: int
) -> Tensor:
    tokens, cols = x.shape[:-1].numel(), x.shape[-1]
    if tokens == 0 or packed.numel() == 0:
        y = x.new_zeros(*x.shape[:-1], rows)
        return y if bias is None else y + bias
    padded_rows, padded_cols = padded_shape(rows, cols, layout)
    x2d = _padded(x.reshape(tokens, cols), -tokens % TOKEN_MULTIPLE, padded_cols - cols)
    bias = None if bias is None else _padded(bias, padded_rows - rows)
    if layout.startswith("cutlass"):
        y = _cutlass(x2d, packed, bias, padded_rows)
    else:
        options = _split_k(split_k, split_k_mode)
        packed = packed.view(padded_rows, -1)
        y = torch._cslt_sparse_mm(packed, x2d.t(), bias=bias, transpose_result=True, alg_id=alg_id, **options)
    return y[:tokens, :rows].contiguous().view(*x.shape[:-1], rows)


def compress(dense: Tensor) -> Tensor:
    """Packs a 2:4 weight in the layout that cuSPARSELt reads on this device."""
    return torch._cslt_compress(dense.contiguous()).flatten()


def suggest(x: Tensor, packed: Tensor, bias: Tensor | None, rows: int, layout: str) -> tuple[int, int, int] | None:
    """Returns the ``(alg_id, split_k, split_k_mode)`` that cuSPARSELt's own search finds; None if torch lacks it."""
    search = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
    if search is None:
        return None
    padded_rows, padded_cols = padded_shape(rows, x.shape[-1], layout)
    x2d = _padded(x, -len(x) % TOKEN_MULTIPLE, padded_cols - x.shape[-1])
    bias = None if bias is None else _padded(bias, padded_rows - rows)
    with torch.cuda.device_of(x):  # an op would set the current device itself; this is none
        alg_id, split_k, mode, *_ = search(packed.view(padded_rows, -1), x2d.t(), bias, None, None, True)
    if isinstance(mode, bool):
        mode = ONE_KERNEL if mode else TWO_KERNELS
    return alg_id, split_k, mode if split_k > 1 else -1


def _cutlass(x2d: Tensor, packed: Tensor, bias: Tensor | None, rows: int) -> Tensor:
    cols = x2d.shape[1]
    values, meta = packed.split([rows * cols // 2, rows * cols // 16])
    values, meta = values.view(rows, cols // 2), meta.view(torch.int16).view(rows, cols // 16)
    if bias is None:
        return torch._sparse_semi_structured_mm(values, meta, x2d.t()).t()
    return torch._sparse_semi_structured_addmm(bias, values, meta, x2d.t()).t()


def _padded(tensor: Tensor, *after: int) -> Tensor:
    """Returns a contiguous, aligned tensor with ``after`` zeros appended to each dimension."""
    if any(after):
        return F.pad(tensor, [size for last in reversed(after) for size in (0, last)])
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def _split_k(split_k: int, mode: int) -> dict[str, Any]:
    if _takes_mode():
        return {"split_k": split_k, "split_k_mode": mode}
    return {"split_k": split_k, "split_k_one_kernel": mode != TWO_KERNELS}


@cache
def _takes_mode() -> bool:
    """Returns whether this torch has the argument ``split_k_mode``; older ones have the bool ``split_k_one_kernel``."""
    return any(argument.name == "split_k_mode" for argument in torch.ops.aten._cslt_sparse_mm.default._schema.arguments)
