import torch

from sparsekit.triton_kernels.masked import masked_weight

from .case import Case, meta


def _call(rows: int, cols: int, taps: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    bits = meta(rows * cols * taps // 8, dtype=torch.uint8)
    return masked_weight(meta(rows, cols, taps, dtype=dtype), bits, cols)


CASES = [
    Case("linear", lambda: _call(4096, 4096, 1), loads=16, stores=16),
    Case("conv", lambda: _call(512, 512, 9), variant=True),
]
