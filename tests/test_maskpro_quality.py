"""How well MaskPro learns, what each part of its step adds, and the defaults that follow from the number of groups."""

import math

import pytest
import torch
from digits import DIFFUSION, digits, trained
from mask_learning import loss_fn, make
from torch import nn

import sparsekit as sk
from sparsekit.masks import Pattern
from sparsekit.prune.advantage import Advantage, flip_probability, lr_for, multiplier_for
from sparsekit.prune.flips import best_flips
from sparsekit.prune.layers import PrunableLayer
from sparsekit.prune.mask_arena import MaskArena


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_the_scale_of_the_loss_does_not_matter(scale):
    plain, _ = make(multiplier=2.0)
    scaled, _ = make(multiplier=2.0, loss=lambda *args: scale * loss_fn(*args))
    plain.learn(40)
    scaled.learn(40)
    torch.testing.assert_close(plain.state_dict()["logits"], scaled.state_dict()["logits"], rtol=1e-3, atol=1e-3)


def test_advantages_by_hand():
    plain = Advantage(0.75, normalize=False)
    first, plain = plain.after(4.0)  # the mean becomes 1
    second, plain = plain.after(9.0)  # 3
    assert (first, second, plain.mean) == (3.0, 6.0, 3.0)
    even = Advantage(0.75)
    first, even = even.after(4.0)
    second, even = even.after(6.0)  # a mean of 5 and a variance of 1
    assert (first, second, even.mean, even.variance) == (0.0, 2.0, 5.0, 1.0)


def test_the_flips_that_follow_from_draws_by_hand():
    assert best_flips(100, [1.0, 3.0]) == pytest.approx(50)  # a mean of 2 and a deviation of sqrt(2)
    assert best_flips(100, [-1.0, 1.0]) == best_flips(100, [-2.0, -1.0]) == best_flips(100, [-1.0, 2.0]) == 100
    assert best_flips(100, [2.0, 2.0]) == pytest.approx(100 / 30) and best_flips(10, [2.0, 2.0]) == 1
    assert best_flips(0.5, [2.0, 2.0]) == best_flips(0.5, [-1.0, 1.0]) == 0.5  # of one group


def test_the_steps_of_a_turn_have_the_likeliest_mask_as_baseline():
    learner, _ = make(multiplier=1.0, lr=3.0)
    steps, expected = [], []
    for turn in range(4):
        with learner._losses.running():
            expected += learner._losses.of(learner._arena.likeliest(), [turn])
        steps += learner.steps(4 * turn + 4)
    assert [step.turn for step in steps] == [turn for turn in range(4) for _ in range(4)]
    assert [step.baseline for step in steps[::4]] == expected and len({step.loss for step in steps}) > 8
    assert all(step.baseline == steps[step.step - 1 - (step.step - 1) % 4].baseline for step in steps)
    assert steps[0].baseline == steps[0].initial_loss and steps[12].baseline != steps[12].initial_loss


def test_the_multiplier_gives_the_number_of_flips():
    assert flip_probability(10, 2, 4) == pytest.approx(1.36e-4, rel=2e-3)  # measured, of the published code
    assert lr_for(10, 2, 4) == 2.5 and lr_for(3, 2, 4) == pytest.approx(3 * 0.005 / 0.134, rel=2e-2)
    assert flip_probability(0, 2, 4) == pytest.approx(5 / 6) and flip_probability(0, 1, 4) == pytest.approx(3 / 4)
    assert flip_probability(multiplier_for(None, 1, 2, 4), 2, 4) == pytest.approx(5 / 12)
    assert flip_probability(multiplier_for(None, 100, 2, 4), 2, 4) == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"flips must be less than 83\.3333, what equal logits give in 100 groups"):
        multiplier_for(84, 100, 2, 4)
    multiplier = multiplier_for(500, 20_000, 4, 8)
    layer = nn.Linear(400, 400)
    arena = MaskArena([PrunableLayer("", layer, 1)], Pattern.parse("4:8"), torch.float32, torch.device("cpu"))
    bits = arena.pack([torch.arange(8).repeat(400, 50) < 4])
    arena.set_logits(bits, multiplier)
    assert torch.equal(arena.likeliest(), bits) and arena.flips(bits, bits) == 0
    drawn = arena.flips(bits, sk.nm_sample(arena.logits, 4, 8, seed=1))
    assert abs(drawn - 500) < 4 * math.sqrt(500)


KINDS = ("vanilla", "unpaired", "residual", "tracker", "normalized", "likeliest")


def learned(kind, seed):
    """The losses of the initial and of the likeliest mask after learning by advantages of this kind."""
    learner, _ = make(seed, lr=0.05, multiplier=3.0, seed=seed)
    if kind != "likeliest":
        learner._draws, learner._of_likeliest = 1, lambda indices, initial: initial
    if kind not in ("normalized", "likeliest"):
        learner._advantage = Advantage(0.99 if kind in ("tracker", "unpaired") else 1.0, normalize=False)
    own = learner._of_initial
    if kind == "vanilla":
        learner._of_initial = lambda indices: [0.0] * len(indices)
    if kind == "unpaired":
        learner._of_initial = lambda indices: own([(i + 5) % 16 for i in indices])
    learner._check_every = 10**9
    learner.learn(2000)
    both = learner._initial, learner._arena.likeliest()
    with learner._losses.running():
        return [sum(learner._losses.of(bits, range(16))) / 16 for bits in both]


@pytest.mark.slow
def test_the_published_ablation():
    """The paper's: the loss alone fails, and so do baselines of other batches; each part makes it better."""
    losses = torch.tensor([[learned(kind, seed) for seed in range(3)] for kind in KINDS]).mean(1)
    vanilla, unpaired, residual, tracker, normalized, likeliest = losses[:, 1].tolist()
    assert vanilla > unpaired > residual > tracker > normalized > likeliest, losses
    assert vanilla > 2 * losses[0, 0] and normalized < losses[0, 0], losses


@pytest.mark.slow
def test_a_trained_unet_predicts_noise_better(data):
    """By the defaults: from Wanda's mask with swaps, 0.465, to 0.306 in 320 steps, on digits not learned from."""
    model, images = trained(data), digits(data, 2048)
    learner = sk.MaskPro(
        model,
        lambda model, x: DIFFUSION.loss(model, x),
        batches=list(images[:1024].split(32)),
        held_out=list(images[1024:].split(128)),
    )
    learner.learn(320)
    report = learner.finish()
    assert report.kept and report.loss < 0.8 * report.initial_loss
