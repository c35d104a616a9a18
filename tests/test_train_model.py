"""Sparse training of whole models: changes, unchanged state, and the end of the training."""

import copy
import io

import pytest
import torch
from torch import nn

import sparsekit as sk
from sparsekit.masks import get_mask, get_mask_info
from sparsekit.ops import transposable_mask24
from tests.compressing import assert_same, snapshot

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}
backwards = pytest.mark.parametrize("backward", ["straight_through", "transposable"])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8, bias=False))


@pytest.fixture
def x():
    return torch.randn(12, 16, generator=torch.Generator().manual_seed(1))


def train(model, optimizer, x, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def masked_copy(model, mask=lambda weight: sk.nm_mask(weight, 2, 4)):
    """Returns a plain model with the weights that sparse training multiplies by."""
    plain = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8, bias=False))
    plain.load_state_dict(model.state_dict())
    for layer in (plain[0], plain[2]):
        layer.weight.data *= mask(layer.weight)
    return plain


def test_multiplies_by_the_pruned_weight_and_changes_nothing_else(model, x):
    before = snapshot(model)
    training = sk.sparse_training_(model)
    assert torch.equal(model(x), masked_copy(model)(x))
    assert all(isinstance(layer, nn.Linear) for layer in (model[0], model[2]))
    after = snapshot(model)
    assert [entry[:2] for entry in after[0]] == [entry[:2] for entry in before[0]]  # the same module objects
    assert_same(after[1:], before[1:])
    training.undo()
    assert_same(snapshot(model), before)
    training.undo()
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("older", [True, False], ids=["older", "newer"])
def test_every_step_is_seen(model, x, make, older):
    """Masks and products follow the weights, even if an optimizer changes them without a new version."""
    optimizer = make(model.parameters()) if older else None
    sk.sparse_training_(model)
    optimizer = optimizer or make(model.parameters())
    masks = [sk.nm_mask(model[0].weight, 2, 4)]
    for _ in range(4):
        train(model, optimizer, x, steps=1)
        assert torch.equal(model(x), masked_copy(model)(x))
        masks.append(sk.nm_mask(model[0].weight, 2, 4))
    assert not torch.equal(masks[0], masks[-1])  # dropped weights came back
    model[0].weight.data.mul_(torch.rand(32, 16))
    assert torch.equal(model(x), masked_copy(model)(x))


def test_gradients_accumulate(model, x):
    sk.sparse_training_(model)
    model(x).sum().backward()
    whole = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for part in x.split(5):
        model(part).sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], whole)


@backwards
def test_finish_makes_the_weights_what_was_multiplied(model, x, backward):
    with sk.sparse_training_(model, backward=backward) as training:
        train(model, torch.optim.AdamW(model.parameters(), lr=0.05), x)
        y = model(x)
        training.finish()
    assert torch.equal(model(x), y)
    assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear]
    for layer in (model[0], model[2]):
        mask = get_mask(layer)
        assert (mask.reshape(-1, 4).sum(1) == 2).all() and torch.equal(layer.weight != 0, mask)
        assert str(get_mask_info(layer).pattern) == "2:4" and get_mask_info(layer).axis == 1
        if backward == "transposable":
            assert (mask.t().reshape(-1, 4).sum(1) == 2).all()
    assert "weight_mask" not in str(list(model.state_dict()))


def test_a_finished_model_goes_on(model, x, ratios, tmp_path):
    """keep_masks, save, load and compress_ treat the model as one that prune_ made."""
    training = sk.sparse_training_(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, x)
    training.finish()
    with sk.keep_masks(model, optimizer):
        train(model, optimizer, x)
    y = model.eval()(x)
    sk.save(model, tmp_path / "model.safetensors")
    for layer in (model[0], model[2]):
        assert (layer.weight[~get_mask(layer)] == 0).all()
    assert sk.compress_(model).swapped == ("0", "2") and isinstance(model[0], sk.nn.Linear24)
    torch.testing.assert_close(model(x), y)
    loaded = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8, bias=False)).eval()
    sk.load(loaded, tmp_path / "model.safetensors")
    torch.testing.assert_close(loaded(x), y)


def test_the_end_of_a_block_undoes(model, x):
    with pytest.raises(KeyError, match="boom"), sk.sparse_training_(model):
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), x)
        weight = model[0].weight.detach().clone()
        raise KeyError("boom")
    assert type(model[0]) is nn.Linear and get_mask(model[0]) is None
    assert torch.equal(model[0].weight, weight) and (weight != 0).all()


def test_finish_rejects_nan_and_changes_nothing(model):
    training = sk.sparse_training_(model)
    model[2].weight.data[1, 3] = torch.nan
    before = snapshot(model)
    with pytest.raises(ValueError, match="the weight of 2 contains NaN"):
        training.finish()
    assert_same(snapshot(model)[3:], before[3:])
    assert (model[0].weight != 0).all() and type(model[0]) is not nn.Linear
    model[2].weight.data[1, 3] = 0
    training.finish()
    assert type(model[0]) is nn.Linear


@backwards
def test_training_resumes_from_a_state_dict(model, x, backward):
    def fresh():
        other = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8, bias=False))
        sk.sparse_training_(other, backward=backward, decay=0.01)
        return other, torch.optim.AdamW(other.parameters(), lr=0.01)

    other, other_optimizer = fresh()
    sk.sparse_training_(model, backward=backward, decay=0.01)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, x)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    train(model, optimizer, x)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other.load_state_dict(weights), other_optimizer.load_state_dict(state)
    train(other, other_optimizer, x)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: _pickled(model)], ids=["deepcopy", "pickle"])
def test_copies_train_on_their_own(model, x, duplicate):
    training = sk.sparse_training_(model, backward="transposable")
    twin = duplicate(model)
    assert torch.equal(twin(x), model(x))
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.1), x)
    assert torch.equal(twin(x), masked_copy(twin, transposable_mask24)(x))
    assert not torch.equal(twin(x), model(x))
    training.finish()
    assert type(twin[0]) is not nn.Linear
    sk.sparse_training_(twin).finish()  # with its own handle and another kind of mask
    assert torch.equal(get_mask(twin[0]), sk.nm_mask(twin[0].weight, 2, 4))


def _pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_an_average_of_weights_trains_and_finishes(model, x):
    sk.sparse_training_(model)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    for _ in range(3):
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), x, steps=1)
        average.update_parameters(model)
    assert torch.equal(average(x), masked_copy(average.module)(x))
    sk.sparse_training_(average.module).finish()
    assert torch.equal(average(x), masked_copy(average.module)(x))


def test_hooks_go_on(model, x):
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    training = sk.sparse_training_(model)
    model(x.requires_grad_()).sum().backward()
    training.finish()
    model(x)
    assert calls == ["forward", "backward", "forward"]


def test_moves_and_dtypes(model, x):
    training = sk.sparse_training_(model)
    model.to(torch.bfloat16)
    assert model(x.bfloat16()).dtype == torch.bfloat16
    training.finish()
    assert (get_mask(model[0]).reshape(-1, 4).sum(1) == 2).all() and model[0].weight.dtype == torch.bfloat16


def test_a_gradient_scaler_and_autocast(model, x):
    sk.sparse_training_(model)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=1024.0)
    weight = model[0].weight.detach().clone()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(x).square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert not torch.equal(model[0].weight, weight) and torch.isfinite(model[0].weight).all()


def test_a_compiled_model_trains_and_notices_the_end(model, x):
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    trainings = [sk.sparse_training_(each) for each in (model, twin)]
    for each, run in ((model, compiled), (twin, twin)):
        train(run, torch.optim.AdamW(each.parameters(), lr=0.01, fused=True), x)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), twin.parameters(), strict=True))
    trainings[0].undo()
    trainings[1].undo()
    assert torch.equal(compiled(x), twin(x))
