import pytest
import torch
import torch.nn.functional as F

import sparsekit as sk
from sparsekit.nn import Linear24

from .baselines import dense_calls
from .shapes import DECODE_TOKENS, DTYPES, GOAL_SHAPES, LINEAR, PREFILL_TOKENS, SQUARE, TOLERANCE, UP, name

GOALS = {
    "fp32": {1: 1.6, 4: 1.35, 8: 1.1, 16: 1.1, 32: 1.1},
    "bf16": {1: 1.3, 4: 1.1},
}
LIMIT = {"fp32": 32 / 17, "bf16": 16 / 9}  # dense bytes over packed bytes, where memory decides; else 2
CASES = [
    *((shape, "fp32", tokens) for shape in LINEAR for tokens in DECODE_TOKENS + PREFILL_TOKENS),
    *((SQUARE, "bf16", tokens) for tokens in (*DECODE_TOKENS, 64, 128, 512)),
    *((UP, "bf16", tokens) for tokens in DECODE_TOKENS),
]


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
    if tokens in DECODE_TOKENS:
        goal = {"best dense": GOALS[dtype].get(tokens, 1.1)} if shape in GOAL_SHAPES else {}
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
