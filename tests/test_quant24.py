"""Quantized 2:4 weights, and the same as tiles."""

import copy
import itertools

import pytest
import torch
from helpers import DTYPES, LAYOUTS, assert_same, dtype_id, hostile, opcheck, sparse24
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsekit as sk
from sparsekit.ops.quant24 import NF4_LEVELS, QUANT_TYPES, quantize24_reference
from sparsekit.ops.sparse24 import values_per_row
from sparsekit.ops.tiled24 import count_tiles, tile24_reference, tile_columns

OPS = torch.ops.sparsekit

SHAPES = [(0, 8), (5, 0), (1, 1), (1, 4), (3, 3), (9, 63), (8, 64), (13, 67), (5, 70), (17, 260)]


def quantized(rows, cols, quant_type, dtype=torch.float32, group=64):
    return sk.quantize24(sk.pack24(*sparse24(rows, cols, dtype)), quant_type, group=group)


def test_literal_int8(simd):
    packed = sk.quantize24(sk.pack24(torch.tensor([[0, 1, 127, 0, -254.0], [0, 0, 0, 0, 0]])), group=8)
    assert packed.values.tolist() == [[0, 64, -127], [0, 0, 0]]  # 0.5 and 63.5 steps are ties
    assert packed.scales.tolist() == [[2], [0]] and packed.bitmask.tolist() == [[0b10110], [0b11100]]
    assert packed.to_dense().tolist() == [[0, 0, 128, 0, -254], [0, 0, 0, 0, 0]]


def test_literal_int4(simd):
    packed = sk.quantize24(sk.pack24(torch.tensor([[0, 1, 7, 0, -14.0]])), "int4", group=8)
    assert packed.values.tolist() == [[0x40, 0x09]]  # 0, 4 and -7
    assert packed.to_dense().tolist() == [[0, 0, 8, 0, -14]]


def test_literal_nf4(simd):
    packed = sk.quantize24(sk.pack24(torch.tensor([[0, 4, -2.1, 0, 0.5]])), "nf4", group=8)
    assert packed.values.tolist() == [[0x2F, 0x09]]  # 1, -0.525 and 0.161
    expected = [[0, 4, 4 * NF4_LEVELS[2], 0, 4 * NF4_LEVELS[9]]]
    assert_same(packed.to_dense(), torch.tensor(expected, dtype=torch.float32))


def test_scales_belong_to_groups_of_columns_and_are_rounded_up():
    weight = torch.zeros(1, 128)
    weight[0, 63], weight[0, 64] = 127, 127 * 1.001
    packed = sk.quantize24(sk.pack24(weight))
    assert packed.scales.tolist() == [[1, 1 + 2**-7]]
    assert packed.to_dense()[0, 63:65].tolist() == [127, 126 * (1 + 2**-7)]


@pytest.mark.parametrize("quant_type, bytes_per_weight", [("int8", 0.65625), ("int4", 0.40625), ("nf4", 0.40625)])
def test_bytes(quant_type, bytes_per_weight):
    packed = quantized(16, 256, quant_type)
    assert packed.nbytes == sk.tile24(packed).nbytes == 16 * 256 * bytes_per_weight


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("group", [8, 24, 64, 136])
def test_every_value_goes_to_the_nearest_level(quant_type, dtype, group):
    packed = sk.pack24(*sparse24(13, 283, dtype))
    result = sk.quantize24(packed, quant_type, group=group)
    levels = {"int8": range(-127, 128), "int4": range(-7, 8), "nf4": NF4_LEVELS}[quant_type]
    dense, weight = result._replace(dtype=torch.float32).to_dense().double(), packed.to_dense().double()
    scales = result.scales.double().repeat_interleave(group, 1)[:, :283]
    candidates = torch.tensor(list(levels)).double() * scales[..., None]
    nearest = (candidates - weight[..., None]).abs().amin(-1)
    assert ((dense - weight).abs() <= nearest * (1 + 1e-6) + 1e-6).all()
    assert weight.abs().amax() <= candidates.amax() and (dense == 0)[weight == 0].all()
    assert result.to_dense().dtype == dtype
    assert_same(result.to_dense(), result._replace(dtype=torch.float32).to_dense().to(dtype))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("group", [8, 64, 72, 192])
def test_tiles_hold_the_same(quant_type, shape, group):
    packed = quantized(*shape, quant_type, torch.float16, group)
    tiled = sk.tile24(packed)
    again = tiled.to_quantized()
    for mine, theirs in zip(again[:3], packed[:3], strict=True):
        assert mine.is_contiguous() and mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    assert again[3:] == packed[3:]
    assert_same(tiled.to_dense(), packed.to_dense())


@given(st.integers(0, 700), st.integers(1, 40))
@settings(deadline=None, max_examples=100)
def test_tiles_hold_every_column_once(cols, eighths):
    columns = tile_columns(cols, 8 * eighths, torch.device("cpu"))
    assert len(columns) == count_tiles(cols, 8 * eighths)
    assert columns[columns < cols].tolist() == list(range(cols))
    groups = torch.where(columns < cols, columns // (8 * eighths), -1)
    assert all(len(set(row.tolist()) - {-1}) <= 1 for row in groups)


def values_of(kind, rows, cols, dtype):
    """Kept values: normal, special, or of every exponent, some of them denormal."""
    shape = rows, values_per_row(cols)
    if kind == "hostile":
        return hostile(*shape, dtype=dtype)
    scale = torch.pow(10.0, torch.randint(-44, 38, shape)) if kind == "wide" else torch.ones(shape)
    return (torch.randn(shape) * scale).to(dtype)


@pytest.mark.parametrize("kind", ["normal", "hostile", "wide"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_every_level_gives_the_bits_of_the_reference(simd, quant_type, dtype, kind):
    for (rows, cols), group in itertools.product([*SHAPES, (3, 1027)], [8, 64, 72, 192]):
        values, bitmask = values_of(kind, rows, cols, dtype), sk.pack24(*sparse24(rows, cols)).bitmask
        codes, scales = OPS.quantize24(values, cols, quant_type, group)
        expected_codes, expected_scales = quantize24_reference(values, cols, quant_type, group)
        assert_same(codes, expected_codes)
        assert_same(scales, expected_scales)
        parts = codes, scales, bitmask, cols, quant_type, group
        assert_same(OPS.tile24(*parts), tile24_reference(*parts))


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_threads(simd, threads, quant_type):
    packed, results = sk.pack24(*sparse24(1030, 516)), []
    for count in (1, 2, 5):
        threads(count)
        quantized = sk.quantize24(packed, quant_type)
        results.append((*quantized[:2], sk.tile24(quantized).tiles))
    for result in results[1:]:
        for mine, expected in zip(result, results[0], strict=True):
            assert_same(mine, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("rows, cols", [(0, 8), (5, 19)])
def test_opcheck(quant_type, dtype, rows, cols):
    values = values_of("normal", rows, cols, dtype)
    opcheck(OPS.quantize24.default, (values, cols, quant_type, 64))
    packed = sk.quantize24(sk.pack24(*sparse24(rows, cols, dtype)), quant_type)
    opcheck(OPS.tile24.default, (*packed[:3], cols, quant_type, 64))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_any_strides(quant_type, layout):
    values, bitmask, shape = sk.pack24(*sparse24(7, 70))
    expected = sk.quantize24(sk.Packed24(values, bitmask, shape), quant_type)
    packed = sk.quantize24(sk.Packed24(LAYOUTS[layout](values), LAYOUTS[layout](bitmask), shape), quant_type)
    strided = packed._replace(**{name: LAYOUTS[layout](getattr(packed, name)) for name in ("values", "scales")})
    assert_same(strided.to_dense(), expected.to_dense())
    assert_same(sk.tile24(strided).tiles, sk.tile24(expected).tiles)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_extreme_values_stay_finite(quant_type):
    """The largest and the smallest float32, a zero group and a -0.0."""
    weight = torch.tensor([[3.4e38, 1, 0, 0], [1e-45, 0, -1e-44, 0], [-0.0, 0.0, 0, 0]])
    for flush in (False, True):
        torch.set_flush_denormal(flush)
        try:
            packed = sk.quantize24(sk.pack24(weight), quant_type)
        finally:
            torch.set_flush_denormal(False)
        dense = packed.to_dense()
        assert dense.isfinite().all() and dense[0, 0] > 3.3e38 and (dense[2] == 0).all()
    half = sk.quantize24(sk.pack24(torch.tensor([[65504.0, 1, 0, 0]], dtype=torch.float16)), quant_type).to_dense()
    assert half.isfinite().all() and half[0, 0] > 64900


def test_copies():
    packed = quantized(5, 20, "int8")
    assert_same(copy.deepcopy(packed).to_dense(), packed.to_dense())
    assert packed.to("cpu").values is packed.values and packed.to("meta").scales.is_meta
    tiled = sk.tile24(packed)
    assert tiled.to("cpu").tiles is tiled.tiles and tiled.to("meta").shape == (5, 20)


P = sk.pack24(torch.zeros(3, 8))
Q = sk.quantize24(P)
T = sk.tile24(Q)


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda: sk.quantize24(Q), TypeError, r"packed must be a Packed24, .* got QuantizedWeight24"),
        (lambda: sk.quantize24(P, "int5"), ValueError, r"quant_type must be one of .*, got 'int5'"),
        (lambda: sk.quantize24(P, group=12), ValueError, r"group must be a positive multiple of 8, got 12"),
        (lambda: sk.quantize24(P, group=0), ValueError, r"group must be a positive multiple of 8, got 0"),
        (lambda: sk.quantize24(P, group=8.0), TypeError, r"group must be an int, got 8\.0"),
        (
            lambda: sk.quantize24(P._replace(values=P.values + torch.inf)),
            ValueError,
            r"packed\.values must be finite to be quantized, got an Inf or a NaN",
        ),
        (lambda: sk.tile24(P), TypeError, r"packed must be a QuantizedWeight24, .* got Packed24"),
        (lambda: Q._replace(scales=Q.scales.float()).to_dense(), TypeError, r"scales must be torch\.bfloat16"),
        (lambda: Q._replace(values=Q.values[:2]).to_dense(), ValueError, r"values must have shape \(3, 4\), got"),
        (lambda: Q._replace(dtype=torch.int8).to_dense(), TypeError, r"packed\.dtype must be float32, .* got torch"),
        (lambda: Q._replace(shape=(3,)).to_dense(), ValueError, r"packed\.shape must be rows and columns, got"),
        (lambda: T._replace(quant_type="int4").to_dense(), ValueError, r"tiles must have shape \(1, 1, 208\), got"),
        (lambda: T._replace(tiles=T.tiles.char()).to_dense(), TypeError, r"tiles must be torch\.uint8, got"),
        (lambda: T._replace(shape=(3,)).to_dense(), ValueError, r"packed\.shape must be rows and columns, got"),
        (lambda: T._replace(dtype=None).to_dense(), TypeError, r"packed\.dtype must be float32, .* got None"),
    ],
)
def test_rejects(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("quant_type, codes", [("int8", [127, 0, -127, 0]), ("int4", [7, 0x09]), ("nf4", [0x7F, 0x70])])
def test_unchecked_values_may_be_anything(simd, quant_type, codes):
    values = torch.tensor([[torch.inf, torch.nan, -torch.inf, -torch.nan], [1, torch.nan, 1, 0], [0, 0, 0, 0]])
    packed = sk.quantize24(P._replace(values=values), quant_type, check=False)
    assert packed.values[0].tolist() == codes
    assert packed.scales.isfinite().all() and packed.scales[0] == packed.scales[1] > 1e36 and packed.scales[2] == 0
