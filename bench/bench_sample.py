import pytest
import torch

import sparsekit as sk
from sparsekit.ops.sample import nm_policy_step_inplace_reference, nm_sample_reference

from .baselines import copy_call
from .shapes import DTYPES, GROUPS, name
from .usual import multinomial_mask, multinomial_step

M = GROUPS[1]
SAMPLE = 4096  # entries that are checked, from the first on: the noise of a group depends on its number


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["nm_sample", "nm_policy_step_"])
def bench_sample(record, op, dtype):
    logits, advantage = torch.randn(GROUPS).flatten().to(DTYPES[dtype]), torch.tensor(0.01)
    bits = sk.nm_sample(logits, 2, M, seed=1)
    assert torch.equal(bits[: SAMPLE // 8], nm_sample_reference(logits[:SAMPLE], 2, M, 1, 0))
    baselines, copied = copy_call(logits)
    if op == "nm_sample":
        call, moved = lambda: sk.nm_sample(logits, 2, M, seed=1), logits.nbytes + bits.nbytes
        baselines["multinomial"] = lambda: multinomial_mask(logits, 2, M)
    else:
        stepped, expected = logits.clone(), logits[:SAMPLE].clone()
        after = nm_policy_step_inplace_reference(expected, bits[: SAMPLE // 8], advantage, 0.1, 2, M, 1, 0)
        assert torch.equal(sk.nm_policy_step_(stepped, bits, advantage, 0.1, 2, M, seed=1)[: SAMPLE // 8], after)
        assert torch.equal(stepped[:SAMPLE], expected)
        call = lambda: sk.nm_policy_step_(stepped, bits, advantage, 0.1, 2, M, seed=1)  # noqa: E731
        moved, usual = 2 * logits.nbytes + 2 * bits.nbytes, logits.clone()
        mask = multinomial_mask(usual, 2, M)
        baselines["multinomial"] = lambda: multinomial_step(usual, mask, advantage, 0.1, 2, M)
    row = {"op": f"{op} 2:4", "shape": name(GROUPS), "dtype": dtype, "goal": {"multinomial": 15}}
    record(row, call, baselines, bytes_moved=moved, copied=copied)
