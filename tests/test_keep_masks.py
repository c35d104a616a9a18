"""Fine-tuning with the stored masks kept."""

import pytest
import torch
from torch import nn

import sparsekit as sk
from sparsekit.masks import get_mask

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "adam-l2-amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}
optimizers = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 4, 10), nn.Tanh(), nn.Linear(10, 3))


@pytest.fixture
def x():
    return torch.randn(16, 4, 4, 4, generator=torch.Generator().manual_seed(1))


def train(model, optimizer, x, steps=5):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def masked(model):
    return [(module.weight, get_mask(module)) for module in model.modules() if get_mask(module) is not None]


def assert_kept(model, optimizer):
    assert len(masked(model)) == 3
    for weight, mask in masked(model):
        assert (weight[~mask] == 0).all() and (weight[mask] != 0).all()
        states = [s for s in optimizer.state[weight].values() if torch.is_tensor(s) and s.shape == weight.shape]
        assert states
        for state in states:
            assert (state[~mask] == 0).all() and (state[mask] != 0).any()


@optimizers
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_weights_and_moments_obey_the_masks(model, x, make, used):
    optimizer = make(model.parameters())
    if used:  # moments from before the masks would move dropped weights
        train(model, optimizer, x)
    sk.prune_(model, sk.Magnitude("2:4"))
    before = [weight.detach().clone() for weight, _ in masked(model)]
    with sk.keep_masks(model, optimizer):
        train(model, optimizer, x)
    assert_kept(model, optimizer)
    for old, (weight, mask) in zip(before, masked(model), strict=True):
        assert (old != weight)[mask].float().mean() > 0.7  # not all: the masks cut two hidden units off


def test_without_it_dropped_weights_come_back(model, x):
    sk.prune_(model, sk.Magnitude("2:4"))
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, x)
    assert all((weight[~mask] != 0).any() for weight, mask in masked(model))


def test_a_kept_zero_trains(model, x):
    sk.prune_(model, sk.Magnitude("2:4"))
    weight, mask = masked(model)[-1]
    with torch.no_grad():
        weight.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sk.keep_masks(model, optimizer):
        train(model, optimizer, x, steps=1)
    assert torch.equal(weight != 0, mask & (weight.grad != 0)) and (weight[mask] != 0).any()


def test_equals_training_the_masked_function(model, x):
    """Masked gradients are those of weight * mask, so SGD on either takes the same steps."""
    sk.prune_(model, sk.Magnitude("2:4"), where=lambda name, _: name == "4")
    weight, mask = masked(model)[0]
    free = weight.detach().clone().requires_grad_()
    with torch.no_grad():
        features = model[:4](x)
    optimizer, reference = (
        torch.optim.SGD([weight], lr=0.1, momentum=0.9),
        torch.optim.SGD([free], lr=0.1, momentum=0.9),
    )
    with sk.keep_masks(model, optimizer):
        for _ in range(5):
            for parameters, opt in ((weight, optimizer), (free * mask, reference)):
                opt.zero_grad()
                (features @ parameters.t()).square().mean().backward()
                opt.step()
    torch.testing.assert_close(weight, free.detach() * mask)


def test_clipping_sees_masked_gradients(model, x):
    sk.prune_(model, sk.Magnitude("2:4"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sk.keep_masks(model, optimizer):
        for _ in range(2):  # accumulated
            model(x).square().mean().backward()
        assert all((weight.grad[~mask] == 0).all() and (weight.grad[mask] != 0).any() for weight, mask in masked(model))
        kept = [p.grad.norm() for p in model.parameters()]
        total = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    torch.testing.assert_close(total, torch.stack(kept).norm())


def test_a_gradient_scaler_may_skip_the_step(model, x):
    sk.prune_(model, sk.Magnitude("2:4"))
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)  # overflows at first
    before = [weight.detach().clone() for weight, _ in masked(model)]
    with sk.keep_masks(model, optimizer):
        scaler.scale(model(x).square().sum() * 1e3).backward()
        assert not all(torch.isfinite(weight.grad).all() for weight, _ in masked(model))
        assert all((weight.grad[~mask] == 0).all() for weight, mask in masked(model))
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(old, weight) for old, (weight, _) in zip(before, masked(model), strict=True))
        scaler.update(1.0)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
    for weight, mask in masked(model):
        assert torch.equal(weight != 0, mask)


def test_parameter_groups_and_frozen_layers(model, x):
    sk.prune_(model, sk.Magnitude("2:4"))
    model[0].requires_grad_(False)
    groups = [{"params": model[2].parameters(), "lr": 0.2}, {"params": model[4].parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    frozen = model[0].weight.detach().clone()
    with sk.keep_masks(model, optimizer):
        train(model, optimizer, x)
        model[0].requires_grad_(True)  # gradual unfreezing: the new group is kept too
        optimizer.add_param_group({"params": model[0].parameters()})
        assert torch.equal(model[0].weight, frozen)
        train(model, optimizer, x)
    assert_kept(model, optimizer)
    assert not torch.equal(model[0].weight, frozen)


def test_remove_ends_it(model, x):
    sk.prune_(model, sk.Magnitude("2:4"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keeper = sk.keep_masks(model, optimizer)
    train(model, optimizer, x)
    assert all((weight[~mask] == 0).all() for weight, mask in masked(model))
    keeper.remove()
    keeper.remove()
    train(model, optimizer, x)
    assert all((weight[~mask] != 0).any() for weight, mask in masked(model))


def test_masks_are_those_stored_not_the_zeros(model):
    sk.prune_(model, sk.Magnitude("2:4"))
    with torch.no_grad():
        model[2].weight.fill_(1.0)  # nothing is zero now
    sk.keep_masks(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert torch.equal(model[2].weight != 0, get_mask(model[2]))


def test_rejects_a_model_without_masks(model):
    with pytest.raises(ValueError, match="no layer of the model has a stored mask"):
        sk.keep_masks(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_rejects_a_foreign_optimizer(model):
    sk.prune_(model, sk.Magnitude("2:4"))
    with pytest.raises(ValueError, match="optimizer holds none of the masked weights"):
        sk.keep_masks(model, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))


def test_rejects_a_compressed_layer(ratios):
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    sk.prune_(model, sk.Magnitude("2:4"))
    sk.compress_(model)
    with pytest.raises(ValueError, match="layer '0' is compressed: call decompress_ first"):
        sk.keep_masks(model, torch.optim.SGD(model.parameters(), 0.1))
