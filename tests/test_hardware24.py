import pytest
import torch
from helpers import LAYOUTS as STRIDES
from helpers import assert_same, dtype_id, hostile, sparse24
from torch.sparse import _semi_structured_conversions as conversions

import sparsekit as sk
from sparsekit.ops import from_hardware24, hardware_multiple, prune_both_to_hardware24, to_hardware24
from sparsekit.ops.hardware24 import MULTIPLES, _nibble_index

OPS = torch.ops.sparsekit
HALF = (torch.float16, torch.bfloat16)
NIBBLES = {0b0011: 0x4, 0b0101: 0x8, 0b0110: 0x9, 0b1001: 0xC, 0b1010: 0xD, 0b1100: 0xE}  # mask bits: code
CPU = torch.device("cpu")


def metadata(packed, rows, cols):
    """The nibbles of the metadata, the low one of a byte first."""
    meta = packed[rows * cols // 2 :].view(torch.uint8)
    return torch.stack([meta & 15, meta >> 4], 1).flatten()


def alone(rows, cols, row, group, kept):
    """A packed weight whose groups all keep their first two entries, but for one."""
    values = torch.zeros(rows, cols // 2, dtype=torch.float16)
    bits = torch.full((rows, cols // 4), 0b0011, dtype=torch.uint8)
    bits[row, group] = kept
    return values, bits[:, ::2] | bits[:, 1::2] << 4


@pytest.mark.parametrize(
    "layout, rows, cols, row, col, nibble",
    [
        # 32 rows by 32 columns are 64 words of four nibbles. Row 1 is dealt to lane 4, row 8 to lane 1, row 9 to 5.
        ("cutlass_sm80", 64, 128, 0, 0, 0),
        ("cutlass_sm80", 64, 128, 0, 12, 3),
        ("cutlass_sm80", 64, 128, 1, 0, 4 * (4 * 2)),
        ("cutlass_sm80", 64, 128, 8, 0, 4 * 1),  # lane 1 is odd and its word is even: to row 0, word 1
        ("cutlass_sm80", 64, 128, 0, 16, 4 * 2),  # and the other way round: to row 1, word 0
        ("cutlass_sm80", 64, 128, 9, 20, 4 * (5 * 2 + 1) + 1),
        ("cutlass_sm80", 64, 128, 32, 0, 4 * (32 * 2)),
        ("cutlass_sm80", 64, 128, 0, 32, 4 * (2 * 64)),  # the next two words of all rows
        # 128 rows by 64 columns are 512 words: four 32 x 32 above each other, then the four to their right.
        ("cusparselt_sm80", 256, 256, 9, 20, 4 * (5 * 2 + 1) + 1),
        ("cusparselt_sm80", 256, 256, 32, 0, 4 * 64),
        ("cusparselt_sm80", 256, 256, 0, 32, 4 * 256),
        ("cusparselt_sm80", 256, 256, 128, 0, 4 * 512),
        ("cusparselt_sm80", 256, 256, 0, 64, 4 * 512 * 2),
        # 64 rows by 32 columns are 256 bytes: 16 rows are 64 of them, row r 8, shared with row r + 8.
        ("cusparselt_sm90", 128, 64, 0, 0, 0),
        ("cusparselt_sm90", 128, 64, 8, 0, 1),
        ("cusparselt_sm90", 128, 64, 0, 4, 2 * 2),
        ("cusparselt_sm90", 128, 64, 0, 16, 2 * 1),
        ("cusparselt_sm90", 128, 64, 1, 0, 2 * 8),
        ("cusparselt_sm90", 128, 64, 25, 28, 2 * (64 + 8 + 6 + 1) + 1),
        ("cusparselt_sm90", 128, 64, 0, 32, 2 * 256),
        ("cusparselt_sm90", 128, 64, 64, 0, 2 * 512),
    ],
)
def test_where_a_group_is_stored(layout, rows, cols, row, col, nibble):
    found = metadata(
        to_hardware24(sk.Packed24(*alone(rows, cols, row, col // 4, 0b1100), (rows, cols)), layout), rows, cols
    )
    assert found[nibble] == 0xE
    found[nibble] = 0x4
    assert found.eq(0x4).all()


@pytest.mark.parametrize("layout", MULTIPLES)
@pytest.mark.parametrize("bits", NIBBLES, ids=lambda bits: f"{bits:04b}")
def test_nibble_of_every_pair(layout, bits):
    rows, cols = hardware_multiple(layout)
    values, bitmask = torch.ones(rows, cols // 2).half(), torch.full((rows, cols // 8), bits * 17, dtype=torch.uint8)
    packed = to_hardware24(sk.Packed24(values, bitmask, (rows, cols)), layout)
    assert metadata(packed, rows, cols).eq(NIBBLES[bits]).all()
    assert torch.equal(from_hardware24(packed, (rows, cols), layout)[1], bitmask)


def shapes(layout):
    rows, cols = hardware_multiple(layout)
    return [(rows, cols), (3 * rows, cols), (rows, 3 * cols), (2 * rows, 4 * cols)]


SHAPES = [(layout, *shape) for layout in MULTIPLES for shape in shapes(layout)]


@pytest.mark.parametrize("layout, rows, cols", SHAPES)
def test_every_nibble_is_used_once(layout, rows, cols):
    index = _nibble_index(rows, cols, layout, CPU)
    assert torch.equal(index.flatten().sort().values, torch.arange(rows * cols // 4))


@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
@pytest.mark.parametrize("layout, rows, cols", SHAPES)
def test_round_trip(layout, rows, cols, dtype):
    values, bitmask, _ = sk.prune_pack24(hostile(rows, cols, dtype=dtype))
    packed = to_hardware24(sk.Packed24(values, bitmask, (rows, cols)), layout)
    assert packed.shape == (rows * cols // 16 * 9,) and packed.dtype == dtype
    assert_same(packed[: rows * cols // 2].view(rows, cols // 2), values)
    for got, expected in zip(from_hardware24(packed, (rows, cols), layout)[:2], (values, bitmask), strict=True):
        assert_same(got, expected)


@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
@pytest.mark.parametrize("rows, cols", [(32, 64), (64, 192), (160, 64), (128, 256)])
def test_cutlass_is_what_torch_makes(rows, cols, dtype):
    weight, _ = sparse24(rows, cols, dtype)
    weight[torch.rand(weight.shape) < 0.4] = 0  # groups with fewer than two non-zeros
    values, meta = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    packed = to_hardware24(sk.pack24(weight), "cutlass_sm80")
    assert_same(packed[: rows * cols // 2].view(rows, cols // 2), values)
    assert_same(packed[rows * cols // 2 :].view(torch.int16), meta.flatten())
    scatter = conversions._calculate_meta_reordering_scatter_offsets(rows, cols // 16, torch.int16, CPU)
    index = _nibble_index(rows, cols, "cutlass_sm80", CPU)
    assert torch.equal(index[:, ::4].flatten(), 4 * scatter)


def test_the_layouts_differ():
    index = {layout: _nibble_index(256, 256, layout, CPU) for layout in MULTIPLES}
    ampere, hopper = index["cusparselt_sm80"], index["cusparselt_sm90"]
    assert (ampere == hopper).double().mean() == 1 / 256  # 0.4 %: one is no copy of the other
    assert (ampere == index["cutlass_sm80"]).double().mean() == 1 / 2


@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
@pytest.mark.parametrize("layout", MULTIPLES)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_prune_is_prune_then_pack(layout, dtype, scaled):
    weight = hostile(128, 256, dtype=dtype)
    scale = torch.rand(256) if scaled else None
    expected = to_hardware24(sk.prune_pack24(weight, scale=scale), layout)
    assert_same(sk.ops.prune_to_hardware24(weight, layout, scale=scale), expected)


@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
@pytest.mark.parametrize("layout", MULTIPLES)
def test_prune_both_serves_the_weight_and_its_transpose(layout, dtype):
    weight = hostile(128, 256, dtype=dtype)
    packed, packed_t, bitmask = prune_both_to_hardware24(weight, layout)
    mask = sk.transposable_mask24(weight)
    forward, backward = from_hardware24(packed, (128, 256), layout), from_hardware24(packed_t, (256, 128), layout)
    assert_same(forward.bitmask, bitmask)
    pruned = torch.where(mask, weight, 0)
    assert_same(forward.to_dense(), pruned)
    assert_same(backward.to_dense(), pruned.t().contiguous())


@pytest.mark.parametrize("layout", MULTIPLES)
@pytest.mark.parametrize("stride", STRIDES)
def test_any_strides(layout, stride):
    weight = hostile(128, 256, dtype=torch.bfloat16)
    values, bitmask, _ = sk.prune_pack24(weight)
    packed = to_hardware24(sk.Packed24(values, bitmask, (128, 256)), layout)
    assert_same(
        to_hardware24(sk.Packed24(STRIDES[stride](values), STRIDES[stride](bitmask), (128, 256)), layout), packed
    )
    assert_same(sk.ops.prune_to_hardware24(STRIDES[stride](weight), layout), packed)
    assert_same(from_hardware24(STRIDES[stride](packed), (128, 256), layout)[1], bitmask)
    for got, expected in zip(
        prune_both_to_hardware24(STRIDES[stride](weight), layout), prune_both_to_hardware24(weight, layout), strict=True
    ):
        assert_same(got, expected)


@pytest.mark.parametrize("layout", MULTIPLES)
@pytest.mark.parametrize("rows, cols", [(0, 128), (128, 0), (0, 0)])
def test_empty(layout, rows, cols):
    weight = torch.empty(rows, cols).half()
    packed = sk.ops.prune_to_hardware24(weight, layout)
    assert packed.shape == (0,)
    values, bitmask, _ = from_hardware24(packed, (rows, cols), layout)
    assert values.shape == (rows, cols // 2) and bitmask.shape == (rows, cols // 8)
    assert to_hardware24(sk.Packed24(values, bitmask, (rows, cols)), layout).shape == (0,)
    assert [each.shape for each in prune_both_to_hardware24(weight, layout)] == [(0,), (0,), (rows, cols // 8)]


@pytest.mark.parametrize("layout", MULTIPLES)
def test_opcheck(layout):
    weight = torch.randn(128, 128).half()
    values, bitmask, _ = sk.prune_pack24(weight)
    packed = to_hardware24(sk.Packed24(values, bitmask, (len(values), 128)), layout)
    torch.library.opcheck(OPS.to_hardware24.default, (values, bitmask, 128, layout))
    torch.library.opcheck(OPS.from_hardware24.default, (packed, 128, 128, layout))
    torch.library.opcheck(OPS.prune_to_hardware24.default, (weight, None, layout))
    torch.library.opcheck(OPS.prune_to_hardware24.default, (weight, torch.rand(128), layout))
    torch.library.opcheck(OPS.prune_both_to_hardware24.default, (weight, layout))


def test_compile_fullgraph():
    def run(weight):
        packed = sk.ops.prune_to_hardware24(weight + 0, "cutlass_sm80")
        return packed, *from_hardware24(packed, (64, 128), "cutlass_sm80")[:2]

    weight = torch.randn(64, 128).bfloat16()
    for got, expected in zip(torch.compile(run, fullgraph=True, backend="aot_eager")(weight), run(weight), strict=True):
        assert torch.equal(got, expected)


def test_stays_outside_autograd():
    weight = torch.randn(64, 64).half().requires_grad_()
    assert not sk.ops.prune_to_hardware24(weight, "cutlass_sm80").requires_grad
    assert not any(each.requires_grad for each in prune_both_to_hardware24(weight, "cutlass_sm80"))


W, V, B = torch.ones(64, 64).half(), torch.ones(64, 32).half(), torch.full((64, 8), 0x33, dtype=torch.uint8)
K = sk.Packed24(V, B, (64, 64))
P, S9 = torch.ones(64 * 64 // 16 * 9).half(), "cusparselt_sm90"


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: hardware_multiple("sm90"), ValueError, r"layout must be one of \('cusparselt_sm80', .*got 'sm90'"),
        (lambda: to_hardware24(K, "x"), ValueError, r"layout must be one of .* got 'x'"),
        (
            lambda: to_hardware24(K._replace(values=V.float()), S9),
            TypeError,
            r"values must be float16 or bfloat16, got",
        ),
        (lambda: to_hardware24(K._replace(values=None), S9), TypeError, r"values must be a tensor, got NoneType"),
        (
            lambda: to_hardware24(K._replace(values=V[0]), S9),
            ValueError,
            r"values must have 2 dimensions, got shape \(32,",
        ),
        (lambda: to_hardware24(V, S9), TypeError, r"packed must be a Packed24, .* got Tensor"),
        (lambda: to_hardware24(K, "cusparselt_sm80"), ValueError, r"rows that are a multiple of 128 .*64 x 64"),
        (lambda: to_hardware24(K._replace(shape=(64, 96)), S9), ValueError, r"values must have shape \(64, 48\), got"),
        (
            lambda: to_hardware24(K._replace(bitmask=B.int()), S9),
            TypeError,
            r"bitmask must be torch\.uint8, got torch\.int",
        ),
        (
            lambda: to_hardware24(K._replace(bitmask=B[:, :4]), S9),
            ValueError,
            r"bitmask must have shape \(64, 8\), got",
        ),
        (lambda: to_hardware24(K._replace(bitmask=B.to("meta")), S9), ValueError, r"bitmask must be on cpu, got meta"),
        (
            lambda: to_hardware24(sk.pack24(torch.zeros(64, 80).half()), S9),
            ValueError,
            r"cusparselt_sm90 needs .* columns of 32, got 64 x 80",
        ),
        (lambda: from_hardware24(P, (64, 64), "x"), ValueError, r"layout must be one of .* got 'x'"),
        (
            lambda: from_hardware24(P.int(), (64, 64), S9),
            TypeError,
            r"data must be float16 or bfloat16, got torch\.int",
        ),
        (lambda: from_hardware24(V, (64, 64), S9), ValueError, r"data must have 1 dimensions, got shape \(64, 32\)"),
        (lambda: from_hardware24(P, (64, 96), S9), ValueError, r"data must have 3456 entries .* 64 x 96, got 2304"),
        (lambda: from_hardware24(P, ("64", 64), S9), TypeError, r"rows must be an int, got '64'"),
        (lambda: from_hardware24(P, (-64, -64), S9), ValueError, r"got -64 x -64"),
        (lambda: sk.ops.prune_to_hardware24(W.float(), S9), TypeError, r"weight must be float16 or bfloat16"),
        (
            lambda: sk.ops.prune_to_hardware24(W[:48], S9),
            ValueError,
            r"a multiple of 64 and columns of 32, got 48 x 64",
        ),
        (lambda: sk.ops.prune_to_hardware24(W, S9, scale=torch.ones(32)), ValueError, r"scale must have shape \(64,\)"),
        (lambda: sk.ops.prune_to_hardware24(W, S9, scale=W[0]), TypeError, r"scale must be torch\.float32"),
        (lambda: prune_both_to_hardware24(W[:, :32], S9), ValueError, r"64 and columns of 64, got 64 x 32"),
        (lambda: prune_both_to_hardware24(W[0], S9), ValueError, r"weight must have 2 dimensions, got shape \(64,\)"),
        (lambda: prune_both_to_hardware24(W, "cutlass"), ValueError, r"layout must be one of .* got 'cutlass'"),
    ],
)
def test_rejects(call, error, match):
    with pytest.raises(error, match=match):
        call()
