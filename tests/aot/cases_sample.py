import torch

from sparsekit.triton_kernels import sample

from .case import Case, meta

LARGE = (4096, 4096)


def _logits(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return meta(*LARGE, dtype=dtype)


def _step(n: int, m: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    bits, advantage = meta(4096, 512, dtype=torch.uint8), meta(dtype=torch.float32)
    return sample.nm_policy_step_(_logits(dtype), bits, advantage, 0.1, n, m, 1, 1)


CASES = [
    Case("draw24", lambda: sample.nm_sample(_logits(), 2, 4, 1, 1), loads=16),
    Case("step24", lambda: _step(2, 4), stores=16),
    Case("step24-bf16", lambda: _step(2, 4, torch.bfloat16), variant=True),
    Case("step4of8", lambda: _step(4, 8), variant=True),
    Case("draw2of7", lambda: sample.nm_sample(meta(33, 65, dtype=torch.float32), 2, 7, 1, 1), hot=False),
]
