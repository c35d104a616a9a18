"""Which units go: scores, the choice, the schedule, masks that training keeps, and learning from losses alone."""

import copy
from itertools import pairwise

import pytest
import torch
from language import stories
from slimming import logits, plain, scatter, tiny
from torch import nn

import sparsekit as sk
from sparsekit.masks import get_mask
from sparsekit.slim import (
    Branch,
    CubicSchedule,
    SlimPlan,
    UnitLearner,
    choose_units,
    find_units,
    gate_scores,
    mask_rows_,
    mask_units_,
    slim_,
    unit_scores,
)
from sparsekit.slim.scores import unit_weights


@pytest.fixture(scope="module")
def distilbert():
    model, batch = tiny("distilbert", torch.float32)
    return model, batch, find_units(model, batch)


def removed(model, plan):
    """The share of the weights of all branches that a plan drops, and the largest share of one unit."""
    sizes = {branch: unit_weights(model, branch) for branch in plan.units}
    total = sum(branch.units * sizes[branch] for branch in plan.units)
    gone = sum((branch.units - len(kept)) * sizes[branch] for branch, kept in plan.units.items())
    return gone / total, max(sizes.values()) / total


def test_the_cubic_schedule():
    schedule = CubicSchedule(0.2, begin=100, end=300, every=50)
    assert [schedule.at(step) for step in (0, 100, 300, 999)] == [0, 0, 0.2, 0.2]
    assert schedule.at(200) == pytest.approx(0.875 * 0.2)
    shares = [schedule.at(step) for step in range(400)]
    assert shares == sorted(shares)
    assert [step for step in range(400) if schedule.prunes_at(step)] == [100, 150, 200, 250, 300]
    assert CubicSchedule(0.2, 0, 5, 2).prunes_at(5)
    with pytest.raises(ValueError, match="begin must be at least 0 and before end"):
        CubicSchedule(0.2, 5, 5)
    with pytest.raises(ValueError, match="final must be a share"):
        CubicSchedule(1.2, 0, 5)


def test_scores_by_hand():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
        model[2].weight.copy_(torch.tensor([[2.0, 0.0]]))
    units = find_units(model, torch.randn(5, 2))
    assert unit_weights(model, units.branches[0]) == 3
    assert unit_scores(model, units)["2"].tolist() == pytest.approx([(9 / 3) ** 0.5, (9 / 3) ** 0.5])
    given = {"0": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "2": torch.tensor([[6.0, 2.0]])}
    assert unit_scores(model, units, given)["2"].tolist() == [3, 3]
    with pytest.raises(ValueError, match=r"scores of layer '2' must have the shape of its weight, \(1, 2\), got none"):
        unit_scores(model, units, {"0": given["0"]})


@pytest.mark.parametrize("name", ("gpt2", "llama"))
def test_scores_of_every_unit_are_those_of_its_weights(name):
    model, batch = tiny(name, torch.float32)
    units = find_units(model, batch)
    scores = unit_scores(model, units)
    for branch in units.branches:
        plan = units.keep({branch.reader: range(1, branch.units)})
        slim = copy.deepcopy(model)
        slim_(slim, plan)
        gone = sum(each.square().sum() for each in model.parameters() if each.dim() == 2) - sum(
            each.square().sum() for each in slim.parameters() if each.dim() == 2
        )
        found = scores[branch.reader][0] ** 2 * unit_weights(model, branch)
        assert found.item() == pytest.approx(gone.item(), rel=1e-3)


def test_taylor_scores_rank_units(distilbert):
    model, batch, units = distilbert
    labels = torch.tensor([0, 1])

    def loss(model, batch):
        return model(**batch, labels=labels).loss

    scores = unit_scores(model, units, sk.taylor_scores(model, loss, [batch]))
    assert all((each > 0).all() for each in scores.values())


def test_gates_by_hand():
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        for parameter, value in zip(
            model.parameters(), ([[1.0], [2.0]], [0.0, 0.0], [[3.0, -1.0]], [0.0]), strict=True
        ):
            parameter.copy_(torch.tensor(value))
    units = find_units(model, torch.ones(2, 1))
    # At x the units say x and 2x, which change the output by 3x and -2x; each has 2 weights.
    scores = gate_scores(model, units, lambda model, x: model(x).sum(), [torch.ones(1, 1), torch.full((1, 1), 2.0)])
    assert scores["2"].tolist() == pytest.approx([(3**2 + 6**2) / 2 / 2, (2**2 + 4**2) / 2 / 2])
    assert all(each.grad is None for each in model.parameters())
    with pytest.raises(ValueError, match="a finite loss that depends on the model"):
        gate_scores(model, units, lambda model, x: torch.zeros(()), [torch.ones(1, 1)])
    with pytest.raises(ValueError, match="no batch to score units on"):
        gate_scores(model, units, lambda model, x: model(x).sum(), [])


def test_negative_scores_are_ranked_like_others(distilbert):
    model, _, units = distilbert
    scores = unit_scores(model, units)
    shifted = {name: each - 10 for name, each in scores.items()}
    options = {"sparsity": 0.3, "round_to": 1}
    assert choose_units(model, units, shifted, **options) == choose_units(model, units, scores, **options)


def test_scores_are_ordered_on_a_real_model(data):
    language = stories(data)
    model = language.model

    def loss(model, batch):
        return model(**batch, labels=batch["input_ids"]).loss

    rows = [{"input_ids": row} for row in language.calibration.split(1)]
    units = find_units(model, rows[0])
    assert sorted({(each.kind, each.units) for each in units.branches}) == [("head", 4), ("neuron", 172)]
    gates = gate_scores(model, units, loss, rows)
    found = []
    for scores in (gates, unit_scores(model, units), {name: -each for name, each in gates.items()}):
        slim = copy.deepcopy(model)
        slim_(slim, choose_units(model, units, scores, 0.1, round_to=1))
        found.append(language.perplexity(slim))
    assert language.perplexity(model) < found[0] < 0.8 * found[1] < 0.8 * found[2]


def test_the_share_is_reached_within_one_unit(distilbert):
    model, _, units = distilbert
    scores = unit_scores(model, units)
    for target in torch.linspace(0, 0.5, 23).tolist():
        share, one = removed(model, choose_units(model, units, scores, target, round_to=1))
        assert abs(share - target) <= one / 2 + 1e-12


def test_one_threshold_holds_for_all_branches(distilbert):
    model, _, units = distilbert
    scores = unit_scores(model, units)
    plan = choose_units(model, units, scores, 0.3, floor=0, round_to=1)
    kept = [scores[branch.reader][unit] for branch, each in plan.units.items() for unit in each]
    dropped = [
        scores[branch.reader][unit] for branch, each in plan.units.items() for unit in {*range(branch.units)} - {*each}
    ]
    assert dropped and max(dropped) <= min(kept)


def test_floor_and_rounding(distilbert):
    model, _, units = distilbert
    scores = {name: each * (1e-6 if ".0." in name else 1) for name, each in unit_scores(model, units).items()}
    plan = choose_units(model, units, scores, 0.4, floor=0.5, round_to=8)
    for branch, kept in plan.units.items():
        assert len(kept) >= branch.units / 2
        assert branch.kind == "head" or len(kept) % 8 == 0
        assert ".0." not in branch.reader or len(kept) <= -(-branch.units // 16) * 8
    with pytest.raises(ValueError, match=r"sparsity 0.6 cannot be reached: with floor=0.5 and round_to=1 at most 0.5 "):
        choose_units(model, units, scores, 0.6, floor=0.5, round_to=1)
    with pytest.raises(ValueError, match=r"round_to=64 at most 0\.\d+ of the weights"):
        choose_units(model, units, scores, 0.9)
    with pytest.raises(ValueError, match="there must be 4 finite scores"):
        choose_units(model, units, {}, 0.1)


def train(model, batch, steps, every_step=lambda step: None):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    labels = torch.tensor([0, 1])
    losses = []
    for _ in range(5):  # the optimizer has moments when the masks come
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    every_step(-1)
    with sk.keep_masks(model, optimizer):
        for step in range(steps):
            every_step(step)
            loss = model(**batch, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return optimizer, losses


def test_masked_units_stay_zero_and_can_be_removed():
    model, batch = tiny("distilbert", torch.float32)
    units = find_units(model, batch)
    plan = choose_units(model, units, unit_scores(model, units), 0.3, round_to=1)
    optimizer, losses = train(model, batch, 50, lambda step: mask_units_(model, plan) if step < 0 else None)
    assert losses[-1] < losses[0]
    masked = 0
    for module in model.modules():
        for name in ("weight", "bias"):
            if (mask := get_mask(module, name)) is not None:
                states = optimizer.state[module.get_parameter(name)]
                for tensor in (module.get_parameter(name), states["exp_avg"], states["exp_avg_sq"]):
                    assert not tensor[~mask].any()
                    assert name == "bias" or tensor[mask].count_nonzero() > 0
                masked += int((~mask).sum())
    assert masked > 0
    before = logits(model, batch)
    slim_(model, plan)
    assert (logits(model, batch) - before).abs().max() < 1e-5


def test_gradual_pruning_reaches_every_target():
    model, batch = tiny("distilbert", torch.float32)
    units, schedule, seen = find_units(model, batch), CubicSchedule(0.4, 0, 30, every=3), []

    def prune(step):
        if step < 0:
            mask_units_(model, units.keep())
        elif schedule.prunes_at(step):
            plan = choose_units(model, units, unit_scores(model, units), schedule.at(step), round_to=1)
            mask_units_(model, plan)
            seen.append((schedule.at(step), plan))

    train(model, batch, 40, prune)
    for target, plan in seen:
        share, one = removed(model, plan)
        assert abs(share - target) <= one / 2 + 1e-12
    for (_, before), (_, after) in pairwise(seen):
        assert all({*after.units[branch]} <= {*kept} for branch, kept in before.units.items())
    assert seen[-1][0] == 0.4
    before = logits(model, batch)
    slim_(model, seen[-1][1])
    assert (logits(model, batch) - before).abs().max() < 1e-5


def test_masks_that_drop_nothing_go_with_the_others():
    model, batch = tiny("distilbert", torch.float32)
    units = find_units(model, batch)
    mask_units_(model, units.keep())
    kept = {branch: (0, 1) if index == 0 else each for index, (branch, each) in enumerate(units.keep().units.items())}
    mask_units_(model, plan := SlimPlan(kept))
    slim_(model, plan)
    assert all(get_mask(module, name) is None for module in model.modules() for name in ("weight", "bias"))


def test_masks_of_units_and_biases_are_saved(tmp_path):
    model, batch = tiny("distilbert", torch.float32)
    units = find_units(model, batch)
    mask_units_(model, choose_units(model, units, unit_scores(model, units), 0.3, round_to=1))
    sk.save(model, tmp_path / "masked.safetensors")
    other, _ = tiny("distilbert", torch.float32)
    sk.load(other, tmp_path / "masked.safetensors")
    for (name, one), (_, two) in zip(model.named_modules(), other.named_modules(), strict=True):
        for parameter in ("weight", "bias"):
            mask, again = get_mask(one, parameter), get_mask(two, parameter)
            assert (mask is None and again is None) or torch.equal(mask, again), name


def test_published_row_masking():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 1.0], [2.0, 0.0]]))  # norms 5, 1, 2
        model[1].weight.copy_(torch.tensor([[0.0, 0.5, 0.0], [2.0, 2.0, 1.0]]))  # norms 0.5, 3
    biases = [each.bias.clone() for each in model]
    assert mask_rows_(model, 0.4, where=lambda name, module: name != "2") == {"0": 1, "1": 1}
    assert get_mask(model[0]).all(1).tolist() == [True, False, True]
    assert get_mask(model[1]).all(1).tolist() == [False, True] and get_mask(model[2]) is None
    assert not model[0].weight[1].any() and all(torch.equal(m.bias, b) for m, b in zip(model, biases, strict=True))
    with pytest.raises(ValueError, match="sparsity must be from 0 to 1, got 2"):
        mask_rows_(model, 2)
    with pytest.raises(ValueError, match="there is no linear layer"):
        mask_rows_(nn.ReLU(), 0.5)


def test_other_masks_are_refused():
    model, batch = plain()
    units = find_units(model, batch)
    sk.prune_(model.float(), sk.Magnitude("2:4"))
    weights = [each.clone() for each in model.parameters()]
    with pytest.raises(ValueError, match="a mask of the pattern 2:4: mask units or rows first"):
        mask_units_(model, units.keep({"2": [0]}))
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), weights, strict=True))


def test_the_learner_finds_units_that_do_nothing():
    model = scatter(nn.Sequential(nn.Linear(4, 24), nn.Tanh(), nn.Linear(24, 3)), 1.0)
    idle = {1, 5, 6, 11, 13, 20}
    with torch.no_grad():
        model[2].weight[:, [*idle]] = 0
    x = torch.randn(64, 4)
    y = model(x).detach()
    before = [each.clone() for each in model.parameters()]
    units = find_units(model, x)
    wrong = {"2": torch.arange(24.0)}  # drops 0 to 5, of which two are idle
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 64, 8)]

    def loss(model, batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    def learner():
        return UnitLearner(model, loss, units, 6 / 24, batches=batches, scores=wrong, round_to=1)

    one = learner()
    one.learn(400)
    report = one.finish()
    (kept,) = report.plan.units.values()
    assert report.learned and report.loss < report.initial_loss / 5
    assert len(kept) == 18 and len(idle - {*kept}) >= 4  # at first 2
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))
    again, resumed = learner(), learner()
    again.learn(200)
    resumed.load_state_dict(copy.deepcopy(again.state_dict()))
    resumed.learn(400)
    assert torch.equal(resumed.state_dict()["logits"], one.state_dict()["logits"])
    losses = [step.loss for step in learner().steps(3)]
    assert len({*losses}) == 3


def test_the_learner_keeps_an_initial_plan_that_is_better():
    model, x = plain()
    units, y = find_units(model, x), model(x).detach()

    def loss(model, batch):
        return nn.functional.mse_loss(model(x), y)

    one = UnitLearner(model, loss, units, 0.2, batches=[x, x], round_to=1)
    report = one.finish()
    assert not report.learned and report.loss == report.initial_loss
    with pytest.raises(ValueError, match="half of the units, got 99"):
        UnitLearner(model, loss, units, 0.2, batches=[x, x], round_to=1, flips=99)
    with pytest.raises(ValueError, match="the state has logits of 3 units"):
        one.load_state_dict({**one.state_dict(), "logits": torch.zeros(3)})


def test_a_branch_says_what_its_units_are():
    assert Branch("out", 4, 8, (("q", 1),)).kind == "head" and Branch("down", 4, 1, (("up", 1),)).kind == "neuron"
