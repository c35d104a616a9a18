import pytest
import torch
from helpers import LAYOUTS as STRIDES
from helpers import SPECIAL, assert_same, dtype_id, hostile, poison

from sparsekit.ops.hardware24 import (
    MULTIPLES,
    from_hardware24_reference,
    prune_to_hardware24_reference,
    to_hardware24_reference,
)
from sparsekit.ops.hardware24_both import prune_both_to_hardware24_reference
from sparsekit.ops.sparse24 import prune_pack24_reference

pytest.importorskip("triton")
from sparsekit.triton_kernels import _tiles, hardware24, hardware24_both

pytestmark = pytest.mark.triton
HALF = (torch.float16, torch.bfloat16)
# Several macro tiles down and across, and tiles that the matrix ends in.
SHAPES = {"cusparselt_sm80": (256, 128), "cusparselt_sm90": (128, 96), "cutlass_sm80": (96, 192)}
CASES = [(layout, *shape) for layout, shape in SHAPES.items()]


def assert_all_same(actual, expected):
    for got, want in zip(actual, expected, strict=True):
        assert_same(got.cpu(), want)


@pytest.mark.parametrize(
    "layout, rows, cols, dtype",
    [(*case, torch.bfloat16) for case in CASES] + [(*CASES[1], torch.float16)],
    ids=dtype_id,
)
def test_pruned_and_packed_equals_reference(gpu, layout, rows, cols, dtype):
    weight = hostile(rows, cols, dtype=dtype)
    for scale in (None, torch.rand(cols) + 0.5):
        expected = prune_to_hardware24_reference(weight, scale, layout)
        poison(expected, expected)
        packed = hardware24.prune_to_hardware24(weight.to(gpu), None if scale is None else scale.to(gpu), layout)
        assert_same(packed.cpu(), expected)


@pytest.mark.parametrize("layout, rows, cols", CASES)
def test_converted_equals_reference(gpu, layout, rows, cols):
    values, bitmask = prune_pack24_reference(hostile(rows, cols, dtype=torch.float16), None)
    packed = to_hardware24_reference(values, bitmask, cols, layout)
    poison(packed, packed)
    assert_same(hardware24.to_hardware24(values.to(gpu), bitmask.to(gpu), cols, layout).cpu(), packed)
    poison(values, values, bitmask, bitmask)
    assert_all_same(hardware24.from_hardware24(packed.to(gpu), rows, cols, layout), (values, bitmask))


@pytest.mark.parametrize(
    "layout, dtype",
    [*((layout, torch.bfloat16) for layout in MULTIPLES), ("cutlass_sm80", torch.float16)],
    ids=dtype_id,
)
def test_both_equal_reference(gpu, layout, dtype):
    rows, cols = (128, 256) if layout == "cusparselt_sm80" else (192, 64)
    weight = hostile(rows, cols, dtype=dtype)
    expected = prune_both_to_hardware24_reference(weight, layout)
    poison(*expected)
    assert_all_same(hardware24_both.prune_both_to_hardware24(weight.to(gpu), layout), expected)


@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
def test_every_group_of_special_values(gpu, dtype):
    groups = torch.cartesian_prod(*[torch.arange(len(SPECIAL))] * 4)
    weight = torch.tensor(SPECIAL, dtype=dtype)[groups].view(125, 320)
    weight = torch.cat([weight, weight[:3]])
    expected = prune_to_hardware24_reference(weight, None, "cusparselt_sm90")
    assert_same(hardware24.prune_to_hardware24(weight.to(gpu), None, "cusparselt_sm90").cpu(), expected)


@pytest.mark.parametrize("config", hardware24.PRUNE.configs)
def test_every_configuration_of_prune(gpu, config):
    weight = hostile(64, 288, dtype=torch.bfloat16)
    expected = prune_to_hardware24_reference(weight, None, "cusparselt_sm90")
    with hardware24.PRUNE.force(config):
        assert_same(hardware24.prune_to_hardware24(weight.to(gpu), None, "cusparselt_sm90").cpu(), expected)


@pytest.mark.parametrize("config", hardware24.CONVERT.configs)
def test_every_configuration_of_convert(gpu, config):
    values, bitmask = prune_pack24_reference(hostile(96, 320, dtype=torch.bfloat16), None)
    packed = to_hardware24_reference(values, bitmask, 320, "cutlass_sm80")
    with hardware24.CONVERT.force(config):
        assert_same(hardware24.to_hardware24(values.to(gpu), bitmask.to(gpu), 320, "cutlass_sm80").cpu(), packed)
        assert_all_same(hardware24.from_hardware24(packed.to(gpu), 96, 320, "cutlass_sm80"), (values, bitmask))


@pytest.mark.parametrize("config", hardware24_both.BOTH.configs)
def test_every_configuration_of_both(gpu, config):
    weight = hostile(128, 192, dtype=torch.float16)
    expected = prune_both_to_hardware24_reference(weight, "cusparselt_sm90")
    with hardware24_both.BOTH.force(config):
        assert_all_same(hardware24_both.prune_both_to_hardware24(weight.to(gpu), "cusparselt_sm90"), expected)


def test_both_with_programs_past_the_matrix(gpu, monkeypatch):
    monkeypatch.setattr(_tiles, "MOST_PROGRAMS", 2)  # three tiles down, in two layers of two
    weight = hostile(192, 64, dtype=torch.bfloat16)
    expected = prune_both_to_hardware24_reference(weight, "cutlass_sm80")
    with hardware24_both.BOTH.force("64x64"):
        assert_all_same(hardware24_both.prune_both_to_hardware24(weight.to(gpu), "cutlass_sm80"), expected)


@pytest.mark.parametrize("stride", ["transposed", "sliced", "strided"])
def test_any_strides(gpu, stride):
    weight = hostile(64, 64, dtype=torch.bfloat16).to(gpu)
    scale = torch.rand(64, device=gpu)
    values, bitmask = prune_pack24_reference(weight.cpu(), None)
    layout, strided = "cutlass_sm80", STRIDES[stride]
    packed = to_hardware24_reference(values, bitmask, 64, layout)
    assert_same(hardware24.prune_to_hardware24(strided(weight), None, layout).cpu(), packed)
    assert_same(
        hardware24.prune_to_hardware24(strided(weight), strided(scale), layout).cpu(),
        prune_to_hardware24_reference(weight.cpu(), scale.cpu(), layout),
    )
    assert_same(hardware24.to_hardware24(strided(values.to(gpu)), strided(bitmask.to(gpu)), 64, layout).cpu(), packed)
    assert_all_same(hardware24.from_hardware24(strided(packed.to(gpu)), 64, 64, layout), (values, bitmask))
    assert_all_same(
        hardware24_both.prune_both_to_hardware24(strided(weight), layout),
        prune_both_to_hardware24_reference(weight.cpu(), layout),
    )


@pytest.mark.parametrize("rows, cols", [(0, 128), (128, 0)])
def test_empty(gpu, rows, cols):
    weight = torch.empty(rows, cols, dtype=torch.float16, device=gpu)
    packed = hardware24.prune_to_hardware24(weight, None, "cusparselt_sm90")
    values, bitmask = hardware24.from_hardware24(packed, rows, cols, "cusparselt_sm90")
    assert packed.shape == (0,) and values.shape == (rows, cols // 2) and bitmask.shape == (rows, cols // 8)
    assert hardware24.to_hardware24(values, bitmask, cols, "cusparselt_sm90").shape == (0,)
    both = hardware24_both.prune_both_to_hardware24(weight, "cusparselt_sm90")
    assert [each.shape for each in both] == [(0,), (0,), (rows, cols // 8)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", HALF, ids=dtype_id)
@pytest.mark.parametrize("rows, cols", [(64, 64), (128, 768), (3072, 768), (768, 4096)])
def test_equals_the_vendor_compressor(gpu, rows, cols, dtype):
    capability = torch.cuda.get_device_capability()
    if torch.version.hip or capability not in ((8, 0), (8, 6), (9, 0)) or not torch.backends.cusparselt.is_available():
        pytest.skip("the layouts are those of cuSPARSELt on Ampere and Hopper")
    layout = "cusparselt_sm90" if capability == (9, 0) else "cusparselt_sm80"
    if rows % MULTIPLES[layout][0] or cols % MULTIPLES[layout][1]:
        pytest.skip(f"not a shape of {layout}")
    values, bitmask = prune_pack24_reference(torch.randn(rows, cols, device=gpu).to(dtype), None)
    packed = hardware24.to_hardware24(values, bitmask, cols, layout)
    weight = torch.ops.sparsekit.unpack24(values, bitmask, cols)
    compressed = torch._cslt_compress(weight).flatten()[: packed.numel()]
    assert torch.equal(packed.view(torch.int16), compressed.view(torch.int16))
    assert from_hardware24_reference(packed, rows, cols, layout)[1].equal(bitmask)
