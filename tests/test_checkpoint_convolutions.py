"""Saving and loading compressed convolutions."""

import json

import pytest
import torch
from checkpoints import forge, put, refuse
from convolutions import convolved
from safetensors import safe_open
from torch import nn

import sparsekit as sk
from sparsekit.cli.stored import Role, own_matrices
from sparsekit.masks import get_mask
from sparsekit.nn import ArrangedConv2d24, Conv2d24, PrepackedConv2d

X = torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(0))


def compressed(seed=0, channels_last=False):
    torch.manual_seed(seed)
    model = convolved(channels_last=channels_last)
    model[0].up = Conv2d24.from_conv2d(model[0].up)
    model[0].down = PrepackedConv2d.from_conv2d(model[0].down, images=(2, 5, 6))
    return model


@pytest.fixture
def path(tmp_path):
    sk.save(compressed(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


TARGETS = {
    "dense": lambda: convolved(pruned=False),
    "pruned": convolved,
    "compressed": lambda: compressed(1),
    "channels last": lambda: convolved(channels_last=True),
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_file_brings_back_the_layers(path, target):
    model, loaded = compressed(), target()
    sk.load(loaded, path)
    assert type(loaded[0].up) is Conv2d24 and type(loaded[0].down) is PrepackedConv2d
    assert loaded[0].down.images == (2, 5, 6) and loaded[0].up.trainable and loaded[0].down.trainable
    assert torch.equal(loaded[0].up.bitmask, model[0].up.bitmask)
    assert torch.equal(get_mask(loaded[0].up), get_mask(model[0].up))
    torch.testing.assert_close(loaded(X), model(X))
    assert sk.decompress_(loaded) == ("0.up", "0.down")
    assert type(loaded[0].up) is nn.Conv2d and loaded[0].up.padding == (1, 1)
    assert torch.equal(loaded[0].up.weight, model[0].up.weight.clone())


def test_the_file_is_neutral_and_comes_back_dense(path):
    with safe_open(path, "pt") as file:
        layers = json.loads(file.metadata()["sparsekit"])["layers"]
        assert set(file.keys()) >= {"0.up.values", "0.up.bitmask", "0.up.bias", "0.down.weight"}
    assert layers["0.up"]["kind"] == "conv24" and layers["0.up"]["shape"] == [12, 8, 3, 3]
    assert layers["0.down"]["kind"] == "prepacked_conv" and layers["0.down"]["images"] == [2, 5, 6]
    model, loaded = compressed(), convolved(pruned=False)
    sk.load(loaded, path, dense=True)
    assert type(loaded[0].up) is nn.Conv2d and torch.equal(loaded[0].up.weight, model[0].up.weight.clone())
    torch.testing.assert_close(loaded(X), model(X))


def test_inspect_reads_the_dense_weights(path):
    model, roles = compressed(), {"0.up": Role(1), "0.down": Role(1)}
    up, down = own_matrices(path, roles)
    assert torch.equal(up.weight, model[0].up.weight.clone()) and up.stored == 12 * 9 * (4 * 4 + 1)
    assert torch.equal(down.weight, model[0].down.weight.clone()) and str(up.info.pattern) == "2:4"


def test_a_model_on_the_meta_device(path):
    loaded = convolved(pruned=False).to("meta")
    sk.load(loaded, path)
    torch.testing.assert_close(loaded(X), compressed()(X))


def test_a_compressed_layer_becomes_dense_by_a_dense_file(tmp_path):
    sk.save(convolved(), tmp_path / "dense.safetensors")
    loaded = compressed(1)
    sk.load(loaded, tmp_path / "dense.safetensors")
    assert type(loaded[0].up) is nn.Conv2d and type(loaded[0].down) is nn.Conv2d


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_the_layout_of_an_arranged_convolution_comes_back(tmp_path, path, target):
    model = compressed()
    model[0].up = ArrangedConv2d24.of(model[0].up.packed, model[0].up).eval()
    model[0].up.bias = compressed()[0].up.bias
    sk.save(model, tmp_path / "arranged.safetensors")
    sk.load(loaded := target(), tmp_path / "arranged.safetensors")
    assert type(loaded[0].up) is ArrangedConv2d24 and loaded[0].up.trainable
    torch.testing.assert_close(loaded(X), model(X))
    with safe_open(path, "pt") as plain, safe_open(tmp_path / "arranged.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("0.up.values"), plain.get_tensor("0.up.values"))
        assert json.loads(file.metadata()["sparsekit"])["layers"]["0.up"]["layout"] == "row pairs"
    assert sk.decompress_(loaded) == ("0.up", "0.down")
    assert torch.equal(loaded[0].up.weight, compressed()[0].up.weight.clone())


def test_what_does_not_fit_is_refused(path):
    other = convolved(pruned=False)
    other[0].down = nn.Conv2d(12, 8, 1, bias=False, padding_mode="reflect")
    refuse(path, r"layer '0\.down' is 'prepacked_conv' in the file and Conv2d in the model", other)
    other = convolved(pruned=False)
    other[0].up = nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular")
    refuse(path, r"layer '0\.up' is 'conv24' in the file and Conv2d in the model", other)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (put("layers", "0.down", "images", value=[2, 5]), r"layer '0\.down' has images of \[2, 5\]"),
        (put("layers", "0.down", "images", value=[2, 5, -6]), r"layer '0\.down' has images of \[2, 5, -6\]"),
        (
            put("layers", "0.up", "layout", value="input pairs"),
            r"'conv24' in the layout 'input pairs', allowed is 'row",
        ),
        (put("layers", "0.up", "shape", value=[12, 72]), r"layer '0\.up' has the shape \[12, 72\]"),
        (put("layers", "0.up", "kind", value="linear24"), r"layer '0\.up' has the shape \[12, 8, 3, 3\]"),
        (
            lambda _, tensors: tensors["0.up.bitmask"].fill_(7),
            r"0\.up\.bitmask does not keep exactly two of every four",
        ),
        (lambda _, tensors: tensors.pop("0.up.values"), r"the tensor '0\.up\.values' is missing"),
    ],
)
def test_a_forged_file_is_refused(path, change, match):
    forge(path, lambda structure, tensors: [change(structure, tensors)][1:])
    refuse(path, match, compressed(1))
