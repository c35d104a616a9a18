"""A sparse RADD: calibrated on masked text, compressed, and sampled and measured as before."""

import copy

import pytest
import torch

pytest.importorskip("huggingface_hub")

import sparsekit as sk
from sparsekit.diffusion import DiffusionSampler, evaluate_bound, k_dce_loss, masked_batches
from sparsekit.models import RADD

ROWS = torch.randint(15, (64, 12), generator=torch.Generator().manual_seed(0))
ROWS[:, 1::2] = (ROWS[:, ::2] + 1) % 15  # what can be learned


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = RADD(tokens=15, hidden_size=64, n_blocks=1, n_heads=2, dropout=0.0)
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=5e-3), torch.Generator().manual_seed(0)
    for _ in range(80):
        optimizer.zero_grad()
        k_dce_loss(model, ROWS, model.mask_token, generator=generator).mean().backward()
        optimizer.step()
    return model.eval()


def pruned(trained, batches):
    model = copy.deepcopy(trained)
    sk.prune_(model, sk.SparseGPT("2:4"), batches, where=lambda name, _: name.startswith("blocks."))
    return model


def test_masked_batches_literal():
    batches = masked_batches(ROWS, 15, batch_size=24)
    assert [len(tokens) for tokens, _ in batches] == [24, 24, 16]
    tokens, masked = (torch.cat(each) for each in zip(*batches, strict=True))
    assert torch.equal(tokens == 15, masked) and torch.equal(tokens[~masked], ROWS[~masked])
    assert all(12 * i / 64 <= k <= 12 * (i + 1) / 64 + 1 for i, k in enumerate(masked.sum(1).tolist()))
    again, other = (masked_batches(ROWS, 15, batch_size=5, seed=seed) for seed in (0, 1))
    assert torch.equal(torch.cat([each for each, _ in again]), tokens)
    assert not torch.equal(torch.cat([each for each, _ in other]), tokens)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        masked_batches(ROWS, 15, batch_size=0)
    with pytest.raises(ValueError, match="must not contain the mask token, got 3"):
        masked_batches(ROWS, 3)


def test_calibrating_on_masked_text_keeps_more_than_on_plain_text(trained):
    plain = [(ROWS, torch.ones_like(ROWS, dtype=torch.bool))]
    dense, masked, clean = (
        evaluate_bound(model, ROWS, 15, draws=8, batch_size=64).nats
        for model in (trained, pruned(trained, masked_batches(ROWS, 15)), pruned(trained, plain))
    )
    assert dense < masked and masked - dense < 0.6 * (clean - dense)


def test_a_compressed_model_is_sampled_and_measured_the_same(trained, ratios):
    batches = masked_batches(ROWS, 15)
    model, start, sampler = pruned(trained, batches), torch.full((4, 12), 15), DiffusionSampler(8)
    before = sampler.sample(model, start, 15, range(4)), evaluate_bound(model, ROWS[:8], 15, draws=2)
    sk.compress_(model, batches[:1])
    assert isinstance(model.blocks[0].up, sk.nn.CompressedLinear)
    after = sampler.sample(model, start, 15, range(4)), evaluate_bound(model, ROWS[:8], 15, draws=2)
    assert torch.equal(after[0].tokens, before[0].tokens)
    torch.testing.assert_close(after[1].row_nats, before[1].row_nats, atol=1e-5, rtol=1e-5)
