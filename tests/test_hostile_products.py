"""Products with what is not finite, and with packed weights that no packer wrote."""

import pytest
import torch
from helpers import DTYPES, dtype_id, sparse24

import sparsekit as sk
from sparsekit.ops.linear24 import linear24_reference
from sparsekit.ops.linear_tiered import linear_tiered_reference

INF, NAN = float("inf"), float("nan")


def kinds(y):
    """0 where finite, 1 and -1 where infinite, 2 where NaN."""
    return torch.where(y.isnan(), 2, torch.where(y.isinf(), y.sign(), 0))


def test_a_dropped_weight_times_inf_is_nan_literal(simd):
    packed = sk.pack24(torch.tensor([[0.0, 1, 2, 0], [3, 0, 0, 1]]))
    for tokens in (1, 2, 15, 16, 33):
        x = torch.ones(tokens, 4)
        x[-1, 1] = INF
        assert sk.linear24(x, packed)[-1].tolist()[0] == INF
        assert sk.linear24(x, packed)[-1, 1].isnan()
        assert sk.linear24(x, packed)[:-1].eq(torch.tensor([3.0, 4.0])).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("tokens", [1, 2, 6, 7, 8, 15, 16, 17, 33])
def test_what_is_not_finite_comes_out_as_in_the_dense_product(simd, dtype, tokens):
    for cols in (7, 36, 72, 260):
        packed = sk.pack24(*sparse24(40, cols, dtype))
        weight = (torch.randn(40, cols) * (torch.rand(40, cols) < 0.2)).to(dtype)
        weight[:16, :16] = 1  # a dense block
        tiered = sk.pack_tiered(weight, block=(8, 8), k=10)
        for value, col in ((INF, cols - 1), (NAN, 0), (-INF, cols // 2)):
            x = torch.randn(tokens, cols).to(dtype)
            x[tokens // 2, col] = value
            expected = linear24_reference(x, packed.values, packed.bitmask, None)
            assert torch.equal(kinds(sk.linear24(x, packed)), kinds(expected))
            expected = linear_tiered_reference(x, *tiered.tensors, None, 40)
            assert torch.equal(kinds(sk.linear_tiered(x, tiered)), kinds(expected))
        x = torch.full((tokens, cols), NAN, dtype=dtype)
        assert sk.linear24(x, packed).isnan().all() and sk.linear_tiered(x, tiered).isnan().all()


@pytest.mark.parametrize("tokens", [1, 20])
def test_bits_that_break_2_of_4_cost_no_more_than_the_result(simd, tokens):
    """The C++ tests run the same between pages that fault."""
    if simd == "reference":
        pytest.skip("the reference counts the bits")
    for cols in (7, 15, 263):
        packed = sk.pack24(*sparse24(9, cols))
        x, bits = torch.randn(tokens, cols), packed.bitmask
        for broken in (torch.full_like(bits, 255), torch.zeros_like(bits), torch.randint_like(bits, 256)):
            assert sk.linear24(x, packed._replace(bitmask=broken)).shape == (tokens, 9)
            assert packed._replace(bitmask=broken).to_dense().shape == (9, cols)


def test_a_mask_may_be_a_view_of_any_bytes(simd):
    if simd == "reference":
        pytest.skip("PyTorch reads such masks as it likes")
    for cols in (7, 30, 100):
        weight, mask = sparse24(9, cols)
        bytes_for_bools = (mask.to(torch.uint8) * 2).view(torch.bool)
        for mine, plain in zip(sk.pack24(weight, bytes_for_bools)[:2], sk.pack24(weight, mask)[:2], strict=True):
            assert torch.equal(mine, plain)
        expected = sk.block_scores(weight, (4, 4), mask=mask)
        assert torch.equal(sk.block_scores(weight, (4, 4), mask=bytes_for_bools), expected)


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_map_and_positions_that_do_not_belong_to_a_tiered_weight(simd, tokens):
    if simd == "reference":
        pytest.skip("the reference indexes with checks")
    x = torch.randn(tokens, 72)
    tiered = sk.pack_tiered(torch.randn(40, 72) * (torch.rand(40, 72) < 0.2), block=(8, 8))
    beyond = tiered._replace(positions=torch.full_like(tiered.positions, 255))
    other = tiered._replace(tiers=torch.randint_like(tiered.tiers, 9))
    for broken in (beyond, other):
        assert sk.linear_tiered(x, broken).shape == (tokens, 40)
    for starts in (tiered.starts * 1000, tiered.starts - 1, tiered.starts.flip(0), torch.zeros_like(tiered.starts)):
        with pytest.raises(ValueError, match="starts must count the stored blocks"):
            sk.linear_tiered(x, tiered._replace(starts=starts))


def test_a_block_far_larger_than_the_matrix_costs_no_room(simd):
    weight, scale = torch.randn(5, 6), -torch.rand(6)
    weight[0] = 0  # -0.0 after the scale, 0.0 with the zeros below
    huge, tiers = (10**9, 4 * 10**9), torch.tensor([[2]], dtype=torch.uint8)
    large = (64, 64)
    for factors in (None, scale):
        for op in (
            lambda block, scale=factors: sk.block_scores(weight, block, scale=scale),
            lambda block: sk.block_topk_mask(weight, 3, block),
            lambda block, scale=factors: torch.cat([*sk.tier_prune(weight, tiers, 3, block, scale=scale)[:2]]),
            lambda block, scale=factors: sk.tier_scores(weight, 3, block, score_scale=scale),
        ):
            assert torch.equal(op(huge), op(large)) and torch.equal(op(huge).signbit(), op(large).signbit())
    assert sk.block_topk_mask(weight, 10**12, huge).all()
