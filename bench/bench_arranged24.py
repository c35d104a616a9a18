import pytest
import torch
import torch.nn.functional as F

import sparsekit as sk
from sparsekit.nn import ArrangedLinear24, Linear24

from .baselines import dense_calls
from .shapes import LINEAR, TOLERANCE, name

TOKENS = {"input pairs": (1, 4, 8, 16, 32), "row pairs": (16, 32, 64, 128, 512, 1024)}
GOALS = {8: 1.4, 16: 1.4, 32: 1.4, 64: 1.35, 128: 1.35, 512: 1.35, 1024: 1.2}
CASES = [(shape, layout, tokens) for shape in LINEAR for layout, counts in TOKENS.items() for tokens in counts]


@pytest.mark.parametrize(
    "shape, layout, tokens", CASES, ids=lambda value: name(value) if type(value) is tuple else value
)
def bench_arranged24(record, shape, layout, tokens):
    linear = torch.nn.Linear(shape[1], shape[0])
    sk.nm_prune_(linear.weight, 2, 4)
    x = torch.randn(tokens, shape[1])
    layer, stored = ArrangedLinear24.from_linear(linear, layout=layout), Linear24.from_linear(linear)
    expected = F.linear(x, linear.weight, linear.bias)
    assert (layer(x) - expected).abs().max() <= TOLERANCE["fp32"] * expected.abs().max()
    row = {
        "op": f"linear24 {layout}",
        "shape": name(shape),
        "dtype": "fp32",
        "tokens": tokens,
        "goal": {"best dense": GOALS[tokens]} if tokens in GOALS else {},
        "limit": 2,
        "flops": 2 * tokens * shape[0] * shape[1],
    }
    moved = sum(tensor.nbytes for tensor in layer.resident_tensors())
    dense = dense_calls(linear, x)
    record(row, lambda: layer(x), {**dense, "Linear24": lambda: stored(x)}, bytes_moved=moved, best=dense)
