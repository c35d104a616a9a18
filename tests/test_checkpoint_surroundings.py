"""save and load under every mode and default of torch, on models that are not all here, and interrupted anywhere."""

import contextlib

import pytest
import torch
from checkpoints import MAKERS, TARGETS, TOKENS, Net, contents, make, mixed, refuse
from interrupts import assert_all_or_nothing
from safetensors.torch import load_file
from torch import nn

import sparsekit as sk
from sparsekit.masks import MaskInfo, Pattern, get_mask, get_mask_info, set_mask


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


SURROUNDINGS = {
    "inference": torch.inference_mode,
    "no-grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "default-meta": lambda: default_device("meta"),
}


@pytest.mark.parametrize("around", SURROUNDINGS)
@pytest.mark.parametrize("source", MAKERS)
def test_surroundings_change_nothing(path, source, around):
    model, loaded, dense = MAKERS[source](), TARGETS["mixed"](), make(1)
    with SURROUNDINGS[around]():
        sk.save(model, path)
        sk.load(loaded, path)
        sk.load(dense, path, dense=True)
    assert contents(loaded) == contents(model)
    for each in (loaded, dense):
        tensors = [*each.parameters(), *each.buffers()]
        assert not any(tensor.is_inference() or tensor.is_meta for tensor in tensors)
    dense.train()(TOKENS).sum().backward()
    assert dense.first.weight.grad is not None and dense.third.bias.grad is not None


def test_a_packed_checkpoint_is_written_under_another_default_device(path):
    with torch.device("meta"):
        sk.save(nn.Sequential(sk.nn.Linear24(8, 4, device="cpu")), path, format="sparse-24-bitmask")
    assert load_file(path)["0.shape"].flatten().tolist() == [4, 8]


def test_a_model_made_in_inference_mode_can_be_trained_once_it_is_loaded(path):
    sk.save(MAKERS["tiered"](), path)
    with torch.inference_mode():
        loaded = make(1)
        sk.load(loaded, path)
    loaded.train()(TOKENS).sum().backward()
    assert loaded.third.dense.grad is not None and loaded.first.weight.grad is not None


def test_what_is_frozen_stays_frozen(path):
    sk.save(MAKERS["tiered"](), path)
    loaded = make(1)
    loaded.requires_grad_(False)
    loaded.conv.requires_grad_(True)
    before = {name: parameter.requires_grad for name, parameter in loaded.named_parameters()}
    sk.load(loaded, path, dense=True)
    assert {name: parameter.requires_grad for name, parameter in loaded.named_parameters()} == before


@pytest.mark.parametrize("kind", ["buffer", "attribute"])
def test_what_would_stay_on_the_meta_device_is_named(path, kind):
    class Positions(Net):
        def __init__(self):
            super().__init__()
            positions = torch.arange(5)
            if kind == "buffer":
                self.norm.register_buffer("positions", positions, persistent=False)
            else:
                self.norm.positions = positions

    sk.save(Positions(), path)
    with torch.device("meta"):
        loaded = Positions().eval()
    modules, keys = list(loaded.modules()), [sorted(vars(module)) for module in loaded.modules()]
    with pytest.raises(ValueError, match=r"cannot load .*norm\.positions would stay on the meta device"):
        sk.load(loaded, path)
    assert all(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    assert list(loaded.modules()) == modules and [sorted(vars(module)) for module in modules] == keys
    loaded.norm.positions = torch.arange(5)
    sk.load(loaded, path)
    assert not any(parameter.is_meta for parameter in loaded.parameters())


def holding(tensor):
    model = nn.Module()
    model.register_buffer("odd", tensor)
    return model


WRAPPED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
UNSAVED = {
    "complex128": (
        torch.zeros(2, dtype=torch.complex128),
        "odd is torch.complex128, which safetensors has no name for",
    ),
    "sparse": (torch.eye(2).to_sparse(), r"odd is torch.sparse_coo, only strided tensors are saved"),
    "wrapped": (WRAPPED, "odd is a NestedTensor, which holds other tensors: only plain ones are saved"),
    "meta": (torch.zeros(2, device="meta"), "odd is on the meta device and has no data to save"),
}


@pytest.mark.parametrize("name", UNSAVED)
def test_tensors_that_cannot_be_written_are_named(path, name):
    tensor, match = UNSAVED[name]
    with pytest.raises(ValueError, match=match):
        sk.save(holding(tensor), path)
    assert not list(path.parent.iterdir())


def test_lazy_modules_are_named(path):
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"0\.weight is not initialized: run the model on an input first"):
        sk.save(model, path)
    sk.save(nn.Sequential(nn.Linear(2, 3)), path)
    with pytest.raises(ValueError, match=r"0\.weight is not initialized: run the model on an input first"):
        sk.load(model, path)


def test_sharded_models_are_refused_by_name(path):
    dist = pytest.importorskip("torch.distributed")
    from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

    plain, sharded = nn.Sequential(nn.Linear(8, 4)), nn.Sequential(nn.Linear(8, 4))
    sk.prune_(sharded, sk.Magnitude("2:4"))
    sk.save(sharded, path)
    sk.save(sharded, path.with_name("masks"), format="masks")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded[0].weight = nn.Parameter(distribute_tensor(sharded[0].weight.detach(), mesh, [Replicate()]))
        with pytest.raises(ValueError, match=r"0\.weight is sharded over processes: gather the model first"):
            sk.save(sharded, path.with_name("other"))
        for name in (path, path.with_name("masks")):
            with pytest.raises(ValueError, match=r"sharded over processes: gather the model first"):
                sk.load(sharded, name)
        assert type(sharded[0].weight).__name__ == "DTensor"
        sk.load(plain, path)
    finally:
        dist.destroy_process_group()


def test_conjugates_are_written_as_they_read(path):
    values = torch.tensor([1 + 2j, 3 - 4j])
    sk.save(holding(values.conj()), path)
    loaded = holding(torch.zeros(2, dtype=torch.complex64))
    sk.load(loaded, path)
    assert loaded.odd.tolist() == [1 - 2j, 3 + 4j]


# Masks of parameters with other names, as those of experts.


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


# Interrupts: what comes out is all or nothing.


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
