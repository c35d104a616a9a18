"""Pruning to a measured speed: the assignment, the plans, and what is left of the model if it fails."""

import itertools
import math
import random
from types import SimpleNamespace

import pytest
import torch
from interrupts import difference, model_state
from torch import nn

import sparsekit as sk
from sparsekit.masks import get_mask
from sparsekit.reach import reach_model
from sparsekit.reach.assign import STEPS, Offer, least_cost, most_saving
from sparsekit.reach.plans import find_plan
from sparsekit.reach.variants import DECISIONS

QUICK = sk.Measure(budget=0.02)


def by_brute_force(offers, need):
    found = [
        (math.fsum(offer.cost for offer in each), each)
        for each in itertools.product(*offers)
        if math.fsum(offer.saving for offer in each) >= need
    ]
    return min(found, key=lambda item: item[0])[0] if found else None


@pytest.mark.parametrize("seed", range(20))
def test_the_assignment_is_the_best_of_all(seed):
    draw = random.Random(seed)
    offers = [
        [Offer(0.0, 0.0), *(Offer(draw.randint(-2, 10) / 10, draw.random()) for _ in range(draw.randint(1, 3)))]
        for _ in range(5)
    ]
    most = math.fsum(offers[i][j].saving for i, j in enumerate(most_saving(offers)))
    for share in (0.3, 0.6, 0.9):
        need = share * most - 1e-6
        chosen = least_cost(offers, need)
        assert math.fsum(offers[i][j].saving for i, j in enumerate(chosen)) >= need * (1 - 5 / STEPS)
        assert math.fsum(offers[i][j].cost for i, j in enumerate(chosen)) == pytest.approx(by_brute_force(offers, need))
    assert least_cost(offers, 1.01 * most) is None


def test_an_assignment_by_hand():
    offers = [[Offer(0, 0), Offer(3, 5.0)], [Offer(0, 0), Offer(2, 1.0)], [Offer(0, 0), Offer(2, 1.5), Offer(4, 9.0)]]
    assert least_cost(offers, 2) == [0, 1, 0]
    assert least_cost(offers, 4) == [0, 1, 1]
    assert least_cost(offers, 5) == [1, 1, 0]
    assert least_cost(offers, 9) == [1, 1, 2]
    assert least_cost(offers, 9.1) is None
    assert most_saving(offers) == [1, 1, 2]


def ways(*pairs):
    return [SimpleNamespace(seconds=s, error=e, offer=lambda p, s=s, e=e: Offer(p - s, e**2)) for s, e in pairs]


THREE = {name: ways((4.0, 0.0), (2.0, error)) for name, error in (("a", 0.1), ("b", 0.2), ("c", 0.3))}


def test_a_plan_is_corrected_by_what_is_measured():
    seen = []

    def measure(plan):  # layers save half of what they save alone, of a pass of 20 seconds
        saved = sum(4 - way.seconds for way in plan.values()) / 2
        seen.append(sorted(name for name, way in plan.items() if way.error))
        return 20 / (20 - saved)

    best, plans = find_plan(THREE, 20 / 18.5, 20.0, measure)
    assert seen == [["a", "b", "c"], ["a", "b"]] and plans == 2
    assert best.ratio == pytest.approx(20 / 18) and best.cost == pytest.approx(0.1**2 + 0.2**2)


def test_a_plan_that_was_too_slow_is_followed_by_a_faster_one():
    def measure(plan):
        number = sum(bool(way.error) for way in plan.values())
        return {0: 1.0, 1: 1.0, 2: 1.3, 3: 2.0}[number]

    best, plans = find_plan(THREE, 1.1, 12.0, measure)
    assert sum(bool(way.error) for way in best.plan.values()) == 2 and plans >= 3


def test_a_speed_that_cannot_be_reached_says_which_can():
    with pytest.raises(ValueError, match=r"a speed-up of 3\.00 cannot be reached: .* a pass is 1\.40x as fast"):
        find_plan(THREE, 3.0, 20.0, lambda plan: 1.4)


@pytest.fixture
def model():
    layers = [nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)) for _ in range(2)]
    return nn.Sequential(*layers).eval()


@pytest.fixture
def batches():
    return [torch.randn(16, 64) for _ in range(4)]


@pytest.fixture
def speed(monkeypatch):
    """Replaces times: those of a layer by its form, and each layer that is not plain makes a pass 10 % faster."""
    measure_ways, seconds = reach_model.measure_ways, {"plain": 0.25, "2:4": 0.1, "tiered": 0.15}

    def timed(*args):
        return {
            name: [way._replace(seconds=seconds.get(way.form, 0.2)) for way in each]
            for name, each in measure_ways(*args).items()
        }

    def compare(swap, modules, over, passes):
        return (SimpleNamespace(seconds=1.0, ratio=1.1 ** len(modules)),)

    monkeypatch.setattr(reach_model, "measure_ways", timed)
    monkeypatch.setattr(reach_model, "compare_passes", compare)


def test_a_model_is_pruned_and_compressed(model, batches, speed):
    dense = {name: each.weight.detach().clone() for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    report = sk.reach_(model, batches, torch.randn(64, 64), 1.15, measure=QUICK)
    assert report.asked == 1.15 and report.measured >= 1.15 and report.plans >= 1
    assert [layer.name for layer in report.layers] == list(dense) and report.error <= report.error_24 + 1e-9
    assert report.error == pytest.approx(math.hypot(*(layer.error for layer in report.layers)))
    for layer in report.layers:
        assert layer.plain_ms > 0 and (layer.error == 0) == (layer.form in ("plain", "prepacked")), layer
    sk.decompress_(model)
    for layer in report.layers:
        module = model.get_submodule(layer.name)
        mask = get_mask(module)
        assert (mask is not None) == (layer.form in ("2:4", "tiered"))
        if mask is None:
            assert torch.equal(module.weight, dense[layer.name])
        elif layer.form == "2:4":
            assert mask.unflatten(1, (-1, 4)).sum(2).eq(2).all() and not module.weight[~mask].any()
    assert report.layers[0].name in str(report) and "asked 1.15x" in str(report)


def test_errors_are_those_of_the_outputs(model, batches, speed, monkeypatch):
    def sparse(ways, *_):
        plan = {name: next(way for way in each if way.form == "2:4") for name, each in ways.items()}
        return SimpleNamespace(plan=plan, ratio=1.2), 1

    monkeypatch.setattr(reach_model, "find_plan", sparse)
    x, dense = torch.cat(batches), model[0][0]
    before = dense(x) - dense.bias
    report = sk.reach_(
        model, batches, torch.randn(64, 64), 1.05, forms=("2:4",), where=lambda name, _: name == "0.0", measure=QUICK
    )
    (layer,) = report.layers
    after = model[0][0](x) - model[0][0].bias
    assert layer.form == "2:4" and layer.error == report.error == report.error_24
    assert layer.error == pytest.approx(((after - before).norm() / before.norm()).item(), rel=1e-3)


def test_every_form_can_be_taken(model, batches, speed, monkeypatch):
    wanted = ("int8", "2:4 int8", "2:4 int4", "tiers")

    def each_its_own(ways, *_):
        names = {form: DECISIONS[form] for form in wanted}
        plan = {
            name: next((way for way in each if way.form in names[form]), each[0])
            for form, (name, each) in zip(wanted, ways.items(), strict=True)
        }
        return SimpleNamespace(plan=plan, ratio=1.2), 1

    monkeypatch.setattr(reach_model, "find_plan", each_its_own)
    x, before = torch.cat(batches), model(torch.cat(batches))
    report = sk.reach_(model, batches, torch.randn(64, 64), 1.05, forms=wanted, measure=QUICK)
    assert report.error_24 is None and report.layers[3].form == "tiered"
    for layer in report.layers:
        assert (layer.form == "plain") == (layer.error == 0)
    assert not any(layer.form == "plain" for layer in report.layers) or not sk.ops.simd_level()
    assert 0 < (model(x) - before).norm() / before.norm() < 1


def test_an_error_at_the_very_end_leaves_the_model_as_it_was(model, batches, speed, monkeypatch):
    before = model_state(model)
    monkeypatch.setattr(reach_model, "_report", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sk.reach_(model, batches, torch.randn(64, 64), 1.4, forms=("2:4",), measure=QUICK)
    assert not difference(before, model_state(model))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_fails_leaves_the_model_as_it_was(model, batches, speed, monkeypatch, error):
    before, build = model_state(model), reach_model._build

    def fail(plan, sites, *, trial):
        if not trial:
            raise error
        return build(plan, sites, trial=trial)

    monkeypatch.setattr(reach_model, "_build", fail)
    with pytest.raises(error):
        sk.reach_(model, batches, torch.randn(64, 64), 1.15, measure=QUICK)
    assert not difference(before, model_state(model))


def test_an_unreachable_speed_leaves_the_model_as_it_was(model, batches, speed):
    before = model_state(model)
    with pytest.raises(ValueError, match=r"a speed-up of 9\.00 cannot be reached"):
        sk.reach_(model, batches, torch.randn(64, 64), 9.0, measure=QUICK)
    assert not difference(before, model_state(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speedup": 1.0}, "speedup must be above 1, got 1.0"),
        ({"forms": "2:4"}, "forms must be of 2:4, tiers, .*, got '2:4'"),
        ({"forms": ("3:4",)}, "forms must be of 2:4, tiers, .*, got 3:4"),
        ({"forms": ()}, "forms must be of 2:4, tiers, .*, got"),
        ({"measure": sk.Measure(tokens=(1,))}, "measure must have no token counts"),
        ({"calibration": sk.Calibration()}, "calibration must have sequential=False"),
        ({"where": lambda name, module: False}, "nothing to change: where selects no linear layer"),
    ],
)
def test_wrong_arguments(model, batches, options, message):
    options = {"speedup": 1.2, **options}
    with pytest.raises(ValueError, match=message):
        sk.reach_(model, batches, torch.randn(64, 64), **options)


def test_layers_in_another_dtype_are_named_with_the_reason(model, batches):
    before = model_state(model)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=r"nothing to change: .*; 0\.0: it runs in torch\.bfloat16, its weight is"),
    ):
        sk.reach_(model, batches, torch.randn(64, 64), 1.2, measure=QUICK)
    assert not difference(before, model_state(model))


@pytest.mark.slow
def test_a_real_speed_is_reached():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512)) for _ in range(3)]
    model, x = nn.Sequential(*blocks).eval(), [torch.randn(64, 512) for _ in range(4)]
    report = sk.reach_(model, x, torch.randn(128, 512), 1.1)
    assert report.measured >= 1.1 and report.error <= report.error_24
