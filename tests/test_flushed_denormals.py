"""Masks do not depend on ``torch.set_flush_denormal``, which sets one thread alone; products follow it everywhere."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._pytree import tree_leaves

import sparsekit as sk


@contextmanager
def flushed():
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def results(call):
    return [leaf for leaf in tree_leaves(call()) if isinstance(leaf, torch.Tensor)]


def denormal_calls():
    """What decides a mask or a score, on numbers that a processor may take for zero."""
    tiny = torch.randint(1, 1 << 22, (256, 256), dtype=torch.int32).view(torch.float32)
    weight, scale = torch.randn(256, 256) * 1e-20, torch.rand(256) * 1e-20
    tiers = torch.randint(0, 3, (16, 16), dtype=torch.uint8)
    factor = torch.linalg.cholesky(torch.eye(32) + 0.1).t().contiguous()
    pruned = sk.nm_prune(tiny, 2, 4)[0]
    return {
        "nm_mask": lambda: sk.nm_mask(tiny, 2, 4),
        "nm_mask_bits": lambda: sk.nm_mask_bits(tiny.bfloat16(), 3, 7),
        "nm_prune": lambda: sk.nm_prune(weight, 2, 4, scale=scale),
        "nm_prune_one": lambda: sk.nm_prune(tiny, 1, 4),
        "nm_sample": lambda: sk.nm_sample(tiny, 2, 4, seed=1),
        "nm_policy_step_": lambda: sk.nm_policy_step_(
            tiny.clone(), sk.nm_sample(tiny, 2, 4, seed=1), 1, 1, 2, 4, seed=1
        ),
        "transposable_mask24": lambda: sk.transposable_mask24(tiny),
        "block_scores": lambda: sk.block_scores(weight, scale=scale),
        "block_topk_mask": lambda: sk.block_topk_mask(tiny, 10),
        "tier_prune": lambda: sk.tier_prune(weight, tiers, 10, scale=scale, nested=True),
        "tier_scores": lambda: sk.tier_scores(weight, 10, scale=scale),
        "pack24": lambda: sk.pack24(pruned),
        "prune_pack24": lambda: sk.prune_pack24(weight, scale=scale),
        "sparsegpt_columns": lambda: sk.ops.sparsegpt_columns(tiny[:, :32], factor),
        "pack_tiered": lambda: sk.pack_tiered(torch.where(torch.rand(256, 256) < 0.1, tiny, 0)),
    }


@pytest.mark.parametrize("count", [1, 4])
def test_masks_do_not_depend_on_flushed_denormals(simd, threads, count):
    if simd == "reference":
        pytest.skip("PyTorch's own threads compute as they were started")
    threads(count)
    torch.ones(300, 300) @ torch.ones(300, 300)  # the pool is at work before the mode changes
    for name, call in denormal_calls().items():
        torch.manual_seed(1)
        expected = results(call)
        torch.manual_seed(1)
        with flushed():
            got = results(call)
            assert torch.tensor(1e-40) * 1 == 0, "the mode of the caller is left as it was"
        for mine, plain in zip(got, expected, strict=True):
            bits = {1: torch.uint8, 4: torch.int32}.get(plain.element_size(), plain.dtype)
            assert torch.equal(mine.view(bits), plain.view(bits)), name


@pytest.mark.parametrize("tokens", [1, 20])
def test_products_follow_the_mode_of_the_caller_in_every_thread(simd, threads, tokens):
    if simd == "reference":
        pytest.skip("PyTorch's own threads compute as they were started")
    packed = sk.pack24(torch.full((512, 512), 1e-20) * torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(128))
    x = torch.full((tokens, 512), 1e-20)
    for count in (1, 4):
        threads(count)
        assert (sk.linear24(x, packed) > 0).all()
        with flushed():
            assert (sk.linear24(x, packed) == 0).all()
        assert (sk.linear24(x, packed) > 0).all()
