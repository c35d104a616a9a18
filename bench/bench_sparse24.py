import pytest
import torch

import sparsekit as sk
from sparsekit.ops.bits import pack_bits
from sparsekit.ops.sparse24 import pack24_reference, prune_pack24_reference

from .baselines import copy_call
from .shapes import DTYPES, SQUARE, name
from .usual import topk_prune


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["pack24", "unpack24"])
def bench_format(record, op, dtype):
    weight, _ = sk.nm_prune(torch.randn(SQUARE).to(DTYPES[dtype]), 2, 4)
    packed = sk.pack24(weight)
    for got, expected in zip(packed[:2], pack24_reference(weight, None, False), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(packed.to_dense(), weight)
    baselines, copied = copy_call(weight)
    call = (lambda: sk.pack24(weight)) if op == "pack24" else (lambda: packed.to_dense())
    row = {"op": op, "shape": name(SQUARE), "dtype": dtype, "goal": {"copy_": 0.6} if op == "pack24" else {}}
    moved = weight.nbytes + packed.nbytes
    record(row, call, baselines, bytes_moved=moved, copied=copied)


def usual_prune_pack(weight, scale):
    """Prunes to 2:4 by a score as it is usually written; returns the kept values, and the mask as bits."""
    pruned, mask = topk_prune(weight, 2, 4, scale)
    return pruned[mask].view(len(weight), -1), pack_bits(mask)


@pytest.mark.parametrize("dtype", DTYPES)
def bench_prune_pack24(record, dtype):
    weight, scale = torch.randn(SQUARE).to(DTYPES[dtype]), torch.rand(SQUARE[1])
    packed = sk.prune_pack24(weight, scale=scale)
    for got, expected in zip(packed[:2], prune_pack24_reference(weight, scale), strict=True):
        assert torch.equal(got, expected)
    baselines, copied = copy_call(weight)
    baselines["topk"] = lambda: usual_prune_pack(weight, scale)
    goal = {"copy_": 0.6, "topk": 50}
    row = {"op": "prune_pack24", "shape": name(SQUARE), "dtype": dtype, "goal": goal}
    moved = weight.nbytes + packed.nbytes
    record(row, lambda: sk.prune_pack24(weight, scale=scale), baselines, bytes_moved=moved, copied=copied)
