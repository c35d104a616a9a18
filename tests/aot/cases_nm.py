import torch

from sparsekit.triton_kernels import nm

from .case import Case, meta

LARGE = (4096, 4096)


def _scale(cols: int) -> torch.Tensor:
    return meta(cols, dtype=torch.float32)


CASES = [
    Case("mask24", lambda: nm.nm_mask(meta(*LARGE), 2, 4), loads=16, stores=8),
    Case("bits24", lambda: nm.nm_mask_bits(meta(*LARGE), 2, 4), loads=16),
    Case("prune24", lambda: nm.nm_prune(meta(*LARGE), 2, 4, None), loads=16, stores=8),
    Case("prune24-scaled", lambda: nm.nm_prune(meta(*LARGE), 2, 4, _scale(4096)), loads=16, stores=8),
    Case("prune24_-scaled", lambda: nm.nm_prune_(meta(*LARGE), 2, 4, _scale(4096)), loads=16, stores=8),
    Case("mask24-fp32", lambda: nm.nm_mask(meta(*LARGE, dtype=torch.float32), 2, 4), loads=16, stores=4),
    Case("bits24-fp32", lambda: nm.nm_mask_bits(meta(*LARGE, dtype=torch.float32), 2, 4), loads=16),
    Case("mask48", lambda: nm.nm_mask(meta(*LARGE), 4, 8), loads=16, stores=8),
    Case("bits16of32", lambda: nm.nm_mask_bits(meta(*LARGE), 16, 32), loads=16, variant=True),
    Case("prune3of7", lambda: nm.nm_prune(meta(33, 65), 3, 7, _scale(65)), hot=False, variant=True),
    Case("one-group", lambda: nm.nm_prune(meta(1, 4), 2, 4, _scale(4)), hot=False),
    Case("one-unit", lambda: nm.nm_prune(meta(1, 8), 2, 4, _scale(8)), hot=False),
]
