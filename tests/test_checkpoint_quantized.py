"""Saving and loading lossy layers."""

import pytest
import torch
from checkpoints import TOKENS, contents, drop, forge, lossy, make, prune, put, refuse

import sparsekit as sk


@pytest.mark.parametrize("inputs", ["int8", "float"])
@pytest.mark.parametrize(
    "target", [make, lambda seed: prune(make(seed)), lambda seed: lossy(make(seed))], ids=["dense", "pruned", "same"]
)
def test_a_file_brings_back_every_code(tmp_path, inputs, target):
    model, path = lossy(make(), inputs), tmp_path / "model.safetensors"
    sk.save(model, path)
    other = target(1)
    sk.load(other, path)
    assert contents(other) == contents(model)
    assert (other.first.inputs, other.second.quant_type, other.second.group) == (inputs, "nf4", 8)
    assert torch.equal(other(TOKENS), model(TOKENS))
    assert sk.decompress_(other) == ("first", "second", "third")
    assert torch.equal(other.second.weight, model.second.weight.clone())


def test_loaded_dense_it_has_the_rounded_weights(tmp_path):
    model, dense, path = lossy(make()), make(1), tmp_path / "model.safetensors"
    sk.save(model, path)
    sk.load(dense, path, dense=True)
    for name in ("first", "second", "third"):
        weight = dense.get_submodule(name).weight
        assert type(weight) is torch.nn.Parameter
        assert torch.equal(weight, model.get_submodule(name).weight.clone())


def test_other_formats_write_them_dense(tmp_path):
    model, path = lossy(make()), tmp_path / "model.safetensors"
    model.first = sk.nn.Linear24.from_linear(model.first)
    with pytest.raises(ValueError, match="multiple of 4"):
        sk.save(model, path, format="sparse-24-bitmask")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (put("layers", "first", "rounding", "dtype", value="float64"), "has weights of 'float64'"),
        (put("layers", "first", "rounding", "inputs", value="int4"), "and inputs of 'int4'"),
        (put("layers", "first", "rounding", "quant_type", value="int3"), "quant_type must be one of"),
        (put("layers", "first", "rounding", "group", value=7), "group must be a positive multiple of 8, got 7"),
        (put("layers", "first", "rounding", "group", value=8), "is not quantized as quantize24 does"),
        (put("layers", "third", "rounding", value=3), "has no 'rounding' of type dict"),
        (drop("first.scales"), r"the tensor 'first\.scales' is missing"),
        (drop("third.scales"), r"the tensor 'third\.scales' is missing"),
        (lambda _, tensors: tensors["first.bitmask"].fill_(1) is None, "does not keep exactly two of every four"),
        (lambda _, tensors: tensors["first.values"].fill_(-128) is None, "must be from -127 to 127"),
        (lambda _, tensors: tensors["third.values"].fill_(-128) is None, "int8 values from -127 to 127"),
    ],
)
def test_a_file_that_no_layer_wrote_is_refused(tmp_path, change, match):
    path = tmp_path / "model.safetensors"
    sk.save(lossy(make()), path)

    def changed(structure, tensors):
        change(structure, tensors)

    forge(path, changed)
    refuse(path, match, lossy(make(1)))
