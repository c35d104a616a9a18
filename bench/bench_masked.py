import pytest
import torch

import sparsekit as sk
from sparsekit.ops import masked_weight, unpack_bits

from .baselines import copy_call
from .shapes import DTYPES, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3072, 768, 1), (512, 512, 9)], ids=name)
def bench_masked(record, shape, dtype):
    weight = torch.randn(shape).to(DTYPES[dtype])
    rows, cols, taps = shape
    bits = sk.nm_sample(torch.zeros(rows * taps * cols), 2, 4, seed=1)

    def filled() -> torch.Tensor:
        dropped = ~unpack_bits(bits, weight.numel()).view(rows, taps, cols).transpose(1, 2)
        return weight.masked_fill(dropped, 0)

    assert torch.equal(masked_weight(weight, bits, cols), filled())
    baselines, copied = copy_call(weight)
    baselines["masked_fill"] = filled
    moved = 2 * weight.nbytes + bits.nbytes
    row = {"op": "masked_weight", "shape": name(shape), "dtype": dtype, "goal": {"masked_fill": 4}}
    record(row, lambda: masked_weight(weight, bits, cols), baselines, bytes_moved=moved, copied=copied)
