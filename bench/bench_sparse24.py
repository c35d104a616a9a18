import pytest
import torch
import torch.nn.functional as F

import sparsekit as sk
from sparsekit.nn import Linear24
from sparsekit.ops.bits import pack_bits
from sparsekit.ops.sparse24 import pack24_reference, prune_pack24_reference

from .baselines import copy_call, dense_calls
from .shapes import FEW, LARGE, LINEAR, MANY, SQUARE, UP, name
from .usual import topk_prune

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # of the largest output
GOALS = {
    "fp32": {1: 1.6, 4: 1.35, 8: 1.1, 16: 1.1, 32: 1.1},
    "bf16": {1: 1.3, 4: 1.1},
}
LIMIT = {"fp32": 32 / 17, "bf16": 16 / 9}  # dense bytes over packed bytes, where memory decides; else 2
CASES = [
    *((shape, "fp32", tokens) for shape in LINEAR for tokens in FEW + MANY),
    *((SQUARE, "bf16", tokens) for tokens in (*FEW, 64, 128, 512)),
    *((UP, "bf16", tokens) for tokens in FEW),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["pack24", "unpack24"])
def bench_format(record, op, dtype):
    weight, _ = sk.nm_prune(torch.randn(SQUARE).to(DTYPES[dtype]), 2, 4)
    packed = sk.pack24(weight)
    for got, expected in zip(packed, pack24_reference(weight, None, False), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(sk.unpack24(*packed, SQUARE[1]), weight)
    baselines, copied = copy_call(weight)
    call = (lambda: sk.pack24(weight)) if op == "pack24" else (lambda: sk.unpack24(*packed, SQUARE[1]))
    row = {"op": op, "shape": name(SQUARE), "dtype": dtype, "goal": {"copy_": 0.6} if op == "pack24" else {}}
    moved = weight.nbytes + sum(part.nbytes for part in packed)
    record(row, call, baselines, bytes_moved=moved, copied=copied)


def usual_prune_pack(weight, scale):
    """2:4 pruning by a score, then the kept values and the mask as bits, as it is usually written."""
    pruned, mask = topk_prune(weight, 2, 4, scale)
    return pruned[mask].view(len(weight), -1), pack_bits(mask)


@pytest.mark.parametrize("dtype", DTYPES)
def bench_prune_pack24(record, dtype):
    weight, scale = torch.randn(SQUARE).to(DTYPES[dtype]), torch.rand(SQUARE[1])
    packed = sk.prune_pack24(weight, scale=scale)
    for got, expected in zip(packed, prune_pack24_reference(weight, scale), strict=True):
        assert torch.equal(got, expected)
    baselines, copied = copy_call(weight)
    baselines["topk"] = lambda: usual_prune_pack(weight, scale)
    goal = {"copy_": 0.6, "topk": 50}
    row = {"op": "prune_pack24", "shape": name(SQUARE), "dtype": dtype, "goal": goal}
    moved = weight.nbytes + sum(part.nbytes for part in packed)
    record(row, lambda: sk.prune_pack24(weight, scale=scale), baselines, bytes_moved=moved, copied=copied)


@pytest.mark.parametrize(
    "shape, dtype, tokens", CASES, ids=lambda value: name(value) if type(value) is tuple else value
)
def bench_linear24(record, shape, dtype, tokens):
    linear = torch.nn.Linear(shape[1], shape[0], dtype=DTYPES[dtype])
    sk.nm_prune_(linear.weight, 2, 4)
    x = torch.randn(tokens, shape[1]).to(DTYPES[dtype])
    sparse = Linear24.from_linear(linear)
    expected = F.linear(x.float(), linear.weight.float(), linear.bias.float())
    assert (sparse(x) - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
    if tokens in FEW:
        goal = {"best dense": GOALS[dtype].get(tokens, 1.1)} if shape in LARGE else {}
    else:
        goal = {"best dense": 1.1} | ({"F.linear": 2.2} if dtype == "fp32" else {})
    row = {
        "op": "linear24",
        "shape": name(shape),
        "dtype": dtype,
        "tokens": tokens,
        "goal": goal,
        "limit": LIMIT[dtype] if tokens <= 8 else 2,
        "flops": 2 * tokens * shape[0] * shape[1],
    }
    moved = sum(tensor.nbytes for tensor in (sparse.values, sparse.bitmask))
    dense = dense_calls(linear, x)
    record(row, lambda: sparse(x), dense, bytes_moved=moved, best=dense)
