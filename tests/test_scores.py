"""Pruning by given scores, and the scores that gradients give."""

import copy
import math

import pytest
import torch
from digits import DIFFUSION, digits, trained
from experts import Stacked
from interrupts import assert_all_or_nothing, difference, model_state
from surroundings import SURROUNDINGS, inputs, make, state_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparsekit as sk
from sparsekit.masks import Pattern, get_mask


def linear(weight):
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    layer.weight.data = torch.tensor(weight)
    return layer


def test_by_hand():
    """Magnitudes decide, also of infinite and negative scores; of equal ones the first."""
    layer = linear([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]])
    scores = torch.tensor([[-9.0, 1.0, 0.0, 2.0, math.inf, 3.0, 3.0, -1.0]])
    report = sk.prune_(layer, sk.Scores("2:4", scores))
    assert layer.weight.tolist() == [[1.0, 0.0, 0.0, 4.0, 5.0, 6.0, 0.0, 0.0]]
    assert report.method.startswith("Scores('2:4', of 1 layer, ")


@pytest.mark.parametrize("pattern", ["2:4", "50%", "50% layer", "50% 2x4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_the_mask_is_that_of_the_pattern(pattern, dtype):
    model = make()
    scores = {name: (9 * torch.randn_like(each)).to(dtype) for name, each in model.named_parameters() if each.dim() > 1}
    sk.prune_(model, sk.Scores(pattern, {**scores, "of another model": torch.ones(1)}))
    for name, each in scores.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(get_mask(layer), Pattern.parse(pattern).mask(each.float()))
        assert torch.equal(layer.weight != 0, get_mask(layer))


@pytest.mark.parametrize("axis", ["input", "flatten"])
def test_scores_are_grouped_like_the_weights(axis):
    """The weights themselves as scores choose what magnitude does, in convolutions and experts, too."""
    model = nn.Sequential(nn.Conv2d(8, 6, 3), nn.Conv2d(6, 5, (1, 3)), Stacked())
    same = copy.deepcopy(model)
    scores = {name: each.detach().clone() for name, each in model.named_parameters()}
    sk.prune_(model, sk.Scores("2:4", scores), axis=axis)
    sk.prune_(same, sk.Magnitude("2:4"), axis=axis)
    assert not difference(model_state(model), model_state(same), identity=False)
    assert get_mask(model[0]) is not None and get_mask(model[2], "down_proj") is not None


def test_refinements_begin_with_the_mask_of_the_scores():
    scores = {name: each.cos() for name, each in make(7).named_parameters()}
    method = sk.Scores("2:4", scores)
    results = {}
    for each in (method, sk.LeastSquares(method), sk.Swaps(method)):
        model = make()
        results[type(each)] = model, sk.prune_(model, each, inputs(), calibration=sk.Calibration(sequential=False))
    (plain, report), (solved, solved_report) = results[sk.Scores], results[sk.LeastSquares]
    for one, other in zip(plain.modules(), solved.modules(), strict=True):
        if isinstance(one, nn.Linear):
            assert torch.equal(get_mask(one), get_mask(other)) and not torch.equal(one.weight, other.weight)
    assert solved_report.error < report.error > results[sk.Swaps][1].error


def test_a_pruned_model_is_saved_loaded_and_gone_on_with(tmp_path):
    scores = {name: each.cos() for name, each in make(7).named_parameters()}
    model, other = make(), make(3)
    sk.prune_(model, sk.Scores("2:4", scores), inputs(), resume=tmp_path / "stages")
    sk.save(model, tmp_path / "model.safetensors")
    sk.load(other, tmp_path / "model.safetensors")
    assert not difference(model_state(other), model_state(model), identity=False)
    again = make()
    sk.prune_(again, sk.Scores("2:4", scores), inputs(), resume=tmp_path / "stages")
    assert not difference(model_state(again), model_state(model), identity=False)
    scores["2.weight"][0, 0] += 1
    with pytest.raises(ValueError, match="method"):
        sk.prune_(make(), sk.Scores("2:4", scores), inputs(), resume=tmp_path / "stages")


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (
            lambda scores: scores.pop("2.weight"),
            ValueError,
            "there are no scores for layer '2': give some, or leave it",
        ),
        (
            lambda scores: scores.update({"2.weight": torch.ones(32, 4)}),
            ValueError,
            r"the scores of layer '2' must have the shape of its weight, \(4, 32\), got \(32, 4\)",
        ),
        (
            lambda scores: scores["0.up.weight"][0].fill_(math.nan),
            ValueError,
            r"the scores of 0\.up\.weight must be real",
        ),
        (lambda scores: scores.update(a=3), TypeError, "the scores of a must be a tensor, got int"),
        (lambda scores: scores.update(a=torch.ones(1) * 1j), ValueError, "must be real numbers without NaN"),
    ],
)
def test_rejects_before_anything_changes(change, error, said):
    model = make()
    scores = {name: each.detach().cos() for name, each in model.named_parameters()}
    change(scores)
    before = state_of(model)
    with pytest.raises(error, match=said):
        sk.prune_(model, sk.Scores("2:4", scores))
    assert state_of(model) == before


@pytest.mark.parametrize("count", [3, 5])
def test_rejects_scores_of_too_few_or_too_many_experts(count):
    experts = Stacked()
    scores = {name: torch.ones(4, *each.shape[1:]) for name, each in experts.named_parameters()}
    scores["down_proj"] = scores["down_proj"][[0] * count]
    before = state_of(experts)
    with pytest.raises(ValueError, match=rf"'down_proj' must have the shape of its weight, \(4, .*, got \({count}, "):
        sk.prune_(experts, sk.Scores("2:4", scores))
    assert state_of(experts) == before


def test_rejects_what_are_no_scores():
    with pytest.raises(TypeError, match="scores must be a mapping from layer names to tensors, got list"):
        sk.Scores("2:4", [torch.ones(2)])
    with pytest.raises(ValueError, match="scores must be real numbers without NaN"):
        sk.Scores("2:4", torch.tensor([math.nan]))
    with pytest.raises(ValueError, match="'2:5:6'"):
        sk.Scores("2:5:6", {})
    with pytest.raises(ValueError, match=r"there are no scores for layer '0\.up'"):
        sk.prune_(make(), sk.Scores("2:4", torch.ones(32, 32)))


def product(model, batch):
    return model(batch).sum()


def test_taylor_by_hand():
    """Gradients add up with signs within a batch, 1.5 - 0.5, and by magnitude between batches, |-2| + |4|.

    Between timesteps signs count, |-2 + 4|.
    """
    layer = linear([[10.0, -1.0]])
    batches = [torch.tensor([[1.5, -0.5], [-0.5, -1.5]]), torch.tensor([[3.0, 4.0]])]
    assert sk.taylor_scores(layer, product, iter(batches))[""].tolist() == [[40.0, 6.0]]
    assert sk.diff_pruning_scores(layer, lambda m, i: product(m, batches[i]), (0, 1), share=0.0)[""].tolist() == [
        [40.0, 2.0]
    ]


def test_timesteps_with_a_small_loss_do_not_count():
    """The losses are 8, 0.2 and 4, in whatever order: above a twentieth of 8 are the first and the last."""
    layer, xs = linear([[2.0]]), {0: 4.0, 1: 0.1, 2: -2.0}

    def scores(**options):
        (found,) = sk.diff_pruning_scores(
            layer, lambda model, t: model(torch.tensor([[xs[t]]])).abs().sum(), (1, 2, 0), **options
        ).values()
        return found.item()

    assert scores() == pytest.approx(2 * (4 + 2)) and scores(share=0.0) == pytest.approx(2 * (4 + 0.1 + 2))
    assert scores(share=0.5) == pytest.approx(2 * 4)
    with pytest.raises(ValueError, match=r"share must be at least 0 and below 1, got 1\.5"):
        scores(share=1.5)


class Parts(nn.Module):
    """A frozen layer, a convolution, experts, dropout, and layers that are not used."""

    def __init__(self):
        super().__init__()
        self.conv, self.frozen = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(16, 8).requires_grad_(False)
        self.norm, self.dropout = nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.experts, self.unused = Stacked(), nn.Linear(4, 4)
        self.around = lambda module, x: module(x)

    def forward(self, x):
        x = self.dropout(self.norm(self.around(self.conv, x)))
        x = self.frozen(x.flatten(2)).flatten(0, 1)
        return self.experts(x, torch.arange(len(x)) % 4)


def noisy(model, batch):
    return (model(batch) * torch.randn(8)).square().mean()


IMAGES = torch.randn(3, 4, 4, 4)


def parts():
    torch.manual_seed(0)
    model = Parts()
    noisy(model, IMAGES).backward()
    model.norm.eval()
    return (model,)


def test_scores_leave_everything_as_it_was():
    (model,) = parts()
    before, state = model_state(model), torch.get_rng_state()
    found = [sk.taylor_scores(model, noisy, [IMAGES] * 2) for _ in range(2)]
    assert not difference(model_state(model), before) and torch.equal(torch.get_rng_state(), state)
    assert list(found[0]) == ["conv", "frozen", "experts.gate_up_proj", "experts.down_proj"]
    for name, scores in found[0].items():
        assert torch.equal(scores, found[1][name]) and scores.max() > 0
        assert scores.shape == model.get_parameter(name if "experts" in name else f"{name}.weight").shape
    model.around = lambda module, x: checkpoint(module, x, use_reentrant=False)
    again = sk.taylor_scores(model, noisy, [IMAGES] * 2)
    assert all(torch.equal(scores, again[name]) for name, scores in found[0].items())


@pytest.mark.parametrize("runs", [12, pytest.param(120, marks=pytest.mark.slow)])
def test_an_interrupt_leaves_everything_as_it_was(runs):
    assert_all_or_nothing(parts, lambda model: sk.taylor_scores(model, noisy, [IMAGES]), runs=runs)


@pytest.mark.parametrize(
    "surrounding", ["inference_mode", "no_grad", "default-float64", "autocast-bf16", "device-meta"]
)
def test_scores_in_the_surroundings_of_their_caller(surrounding):
    expected = sk.taylor_scores(make(), product, inputs())
    model = make()
    with SURROUNDINGS[surrounding]():
        found = sk.taylor_scores(model, product, inputs())
    for name, scores in found.items():
        assert scores.dtype == torch.float32 and not scores.is_inference()
        error = (scores - expected[name]).norm() / expected[name].norm()
        assert error < (0.1 if surrounding == "autocast-bf16" else 1e-6)


@pytest.mark.parametrize(
    ("loss_fn", "batches", "error", "said"),
    [
        (None, [], TypeError, r"loss_fn must be a function of \(model, batch\)"),
        (lambda m, x: m(x), [torch.ones(2, 32)], ValueError, r"must return one number, got the shape \(2, 4\)"),
        (lambda m, x: 1.0, [0], TypeError, "loss_fn must return a tensor, got float"),
        (lambda m, x: m(x).sum() / 0, [torch.ones(2, 32)], ValueError, "and scores need finite losses"),
        (lambda m, x: m(x).sum().detach(), [torch.ones(2, 32)], ValueError, "the loss depends on no weight"),
        (lambda m, x: m[0].up.bias.sum(), [0], ValueError, "no loss depends on the weight of a layer"),
        (product, [], ValueError, "no batch was given"),
    ],
)
def test_taylor_rejects(loss_fn, batches, error, said):
    model = make()
    before = state_of(model)
    with pytest.raises(error, match=said):
        sk.taylor_scores(model, loss_fn, batches)
    with torch.inference_mode():
        made = make()
    with pytest.raises(ValueError, match=r"the weight of '0\.up' was made in inference mode"):
        sk.taylor_scores(made, product, inputs())
    assert state_of(model) == before


@pytest.mark.slow
def test_taylor_beats_random_on_a_diffusion_model(data, capsys):
    """The loss of a trained UNet at the same timesteps and noise; magnitude is as good, which others found, too."""
    dense, images = trained(data), digits(data, 360)

    def with_noise(part):
        return part, torch.randint(1000, part.shape[:1]), torch.randn_like(part)

    def loss(model, batch):
        images, t, noise = batch
        return DIFFUSION.loss(model, images, t=t, noise=noise)

    held_out, batches = with_noise(images[:160]), [with_noise(part) for part in images[160:].split(40)]
    scores = sk.taylor_scores(dense, loss, batches)
    methods = {"taylor": sk.Scores("2:4", scores), "magnitude": sk.Magnitude("2:4")}
    for seed in range(3):
        torch.manual_seed(seed)
        methods[f"random {seed}"] = sk.Scores("2:4", {name: torch.rand_like(each) for name, each in scores.items()})
    losses = {}
    for name, method in methods.items():
        model = copy.deepcopy(dense)
        sk.prune_(model, method)
        with torch.no_grad():
            losses[name] = loss(model, held_out).item()
    with capsys.disabled():
        print({name: round(value, 3) for name, value in losses.items()})
    assert losses["taylor"] < 0.8 * min(losses[f"random {seed}"] for seed in range(3))
    assert losses["taylor"] < 1.3 * losses["magnitude"]
