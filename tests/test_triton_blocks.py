"""The Triton kernels of blocks, on the GPU or in Triton's interpreter."""

import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_same, assert_same_sums, dtype_id, hostile, poison, shape_id, ties

from sparsekit.ops.blocks import block_scores_reference, block_topk_mask_reference

blocks = pytest.importorskip("sparsekit.triton_kernels.blocks")
large_blocks = pytest.importorskip("sparsekit.triton_kernels._large_blocks")

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),  # the interpreter adds with numpy
]
NAN, BIG = float("nan"), 2.0**24  # BIG + 1 rounds to BIG
# Rows of slices, several slices of a row, several rows of a slice; sides that are no powers of two; edges.
TILINGS = [
    ((16, 64), (16, 16)),
    ((17, 38), (16, 16)),
    ((2, 130), (1, 64)),
    ((3, 70), (2, 40)),
    ((70, 20), (64, 8)),
    ((4, 23), (3, 5)),
    ((17, 3), (16, 1)),
    ((2, 3), (1, 1)),
]


def tiling_id(value):
    return shape_id(value) if isinstance(value, tuple) else dtype_id(value)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_scores_literal(gpu, dtype):
    weight = torch.tensor([[1, -2, 3, 4, 1], [5, 6, -7, 8, 1], [1, 1, 1, 1, -1]], dtype=dtype, device=gpu)
    assert blocks.block_scores(weight, 2, 2, None, None).tolist() == [[14, 22, 2], [2, 2, 1]]
    scale = torch.tensor([1, 0, 0.5, 2, 3], device=gpu)
    assert blocks.block_scores(weight, 2, 2, scale, None).tolist() == [[6, 29, 6], [1, 2.5, 3]]
    assert blocks.block_scores(weight, 2, 2, None, weight > 1).tolist() == [[11, 15, 0], [0, 0, 0]]


def test_sums_keep_their_order(gpu):
    def score(rows):
        weight = torch.tensor(rows, device=gpu)
        return blocks.block_scores(weight, *weight.shape, None, None).item()

    assert score([[1.0], [1.0], [BIG]]) == BIG + 2
    assert score([[BIG], [1.0], [1.0]]) == BIG
    assert score([[BIG, 1.0, 0.0, 1.0]]) == BIG + 2
    assert score([[1.0, BIG, 1.0]]) == BIG + 2


# The bytes of an entry decide the tiles, and float16 has those of bfloat16.
tilings = pytest.mark.parametrize(
    "shape, block, dtype",
    [(*tiling, dtype) for tiling in TILINGS for dtype in (torch.float32, torch.bfloat16)]
    + [(*tiling, torch.float16) for tiling in TILINGS[1::3]],
    ids=tiling_id,
)


@tilings
def test_scores_equal_reference(gpu, shape, block, dtype):
    weight, scale, mask = hostile(*shape, dtype=dtype), torch.randn(shape[1]), torch.rand(shape) < 0.5
    for given_scale, given_mask in ((None, None), (scale, None), (None, mask), (scale, mask)):
        expected = block_scores_reference(weight, *block, given_scale, given_mask)
        poison(expected)
        on_gpu = [tensor if tensor is None else tensor.to(gpu) for tensor in (given_scale, given_mask)]
        assert_same_sums(blocks.block_scores(weight.to(gpu), *block, *on_gpu), expected)


@tilings
def test_topk_equals_reference(gpu, shape, block, dtype):
    size = block[0] * block[1]
    for score, k in ((hostile(*shape, dtype=dtype), max(1, size // 25)), (ties(*shape, dtype=dtype), size // 2)):
        expected = block_topk_mask_reference(score, k, *block)
        poison(expected)
        assert_same(blocks.block_topk_mask(score.to(gpu), k, *block).cpu(), expected)


@pytest.mark.parametrize("k", [0, 1, 5, 40, 63, 64])
def test_every_k(gpu, k):
    score = ties(10, 20, dtype=torch.float16)  # blocks at the edges have 16, 40 or 8 entries
    assert_same(blocks.block_topk_mask(score.to(gpu), k, 8, 8).cpu(), block_topk_mask_reference(score, k, 8, 8))


def test_topk_literal(gpu):
    score = torch.tensor([[0.0, -0.0, NAN, float("inf")], [1, -3, 3, 2], [-2, 2, 2, 2]], device=gpu)
    kept = blocks.block_topk_mask(score, 2, 1, 4).tolist()
    assert kept == [[False, False, True, True], [False, True, True, False], [True, True, False, False]]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_all_nans_are_equal(gpu, dtype):
    bits = 0x7FC0 + torch.arange(-32, 32).view(1, 64)  # NaNs of many payloads in 16 bits, the larger ones later
    score = bits.to(torch.int16).view(torch.float16 if dtype == torch.float16 else torch.bfloat16).to(dtype)
    kept = blocks.block_topk_mask(score.to(gpu), 10, 1, 64).cpu()
    assert_same(kept, block_topk_mask_reference(score, 10, 1, 64))
    assert kept[0].tolist() == [True] * 10 + [False] * 54


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(gpu, layout):
    base, keep = ties(20, 36, dtype=torch.float16), torch.rand(20, 36) < 0.5
    weight, mask = LAYOUTS[layout](base.to(gpu)), LAYOUTS[layout](keep.to(gpu))
    assert_same_sums(blocks.block_scores(weight, 16, 16, None, mask), block_scores_reference(base, 16, 16, None, keep))
    assert_same(blocks.block_topk_mask(weight, 10, 16, 16).cpu(), block_topk_mask_reference(base, 10, 16, 16))


@pytest.mark.parametrize("config", blocks.TOPK.configs)
def test_every_configuration(gpu, config):
    score = torch.randn(16, 528).bfloat16()
    with blocks.TOPK.force(config), blocks.SCORES.force(config):
        assert_same(
            blocks.block_topk_mask(score.to(gpu), 10, 16, 16).cpu(), block_topk_mask_reference(score, 10, 16, 16)
        )
        assert_same_sums(
            blocks.block_scores(score.to(gpu), 16, 16, None, None), block_scores_reference(score, 16, 16, None, None)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_rows_as_wide_as_layers(gpu, dtype):
    score = ties(2, 14336, dtype=dtype)
    assert_same(
        blocks.block_topk_mask(score.to(gpu), 5000, 1, 14336).cpu(), block_topk_mask_reference(score, 5000, 1, 14336)
    )
    score = torch.cat([score, hostile(2, 4000, dtype=dtype)], 1)  # beyond the registers of sums
    assert_same_sums(
        blocks.block_scores(score.to(gpu), 2, 17000, None, None), block_scores_reference(score, 2, 17000, None, None)
    )


def test_blocks_larger_than_the_registers(gpu):
    score = ties(1, 70000, dtype=torch.bfloat16)
    assert blocks.plan_strips(score, 1, 70000, 2, 2, {"num_warps": 1}) is None
    assert_same(blocks.block_topk_mask(score.to(gpu), 9, 1, 70000).cpu(), block_topk_mask_reference(score, 9, 1, 70000))


@pytest.mark.parametrize(
    "k, dtype", [(0, torch.float16), (3, torch.bfloat16), (3, torch.float32), (15, torch.bfloat16)], ids=dtype_id
)
def test_large_blocks_equal_the_reference(gpu, k, dtype):
    for score, block in ((hostile(4, 11, dtype=dtype), (3, 5)), (ties(6, 11, dtype=dtype).t(), (5, 3))):
        mask = torch.empty(score.shape, dtype=torch.bool, device=gpu)
        large_blocks.large_block_topk_mask(score.to(gpu), mask, k, *block)
        assert_same(mask.cpu(), block_topk_mask_reference(score, k, *block))


@pytest.mark.parametrize("shape", [(0, 16), (16, 0)], ids=tiling_id)
def test_empty(gpu, shape):
    weight = torch.empty(shape, device=gpu)
    assert blocks.block_scores(weight, 16, 16, None, None).shape == (shape[0] // 16, shape[1] // 16)
    assert blocks.block_topk_mask(weight, 10, 16, 16).shape == shape
