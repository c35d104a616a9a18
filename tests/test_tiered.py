"""The tiered format: what pack_tiered stores, and that nothing is lost."""

import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_same, dtype_id, hostile
from hypothesis import given
from hypothesis import strategies as st
from tiering import BLOCKS, tiered

import sparsekit as sk
from sparsekit.ops.tiered import block_starts, to_blocks
from sparsekit.ops.tiers import DENSE, SPARSE24, TOPK

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_literal(dtype):
    weight = torch.zeros(17, 40, dtype=dtype)
    weight[:16, :16] = 1  # dense
    weight[:16, 17:32:2] = torch.arange(1, 9).to(dtype)  # two of every four
    weight[3, 38], weight[1, 33] = 5, 7  # top-k
    packed = sk.pack_tiered(weight, k=3)
    assert packed.tiers.tolist() == [[DENSE, SPARSE24, TOPK], [TOPK, TOPK, TOPK]]
    assert packed.starts.tolist() == [[0, 0, 0], [1, 1, 1], [1, 1, 4]] and packed.block == (16, 16)
    assert packed.dense.tolist() == [[[1] * 16] * 16]
    assert packed.values.tolist() == [[list(range(1, 9))] * 16]
    assert packed.bitmask.tolist() == [[[0b1010_1010] * 2] * 16]
    assert packed.topk.tolist() == [[7, 5, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert packed.positions.tolist() == [[17, 54, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert packed.dense.dtype == packed.values.dtype == packed.topk.dtype == dtype
    assert packed.tiers.dtype == packed.bitmask.dtype == packed.positions.dtype == torch.uint8
    assert torch.equal(packed.to_dense(), weight)


def test_literal_with_mask():
    weight = torch.arange(1.0, 257).view(16, 16)
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[0, 3] = mask[15, 15] = True
    packed = sk.pack_tiered(weight, mask, k=2)
    assert packed.topk.tolist() == [[4, 256]] and packed.positions.tolist() == [[3, 255]]
    mask[0, 4] = True  # three entries, at most two of every four: 2:4, completed, and what the mask drops is zero
    packed = sk.pack_tiered(weight, mask, k=2)
    assert packed.tiers.tolist() == [[SPARSE24]]
    assert packed.values[0, 0].tolist() == [0, 4, 5, 0, 0, 0, 0, 0]
    mask[0, :3] = True
    assert sk.pack_tiered(weight, mask, k=2).dense[0, 0].tolist() == [1, 2, 3, 4, 5] + [0] * 11


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("rows, cols", [(0, 16), (16, 0), (1, 1), (17, 21), (130, 263), (256, 256)])
def test_round_trip(dtype, block, rows, cols):
    weight, mask = tiered(rows, cols, block, dtype)
    packed = sk.pack_tiered(weight, block=block)
    assert_same(packed.to_dense(), weight)
    masked = sk.pack_tiered(torch.randn(rows, cols).to(dtype).abs() + 1, mask, block=block)
    assert torch.equal(masked.to_dense() != 0, mask)
    again = sk.TieredWeight.from_parts(*packed[:6], packed.shape)
    assert_same(again.starts, packed.starts)
    assert again.block == block and again.nbytes == packed.nbytes


@pytest.mark.parametrize("keep, tier, k", [(1.0, DENSE, 10), (0.5, SPARSE24, 10), (0.01, TOPK, 10), (1.0, TOPK, 256)])
def test_one_form_alone(keep, tier, k):
    weight = torch.randn(48, 64)
    if keep == 0.5:
        weight = sk.nm_prune(weight, 2, 4)[0]
    if keep == 0.01:
        weight = torch.where(sk.block_topk_mask(weight, k), weight, 0)
    packed = sk.pack_tiered(weight, k=k)
    assert (packed.tiers == tier).all()
    assert [len(packed.dense), len(packed.values), len(packed.topk)] == [12 * (tier == form) for form in range(3)]
    assert_same(packed.to_dense(), weight)


def test_k_of_zero_holds_empty_blocks():
    weight = torch.zeros(16, 32)
    weight[0, 0] = 1
    packed = sk.pack_tiered(weight, k=0)
    assert packed.tiers.tolist() == [[SPARSE24, TOPK]] and packed.topk.shape == packed.positions.shape == (1, 0)
    assert_same(packed.to_dense(), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_special_values_come_back(dtype):
    weight, (_, mask) = hostile(40, 72, dtype=dtype), tiered(40, 72)
    for packed, expected in (
        (sk.pack_tiered(weight), weight),
        (sk.pack_tiered(weight, mask), torch.where(mask, weight, 0)),
    ):
        torch.testing.assert_close(packed.to_dense(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("block", [(16, 16), (8, 24), (64, 64)], ids=str)
@pytest.mark.parametrize("rows, cols", [(0, 16), (16, 0), (5, 7), (130, 263), (256, 256)])
def test_every_block_takes_the_smallest_form(block, rows, cols):
    for mask in (
        torch.rand(rows, cols) < 0.5,
        torch.rand(rows, cols) < 0.02,
        torch.ones(rows, cols, dtype=torch.bool),
        tiered(rows, cols, block)[1],
        sk.nm_mask(torch.randn(rows, cols), 2, 4),
    ):
        packed = sk.pack_tiered(torch.randn(rows, cols), mask, block=block)
        blocks = to_blocks(mask, block)
        crowded = (blocks.unflatten(2, (block[1] // 4, 4)).sum(-1) > 2).flatten(1).any(1)
        form = torch.where(crowded, DENSE, SPARSE24).masked_fill(blocks.sum((1, 2)) <= 10, TOPK)
        assert torch.equal(packed.tiers, form.to(torch.uint8).view_as(packed.tiers))


def test_bytes_at_the_shares_of_the_pruner():
    tiers = torch.tensor([0] * 7 + [1] * 9 + [2] * 4, dtype=torch.uint8).repeat(52)[: 32 * 32].view(32, 32)
    for dtype, most in ((torch.float32, 0.605), (torch.bfloat16, 0.62)):
        weight = sk.tier_prune(torch.randn(512, 512).to(dtype), tiers, 10)[0]
        packed = sk.pack_tiered(weight)
        assert torch.equal(packed.tiers, tiers)
        assert packed.nbytes / weight.nbytes <= most


@given(rows=st.integers(0, 20), cols=st.integers(0, 40), k=st.integers(0, 64), data=st.data())
def test_lossless(rows, cols, k, data):
    density = data.draw(st.sampled_from([0.0, 0.05, 0.3, 0.5, 1.0]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    weight = torch.randn(rows, cols, generator=generator) * (torch.rand(rows, cols, generator=generator) < density)
    packed = sk.pack_tiered(weight, k=k, block=(8, 8))
    assert torch.equal(packed.to_dense(), weight)
    assert torch.equal(packed.starts, block_starts(packed.tiers))
    assert (packed.positions.int().diff() > 0)[packed.topk[:, 1:] != 0].all()
    assert len(packed.dense) + len(packed.values) + len(packed.topk) == -(-rows // 8) * -(-cols // 8)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout):
    weight, mask = tiered(33, 40)
    expected = sk.pack_tiered(weight, mask)
    for got, want in zip(
        sk.pack_tiered(LAYOUTS[layout](weight), LAYOUTS[layout](mask)).tensors, expected.tensors, strict=True
    ):
        assert torch.equal(got, want)
    strided = sk.TieredWeight(*map(LAYOUTS[layout], expected.tensors), expected.shape)
    assert_same(strided.to_dense(), weight)


def test_gradients_of_pack_and_unpack():
    weight, mask = tiered(33, 40)
    weight.requires_grad_()
    grad = torch.randn(33, 40)
    sk.pack_tiered(weight, mask).to_dense().backward(grad)
    assert torch.equal(weight.grad, torch.where(mask, grad, 0))


W = torch.randn(24, 32)
P = sk.pack_tiered(sk.tier_prune(W, torch.tensor([[0, 1], [2, 1]], dtype=torch.uint8), 10)[0])


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: sk.pack_tiered(W.int()), TypeError, r"weight must be float32, .* got torch\.int32"),
        (lambda: sk.pack_tiered(W[0]), ValueError, r"weight must have 2 dimensions, got shape \(32,\)"),
        (lambda: sk.pack_tiered(W.to("meta")), ValueError, "weight is on the meta device and has no data to pack"),
        (lambda: sk.pack_tiered(W, W), TypeError, r"mask must be torch\.bool, got torch\.float32"),
        (lambda: sk.pack_tiered(W, W.t() > 0), ValueError, r"mask must have shape \(24, 32\), got \(32, 24\)"),
        (lambda: sk.pack_tiered(W, k=257), ValueError, r"k must be between 0 and 256 .* got 257"),
        (lambda: sk.pack_tiered(W, k=2.0), TypeError, r"k must be an int, got 2\.0"),
        (lambda: sk.pack_tiered(W, block=16), TypeError, r"block must be two ints \(rows, cols\), got 16"),
        (lambda: sk.pack_tiered(W, block=(16, 12)), ValueError, r"columns a multiple of 8, got \(16, 12\)"),
        (lambda: sk.pack_tiered(W, block=(4, 16)), ValueError, r"sides of 8 to 128 .* got \(4, 16\)"),
        (lambda: sk.pack_tiered(W, block=(16, 136)), ValueError, r"sides of 8 to 128 .* got \(16, 136\)"),
        (
            lambda: P._replace(shape=(33, 32)).to_dense(),
            ValueError,
            r"tiers must have shape \(3, 2\) .* 33 x 32 .* got",
        ),
        (lambda: P._replace(shape=(24,)).to_dense(), ValueError, r"shape must be rows and columns, got \(24,\)"),
        (lambda: P._replace(shape=(-24, 32)).to_dense(), ValueError, r"tiers must have shape .* of -24 x 32"),
        (lambda: P._replace(dense=W).to_dense(), ValueError, r"dense must have 3 dimensions"),
        (lambda: P._replace(topk=P.topk.half()).to_dense(), TypeError, r"topk must be torch\.float32"),
        (
            lambda: P._replace(values=P.dense).to_dense(),
            ValueError,
            r"values must have shape \(1, 16, 8",
        ),
        (lambda: P._replace(bitmask=None).to_dense(), TypeError, r"bitmask must be a tensor, got None"),
        (
            lambda: P._replace(positions=P.positions.short()).to_dense(),
            TypeError,
            r"positions must be torch\.uint8, got torch\.int16",
        ),
        (lambda: P._replace(tiers=P.tiers[:1]).to_dense(), ValueError, r"tiers must be a map of the 4"),
        (
            lambda: P._replace(starts=P.starts[1:]).to_dense(),
            ValueError,
            r"starts must have shape \(3, 3",
        ),
        (lambda: sk.TieredWeight.from_parts(None, *P[1:6], P.shape), TypeError, r"tiers must be a matrix, got None"),
        (
            lambda: sk.TieredWeight.from_parts(P.tiers.to(torch.uint16), *P[1:6], P.shape),
            TypeError,
            r"tiers must be torch\.uint8",
        ),
        (
            lambda: sk.TieredWeight.from_parts(P.tiers * 2, *P[1:6], P.shape),
            ValueError,
            r"tiers must be 0, 1 or 2, got 4",
        ),
        (
            lambda: sk.TieredWeight.from_parts(P.tiers * 0, *P[1:6], P.shape),
            ValueError,
            r"tiers names \[4, 0, 0\] blocks that are dense, 2:4 and top-k, but \[1, 2, 1\] are stored",
        ),
    ],
)
def test_rejects(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_from_parts_rejects_positions_outside_a_block():
    packed = sk.pack_tiered(torch.zeros(8, 8), k=1, block=(8, 8))
    with pytest.raises(ValueError, match=r"positions must be below 64, got 64 to 64"):
        sk.TieredWeight.from_parts(*packed[:5], packed.positions + 64, packed.shape)
