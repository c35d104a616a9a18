"""Weights with zeros where a mask, given as bits, drops entries."""

import pytest
import torch
from helpers import LAYOUTS, dtype_id, opcheck, poison, shape_id

from sparsekit.ops import masked_weight, pack_bits
from sparsekit.ops.masked import masked_weight_reference

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [
    ((3, 128, 1), 128),
    ((3, 70, 1), 68),
    ((5, 12, 9), 12),
    ((2, 23, 70), 20),
    ((1, 6, 3), 0),
    ((9, 4096, 1), 4096),
]
CASES += [((0, 8, 1), 8), ((2, 4, 0), 4), ((1, 21, 2), 21)]


def random_bits(shape, full):
    return pack_bits(torch.rand(shape[0] * shape[2] * full) < 0.5)


def test_literal(simd):
    weight = torch.tensor([[[1.0], [INF], [NAN], [4.0], [5.0]], [[6.0], [-0.0], [8.0], [9.0], [10.0]]])
    masked = masked_weight(weight, torch.tensor([0b1010_1001], dtype=torch.uint8), 4)
    assert masked.flatten(1).tolist() == [[1, 0, 0, 4, 5], [0, 0, 0, 9, 10]]
    kernel = torch.arange(1.0, 13).view(1, 4, 3)  # of three taps: the entries of a tap follow each other
    masked = masked_weight(kernel, torch.tensor([0b1100_0011, 0b0101], dtype=torch.uint8), 4)
    assert masked.tolist() == [[[1, 0, 3], [4, 0, 0], [0, 8, 9], [0, 11, 0]]]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape, full", CASES, ids=[f"{shape_id(shape)}-{full}" for shape, full in CASES])
def test_every_level_equals_reference(simd, dtype, shape, full):
    weight, bits = torch.randn(shape).to(dtype), random_bits(shape, full)
    expected = masked_weight_reference(weight, bits, full)
    assert expected.is_contiguous()
    poison(expected)
    assert torch.equal(masked_weight(weight, bits, full), expected)
    assert masked_weight(weight.to("meta"), bits.to("meta"), full).shape == shape


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_strides(layout):
    weight, bits = torch.randn(6, 20), random_bits((6, 20, 1), 20)
    got = masked_weight(layout(weight)[..., None], bits, 20)
    assert torch.equal(got, masked_weight_reference(weight[..., None], bits, 20)) and got.is_contiguous()


def test_opcheck():
    opcheck(torch.ops.sparsekit.masked_weight.default, (torch.randn(2, 8, 3), random_bits((2, 8, 3), 8), 8))


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        ({"weight": torch.ones(2, 8)}, ValueError, "weight must have 3 dimensions"),
        ({"weight": torch.ones(2, 8, 1, dtype=torch.int8)}, TypeError, "weight must be float32"),
        ({"bits": torch.ones(2, dtype=torch.int8)}, TypeError, "bits must be torch.uint8"),
        ({"bits": torch.ones(3, dtype=torch.uint8)}, ValueError, r"bits must have shape \(2,\), got \(3,\)"),
        ({"full": 9}, ValueError, "full must be from 0 to the 8 columns of the weight, got 9"),
        ({"full": 8.0}, TypeError, "full must be an int"),
    ],
)
def test_what_is_wrong_is_said(change, kind, match):
    arguments = {"weight": torch.ones(2, 8, 1), "bits": torch.ones(2, dtype=torch.uint8), "full": 8}
    with pytest.raises(kind, match=match):
        masked_weight(**{**arguments, **change})
