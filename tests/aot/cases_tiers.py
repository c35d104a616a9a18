import torch

from sparsekit.triton_kernels.tiers import tier_prune

from .case import Case, meta

SQUARE = 4096, 4096
TIERS = meta(256, 256, dtype=torch.uint8)
NORMS = meta(4096, dtype=torch.float32)
CASES = [
    Case("magnitude", lambda: tier_prune(meta(*SQUARE), TIERS, 10, 16, 16, None, NORMS), loads=16, stores=8),
    Case("nested", lambda: tier_prune(meta(*SQUARE), TIERS, 10, 16, 16, None, NORMS, True), loads=16, stores=8),
    Case("scaled", lambda: tier_prune(meta(*SQUARE), TIERS, 10, 16, 16, NORMS, NORMS), loads=8, stores=4),
]
