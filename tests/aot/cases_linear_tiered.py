import torch
from torch import Tensor

from sparsekit.triton_kernels._tiered_columns import Packed
from sparsekit.triton_kernels._tiered_unpack import unpack_tiered
from sparsekit.triton_kernels.linear_tiered import linear_tiered

from .case import Case, meta

BF16, UINT8 = torch.bfloat16, torch.uint8


def _packed(rows: int, cols: int, block: tuple[int, int], k: int, dtype: torch.dtype) -> Packed:
    """A third of the blocks in each form."""
    down, across = -(-rows // block[0]), -(-cols // block[1])
    each = down * across // 3
    return Packed(
        meta(down, across, dtype=UINT8),
        meta(each, *block, dtype=dtype),
        meta(each, block[0], block[1] // 2, dtype=dtype),
        meta(each, block[0], block[1] // 8, dtype=UINT8),
        meta(each, k, dtype=dtype),
        meta(each, k, dtype=UINT8 if block[0] * block[1] <= 256 else torch.int16),
        meta(down + 1, 3, dtype=torch.int32),
    )


def _linear(
    tokens: int, rows: int, cols: int, block: tuple[int, int] = (16, 16), k: int = 10, dtype: torch.dtype = BF16
) -> Tensor:
    return linear_tiered(meta(tokens, cols, dtype=dtype), *_packed(rows, cols, block, k, dtype), None, rows)


CASES = [
    Case("token1", lambda: _linear(1, 4096, 4096), loads=16, variant=True),
    Case("tokens16", lambda: _linear(16, 4096, 4096), loads=16),
    Case("tokens64-large-blocks", lambda: _linear(64, 4096, 4096, (64, 64), 160), variant=True),
    Case("any-shape", lambda: _linear(3, 33, 70, (24, 40), 0), hot=False, variant=True),
    Case("token1-fp32", lambda: _linear(1, 4096, 4096, dtype=torch.float32), loads=8),
    # A wavefront of 64 lanes has half as much to store; for sm_100, ptxas spills two registers.
    Case("unpack", lambda: unpack_tiered(_packed(4096, 4096, (16, 16), 10, BF16), 4096, 4096), hot=False, stores=8),
]
