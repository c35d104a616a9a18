import torch

from sparsekit.triton_kernels import sparse24

from .case import Case, meta

BF16, FP32 = torch.bfloat16, torch.float32


def _prune(config: str) -> object:
    with sparse24.PACK.force(config):
        return sparse24.prune_pack24(meta(4096, 4096), None)


def _unpack(rows: int, cols: int, dtype: torch.dtype = BF16) -> object:
    bitmask = meta(rows, -(-cols // 8), dtype=torch.uint8)
    return sparse24.unpack24(meta(rows, 2 * (cols // 4) + cols % 4, dtype=dtype), bitmask, cols)


CASES = [
    Case("prune-pack", lambda: sparse24.prune_pack24(meta(4096, 4096), None), loads=16, stores=8),
    # A wavefront of 64 lanes has half of the small tiles to load.
    Case("prune-pack-least", lambda: _prune("4x256"), loads=8, stores=4),
    Case("prune-pack-most", lambda: _prune("32x256"), loads=16, stores=8),
    Case(
        "prune-pack-scaled", lambda: sparse24.prune_pack24(meta(4096, 4096), meta(4096, dtype=FP32)), loads=16, stores=8
    ),
    Case("prune-pack-fp32", lambda: sparse24.prune_pack24(meta(4096, 4096, dtype=FP32), None), loads=16, stores=8),
    Case("pack", lambda: sparse24.pack24(meta(4096, 4096), None, False), loads=16, stores=8),
    Case(
        "pack-mask",
        lambda: sparse24.pack24(meta(4096, 4096), meta(4096, 4096, dtype=torch.bool), False),
        loads=8,
        stores=8,
    ),
    Case("pack-odd", lambda: sparse24.pack24(meta(33, 67), None, False), hot=False),
    Case("unpack", lambda: _unpack(4096, 4096), loads=8, stores=16),
    Case("unpack-odd", lambda: _unpack(33, 67), hot=False),
]
