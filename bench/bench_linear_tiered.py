import pytest
import torch
import torch.nn.functional as F

import sparsekit as sk

from .baselines import dense_calls
from .shapes import DTYPES, SQUARE, TOLERANCE, name

SHARES = (0.35, 0.45, 0.20)  # of dense, 2:4 and top-k blocks: the last step of the three-tier schedule
KEPT = 0.35 + 0.45 / 2 + 0.20 * 10 / 256
# At many tokens at most 1.1 times as long as the kept weights would take at the rate of linear24, which keeps half.
GOALS = {("fp32", 1): {"best dense": 1.3}, ("fp32", 128): {"linear24": 0.5 / KEPT / 1.1}}


@pytest.mark.parametrize("dtype, tokens", [("fp32", 1), ("fp32", 16), ("fp32", 128), ("bf16", 1)])
def bench_linear_tiered(record, dtype, tokens):
    linear = torch.nn.Linear(SQUARE[1], SQUARE[0], dtype=DTYPES[dtype])
    sparse24 = sk.pack24(sk.nm_prune(linear.weight, 2, 4)[0])
    share = torch.rand(SQUARE[0] // 16, SQUARE[1] // 16)
    tiers = (share > SHARES[0]).to(torch.uint8) + (share > SHARES[0] + SHARES[1])
    linear.weight.copy_(sk.tier_prune(linear.weight, tiers, 10)[0])
    packed, x = sk.pack_tiered(linear.weight), torch.randn(tokens, SQUARE[1]).to(DTYPES[dtype])

    def call():
        return sk.linear_tiered(x, packed, linear.bias)

    expected = F.linear(x.float(), linear.weight.float(), linear.bias.float())
    assert (call() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
    dense = dense_calls(linear, x)
    baselines = dense | {"linear24": lambda: sk.linear24(x, sparse24, linear.bias)}
    row = {
        "op": "linear_tiered",
        "shape": name(SQUARE),
        "dtype": dtype,
        "tokens": tokens,
        "goal": GOALS.get((dtype, tokens), {}),
        "limit": linear.weight.nbytes / packed.nbytes if tokens <= 8 else 1 / KEPT,
        "flops": 2 * tokens * SQUARE[0] * SQUARE[1],
    }
    record(row, call, baselines, bytes_moved=packed.nbytes, best=dense)
