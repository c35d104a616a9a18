import torch

from sparsekit.triton_kernels.tier_scores import tier_scores

from .case import Case, meta

NORMS = meta(4096, dtype=torch.float32)
CASES = [
    Case(
        "squared", lambda: tier_scores(meta(4096, 4096, dtype=torch.float32), 10, 16, 16, NORMS, NORMS, True), loads=16
    ),
]
