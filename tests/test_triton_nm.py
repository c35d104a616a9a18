import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_same, dtype_id, hostile, pattern_id, poison, shape_id, ties

from sparsekit.ops.nm import nm_mask_bits_reference, nm_prune_reference

pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),  # NumPy, interpreting
]
kernels = pytest.importorskip("sparsekit.triton_kernels.nm")
fast = pytest.importorskip("sparsekit.triton_kernels._nm24")

PATTERNS = [(2, 4), (1, 4), (3, 4), (1, 1), (1, 2), (4, 8), (16, 32), (2, 5), (3, 3), (5, 13)]
SHAPES = [(0,), (3,), (37,), (3, 0), (0, 8), (1, 1), (2, 3, 12), (7, 64), (5, 259), (3, 1032)]


def check(base, gpu, n, m, scale=None, layout=torch.Tensor.contiguous):
    """Every launcher against the reference, on a weight that the layout made of ``base``."""
    pruned, mask = nm_prune_reference(base, n, m, scale)
    on_gpu = None if scale is None else scale.to(gpu)
    weight = layout(base.to(gpu))
    poison(mask, pruned)
    got, its_mask = kernels.nm_prune(weight, n, m, on_gpu)
    assert_same(got.cpu(), pruned)
    assert_same(its_mask.cpu(), mask)
    if scale is None:
        assert_same(kernels.nm_mask(weight, n, m).cpu(), mask)
        assert_same(kernels.nm_mask_bits(weight, n, m).cpu(), nm_mask_bits_reference(base, n, m))
    assert_same(kernels.nm_prune_(weight, n, m, on_gpu).cpu(), mask)
    assert_same(weight.cpu().contiguous(), pruned)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_literal(gpu, dtype):
    weight = torch.tensor([[1, -4, 3, 2, 5, 5, 5, 5], [8, 7, 6, 9, 0, -0.0, 1, 2]], dtype=dtype, device=gpu)
    scale = torch.tensor([10, 1, 1, 0.25, 1, 1, 2, 3], device=gpu)
    assert kernels.nm_mask(weight, 2, 4).int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0], [1, 0, 0, 1, 0, 0, 1, 1]]
    assert kernels.nm_mask_bits(weight, 2, 4).tolist() == [[0b00110110], [0b11001001]]
    pruned, mask = kernels.nm_prune(weight, 2, 4, scale)
    assert mask.int().tolist() == [[1, 1, 0, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0, 1, 1]]
    assert pruned.tolist() == [[1, -4, 0, 0, 0, 0, 5, 5], [8, 7, 0, 0, 0, 0, 1, 2]]


# float16 takes the ways of bfloat16, with other constants: a shape for each way.
@pytest.mark.parametrize(
    "shape, dtype",
    [(shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)]
    + [(shape, torch.float16) for shape in ((7, 64), (5, 259))],
    ids=lambda value: shape_id(value) if isinstance(value, tuple) else dtype_id(value),
)
def test_shapes(gpu, shape, dtype):
    check(hostile(*shape, dtype=dtype), gpu, 2, 4)
    check(hostile(*shape, dtype=dtype), gpu, 2, 4, hostile(shape[-1]))


# 2:4 has kernels of its own by dtype; the kernel of other patterns differs in the load alone.
@pytest.mark.parametrize(
    "dtype, pattern",
    [(torch.float32, pattern) for pattern in PATTERNS]
    + [(dtype, each) for dtype in DTYPES[1:] for each in PATTERNS[:2]],
    ids=lambda value: pattern_id(value) if isinstance(value, tuple) else dtype_id(value),
)
@pytest.mark.parametrize("cols", [64, 75])
def test_patterns(gpu, dtype, pattern, cols):
    check(hostile(5, cols, dtype=dtype), gpu, *pattern)
    check(ties(5, cols, dtype=dtype), gpu, *pattern, hostile(cols))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_kind_of_nan(gpu, dtype):
    # Payloads differ: what ranks NaNs by their bits gets these groups wrong.
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    inf, largest = torch.tensor([torch.inf, torch.finfo(dtype).max], dtype=dtype).view(integer).tolist()
    some = torch.tensor([inf + 1, torch.iinfo(integer).max, inf + 3, inf, largest, 0], dtype=integer)
    groups = some[torch.cartesian_prod(*[torch.arange(6)] * 4)]  # every group of these six
    sign = torch.where(torch.rand(groups.shape) < 0.5, torch.iinfo(integer).min, 0).to(integer)
    for pattern in [(2, 4), (1, 4)]:
        check((groups ^ sign).view(dtype).view(-1, 48), gpu, *pattern)


@pytest.mark.parametrize("pattern", [(2, 3), (4, 8)], ids=pattern_id)
def test_groups_that_straddle_tiles(gpu, pattern):
    for scale in (None, torch.rand(1100)):
        check(ties(3, 1100), gpu, *pattern, scale)


def test_pruned_entries_are_not_read_again(gpu):
    # A group of two tiles, and a zero that would become NaN and win if the second tile saw what the first one pruned.
    weight, scale = torch.ones(3, 1100), torch.ones(1100)
    weight[:, 1024], scale[1023] = torch.nan, torch.inf
    check(weight, gpu, 1, 3, scale)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape, dtype", [((6, 40), torch.float32), ((4, 3, 21), torch.bfloat16)], ids=["6x40-float32", "4x3x21-bfloat16"]
)
def test_any_strides(gpu, layout, shape, dtype):
    for scale in (None, hostile(shape[-1])):
        check(ties(*shape, dtype=dtype), gpu, 2, 4, scale, LAYOUTS[layout])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("offset", [1, 4])
def test_contiguous_but_misaligned(gpu, dtype, offset):
    def window(base):
        return torch.cat([base.new_zeros(offset), base.flatten()])[offset:].view(base.shape)

    for scale in (None, hostile(24)):
        check(hostile(5, 24, dtype=dtype), gpu, 2, 4, scale, window)
    strided = torch.stack([torch.rand(24), torch.full((24,), torch.nan)], 1)[:, 0]
    check(hostile(5, 24, dtype=dtype), gpu, 2, 4, strided)


def test_prune_in_place_leaves_the_neighbors(gpu):
    larger = torch.randn(6, 40, device=gpu)
    before, window = larger.clone(), (slice(1, 4), slice(3, 35))
    kernels.nm_prune_(larger[window], 2, 4, None)
    assert torch.equal(larger[window].cpu(), nm_prune_reference(before[window].cpu(), 2, 4, None)[0])
    larger[window] = before[window]
    assert torch.equal(larger, before)


CONFIGS = [(table, name) for table in (fast.PAIRS, fast.SCALED, kernels.TILES) for name in table.configs]


@pytest.mark.parametrize("table, name", CONFIGS, ids=lambda value: getattr(value, "kernel", value))
def test_every_configuration(gpu, table, name):
    # More than one block along every axis, and blocks that are not full.
    general = table is kernels.TILES
    weight = ties(5, 1032 if general else 2056).to(torch.float32 if general else torch.bfloat16)
    scale = None if table is fast.PAIRS else torch.rand(weight.shape[1])
    with table.force(name):
        check(weight, gpu, 2, 4, scale)
