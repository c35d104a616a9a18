import torch

from sparsekit.triton_kernels.transposable import transposable_mask24

from .case import Case, meta

CASES = [
    Case("bf16", lambda: transposable_mask24(meta(4096, 4096)), loads=16, stores=8),
    Case("fp32", lambda: transposable_mask24(meta(4096, 4096, dtype=torch.float32)), loads=16, stores=4, variant=True),
    Case("odd", lambda: transposable_mask24(meta(6, 4099)), hot=False, variant=True),
    Case("one-tile", lambda: transposable_mask24(meta(4, 4)), hot=False, variant=True),
]
