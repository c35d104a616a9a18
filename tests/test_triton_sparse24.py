import pytest
import torch
from helpers import DTYPES, LAYOUTS, SPECIAL, assert_same, dtype_id, hostile, poison
from helpers import sparse24 as weight24

from sparsekit.ops.sparse24 import pack24_reference, prune_pack24_reference, unpack24_reference

pytest.importorskip("triton")
from sparsekit.triton_kernels import _tiles, sparse24

pytestmark = pytest.mark.triton
NAN = float("nan")
SHAPES = [(1, 8), (5, 13), (3, 4), (1, 1), (9, 71), (17, 255), (33, 264), (2, 520)]


def on(device, *tensors):
    return [None if each is None else each.to(device) for each in tensors]


def assert_packed(actual, expected):
    for got, want in zip(actual, expected, strict=True):
        assert_same(got.cpu(), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_literal(gpu, dtype):
    weight = torch.tensor([[0, 1, 2, 0, 3, 0, 0, 4, 0, 0, 0, 0, 7]], dtype=dtype, device=gpu)
    values, bitmask = sparse24.pack24(weight, None, True)
    assert values.tolist() == [[1, 2, 3, 4, 0, 0, 7]] and bitmask.tolist() == [[0b1001_0110, 0b1_1100]]
    assert torch.equal(sparse24.unpack24(values, bitmask, 13), weight)
    weight = torch.tensor([[1, -4, 2, 3, -1, 1, 1, 0]], dtype=dtype, device=gpu)
    values, bitmask = sparse24.prune_pack24(weight, None)
    assert values.tolist() == [[-4, 3, -1, 1]] and bitmask.tolist() == [[0b0011_1010]]
    scale = torch.tensor([8.0, 0.5, 1, 1, 1, 1, 2, 9], device=gpu)
    values, bitmask = sparse24.prune_pack24(weight, scale)
    assert values.tolist() == [[1, 3, -1, 1]] and bitmask.tolist() == [[0b0101_1001]]


@pytest.mark.parametrize(
    "rows, cols, dtype",
    [(*shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)]
    + [(*shape, torch.float16) for shape in ((5, 13), (33, 264))],
    ids=dtype_id,
)
def test_equals_reference(gpu, rows, cols, dtype):
    pruned, mask = weight24_with_gaps(rows, cols, dtype)
    expected = pack24_reference(pruned, None, True)
    poison(*expected, *expected)
    assert_packed(sparse24.pack24(*on(gpu, pruned, None), True), expected)
    dirty = hostile(rows, cols, dtype=dtype)
    mask[:, cols // 4 * 4 :] = False  # a tail is kept all the same
    assert_packed(sparse24.pack24(*on(gpu, dirty, mask), True), pack24_reference(dirty, mask, True))
    for scale in (None, torch.rand(cols) + 0.5):
        expected = prune_pack24_reference(dirty, scale)
        assert_packed(sparse24.prune_pack24(*on(gpu, dirty, scale)), expected)
    poison(dirty, dirty)
    assert_same(sparse24.unpack24(*on(gpu, *expected), cols).cpu(), unpack24_reference(*expected, cols))


def weight24_with_gaps(rows, cols, dtype):
    """A 2:4 weight of which some groups have fewer than two non-zeros."""
    pruned, mask = weight24(rows, cols, dtype)
    pruned[torch.rand(pruned.shape) < 0.3] = 0
    return pruned, mask


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_every_group_of_special_values(gpu, dtype, scaled):
    count = len(SPECIAL)
    groups = torch.cartesian_prod(*[torch.arange(count)] * 4)
    weight = torch.tensor(SPECIAL, dtype=dtype)[groups].view(125, 320)
    scale = torch.ones(320) if scaled else None
    assert_packed(sparse24.prune_pack24(*on(gpu, weight, scale)), prune_pack24_reference(weight, scale))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype, cols", [(torch.float32, 70), (torch.bfloat16, 72)], ids=["float32", "bfloat16"])
def test_any_strides(gpu, layout, dtype, cols):
    pruned, mask = weight24(7, cols, dtype)
    expected = pack24_reference(pruned, mask, True)
    weight, kept = LAYOUTS[layout](pruned.to(gpu)), LAYOUTS[layout](mask.to(gpu))
    scale = LAYOUTS[layout](torch.ones(cols, device=gpu))
    for packed in (
        sparse24.pack24(weight, None, True),
        sparse24.pack24(weight, kept, True),
        sparse24.prune_pack24(weight, None),
        sparse24.prune_pack24(weight, scale),
    ):
        assert_packed(packed, expected)
    strided = [LAYOUTS[layout](each) for each in on(gpu, *expected)]
    assert_same(sparse24.unpack24(*strided, cols).cpu(), pruned)


@pytest.mark.parametrize("config", sparse24.PACK.configs)
@pytest.mark.parametrize("cols", [264, 261])
def test_every_configuration(gpu, config, cols):
    weight = hostile(33, cols, dtype=torch.float16)
    expected = prune_pack24_reference(weight, None)
    with sparse24.PACK.force(config):
        assert_packed(sparse24.prune_pack24(weight.to(gpu), None), expected)
        assert_same(sparse24.unpack24(*on(gpu, *expected), cols).cpu(), unpack24_reference(*expected, cols))


def test_rows_beyond_the_second_axis_of_a_grid(gpu, monkeypatch):
    config = sparse24.PACK.configs["4x256"]
    assert _tiles.tiles(4 * 65535, 257, config) == (2, 65535, 1)
    assert _tiles.tiles(4 * 65535 + 1, 256, config) == (1, 32768, 2)
    monkeypatch.setattr(_tiles, "MOST_PROGRAMS", 2)
    weight = hostile(18, 8, dtype=torch.float16)
    with sparse24.PACK.force("4x256"):
        assert_packed(sparse24.prune_pack24(weight.to(gpu), None), prune_pack24_reference(weight, None))


@pytest.mark.parametrize("rows, cols", [(0, 8), (4, 0), (0, 0)])
def test_empty(gpu, rows, cols):
    weight = torch.empty(rows, cols, device=gpu)
    for values, bitmask in (sparse24.pack24(weight, None, True), sparse24.prune_pack24(weight, None)):
        assert values.shape == (rows, cols // 2) and bitmask.shape == (rows, cols // 8)
        assert sparse24.unpack24(values, bitmask, cols).shape == (rows, cols)


@pytest.mark.parametrize("row, group", [(0, 0), (2, 16), (18, 64)])
def test_check_names_the_first_bad_group(gpu, row, group):
    weight, mask = weight24(19, 261)
    weight[row, 4 * group : 4 * group + 4] = torch.tensor([1, NAN, 0, 1])
    weight[18, 256:260] = 1
    weight[row:, 260] = 1  # a tail may have anything
    count = 4 if row == 18 else 3
    where = f"pack24: row {row}, columns {4 * group} to {4 * group + 3} have"
    with pytest.raises(ValueError, match=rf"{where} {count} non-zeros; 2:4 needs at most 2"):
        sparse24.pack24(weight.to(gpu), None, True)
    mask[row, 4 * group : 4 * group + 4] = torch.tensor([True, False, False, False])
    with pytest.raises(ValueError, match=rf"{where} 1 set mask entries; 2:4 needs exactly 2"):
        sparse24.pack24(*on(gpu, weight, mask), True)


def test_unchecked_never_raises(gpu):
    weight = torch.ones(3, 13, device=gpu)
    values, bitmask = sparse24.pack24(weight, None, False)
    assert values.eq(1).all() and bitmask.tolist() == [[0b0011_0011, 0b1_0011]] * 3  # as torch.sparse: the first two
