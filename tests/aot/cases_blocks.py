import torch

from sparsekit.triton_kernels.blocks import block_scores, block_topk_mask

from .case import Case, meta

SQUARE = 4096, 4096
CASES = [
    Case("scores", lambda: block_scores(meta(*SQUARE), 16, 16, None, None), loads=16),
    Case(
        "scores-scaled-masked",
        lambda: block_scores(
            meta(*SQUARE), 16, 16, meta(SQUARE[1], dtype=torch.float32), meta(*SQUARE, dtype=torch.bool)
        ),
        loads=8,
    ),
    Case(
        "scores-fp32",
        lambda: block_scores(meta(*SQUARE, dtype=torch.float32), 16, 16, None, None),
        loads=16,
        variant=True,
    ),
    Case("topk", lambda: block_topk_mask(meta(*SQUARE), 10, 16, 16), loads=16, stores=8),
    Case(
        "topk-fp32",
        lambda: block_topk_mask(meta(*SQUARE, dtype=torch.float32), 10, 16, 16),
        loads=16,
        stores=4,
        variant=True,
    ),
    Case("topk-rows", lambda: block_topk_mask(meta(4096, 14336), 512, 1, 14336), loads=16, stores=8, variant=True),
    Case("topk-large-blocks", lambda: block_topk_mask(meta(64, 131072), 512, 1, 131072), hot=False),
]
