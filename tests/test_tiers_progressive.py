"""Iterations of demotion and fine-tuning, and going on after a kill."""

import copy

import pytest
import torch
from pruning import Killed, assert_restored, snapshot, stack
from torch import nn

import sparsekit as sk
from sparsekit.compress.sites import must_stay_reason
from sparsekit.masks import get_mask, get_mask_info
from sparsekit.ops.tiers import TOPK
from sparsekit.tiers import (
    Ratios,
    Step,
    TierMap,
    fade,
    load_tier_maps,
    progressive_tiers,
    save_tier_maps,
    tier_iteration,
    tier_mask,
)
from sparsekit.tiers.fade import fading_of

STEPS = (
    Step(1, Ratios(0.75, 0.25, 0.0), 0.25, 0.0, 1),
    Step(2, Ratios(0.5, 0.25, 0.25), 0.25, 0.25, 2),
    Step(3, Ratios(0.25, 0.5, 0.25), 0.25, 0.0, 1),
)


@pytest.fixture
def task():
    """A teacher to imitate, as a model and its batches."""
    teacher, x = stack(32, 64, 32), torch.randn(256, 32) @ torch.randn(32, 32)
    with torch.no_grad():
        return teacher, x, teacher(x)


def trainer(x, y, seen=None, die_at=None):
    def finetune(model, step):
        if seen is not None:
            seen.append(step.iteration)
        if step.iteration == die_at:
            raise Killed
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        with sk.keep_masks(model, optimizer):
            for _ in range(int(20 * step.epochs)):
                optimizer.zero_grad()
                (model(x) - y).square().mean().backward()
                optimizer.step()

    return finetune


@pytest.mark.parametrize("allocation", ["layer", "model"])
@pytest.mark.parametrize("criterion", ["loss", "published"])
def test_an_iteration_reaches_its_shares(task, allocation, criterion):
    model, x, _ = task
    dense = copy.deepcopy(model)
    maps, report = tier_iteration(
        model, STEPS[1], [x], options=sk.tiers.TierOptions(allocation=allocation, criterion=criterion)
    )
    assert list(maps) == list(report.demoted) == ["0", "2"] and report.ratios == Ratios(0.5, 0.25, 0.25)
    assert report.sparsity == pytest.approx(0.25 / 2 + 0.25 * (1 - 10 / 256), abs=1e-9)
    assert report.expected_sparsity == pytest.approx(report.sparsity)
    for name, tier_map in maps.items():
        layer, before = model.get_submodule(name), dense.get_submodule(name)
        mask = get_mask(layer)
        assert torch.equal(layer.weight, torch.where(mask, before.weight, 0))
        assert str(get_mask_info(layer).pattern) == "tiers 16x16 k=10"
        if allocation == "layer":
            assert tier_map.ratios == report.ratios
    first = x.square().mean(0).sqrt() * dense[0].weight.abs()
    assert torch.equal(get_mask(model[0]), tier_mask(dense[0].weight, first, maps["0"], criterion))


def test_iterations_go_on_from_the_maps_before(task):
    model, x, y = task
    maps, reports = progressive_tiers(model, STEPS, [x], trainer(x, y), evaluate=lambda m: float((m(x) - y).norm()))
    assert [report.ratios for report in reports] == [step.ratios for step in STEPS]
    assert all(report.metric > 0 and min(report.seconds) > 0 for report in reports)
    for name, tier_map in maps.items():
        layer = model.get_submodule(name)
        assert tier_map.ratios == STEPS[-1].ratios and torch.equal(layer.weight != 0, get_mask(layer))
        assert (~get_mask(layer)).float().mean().item() == pytest.approx(tier_map.sparsity)


def test_progress_with_fine_tuning_beats_one_step_without(task):
    dense, x, y = task
    errors = {}
    for name, steps, finetune in (
        ("progressive", STEPS, trainer(x, y)),
        ("one-shot", (Step(1, STEPS[-1].ratios, 0.75, 0.25, 0),), lambda model, step: None),
    ):
        model = copy.deepcopy(dense)
        progressive_tiers(model, steps, [x], finetune)
        errors[name] = (model(x) - y).norm().item()
    assert errors["progressive"] < 0.5 * errors["one-shot"]


@pytest.mark.parametrize("die_at", [1, 2, 3])
def test_goes_on_after_a_kill(task, tmp_path, die_at):
    dense, x, y = task
    whole, killed, resumed = (copy.deepcopy(dense) for _ in range(3))
    maps, reports = progressive_tiers(whole, STEPS, [x], trainer(x, y))
    with pytest.raises(Killed):
        progressive_tiers(killed, STEPS, [x], trainer(x, y, die_at=die_at), folder=tmp_path / "run")
    seen = []
    again, found = progressive_tiers(resumed, STEPS, [x], trainer(x, y, seen), folder=tmp_path / "run")
    assert seen == list(range(die_at, 4))
    assert all(torch.equal(again[name].tiers, maps[name].tiers) for name in maps)
    assert [report.demoted for report in found] == [report.demoted for report in reports]
    for one, other in zip(resumed[::2], whole[::2], strict=True):
        assert torch.equal(one.weight, other.weight) and torch.equal(get_mask(one), get_mask(other))
    with pytest.raises(ValueError, match="belongs to another schedule"):
        other = Step(1, Ratios(0.5, 0.5, 0.0), 0.5, 0.0, 1)
        progressive_tiers(resumed, (other,), [x], trainer(x, y), folder=tmp_path / "run")


def test_one_iteration_from_the_files_of_the_last(task, tmp_path):
    model, x, _ = task
    maps, _ = tier_iteration(model, STEPS[0], [x])
    save_tier_maps(maps, tmp_path / "maps.safetensors")
    published = {f"layer_{name}": tier_map.tiers.long() for name, tier_map in maps.items()}
    torch.save(published, tmp_path / "tier_maps_iter1.pt")
    stored, foreign = load_tier_maps(tmp_path / "maps.safetensors"), load_tier_maps(tmp_path / "tier_maps_iter1.pt")
    for name, tier_map in maps.items():
        for other in (stored[name], foreign[f"layer_{name}"]):
            assert torch.equal(other.tiers, tier_map.tiers) and other.shape == tier_map.shape
            assert (other.block, other.k) == (tier_map.block, tier_map.k)
    holder = nn.Module()
    holder.layers = model
    batches, forward = [x], lambda m, batch: m.layers(batch)
    later, _ = tier_iteration(
        holder, STEPS[1], batches, foreign, options=sk.tiers.TierOptions(calibration=sk.Calibration(forward=forward))
    )
    for name, tier_map in maps.items():
        assert (later[f"layers.{name}"].tiers >= tier_map.tiers).all()


def test_a_failure_leaves_the_model_as_it_was(task):
    model, x, _ = task
    before = snapshot(model)
    broken = x.clone()
    broken[3, 4] = float("nan")
    with pytest.raises(ValueError, match="a calibration input of 0 is NaN or infinite"):
        tier_iteration(model, STEPS[0], [broken])
    wrong = {"0": TierMap(torch.zeros(2, 2, dtype=torch.uint8), (32, 32))}
    with pytest.raises(ValueError, match=r"the tier map of '0' is for \(32, 32\), not \(64, 32\)"):
        tier_iteration(model, STEPS[0], [x], wrong)
    with pytest.raises(ValueError, match="layer '0' needs one tier map, got none"):
        tier_iteration(model, STEPS[0], [x], {})
    with pytest.raises(ValueError, match='allocation must be "layer" or "model", got \'global\''):
        tier_iteration(model, STEPS[0], [x], options=sk.tiers.TierOptions(allocation="global"))
    with pytest.raises(ValueError, match="schedule must have at least one step, got none"):
        progressive_tiers(model, (), [x], lambda model, step: None)
    with pytest.raises(ValueError, match="nothing to prune: the model has no linear layer"):
        tier_iteration(nn.Sequential(nn.Conv2d(4, 4, 3)), STEPS[0], [x])
    assert_restored(model, before)


@pytest.mark.parametrize("allocation", ["layer", "model"])
def test_reconstruction_lowers_the_error_and_keeps_the_masks(task, allocation):
    dense, x, y = task
    plain, solved = copy.deepcopy(dense), copy.deepcopy(dense)
    _, before = tier_iteration(plain, STEPS[1], [x], options=sk.tiers.TierOptions(allocation=allocation))
    maps, after = tier_iteration(
        solved, STEPS[1], [x], options=sk.tiers.TierOptions(allocation=allocation, reconstruct=True)
    )
    assert after.ratios == before.ratios == STEPS[1].ratios and list(maps) == ["0", "2"]
    assert torch.equal(get_mask(solved[0]), get_mask(plain[0]))
    assert not torch.equal(solved[0].weight, plain[0].weight)
    for layer in solved[::2]:
        assert not layer.weight[~get_mask(layer)].any()
    assert after.error < 0.8 * before.error
    assert (solved(x) - y).norm() < (plain(x) - y).norm()


@pytest.mark.parametrize("allocation", ["layer", "model"])
def test_what_has_faded_is_demoted_without_a_change(task, allocation):
    model, x, _ = task
    maps, report = tier_iteration(
        model, STEPS[0], [x], options=sk.tiers.TierOptions(goal=STEPS[1].ratios, allocation=allocation)
    )
    assert report.ratios == STEPS[0].ratios
    before = [layer.weight.detach().clone() for layer in model[::2]]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with sk.keep_masks(model, optimizer), fade(model, optimizer, 4):
        for left in (3, 2, 1, 0):
            optimizer.step()
            for layer, weight in zip(model[::2], before, strict=True):
                shrunk = layer.weight != weight
                assert shrunk.any() and torch.allclose(layer.weight[shrunk], left / 4 * weight[shrunk])
    optimizer.step()
    faded = [layer.weight.detach().clone() for layer in model[::2]]
    shares = [(weight == 0).float().mean().item() for weight in faded]
    maps, report = tier_iteration(model, STEPS[1], [x], maps, options=sk.tiers.TierOptions(allocation=allocation))
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(model[::2], faded, strict=True))
    assert sum(shares) == pytest.approx(sum(tier_map.sparsity for tier_map in maps.values()))
    assert report.error == 0


@pytest.mark.parametrize("allocation", ["layer", "model"])
def test_what_faded_for_the_last_step_is_what_every_step_on_the_way_drops(allocation):
    model, x, goal = stack(64, 256, 64), torch.randn(256, 64), STEPS[2].ratios
    maps, _ = tier_iteration(
        model, STEPS[0], [x], options=sk.tiers.TierOptions(goal=goal, allocation=allocation, k=40)
    )  # often three of a group of 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with sk.keep_masks(model, optimizer), fade(model, optimizer, 1):
        optimizer.step()
    faded = [layer.weight.detach().clone() for layer in model[::2]]
    for step in STEPS[1:]:
        maps, report = tier_iteration(
            model, step, [x], maps, options=sk.tiers.TierOptions(goal=goal, allocation=allocation)
        )
        assert report.error == 0 and report.ratios == step.ratios
    for layer, weight in zip(model[::2], faded, strict=True):
        assert torch.equal(layer.weight, weight) and torch.equal(get_mask(layer), weight != 0)


def test_blocks_that_have_arrived_do_not_fade():
    """A block that a step takes to top-k at once keeps the best of all its entries, not those of what 2:4 leaves."""
    model, x, goal = stack(64, 256, 64), torch.randn(256, 64), Ratios(0.25, 0.5, 0.25)
    before, _ = tier_iteration(
        model, Step(1, Ratios(0.5, 0.25, 0.25), 0.5, 0.25, 1), [x], options=sk.tiers.TierOptions(goal=goal, k=40)
    )
    fading = [fading_of(layer) for layer in model[::2]]
    maps, _ = tier_iteration(model, Step(2, goal, 0.25, 0.0, 1), [x], before, options=sk.tiers.TierOptions(goal=goal))
    for found, old, new in zip(fading, before.values(), maps.values(), strict=True):
        arrived = (old.tiers == TOPK) & (new.tiers == TOPK)
        blocks = found.unflatten(1, (-1, 16)).unflatten(0, (-1, 16)).any(3).any(1)
        assert arrived.any() and blocks.any() and not blocks[arrived].any()


def test_fading_is_forgotten_where_the_schedule_ends(task):
    model, x, _ = task
    tier_iteration(model, STEPS[0], [x], options=sk.tiers.TierOptions(goal=STEPS[2].ratios))
    assert {"weight_mask", "weight_fading"} == {name for name, _ in model[0].named_buffers()}
    assert "weight_fading" not in "".join(model.state_dict())
    tier_iteration(model, STEPS[2], [x], options=sk.tiers.TierOptions(goal=STEPS[2].ratios))
    assert {"weight_mask"} == {name for name, _ in model[0].named_buffers()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = model[0].weight.detach().clone()
    with fade(model, optimizer, 1):
        optimizer.step()
    assert torch.equal(model[0].weight, before)
    with pytest.raises(ValueError, match="updates must be from 0 on, got -1"):
        fade(model, optimizer, -1)
    tier_iteration(model, STEPS[0], [x], options=sk.tiers.TierOptions(goal=STEPS[2].ratios))
    other = torch.optim.SGD(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match="the optimizer holds none of the weights that fade"):
        fade(model, other, 1)


def test_a_failure_forgets_what_would_fade(task):
    model, x, _ = task
    tier_iteration(model, STEPS[0], [x])

    def fail(*_):
        if "weight_fading" in model[0]._buffers:
            raise RuntimeError("the second layer")

    model[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="the second layer"):
        tier_iteration(model, STEPS[0], [x], options=sk.tiers.TierOptions(goal=STEPS[2].ratios))
    assert {"weight_mask"} == {name for name, _ in model[0].named_buffers()}


def test_a_layer_that_no_batch_reaches_keeps_its_map(task):
    model, x, _ = task
    whole = nn.ModuleDict({"used": model, "unused": nn.Linear(32, 32)})
    maps, reports = progressive_tiers(
        whole,
        STEPS[:2],
        [x],
        lambda model, step: None,
        options=sk.tiers.TierOptions(calibration=sk.Calibration(forward=lambda model, batch: model["used"](batch))),
    )
    assert maps["unused"].counts == (4, 0, 0) and "unused" not in reports[-1].demoted
    assert maps["used.0"].ratios == STEPS[1].ratios


def test_a_model_that_still_fades_may_be_compressed(task):
    model, x, _ = task
    tier_iteration(model, STEPS[0], [x], options=sk.tiers.TierOptions(goal=STEPS[2].ratios))
    assert "weight_fading" in model[0]._buffers and must_stay_reason(model[0]) is None


def test_files_that_are_no_tier_maps(tmp_path):
    path = tmp_path / "maps.safetensors"
    path.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"maps.safetensors holds no tier maps"):
        load_tier_maps(path)
    torch.save({"layer_0.q": torch.tensor([[3]])}, tmp_path / "maps.pt")
    with pytest.raises(ValueError, match=r"a tier is 0, 1 or 2, and layer_0.q has others"):
        load_tier_maps(tmp_path / "maps.pt")
    torch.save(print, tmp_path / "code.pt")
    with pytest.raises(ValueError, match=r"code.pt holds no tier maps"):
        load_tier_maps(tmp_path / "code.pt")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_tier_maps(tmp_path / "none.pt")
