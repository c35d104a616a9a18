"""save and load of masks of any parameter; if they are interrupted anywhere, the result is all or nothing."""

import pytest
import torch
from checkpoints import MAKERS, TARGETS, make, mixed, refuse
from interrupts import assert_all_or_nothing
from torch import nn

import sparsekit as sk
from sparsekit.masks import MaskInfo, Pattern, get_mask, get_mask_info, set_mask


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


class Experts(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Parameter(torch.randn(3, 5, 8))
        self.down = nn.Parameter(torch.randn(3, 8, 4))
        self.router = nn.Linear(8, 3)


def experts():
    model = nn.Sequential(Experts())
    for name, axis in (("up", 2), ("down", 1)):
        parameter = model[0].get_parameter(name)
        score = parameter.detach().movedim(axis, -1).contiguous()
        mask = sk.nm_mask(score.flatten(0, 1), 2, 4).view(score.shape).movedim(-1, axis)
        parameter.data.mul_(mask)
        set_mask(model[0], mask, MaskInfo(Pattern.parse("2:4"), axis), name)
    sk.prune_(model, sk.Magnitude("1:4"), where=lambda name, module: name == "0.router")
    return model


@pytest.mark.parametrize("form", ["sparsekit", "masks"])
def test_masks_of_other_parameters_come_back(path, form):
    model, loaded = experts(), nn.Sequential(Experts(1))
    if form == "masks":
        loaded.load_state_dict(model.state_dict())
    sk.save(model, path, format=form)
    set_mask(loaded[0], torch.ones(3, 5, 8).bool(), MaskInfo(Pattern.parse("4:4"), 2), "up")
    sk.load(loaded, path)
    for name, axis in (("up", 2), ("down", 1)):
        assert torch.equal(get_mask(loaded[0], name), get_mask(model[0], name))
        info = get_mask_info(loaded[0], name)
        assert (str(info.pattern), info.axis) == ("2:4", axis)
        assert torch.equal(loaded[0].get_parameter(name), model[0].get_parameter(name))
    assert torch.equal(get_mask(loaded[0].router), get_mask(model[0].router))


def test_masks_of_other_parameters_are_verified(path):
    model = experts()
    sk.save(model, path, format="masks")
    other = nn.Sequential(Experts(1))
    refuse(path, r"layer '0\.(up|down)' has weights that its mask drops", other)
    del other[0].up
    refuse(path, r"the model has no dense layer '0\.up' for its mask", other)
    sk.save(model, path)
    refuse(path, r"there is no layer '0\.up' with a weight", other)
    other[0].up = nn.Parameter(torch.zeros(3, 5, 9))
    refuse(path, r"layer '0\.up' has shape \(3, 5, 8\), the model's has \(3, 5, 9\)", other)


@pytest.mark.parametrize("target", ["fresh", "mixed"])
@pytest.mark.parametrize("dense", [False, True], ids=["packed", "dense"])
def test_an_interrupted_load_changes_nothing(path, target, dense):
    sk.save(MAKERS["tiered"](), path)
    assert_all_or_nothing(lambda: (TARGETS[target](),), lambda model: sk.load(model, path, dense=dense), runs=20)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", MAKERS)
def test_a_load_interrupted_anywhere_changes_nothing(path, source, target):
    sk.save(MAKERS[source](), path)
    assert_all_or_nothing(lambda: (TARGETS[target](),), lambda model: sk.load(model, path), runs=300)


def test_an_interrupted_load_of_masks_changes_nothing(path):
    sk.save(experts(), path, format="masks")

    def pair():
        model = nn.Sequential(Experts())
        model.load_state_dict(experts().state_dict())
        return (model,)

    assert_all_or_nothing(pair, lambda model: sk.load(model, path), runs=40)


def test_an_interrupted_save_leaves_the_old_file_or_the_new_one(path):
    model = mixed(make())
    sk.save(make(1), path)
    old = path.read_bytes()
    sk.save(model, path)
    new = path.read_bytes()

    def restart():
        path.write_bytes(old)
        return model, path

    def look(model, path):
        return {"content": {old: "old", new: "new"}.get(path.read_bytes())}

    assert_all_or_nothing(restart, sk.save, look, runs=80)
    sk.save(model, path)
    assert list(path.parent.iterdir()) == [path]
