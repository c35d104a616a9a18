"""MaskPro: the masks that it begins with, learns and stores, and what it refuses."""

import copy
import math

import pytest
import torch
from experts import Stacked
from interrupts import difference, model_state
from mask_learning import IMAGES, WANDA, Network, loss_fn, make, noisy, problem
from torch import nn

import sparsekit as sk
from sparsekit.masks import Pattern, get_mask
from sparsekit.prune.layers import PrunableLayer, find_layers
from sparsekit.prune.mask_arena import MaskArena


def test_it_lowers_the_loss_and_stores_the_masks():
    learner, layer = make(data=1)
    dense, seen = layer.weight.detach().clone(), []
    for step in learner.steps(600):
        seen.append(step)
        assert torch.equal(layer.weight, dense) and get_mask(layer) is None
    report = learner.finish()
    mask = get_mask(layer)
    assert [step.step for step in seen] == list(range(1, 601))
    assert report.kept and report.loss < 0.9 * report.initial_loss and 0 < report.flips <= report.groups == 32
    assert torch.equal(layer.weight, dense.masked_fill(~mask, 0)) and (mask.view(-1, 4).sum(1) == 2).all()
    held = [loss_fn(layer, batch).item() for batch in problem(1)[1][16:]]
    assert report.loss == pytest.approx(sum(held) / 8, rel=1e-5)
    assert "the learned mask is in the model" in str(report) and report.to_json()["steps"] == 600
    for act in (learner.finish, lambda: learner.learn(601)):
        with pytest.raises(RuntimeError, match=r"finish\(\)"):
            act()


def test_it_is_never_worse_than_the_initial_mask():
    """What is learned is the opposite of what counts on the batches that are held out."""
    layer, batches = problem()
    opposite = [(x, -10 * y) for x, y in batches[:16]]
    learner = sk.MaskPro(layer, loss_fn, batches=opposite, held_out=batches[16:], init=WANDA, lr=1.0, multiplier=2.0)
    pruned, _ = problem()
    sk.prune_(pruned, WANDA, opposite, calibration=sk.Calibration(forward=loss_fn))
    learner.learn(160)
    report = learner.finish()
    assert not report.kept and report.loss > report.initial_loss and report.flips > 0
    assert torch.equal(layer.weight, pruned.weight) and torch.equal(get_mask(layer), get_mask(pruned))
    assert "the initial mask is in the model" in str(report)


def test_convolutions_tails_tied_layers_and_what_where_leaves_out():
    network = Network()
    state = model_state(network)
    learner = sk.MaskPro(network, noisy, batches=IMAGES[:3], held_out=IMAGES[3:], multiplier=1.0, lr=0.5)
    learner.learn(30)
    assert not difference(model_state(network), state)
    report = learner.finish()
    assert report.layers == ("conv", "fc") and report.groups == 6 * 9 + 8
    assert {each.name for each in report.skipped} == {"tied", "other"}
    assert (get_mask(network.conv).sum(1) == 2).all()
    assert (get_mask(network.fc)[:, :4].sum(1) == 2).all() and get_mask(network.fc)[:, 4:].all()
    chosen = sk.MaskPro(Network(), noisy, batches=IMAGES, where=lambda name, _: name == "fc", axis="flatten")
    assert chosen.finish().layers == ("fc",)


@pytest.mark.parametrize("transposed", [False, True])
def test_experts_of_which_one_gets_no_token(transposed):
    experts = Stacked(transposed=transposed)
    state = model_state(experts)
    batches = [(torch.randn(12, 8), torch.tensor([0, 1, 2]).repeat(4)) for _ in range(4)]
    learner = sk.MaskPro(experts, lambda model, batch: model(*batch).square().mean(), batches=batches, multiplier=1.0)
    steps = list(learner.steps(3))
    assert not difference(model_state(experts), state) and len({step.loss for step in steps}) == 3
    assert learner.finish().groups == 4 * (24 * 2 + 8 * 3)
    for key, axis in (("gate_up_proj", 2), ("down_proj", 2)):
        mask = get_mask(experts, key).movedim(axis - transposed, -1)
        assert (mask.unflatten(-1, (-1, 4)).sum(-1) == 2).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("axis", ["input", "flatten"])
def test_a_masked_forward_is_that_of_the_masked_model(layout, axis):
    """Bit for bit, whatever the layout of a convolution's weight, and with inputs that fill no group at the end."""
    torch.manual_seed(0)
    network = Network().eval().to(memory_format=layout)
    layers = find_layers(network, Pattern.parse("2:4"), axis, None)[0]
    arena = MaskArena(layers, Pattern.parse("2:4"), torch.float32, torch.device("cpu"))
    arena.logits.normal_()
    bits, images = sk.nm_sample(arena.logits, 2, 4, seed=0), IMAGES[0].to(memory_format=layout)
    with torch.no_grad():
        with arena.masking(bits):
            masked = network(images)
        for layer, mask in arena.masks(bits):
            layer.weight.masked_fill_(~mask, 0)
        assert [layer.name for layer in layers] == ["conv", "fc"] and torch.equal(network(images), masked)


def test_initial_masks():
    layer, batches = problem()
    dense, pruned = layer.weight.detach().clone(), copy.deepcopy(layer)
    sk.prune_(pruned, sk.Magnitude("2:4"))
    mask = get_mask(pruned)
    for init in (sk.Magnitude("2:4"), pruned, {"": mask}):
        learner = sk.MaskPro(layer, loss_fn, batches=batches, init=init)
        assert torch.equal(next(learner._arena.masks(learner._initial))[1], mask)
    assert torch.equal(layer.weight, dense) and get_mask(layer) is None
    pruned.weight.data.copy_(dense)  # it keeps its mask
    assert torch.equal(
        next((kept := sk.MaskPro(pruned, loss_fn, batches=batches))._arena.masks(kept._initial))[1], mask
    )
    layer.weight.data.mul_(mask)
    with pytest.raises(ValueError, match="all zero, so no other mask can be better"):
        sk.MaskPro(layer, loss_fn, batches=batches, init=pruned)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"pattern": "50%"}, 'a pattern "n:m"'),
        ({"pattern": "4:4"}, "n < m"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"flips": 3, "multiplier": 3.0}, "pass one of the two"),
        ({"flips": 27}, r"flips must be less than 26\.6667, what equal logits give in 32 groups, got 27"),
        ({"init": sk.Wanda("1:4")}, "must choose masks of 2:4"),
        ({"init": {"": torch.arange(128).view(4, 32) > 3}}, "exactly 2 of every 4"),
        ({"init": {"": torch.ones(4, 30, dtype=torch.bool)}}, r"bool \(4, 32\)"),
        ({"init": {"body": torch.ones(4, 32, dtype=torch.bool)}}, "'body', which is no layer"),
        ({"init": nn.Linear(32, 4)}, "nothing to learn"),
        ({"axis": "output"}, "axis must be"),
        ({"multiplier": 1000}, "multiplier must be at most 28, got 1000"),
        ({"init": {"body": None}, "where": lambda *_: True}, "no layer that can be pruned and that where selects"),
        ({"draws": 0}, "draws must be positive, got 0"),
        ({"draws": 4, "parity": True}, "with parity, draws is 1, got 4"),
        ({"dtype": torch.float16}, r"dtype must be torch\.float32, torch\.bfloat16 or None, got torch\.float16"),
    ],
)
def test_what_is_wrong_is_said(options, match):
    with pytest.raises(ValueError, match=match):
        make(**options)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"seed": 1.5}, r"seed must be an int, got 1\.5"), ({"init": {"": [1]}}, "must be a tensor, got list")],
)
def test_wrong_types_are_said(options, match):
    with pytest.raises(TypeError, match=match):
        make(**options)


@pytest.mark.parametrize(
    ("loss", "kind", "match"),
    [
        (lambda model, batch: model(batch[0]), TypeError, r"a tensor \(32, 4\)"),
        (lambda model, batch: math.nan * model(batch[0]).sum(), ValueError, "is nan on batch 0"),
        (
            lambda model, batch: 0 * model(batch[0]).sum() + torch.rand((), generator=NOISE),
            ValueError,
            "for the same mask and batch",
        ),
    ],
    ids=["tensor", "nan", "own generator"],
)
def test_losses_that_cannot_be_learned_from(loss, kind, match):
    with pytest.raises(kind, match=match):
        make(loss=loss, init=sk.Magnitude("2:4"))[0].learn(1)
    with pytest.raises(ValueError, match="others to hold out, got 0 and 1"):
        sk.MaskPro(nn.Linear(4, 4), loss_fn, batches=[torch.ones(1, 4)])


NOISE = torch.Generator()


def test_the_memory_of_a_large_model():
    """LLaMA-2-7B in bfloat16: model, logits and the mask that was drawn, in GB; 28 hold the next mask as well."""
    layers = [
        PrunableLayer(f"{block}.{i}", nn.Linear(cols, rows, bias=False, device="meta", dtype=torch.bfloat16), 1)
        for block in range(32)
        for i, (rows, cols) in enumerate([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)])
    ]
    arena = MaskArena(layers, Pattern.parse("2:4"), torch.bfloat16, torch.device("meta"))
    weights = 2 * 6_738_415_616
    bits = sk.nm_sample(arena.logits, 2, 4, seed=0)
    assert arena.groups == 6_476_005_376 // 4 and bits.nbytes == 809_500_672
    assert weights + arena.logits.nbytes + bits.nbytes <= 27.3e9
    assert weights + arena.logits.nbytes + 2 * bits.nbytes <= 28.1e9
