import torch
from torch import Tensor

from sparsekit.triton_kernels.linear24q import linear24q

from .case import Case, meta


def _linear(
    tokens: int, rows: int, cols: int, quant_type: str, dtype: torch.dtype = torch.bfloat16, bias: bool = False
) -> Tensor:
    kept = cols // 4 * 2 + cols % 4
    whole = quant_type == "int8"
    values = meta(rows, kept if whole else -(-kept // 2), dtype=torch.int8 if whole else torch.uint8)
    scales, bitmask = meta(rows, -(-cols // 64)), meta(rows, -(-cols // 8), dtype=torch.uint8)
    x = meta(tokens, cols, dtype=dtype)
    return linear24q(x, values, scales, bitmask, meta(rows, dtype=dtype) if bias else None, quant_type, 64)


CASES = [
    Case("token1", lambda: _linear(1, 4096, 4096, "int8"), loads=8),
    Case("token1-int4", lambda: _linear(1, 4096, 4096, "int4"), loads=4),
    Case("token1-nf4", lambda: _linear(1, 4096, 4096, "nf4"), loads=4, variant=True),
    Case("tokens32-half", lambda: _linear(32, 4096, 4096, "int8", torch.float16, bias=True), loads=8, variant=True),
    Case("tokens128", lambda: _linear(128, 4096, 4096, "int8")),
    # gfx942 spills nine registers, of which the sixteen levels take their share.
    Case("tokens128-nf4", lambda: _linear(128, 4096, 4096, "nf4"), hot=False, variant=True),
    Case("token1-fp32", lambda: _linear(1, 4096, 4096, "int8", torch.float32), loads=8, variant=True),
    Case("any-shape", lambda: _linear(20, 33, 71, "int4"), hot=False, variant=True),
]
