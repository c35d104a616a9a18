import torch
from torch import Tensor

from sparsekit.triton_kernels.linear24 import linear24

from .case import Case, meta


def _linear(tokens: int, rows: int, cols: int, dtype: torch.dtype = torch.bfloat16, bias: bool = False) -> Tensor:
    values, bitmask = meta(rows, cols // 2, dtype=dtype), meta(rows, cols // 8, dtype=torch.uint8)
    return linear24(meta(tokens, cols, dtype=dtype), values, bitmask, meta(rows, dtype=dtype) if bias else None)


CASES = [
    Case("token1", lambda: _linear(1, 4096, 4096), loads=16),
    Case("tokens8-bias-half", lambda: _linear(8, 14336, 4096, torch.float16, bias=True), loads=16),
    Case("tokens16", lambda: _linear(16, 4096, 4096), loads=16),
    Case("tokens16-split", lambda: _linear(16, 4096, 14336), loads=4),
    Case("tokens64-split", lambda: _linear(64, 4096, 14336), loads=4),
    Case("any-shape", lambda: _linear(20, 33, 70), hot=False, variant=True),
    Case("token1-fp32", lambda: _linear(1, 4096, 4096, torch.float32), loads=8),
    Case("tokens8-fp32", lambda: _linear(8, 4096, 4096, torch.float32), loads=16, variant=True),
]
