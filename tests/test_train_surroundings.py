"""Sparse training in many surroundings: weights that are read without a call, interrupts, sharding, torch's modes."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import sparsekit as sk
from sparsekit.masks import get_mask
from sparsekit.ops.train24 import train_linear24
from tests.interrupts import assert_all_or_nothing, model_state


@pytest.fixture
def model():
    return network()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))


class Reads(nn.Module):
    """A module that calls one layer and reads the weight of the other."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return F.linear(self.a(x).relu(), self.b.weight, self.b.bias)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "copied"])
def test_a_layer_that_is_read_and_not_called_stays_dense(wrapped):
    model = Reads()
    training = sk.sparse_training_(model)
    if wrapped:
        model = copy.deepcopy(model)
        training = sk.sparse_training_(model)
    weight, y = model.b.weight.detach().clone(), model(X)
    assert [layer.product for layer in training.layers] == ["masked dense", "masked dense"]
    training.finish()
    assert torch.equal(model(X), y) and torch.equal(model.b.weight, weight)
    assert get_mask(model.a) is not None and get_mask(model.b) is None and type(model.b) is nn.Linear
    assert [layer.reason for layer in training.layers] == [
        "its sparse training is over",
        "it was never called: what reads its weight instead goes on with the dense one",
    ]
    training.finish()
    assert training.layers[1].reason.startswith("it was never called")


def test_also_where_no_other_layer_trains_sparse():
    model = Reads()
    training = sk.sparse_training_(model, where=lambda name, _: name == "b")
    other = sk.sparse_training_(model, where=lambda name, _: name == "a")
    y = model(X)
    other.undo()
    assert not torch.equal(model(X), y)
    y = model(X)
    training.finish()
    assert torch.equal(model(X), y) and get_mask(model.b) is None
    assert not model._forward_pre_hooks and "_ran_sparse" not in model.__dict__


def test_a_model_that_has_not_run_is_finished_whole():
    """An example is a plain copy of a sharded model, whose weights were trained elsewhere."""
    model = Reads()
    sk.sparse_training_(model).finish()
    assert get_mask(model.a) is not None and get_mask(model.b) is not None


def test_what_was_called_before_a_copy_counts(model):
    sk.sparse_training_(model)
    model(X)
    twin = copy.deepcopy(model)
    sk.sparse_training_(twin, backward="transposable").finish()
    assert get_mask(twin[0]) is not None and get_mask(twin[2]) is not None


def test_input_by_its_name(model):
    layer = model[0]
    sk.sparse_training_(layer)
    assert torch.equal(layer(input=X), layer(X))


def started(decay=0.01):
    model = network()
    return model, sk.sparse_training_(model, decay=decay)


def masked():
    model = network()
    sk.prune_(model[0], sk.Magnitude("1:4"))
    return (model,)


def running():
    model, _ = started()
    sk.sparse_training_(model, backward="transposable", where=lambda name, _: name == "2")
    return (model,)


@pytest.mark.parametrize("make", [masked, running])
def test_an_interrupted_start_changes_nothing(make):
    assert_all_or_nothing(make, sk.sparse_training_, _look, runs=50, last=70)


@pytest.mark.parametrize("act", ["finish", "undo"])
def test_an_interrupted_end_changes_nothing(act):
    def make():
        model, training = started()
        model[0].weight.data[0, 0] = -0.0
        model(X)
        return model, training

    assert_all_or_nothing(make, lambda _, training: getattr(training, act)(), _look, runs=60, last=70)


def _look(model, *_):
    recipes = {f"{name}:recipe": module.__dict__.get("recipe") for name, module in model.named_modules()}
    return model_state(model) | recipes


def test_two_trainings_of_one_model(model):
    first, second = sk.sparse_training_(model), sk.sparse_training_(model, decay=0.5)
    assert model[0].recipe.decay == 0.5
    first.finish()
    weight = model[0].weight.detach().clone()
    second.finish(), first.undo(), second.undo()
    assert torch.equal(model[0].weight, weight) and get_mask(model[0]) is not None


def test_an_undone_training_cannot_be_finished(model):
    training = sk.sparse_training_(model)
    training.undo()
    with pytest.raises(ValueError, match="the sparse training of this model was undone: there is nothing to finish"):
        training.finish()
    assert get_mask(model[0]) is None


def test_what_is_infinite_is_refused(model):
    training = sk.sparse_training_(model)
    model[2].weight.data[0, 0] = -torch.inf
    with pytest.raises(ValueError, match="the weight of 2 contains Inf"):
        training.finish()
    assert get_mask(model[0]) is None


@pytest.mark.parametrize(
    "compute",
    [nn.utils.parametrizations.weight_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)],
    ids=["parametrized", "torch-prune"],
)
def test_a_weight_that_is_computed_since(model, compute):
    training = sk.sparse_training_(model)
    compute(model[2])
    for end in (training.finish, training.undo):
        with pytest.raises(ValueError, match="the weight of 2 is computed since its training began: remove its param"):
            end()
    assert type(model[0]) is not nn.Linear and get_mask(model[0]) is None and model(X).shape == (5, 4)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_sharded_models_are_finished_elsewhere(model):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        flattened = copy.deepcopy(model)
        flattened[0].weight = nn.Parameter(torch.randn(128))  # like the shard of a wrapped layer
        assert sk.sparse_training_(flattened).layers[1].reason.startswith("its weight has 1 dimensions: FSDP flattens")
        old = FullyShardedDataParallel(copy.deepcopy(model), use_orig_params=True, device_id=torch.device("cpu"))
        fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        for sharded in (model, old):
            training = sk.sparse_training_(sharded)
            sharded(X).sum().backward()
            with pytest.raises(ValueError, match="sharded by FSDP: finish a plain copy that has loaded its full state"):
                training.finish()
        training = sk.sparse_training_(alone := network())
        fully_shard(alone[0], mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="sharded by FSDP"):
            training.undo()
    finally:
        dist.destroy_process_group()


def test_default_dtype_and_device(model):
    expected, training = copy.deepcopy(model), sk.sparse_training_(model)
    sk.sparse_training_(expected).finish()
    torch.set_default_dtype(torch.float64), torch.set_default_device("meta")
    try:
        model(X).sum().backward()
        training.finish()
    finally:
        torch.set_default_dtype(torch.float32), torch.set_default_device(None)
    assert torch.equal(model[0].weight, expected[0].weight) and get_mask(model[0]).device.type == "cpu"


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes(model, mode, tmp_path):
    """A model that was finished in a mode can be trained, copied and saved outside of it."""
    with mode():
        training = sk.sparse_training_(model)
        y = model(X)
        training.finish()
        assert torch.equal(model(X), y)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with mode():
        keeper = sk.keep_masks(model, optimizer)
    model(X).sum().backward()
    optimizer.step()
    keeper.remove()
    assert torch.equal(copy.deepcopy(model)[0].weight != 0, get_mask(model[0]))
    sk.save(model, tmp_path / "model.safetensors")


@pytest.mark.parametrize("transposable", [False, True])
@pytest.mark.parametrize("frozen, kept", [("weight", {"other"}), ("x", {"x"}), ("both", set()), ("", {"x", "other"})])
def test_saves_what_the_gradients_want(transposable, frozen, kept):
    x, weight = torch.randn(32, 128).bfloat16(), torch.randn(128, 128).bfloat16()
    pruned = sk.nm_prune(weight, 2, 4)[0]
    bias = torch.zeros(128, dtype=torch.bfloat16, requires_grad=True)
    x.requires_grad_(frozen not in ("x", "both")), pruned.requires_grad_(frozen not in ("weight", "both"))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = train_linear24(x, pruned, bias, transposable=transposable, layout="cutlass_sm80")
    assert {"x" if tensor.shape == x.shape else "other" for tensor in saved} == kept
    y.sum().backward()
    assert (x.grad is None, pruned.grad is None) == (not x.requires_grad, not pruned.requires_grad)
