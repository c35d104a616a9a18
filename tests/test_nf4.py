"""The nf4 codec, the layer on it, and ``quantize_``."""

import copy
from itertools import pairwise

import pytest
import torch
from checkpoints import TOKENS, contents, drop, forge, make, put, refuse
from helpers import DTYPES, assert_linear_gradients, dtype_id, opcheck, sparse_linear
from torch import nn

import sparsekit as sk
from sparsekit.nn import Nf4Linear, QuantizedLinear24
from sparsekit.ops import Nf4Weight, linear_nf4, quantize_nf4
from sparsekit.ops.quant24 import NF4_LEVELS

# What bitsandbytes 0.50.2 makes of the weight below.
GOLDEN = (
    "04c16e29f3b05d17e29f3c05d18e2af4c16e18e3b05d17e29f7b05718e7af4716d78e3704c77e27f3b75d17e2a74c07d1872a04c16e29f3b05d1"
    "7e29f3c05d18e2af4c16e18e3b05d17e29"
)


def golden_weight():
    weight = ((torch.arange(150) * 37 % 101) - 50).view(3, 50) / 16
    weight[1, ::4] = 0
    return weight


def test_literal():
    # One block: each level times the largest magnitude, 2, and the midpoint of two levels, which goes to the lower one.
    levels = torch.tensor(NF4_LEVELS)
    weight = torch.cat([levels, (levels[:-1] + levels[1:]) / 2, torch.zeros(1)]).view(2, 16) * 2
    packed = quantize_nf4(weight)
    assert packed.codes[:8].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF]
    assert packed.codes[8:].tolist() == [0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xE7]
    assert packed.absmax.tolist() == [2.0] and packed.nbytes == 16 + 4
    assert torch.equal(packed.to_dense()[0], levels * 2)


def test_bytes_are_those_of_bitsandbytes():
    packed = quantize_nf4(golden_weight())
    assert bytes(packed.codes.tolist()).hex() == GOLDEN and packed.absmax.tolist() == [3.125] * 3
    assert (packed.to_dense()[1, ::4] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(128, 64), (100, 72), (7, 13), (1, 1), (33, 65)], ids=str)
def test_bitsandbytes_agrees(shape, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    for weight in (torch.randn(shape), torch.randn(shape) * torch.logspace(-30, 3, shape[0])[:, None]):
        weight = torch.where(torch.rand(shape) < 0.3, 0, weight).to(dtype)
        codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        packed = quantize_nf4(weight)
        assert torch.equal(packed.codes, codes.flatten()) and torch.equal(packed.absmax, state.absmax)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(96, 80), (3, 5), (1, 1), (64, 64), (0, 8), (8, 0)], ids=str)
def test_a_round_trip_is_near_and_keeps_zeros(shape, dtype):
    weight = torch.where(torch.rand(shape) < 0.4, 0, torch.randn(shape)).to(dtype)
    packed = quantize_nf4(weight)
    dense = packed.to_dense()
    entries = weight.numel()
    assert packed.codes.numel() == -(-entries // 2) and packed.absmax.numel() == -(-entries // 64)
    assert dense.dtype == dtype and dense.shape == shape and dense.is_contiguous()
    assert (dense[weight == 0] == 0).all() and torch.equal(quantize_nf4(dense).to_dense(), dense)
    largest = packed.absmax.repeat_interleave(64)[:entries].view(shape)
    widest = max(high - low for low, high in pairwise(NF4_LEVELS)) / 2
    # A half of the widest gap between two levels, and the rounding of the dtype.
    assert ((dense.float() - weight.float()).abs() <= largest * (widest + torch.finfo(dtype).eps)).all()


def test_strides_blocks_and_blocks_of_zeros():
    wide = torch.randn(40, 60)
    assert torch.equal(quantize_nf4(wide.t()).codes, quantize_nf4(wide.t().contiguous()).codes)
    weight = torch.zeros(4, 64)
    weight[1] = torch.randn(64)
    assert quantize_nf4(weight).absmax[[0, 2, 3]].tolist() == [0.0] * 3
    assert torch.equal(quantize_nf4(weight).to_dense()[[0, 2, 3]], torch.zeros(3, 64))
    fine, coarse = (quantize_nf4(wide, block=block).to_dense() for block in (8, 256))
    assert (fine - wide).norm() < (coarse - wide).norm()


def test_rejects():
    for weight, block, error, match in (
        (torch.ones(4, 8, dtype=torch.double), 64, TypeError, "weight must be float32"),
        (torch.ones(4), 64, ValueError, "weight must have 2 dimensions"),
        (torch.tensor([[1.0, float("nan")]]), 64, ValueError, "weight must be finite to be quantized, got an Inf or"),
        (torch.ones(4, 8), 12, ValueError, "block must be a positive multiple of 8, got 12"),
    ):
        with pytest.raises(error, match=match):
            quantize_nf4(weight, block=block)
    packed, x = quantize_nf4(torch.randn(6, 8)), torch.randn(2, 8)
    for wrong, match in (
        (packed._replace(codes=packed.codes[1:]), r"packed.codes must have shape \(24,\), got \(23,\)"),
        (packed._replace(shape=(8,)), r"packed.shape must be rows and columns, got \(8,\)"),
    ):
        with pytest.raises(ValueError, match=match):
            wrong.to_dense()
    with pytest.raises(TypeError, match="packed must be an Nf4Weight, as quantize_nf4 returns it, got Tensor"):
        linear_nf4(x, x)
    with pytest.raises(ValueError, match=r"x must have 8 columns for a weight of 6 x 8, got shape \(2, 9\)"):
        linear_nf4(torch.randn(2, 9), packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_the_product_is_that_of_the_dense_weight(dtype):
    weight, bias = torch.randn(10, 13), torch.randn(10).to(dtype)
    packed = quantize_nf4(weight)
    for shape in ((13,), (4, 13), (2, 3, 13), (0, 13)):
        x = torch.randn(shape).to(dtype)
        expected = nn.functional.linear(x.float(), packed.to_dense(), bias.float()).to(dtype)
        torch.testing.assert_close(linear_nf4(x, packed, bias), expected)
    x = torch.randn(4, 13).to(dtype).requires_grad_()
    args = x, packed.codes, packed.absmax, bias.requires_grad_(), 10, 64
    opcheck(torch.ops.sparsekit.linear_nf4.default, args)


def test_gradients_and_state():
    linear = sparse_linear(48, 40)
    layer = Nf4Linear.from_linear(linear)
    assert_linear_gradients(layer, layer.to_linear(), torch.randn(5, 48))
    state, other = layer.state_dict(), Nf4Linear.from_linear(sparse_linear(48, 40))
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        "codes": torch.uint8,
        "absmax": torch.float32,
        "bias": torch.float32,
    }
    other.load_state_dict(state)
    x = torch.randn(3, 48)
    assert torch.equal(other(x), layer(x))
    other.bfloat16()
    assert other.absmax.dtype == torch.float32 and other.weight.dtype == other(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("form", ["nf4", "2:4 nf4", "2:4 int4", "2:4 int8"])
def test_quantize_keeps_2_4_and_says_what_it_did(form):
    model = nn.Sequential(nn.Linear(100, 72), nn.GELU(), nn.Linear(72, 40), nn.Linear(40, 2)).eval()
    sk.prune_(model, sk.Magnitude("2:4"))
    dense, x = copy.deepcopy(model), torch.randn(6, 100)
    report = sk.quantize_(model, form)
    assert [layer.name for layer in report.layers] == ["0", "2"] and type(model[3]) is nn.Linear
    assert report.skipped == {"3": "it has fewer than 32 outputs: select it by where to quantize it"}
    assert type(model[0]) is (Nf4Linear if form == "nf4" else QuantizedLinear24)
    for layer in report.layers:
        before, after = (each.get_submodule(layer.name).weight.detach().clone() for each in (dense, model))
        assert (after[before == 0] == 0).all() and (after != before).any()
        assert layer.error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
        assert layer.bytes_before == before.nbytes
    sizes = {"nf4": 100 * 72 / 2 + 4 * 113, "2:4 int8": 100 * 72 / 2 + 2 * 72 * 2 + 72 * 13}
    assert report.layers[0].bytes_after == sizes.get(form, 100 * 72 / 4 + 2 * 72 * 2 + 72 * 13)
    assert "skipped: it has fewer" in str(report) and f"{report.layers[0].error:.2%}" in str(report)
    before = model.state_dict()
    assert (model(x) - dense(x)).norm() / dense(x).norm() < 0.25
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())  # a call changes none
    assert sk.decompress_(model) == ("0", "2")


def test_quantize_refuses_and_changes_nothing():
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    with pytest.raises(ValueError, match=r"form must be one of \('nf4', .*got 'fp4'"):
        sk.quantize_(model, "fp4")
    with pytest.raises(ValueError, match="no layer of the model can be quantized to '2:4 int8', for one '0': not 2:4"):
        sk.quantize_(model, "2:4 int8")
    with pytest.raises(ValueError, match=r"inputs must be one of .*got 'int4'"):
        sk.quantize_(model, inputs="int4")
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        sk.quantize_(model.train())
    assert type(model[0]) is nn.Linear
    assert sk.quantize_(model.eval(), where=sk.quant.fits_bitsandbytes).layers[0].form == "nf4"
    assert not sk.quant.fits_bitsandbytes("", nn.Linear(96, 64)) and not sk.quant.fits_bitsandbytes(
        "", nn.Linear(64, 8)
    )


def quantized(seed=0):
    model = make(seed)
    sk.prune_(model, sk.Magnitude("2:4"), where=lambda name, _: name == "first")
    sk.quantize_(model, where=lambda name, _: name in ("first", "second"))
    return model


@pytest.mark.parametrize("target", [make, quantized])
def test_a_file_brings_back_every_code(tmp_path, target):
    model, path = quantized(), tmp_path / "model.safetensors"
    sk.save(model, path)
    other, dense = target(1), make(1)
    sk.load(other, path)
    assert contents(other) == contents(model) and torch.equal(other(TOKENS), model(TOKENS))
    sk.load(dense, path, dense=True)
    assert type(dense.second.weight) is nn.Parameter and torch.equal(dense.second.weight, model.second.weight.clone())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (put("layers", "first", "rounding", "group", value=12), "group must be a positive multiple of 8, got 12"),
        (put("layers", "first", "rounding", "group", value=8), "is not quantized as quantize_nf4 does"),
        (drop("first.absmax"), r"the tensor 'first\.absmax' is missing"),
        (lambda _, tensors: tensors["first.absmax"].fill_(-1) is None, "has an absmax that is negative, infinite"),
    ],
)
def test_a_file_that_no_layer_wrote_is_refused(tmp_path, change, match):
    path = tmp_path / "model.safetensors"
    sk.save(quantized(), path)
    forge(path, lambda structure, tensors: change(structure, tensors) and None)
    refuse(path, match, quantized(1))


def test_a_weight_is_a_plain_tuple():
    packed = quantize_nf4(torch.randn(4, 16).bfloat16())
    assert isinstance(packed, Nf4Weight) and packed.dtype == torch.bfloat16 and packed.to("cpu") == packed
