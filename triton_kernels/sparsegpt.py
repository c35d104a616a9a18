"""SparseGPT's inner loop over consecutive columns; a program holds its rows in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _select
from ._launch import Table, on

TABLE = Table(
    "sparsegpt_columns",
    {
        "8": {"ROWS": 8, "num_warps": 4},
        "16": {"ROWS": 16, "num_warps": 4},
        "32": {"ROWS": 32, "num_warps": 8},
    },
    default={"any": "16"},
)


@triton.jit
def _column(x, col, index):
    """Returns column ``index`` of ``[ROWS, COLS]`` as ``[ROWS, 1]``: by a sum, as a row is spread over threads."""
    return tl.sum(tl.where(col == index, x, tl.zeros_like(x)), 1, keep_dims=True)


@triton.jit
def _sparsegpt_kernel(
    weight_ptr,
    factor_ptr,
    given_ptr,
    pruned_ptr,
    error_ptr,
    mask_ptr,
    rows,
    cols,
    N: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    inside = (row < rows) & (col < cols)
    offset = row * cols + col
    updated = tl.load(weight_ptr + offset, mask=inside, other=0.0)
    scale = tl.load(factor_ptr + col * (cols + 1), mask=col < cols, other=1.0)
    error = tl.zeros([ROWS, COLS], tl.float32)
    kept = tl.full([ROWS, COLS], 1, tl.int32)
    if given_ptr is not None:
        kept = tl.load(given_ptr + offset, mask=inside, other=1).to(tl.int32)
    for group in range(0, cols, M):
        if given_ptr is None:
            if group + M <= cols:
                key = _select.magnitude_key(tl.div_rn(updated, scale))
                beaten = tl.zeros([ROWS, COLS], tl.int32)
                for j in range(group, group + M):
                    other = _column(key, col, j)
                    beaten += ((other > key) | ((other == key) & (j < col))).to(tl.int32)
                kept = tl.where((col >= group) & (col < group + M), (beaten < N).to(tl.int32), kept)
        for j in range(group, tl.minimum(group + M, cols)):
            lost = tl.div_rn(_column(updated, col, j), _column(scale, col, j))
            lost = tl.where(_column(kept, col, j) != 0, 0.0, lost)
            later = tl.load(factor_ptr + j * cols + col, mask=(col >= j) & (col < cols), other=0.0)
            updated -= lost * later
            error = tl.where(col == j, lost, error)
    tl.store(pruned_ptr + offset, tl.where(kept != 0, updated, 0.0), mask=inside)
    tl.store(error_ptr + offset, error, mask=inside)
    tl.store(mask_ptr + offset, kept != 0, mask=inside)


def sparsegpt_columns(
    weight: Tensor, factor: Tensor, mask: Tensor | None, n: int, m: int
) -> tuple[Tensor, Tensor, Tensor]:
    weight, factor = weight.contiguous(), factor.contiguous()
    given = None if mask is None else mask.contiguous()
    pruned, error = torch.empty_like(weight), torch.empty_like(weight)
    kept = torch.empty(weight.shape, dtype=torch.bool, device=weight.device)
    rows, cols = weight.shape
    if weight.numel():
        config = TABLE.config(weight, "any")
        grid = (triton.cdiv(rows, config["ROWS"]),)
        with on(weight):
            _sparsegpt_kernel[grid](
                weight,
                factor,
                given,
                pruned,
                error,
                kept,
                rows,
                cols,
                N=n,
                M=m,
                COLS=triton.next_power_of_2(cols),
                enable_fp_fusion=False,
                **config,
            )
    return pruned, error, kept
