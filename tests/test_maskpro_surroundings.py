"""MaskPro after kills and interrupts, in several processes, and in other modes of torch."""

import copy
import math

import pytest
import torch
from interrupts import assert_all_or_nothing, count_lines, difference, interrupted, model_state
from mask_learning import IMAGES, WANDA, Network, loss_fn, make, noisy, problem
from torch import nn

import sparsekit as sk
from sparsekit.prune.advantage import multiplier_for

MASK = torch.tensor([True, True, False, False]).repeat(8, 2)


def test_surroundings():
    """It may be made and used in inference mode and under autocast, and goes on outside; loaders are read once."""
    plain, _ = make(lr=0.3, multiplier=2.0)
    plain.learn(20)
    layer, batches = problem()
    with torch.inference_mode():
        options = {"init": WANDA, "lr": 0.3, "multiplier": 2.0}
        other = sk.MaskPro(layer, loss_fn, batches=batches[:16], held_out=batches[16:], **options)
        other.learn(10)
    other.learn(20)
    assert torch.equal(other.state_dict()["logits"], plain.state_dict()["logits"])
    other.finish()
    assert layer(torch.ones(1, 32)).requires_grad
    network = Network().bfloat16().train()
    loader = torch.utils.data.DataLoader(torch.stack(IMAGES).flatten(0, 1), batch_size=3, shuffle=True)
    with torch.autocast("cpu", torch.bfloat16):
        learner = sk.MaskPro(network, lambda model, x: model(x).float().square().mean(), batches=loader)
        learner.learn(3)
        learner.finish()
    assert learner.state_dict()["logits"].dtype == torch.bfloat16 and network.training


@pytest.mark.parametrize(
    "options", [{}, {"multiplier": 2.0, "lr": 0.3, "parity": True}, {"dtype": torch.bfloat16}], ids=str
)
def test_a_killed_learner_goes_on_exactly(tmp_path, options):
    whole, _ = make(**options)
    whole._check_every = 5
    at_zero = copy.deepcopy(whole.state_dict())
    whole.learn(30)
    killed, _ = make(**options)
    killed._check_every = 5
    begun = killed.state_dict()["multiplier"]
    killed.learn(13)
    assert options.get("parity") or killed.state_dict()["multiplier"] != begun  # it follows from measured losses
    with sk.runs.Run.open(tmp_path / "run", {}) as run:
        run.restore(learner=killed)
        run.step = 13
        run.save()
    with sk.runs.Run.open(tmp_path / "run", {}) as run:
        again, _ = make(**options)
        again._check_every = 10**9
        assert run.restore(learner=again)
    assert torch.equal(again.state_dict()["best"], killed.state_dict()["best"])
    again._check_every = 5
    again.learn(30)
    expected = whole.state_dict()
    for key, value in again.state_dict().items():
        assert torch.equal(value, expected[key]) if isinstance(value, torch.Tensor) else value == expected[key], key
    again.load_state_dict(at_zero)
    again.learn(30)
    assert torch.equal(again.state_dict()["logits"], expected["logits"])
    other, _ = make(**{**options, "seed": 1})
    with pytest.raises(ValueError, match="seed 0, and this learner 1"):
        other.load_state_dict(expected)


def test_parity_begins_with_the_initial_mask():
    learner, _ = make(parity=True)
    first = next(learner.steps(1))
    assert first.loss == first.initial_loss and first.advantage == 0
    assert learner.finish().multiplier == 10
    other, _ = make(parity=True, flips=5.0, lr=2.0)
    assert other.finish().multiplier == multiplier_for(5.0, 32, 2, 4) and other.state_dict()["lr"] == 2


def test_ranks_learn_what_one_process_learns(ranks):
    def learn(model, batches, held, microbatches):
        learner = sk.MaskPro(
            model,
            loss_fn,
            batches=batches,
            held_out=held,
            init=sk.Magnitude("2:4"),
            multiplier=2.0,
            lr=0.3,
            microbatches=microbatches,
        )
        steps = list(learner.steps(100))
        return learner.state_dict()["logits"], steps, learner.finish()

    (layer, batches), models = problem(), [problem()[0] for _ in range(2)]
    logits, steps, report = learn(layer, batches[:16], batches[16:], 2)
    for rank, result in enumerate(
        ranks(lambda rank: learn(models[rank], batches[rank:16:2], batches[16 + rank :: 2], 1))
    ):
        assert not isinstance(result, BaseException), result
        assert torch.equal(result[0], logits) and result[1] == steps and result[2] == report
        assert torch.equal(models[rank].weight, layer.weight)


def test_a_failure_in_one_rank_ends_all(ranks):
    def failing(model, batch):
        if batch[0].isnan().any():
            raise ZeroDivisionError("bad batch")
        return loss_fn(model, batch)

    def learn(rank):
        layer, batches = problem()
        if rank == 1:
            batches[3][0].fill_(math.nan)
        sk.MaskPro(layer, failing, batches=batches, held_out=batches[:1], init=sk.Magnitude("2:4")).learn(10)

    first, second = ranks(learn)
    assert isinstance(second, ZeroDivisionError) and "rank 1 failed with ZeroDivisionError" in str(first)


def test_an_interrupt_leaves_the_model_as_it_was():
    def setup():
        torch.manual_seed(0)
        network = Network()
        sk.prune_(network, sk.Magnitude("1:4"), where=lambda name, _: name == "fc")
        return (network,)

    def act(network):
        sk.MaskPro(network, noisy, batches=IMAGES[:3], held_out=IMAGES[3:], init=WANDA).learn(1)

    (network,) = setup()
    before, random = model_state(network), torch.get_rng_state()
    lines = count_lines(lambda: act(network))
    for line in range(0, lines, lines // 20):
        assert interrupted(lambda: act(network), line), line
        assert not difference(model_state(network), before), line
        assert torch.equal(torch.get_rng_state(), random)

    def finishing(network, learner):
        learner.finish()

    def learned():
        (network,) = setup()
        return network, sk.MaskPro(network, noisy, batches=IMAGES[:3], held_out=IMAGES[3:], init=sk.Magnitude("2:4"))

    assert_all_or_nothing(learned, finishing, lambda model, _: model_state(model), runs=15)


class Reader(nn.Module):
    """Reads the weight of its first layer without calling it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.read, self.called = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.called(nn.functional.linear(x, self.read.weight).relu())


@pytest.mark.parametrize(
    "init", [sk.Magnitude("2:4"), None, {"read": MASK, "called": MASK[:4]}], ids=["Magnitude", "Wanda", "masks"]
)
def test_layers_that_are_read_without_a_call_are_left_out(init):
    model, batches = Reader(), list(torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(0)))
    weight = model.read.weight.detach().clone()
    learner = sk.MaskPro(model, lambda model, x: model(x).square().mean(), batches=batches, init=init)
    report = learner.finish()
    assert report.layers == ("called",) and torch.equal(model.read.weight, weight)
    assert [(each.name, each.reason) for each in report.skipped] == [
        ("read", "Reader reads its weight without calling it")
    ]


def test_ranks_must_begin_with_the_same_masks(ranks):
    """And an error in one of them ends the other: a mask that does not fit, a batch that cannot be read."""

    def make_with(init, batches=None):
        layer, own = problem()
        return sk.MaskPro(layer, loss_fn, batches=batches or own[:16], held_out=own[16:], init=init)

    class Failing(list):
        def __getitem__(self, index):
            raise OSError("no such file")

    masks = [MASK.repeat(1, 4)[:4], ~MASK.repeat(1, 4)[:4]]
    for error in ranks(lambda rank: make_with({"": masks[rank]})):
        assert isinstance(error, ValueError) and "rank 1 and rank 0 differ in initial masks" in str(error)
    first, second = ranks(lambda rank: make_with({"": masks[0][:, : 32 - 2 * rank]}))
    assert isinstance(second, ValueError) and "rank 1 failed with ValueError" in str(first)
    first, second = ranks(lambda rank: make_with(WANDA, Failing([1, 2]) if rank else None))
    assert isinstance(second, OSError) and "rank 1 failed with OSError" in str(first)


def test_a_step_that_fails_is_made_again_as_if_nothing_had_happened():
    whole, _ = make()
    whole._check_every = 3
    whole.learn(8)
    calls = failing = failures = 0

    def fails(model, batch):
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError
        return loss_fn(model, batch)

    learner, _ = make(loss=fails)
    learner._check_every, seen = 3, []
    for ahead in (1, 20, 30, 17, 18, 3, 2, 20, 4, 1):  # measuring, drawing, and checking
        failing = calls + ahead
        try:
            for step in learner.steps(8):
                seen.append(step.step)
        except OSError:
            failures += 1
    learner.learn(8)
    assert seen == list(range(1, 9)) and failures == 7
    for key, value in learner.state_dict().items():
        same = whole.state_dict()[key]
        assert torch.equal(value, same) if isinstance(value, torch.Tensor) else value == same, key


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"best": None}, r"best must be torch.uint8 \(16,\), got NoneType"),
        ({"logits": torch.zeros(1)}, r"logits must be torch.float32 \(128,\), got torch.float32 \(1,\)"),
        ({"batches": 15}, "it has batches 15, and this learner 16"),
        ({}, "it has no 'lr'"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, match):
    learner, other = make()[0], make()[0]
    learner.learn(1)
    before = copy.deepcopy(learner.state_dict())
    state = {**other.state_dict(), **change}
    if not change:
        del state["lr"]
    with pytest.raises(ValueError, match=match):
        learner.load_state_dict(state)
    for key, value in learner.state_dict().items():
        assert torch.equal(value, before[key]) if isinstance(value, torch.Tensor) else value == before[key], key
