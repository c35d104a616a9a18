import torch

from sparsekit.triton_kernels.sparsegpt import sparsegpt_columns

from .case import Case, meta


def block(mask=None):
    return sparsegpt_columns(meta(4096, 128, dtype=torch.float32), meta(128, 128, dtype=torch.float32), mask, 2, 4)


CASES = [
    Case("2:4", block),
    Case("given", lambda: block(meta(4096, 128, dtype=torch.bool))),
]
