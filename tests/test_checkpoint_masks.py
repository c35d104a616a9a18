"""Files of masks alone: they load into a dense model that has the weights, and into no other."""

import copy

import pytest
import torch
from checkpoints import contents, forge, make, mixed, prune, refuse
from safetensors.torch import load_file

import sparsekit as sk
from sparsekit.masks import get_mask, get_mask_info


@pytest.fixture
def path(tmp_path):
    return tmp_path / "masks.safetensors"


def unmasked(model):
    """Returns a copy without masks, as another library loads it."""
    fresh = make(1, tied=False)
    fresh.load_state_dict(model.state_dict())
    return fresh


def test_masks_alone_come_back(path):
    model = prune(make(tied=False))
    sk.save(model, path, format="masks")
    assert {name: tuple(bits.shape) for name, bits in load_file(path).items()} == {
        "first.weight_mask": (12, 2),
        "second.weight_mask": (12, 2),
        "third.weight_mask": (10, 2),
        "conv.weight_mask": (3, 5),
    }
    loaded = unmasked(model)
    weight = loaded.first.weight
    sk.load(loaded, path)
    assert contents(loaded) == contents(model)
    assert loaded.first.weight is weight  # an optimizer can continue with it


def test_masks_of_compressed_layers_are_those_of_dense_ones(path):
    model = prune(make(tied=False))
    loaded = unmasked(model)
    sk.save(mixed(copy.deepcopy(model)), path, format="masks")
    sk.load(loaded, path)
    assert contents(loaded) == contents(model)


def test_masks_replace_all_others(path):
    model = prune(make(tied=False))
    loaded = copy.deepcopy(model)
    for name in ("second", "third", "conv"):
        setattr(model, name, getattr(make(), name))
    sk.save(model, path, format="masks")
    sk.load(loaded, path)
    assert [name for name, module in loaded.named_modules() if get_mask_info(module)] == ["first"]
    assert torch.equal(get_mask(loaded.first), get_mask(model.first))


def test_masks_of_a_shared_layer(path):
    layer = prune(make()).first
    sk.save(torch.nn.Sequential(layer, layer), path, format="masks")
    fresh = torch.nn.Linear(10, 12)
    fresh.load_state_dict(layer.state_dict())
    sk.load(torch.nn.Sequential(fresh, fresh), path)
    assert torch.equal(get_mask(fresh), get_mask(layer))


def test_refuses_what_the_masks_are_not_for(path):
    model = prune(make(tied=False))
    sk.save(model, path, format="masks")
    other = unmasked(model)
    other.third.weight.data[0, 0:4] = 1
    refuse(path, "layer 'third' has weights that its mask drops", other)
    other = unmasked(model)
    other.second = torch.nn.Linear(12, 8)
    refuse(path, r"layer 'second' has shape \(12, 12\), the model's has \(8, 12\)", other)
    other.second = torch.nn.Identity()
    refuse(path, "the model has no dense layer 'second' for its mask", other)
    refuse(path, "the model has no dense layer 'first' for its mask", mixed(copy.deepcopy(model)))
    with pytest.raises(ValueError, match="layer 'first' is on the meta device: masks alone need a model that has its"):
        sk.load(unmasked(model).to("meta"), path)
    forge(path, lambda _, tensors: tensors.update({"conv.weight_mask": tensors["conv.weight_mask"] | 0xF0}))
    refuse(path, "conv.weight_mask has bits set past its last column", unmasked(model))


def test_a_model_without_masks_has_none_to_save(path):
    with pytest.raises(ValueError, match="the model has no masks to be saved"):
        sk.save(make(), path, format="masks")
    assert not path.exists()


def test_masks_may_be_saved_before_their_weights_have_the_zeros_and_are_given_to_weights_that_do(path):
    model = prune(make(tied=False))
    pruned = unmasked(model)
    model.second.weight.data.add_(1)
    sk.save(model, path, format="masks")
    refuse(path, "layer 'second' has weights that its mask drops", unmasked(model))
    sk.load(pruned, path)
    assert torch.equal(get_mask(pruned.second), get_mask(model.second))
