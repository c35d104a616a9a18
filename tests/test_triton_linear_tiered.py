import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_product, assert_same, dtype_id
from triton_linear import KERNELS, NAN, random, record_grids

from sparsekit.ops.linear_tiered import linear_tiered_reference
from sparsekit.ops.tiered import pack_tiered
from sparsekit.ops.tiers import DENSE, SPARSE24, TOPK, tier_prune_reference

pytestmark = pytest.mark.triton
pytest.importorskip("triton")
from sparsekit.triton_kernels import _tiered_unpack  # noqa: E402
from sparsekit.triton_kernels import linear_tiered as tiered  # noqa: E402
from sparsekit.triton_kernels._tiered_columns import Packed  # noqa: E402
from sparsekit.triton_kernels._tiered_unpack import unpack_tiered  # noqa: E402
from sparsekit.triton_kernels.linear_tiered import TABLE, linear_tiered  # noqa: E402

FAST = "16"  # the configuration with the fewest steps to interpret


def packed(gpu, rows, cols, dtype, block=(16, 16), k=10, tiers=None):
    """A weight whose blocks are pruned to random tiers, and its packed form."""
    shape = -(-rows // block[0]), -(-cols // block[1])
    tiers = torch.randint(3, shape, dtype=torch.uint8) if tiers is None else torch.full(shape, tiers, dtype=torch.uint8)
    weight = tier_prune_reference(torch.randn(rows, cols).to(dtype), tiers, k, *block, None, None)[0]
    return weight.to(gpu), on(gpu, pack_tiered(weight, k=k, block=block))


def on(gpu, parts):
    return parts.to(gpu)


def assert_linear(x, weight, parts, bias):
    with TABLE.force(FAST):
        assert_product(linear_tiered(x, *parts.tensors, bias, len(weight)), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_literal(gpu, dtype):
    weight = torch.zeros(10, 24, dtype=dtype)
    weight[0, :8] = torch.arange(1, 9)
    weight[0, 8:16] = torch.tensor([1, 0, 0, 2, 0, 0, 3, 0])
    weight[3, 21] = 7
    weight[9, 0] = 5
    parts = on(gpu, pack_tiered(weight, k=1, block=(8, 8)))
    assert parts.tiers.tolist() == [[DENSE, SPARSE24, TOPK], [TOPK] * 3]
    x = torch.zeros(2, 24, dtype=dtype, device=gpu)
    x[0], x[1, 21] = 1, 2
    bias = torch.arange(10, dtype=dtype, device=gpu)
    with TABLE.force(FAST):
        assert linear_tiered(x, *parts.tensors, None, 10).tolist() == [
            [42, 0, 0, 7, 0, 0, 0, 0, 0, 5],
            [0, 0, 0, 14, 0, 0, 0, 0, 0, 0],
        ]
        assert linear_tiered(x[0], *parts.tensors, bias, 10).tolist() == [42, 1, 2, 10, 4, 5, 6, 7, 8, 14]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("block", [(8, 8), (16, 16)], ids=str)
def test_column_by_column(gpu, dtype, block):
    weight, parts = packed(gpu, 24, 48, dtype, block, k=5)
    with TABLE.force(FAST):
        actual = linear_tiered(torch.eye(48, dtype=dtype, device=gpu)[:30], *parts.tensors, None, 24)
    assert actual.tolist() == weight.t()[:30].tolist()


@pytest.mark.parametrize(
    "dtype, tokens",
    [(torch.bfloat16, tokens) for tokens in (0, 1, 5, 16, 17, 32, 33)]
    + [(torch.float16, tokens) for tokens in (1, 9)]
    + [(torch.float32, tokens) for tokens in (0, 1, 3, 17, 33)],
    ids=dtype_id,
)
def test_tokens(gpu, dtype, tokens):
    weight, parts = packed(gpu, 20, 70, dtype)
    assert_linear(random(gpu, tokens, 70, dtype=dtype), weight, parts, random(gpu, 20, dtype=dtype))


SHAPES = [
    (1, 1, 1, (8, 8), 1),
    (2, 20, 37, (8, 24), 3),
    (17, 70, 100, (32, 40), 7),
    (2, 33, 256, (16, 16), 13),
    (2, 24, 64, (24, 16), 12),
    (2, 150, 300, (128, 128), 100),
]


@pytest.mark.parametrize(
    "tokens, rows, cols, block, k, dtype",
    [(*shape, torch.bfloat16) for shape in SHAPES] + [(*shape, torch.float32) for shape in SHAPES[:3]],
    ids=dtype_id,
)
def test_shapes(gpu, tokens, rows, cols, block, k, dtype):
    weight, parts = packed(gpu, rows, cols, dtype, block, k)
    assert_linear(random(gpu, tokens, cols, dtype=dtype), weight, parts, None)


@pytest.mark.parametrize("dtype", KERNELS, ids=dtype_id)
@pytest.mark.parametrize("tier", [DENSE, SPARSE24, TOPK])
def test_one_form_alone(gpu, dtype, tier):
    weight, parts = packed(gpu, 20, 40, dtype, tiers=tier)
    assert [len(parts.dense) > 0, len(parts.values) > 0, len(parts.topk) > 0] == [each == tier for each in range(3)]
    assert_linear(random(gpu, 3, 40, dtype=dtype), weight, parts, random(gpu, 20, dtype=dtype))


@pytest.mark.parametrize("dtype", KERNELS, ids=dtype_id)
def test_blocks_that_keep_nothing(gpu, dtype):
    weight, parts = packed(gpu, 20, 40, dtype, k=0)
    assert 0 < len(parts.topk) and parts.topk.numel() == 0
    assert_linear(random(gpu, 3, 40, dtype=dtype), weight, parts, None)


@pytest.mark.parametrize("name", TABLE.configs)
def test_every_configuration(gpu, name, monkeypatch):
    weight, parts = packed(gpu, 17, 600, torch.bfloat16)
    monkeypatch.setattr(TABLE, "force", lambda fast, force=TABLE.force: force(name))
    assert_linear(random(gpu, 2, 600, dtype=torch.bfloat16), weight, parts, random(gpu, 17, dtype=torch.bfloat16))


@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (2, 3), (1, 2, 3)], ids=str)
def test_leading_dimensions(gpu, leading):
    weight, parts = packed(gpu, 9, 20, torch.bfloat16)
    assert_linear(random(gpu, *leading, 20, dtype=torch.bfloat16), weight, parts, None)


@pytest.mark.parametrize("dtype", KERNELS, ids=dtype_id)
@pytest.mark.parametrize("rows, cols", [(0, 8), (5, 0), (0, 0)])
def test_without_rows_or_columns(gpu, dtype, rows, cols):
    _, parts = packed(gpu, rows, cols, dtype)
    x, bias = random(gpu, 3, cols, dtype=dtype), random(gpu, rows, dtype=dtype)
    assert_same(linear_tiered(x, *parts.tensors, bias, rows), bias.expand(3, rows).contiguous())
    assert_same(linear_tiered(x, *parts.tensors, None, rows), torch.zeros(3, rows, dtype=dtype, device=gpu))
    assert unpack_tiered(Packed(*parts.tensors), rows, cols).shape == (rows, cols)


@pytest.mark.parametrize("dtype, cols", [(torch.bfloat16, 70), (torch.bfloat16, 53), (torch.float32, 70)], ids=dtype_id)
def test_any_strides(gpu, dtype, cols):
    _, parts = packed(gpu, 20, cols, dtype)
    x, bias = random(gpu, 3, cols, dtype=dtype), random(gpu, 20, dtype=dtype)
    with TABLE.force(FAST):
        expected = linear_tiered(x, *parts.tensors, bias, 20)
        for layout in ("transposed", "sliced", "strided"):
            assert_same(linear_tiered(LAYOUTS[layout](x), *parts.tensors, bias, 20), expected)
        views = [LAYOUTS["sliced"](part) for part in parts.tensors]
        assert_same(linear_tiered(x, *views, torch.stack([bias, bias], 1)[:, 0], 20), expected)


@pytest.mark.parametrize("dtype", KERNELS, ids=dtype_id)
def test_does_not_swallow_nan(gpu, dtype):
    weight, parts = packed(gpu, 24, 75, dtype)
    x = random(gpu, 4, 75, dtype=dtype)
    cols = (0, 70, 73)
    for token, col in enumerate(cols):
        x[token, col] = NAN
    with TABLE.force(FAST):
        hit = torch.isnan(linear_tiered(x, *parts.tensors, None, 24))
    for token, col in enumerate(cols):
        assert hit[token][weight[:, col] != 0].all()
    assert not hit[len(cols) :].any()


def test_fp32_is_not_rounded_to_tf32(gpu):
    for k in (0, 2):  # as 2:4, and as top-k
        weight = torch.zeros(8, 8)
        weight[0, :2] = torch.tensor([1.0, 2**-20])
        parts = on(gpu, pack_tiered(weight, k=k, block=(8, 8)))
        x = torch.tensor([[1 + 2**-20, 1, 0, 0, 0, 0, 0, 0]], device=gpu)
        assert linear_tiered(x, *parts.tensors, None, 8)[0, 0].item() == 1 + 2**-19


def test_splits_add_up_in_order(gpu, monkeypatch):
    """Two splits of the units on a pretended GPU, each launch of which is counted."""
    weight, parts = packed(gpu, 5, 900, torch.bfloat16)
    x, bias = random(gpu, 2, 900, dtype=torch.bfloat16), random(gpu, 5, dtype=torch.bfloat16)
    monkeypatch.setattr(tiered, "processors", lambda tensor: 1)
    grids = record_grids(monkeypatch, tiered, "_linear_tiered_kernel")
    monkeypatch.setattr(TABLE, "force", lambda fast, force=TABLE.force: force("8_split"))
    assert_linear(x, weight, parts, bias)
    assert grids == [(1, 2)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter runs one program after another")
@pytest.mark.parametrize("name", TABLE.configs)
def test_the_same_bits_every_time(gpu, name):
    _, parts = packed(gpu, 1030, 1030, torch.bfloat16)
    x = random(gpu, 2, 1030, dtype=torch.bfloat16)
    with TABLE.force(name):
        first = linear_tiered(x, *parts.tensors, None, 1030)
        for _ in range(20):
            assert_same(linear_tiered(x, *parts.tensors, None, 1030), first)


def test_matches_the_reference_where_sums_are_exact(gpu):
    for dtype in (torch.float16, torch.bfloat16):
        weight, _ = packed(gpu, 24, 136, dtype)
        parts = pack_tiered(weight.cpu().sign())
        x, bias = torch.randint(-3, 4, (10, 136)).to(dtype), torch.randint(-3, 4, (24,)).to(dtype)
        with TABLE.force(FAST):
            actual = linear_tiered(x.to(gpu), *on(gpu, parts).tensors, bias.to(gpu), 24)
        assert_same(actual.cpu(), linear_tiered_reference(x, *parts.tensors, bias, 24))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "rows, cols, block, k",
    [(33, 70, (16, 16), 10), (20, 37, (8, 8), 3), (64, 130, (32, 24), 70), (16, 16, (16, 16), 0)],
    ids=str,
)
def test_unpacks_what_was_packed(gpu, dtype, rows, cols, block, k):
    weight, parts = packed(gpu, rows, cols, dtype, block, k)
    assert_same(unpack_tiered(Packed(*parts.tensors), rows, cols), torch.where(weight != 0, weight, 0))


def test_padding_of_topk_leaves_position_0_alone(gpu):
    weight = torch.zeros(16, 16, device=gpu)
    weight[0, 0] = 3
    parts = pack_tiered(weight)
    assert parts.topk.tolist() == [[3] + [0] * 9]
    assert_same(unpack_tiered(Packed(*parts.tensors), 16, 16), weight)


def test_rows_of_more_blocks_than_one_scan(gpu, monkeypatch):
    monkeypatch.setattr(_tiered_unpack, "scan_size", lambda across: 16)
    weight, parts = packed(gpu, 16, 300, torch.bfloat16, block=(8, 8))
    assert_same(unpack_tiered(Packed(*parts.tensors), 16, 300), torch.where(weight != 0, weight, 0))


def test_many_tokens_are_left_to_cublas(gpu, monkeypatch):
    unpacked = []
    monkeypatch.setattr(
        tiered, "unpack_tiered", lambda *operands: unpacked.append(operands[-2:]) or unpack_tiered(*operands)
    )
    for block, most in (((16, 16), 32), ((32, 32), 64)):
        weight, parts = packed(gpu, 20, 40, torch.bfloat16, block)
        for tokens in (most, most + 1):
            unpacked.clear()
            assert_linear(random(gpu, tokens, 40, dtype=torch.bfloat16), weight, parts, None)
            assert unpacked == [(20, 40)] * (tokens > most)


@pytest.mark.parametrize("tokens", [1, 8, 16, 33])
def test_every_shape_class_has_a_configuration(tokens):
    for down, size in ((256, "many"), (48, "few")):
        shape_class = tiered._shape_class(tokens, down, 16, 132)
        assert shape_class.endswith(size) and TABLE.name("", shape_class) in TABLE.configs
