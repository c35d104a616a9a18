import pytest
import torch

import sparsekit as sk
from sparsekit.ops.transposable import tile_masks, transposable_mask24_reference

from .baselines import copy_call
from .shapes import DTYPES, SQUARE, name

SAMPLE = slice(0, 256)  # rows: whole tiles


def usual_search(score, patterns):
    """Multiplies every tile by all 90 patterns, as the exact search is usually written; returns the mask."""
    rows, cols = score.shape
    tiles = score.float().abs().view(rows // 4, 4, cols // 4, 4).transpose(1, 2).reshape(-1, 16)
    best = (tiles @ patterns.flatten(1).t()).argmax(1)
    return patterns[best].bool().view(rows // 4, cols // 4, 4, 4).transpose(1, 2).reshape(rows, cols)


@pytest.mark.parametrize("dtype", DTYPES)
def bench_transposable(record, dtype):
    score = torch.randn(SQUARE).to(DTYPES[dtype])
    assert torch.equal(sk.transposable_mask24(score)[SAMPLE], transposable_mask24_reference(score[SAMPLE]))
    baselines, copied = copy_call(score)
    patterns = tile_masks(score.device).float()
    baselines["matmul"] = lambda: usual_search(score, patterns)
    row = {"op": "transposable_mask24", "shape": name(SQUARE), "dtype": dtype, "goal": {}}
    moved = score.nbytes + score.numel()
    record(row, lambda: sk.transposable_mask24(score), baselines, bytes_moved=moved, copied=copied)
