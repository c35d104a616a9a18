"""What pruning must not depend on, methods of the user, and sequential pruning of a trained language model."""

import copy
import math
from dataclasses import dataclass

import torch
from language import stories
from pruning import stack
from torch import nn

import sparsekit as sk
from sparsekit.masks import Pattern, get_mask
from sparsekit.prune import InputNorm, Method
from sparsekit.prune.layers import find_layers


class Gram:
    """A statistic that no method of the library has: the sum of x x^T."""

    def __init__(self, layer):
        self.layer, self.gram = layer, 0

    def update(self, x):
        rows = self.layer.windows(x).float()
        self.gram = self.gram + rows.t() @ rows


@dataclass(frozen=True)
class LeastSquares(Method):
    """Wanda's mask, then the kept weights that change the output least."""

    statistic = Gram

    def prune(self, weight, statistic):
        mask = Pattern.parse(self.pattern).mask(weight.abs() * statistic.gram.diagonal().sqrt())
        solved = torch.zeros_like(weight)
        for row, kept in enumerate(mask):
            h = statistic.gram[kept]
            solved[row, kept] = torch.linalg.solve(h[:, kept], h @ weight[row])
        return solved, mask


def test_golden_input_norms():
    """The sums of squares that the published Wanda gives on inputs that are a formula."""
    rows = [
        [(math.cos(0.37 * t * (j + 1)) + 0.5 * math.sin(0.077 * (t + 1) * (j + 2))) * (1 + j % 5) for j in range(16)]
        for t in range(64)
    ]
    norm = InputNorm(find_layers(nn.Linear(16, 4), Pattern.parse("2:4"), "input", None)[0][0])
    for x in torch.tensor(rows, dtype=torch.float64).float().split(40):
        norm.update(x)
    expected = torch.tensor([40.4516, 162.3515, 368.8643, 647.6105])
    torch.testing.assert_close(64 * norm.norm[:4].square(), expected, rtol=0, atol=1e-3)


def test_wanda_ignores_outlier_channels_that_the_weights_cancel():
    """Scaling a channel up and its weights down changes no output: Wanda's mask stays, magnitude's moves."""
    torch.manual_seed(0)
    scale = torch.randn(64).exp()
    x = torch.randn(500, 64)
    plain = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    scaled = copy.deepcopy(plain)
    with torch.no_grad():
        scaled[0].weight.mul_(scale[:, None]), scaled[0].bias.mul_(scale), scaled[1].weight.div_(scale)
    torch.testing.assert_close(plain(x), scaled(x), rtol=1e-3, atol=1e-4)
    same = {}
    for method in (sk.Wanda("2:4"), sk.Magnitude("2:4")):
        masks = []
        for model in (copy.deepcopy(plain), copy.deepcopy(scaled)):
            sk.prune_(model, method, [x], where=lambda name, _: name == "1")
            masks.append(get_mask(model[1]))
        same[type(method)] = (masks[0] == masks[1]).float().mean().item()
    assert same[sk.Wanda] > 0.999 and same[sk.Magnitude] < 0.9  # not all: the scaled norm is rounded anew


def test_a_method_with_its_own_statistic_plugs_in():
    torch.manual_seed(0)
    model = stack(32, 32, 32)
    x = torch.randn(300, 32) @ torch.randn(32, 32)
    errors = {}
    for method in (sk.Magnitude("2:4"), sk.Wanda("2:4"), LeastSquares("2:4")):
        pruned = copy.deepcopy(model)
        errors[type(method).__name__] = sk.prune_(
            pruned, method, [x], calibration=sk.Calibration(sequential=False)
        ).error
        mask = get_mask(pruned[0])
        assert torch.equal(pruned[0].weight != 0, mask) and (mask.view(32, 8, 4).sum(-1) == 2).all()
    assert errors["LeastSquares"] < errors["Wanda"] < errors["Magnitude"]
    changed = pruned[0].weight[mask] != model[0].weight[mask]
    assert changed.all()  # kept weights were updated


def test_sequential_pruning_of_a_real_language_model(data):
    language = stories(data)
    model, reference = copy.deepcopy(language.model), copy.deepcopy(language.model)
    report = sk.prune_(model, sk.Wanda("2:4"), language.batches)
    assert [layer.name.split(".")[2] for layer in report.layers] == [str(block) for block in range(5) for _ in range(7)]
    # Pruning the first block by itself, then the second on what it gives, is what sequential means.
    for block in ("0", "1"):
        sk.prune_(reference, sk.Wanda("2:4"), language.batches, where=lambda name, _, b=block: f"layers.{b}." in name)
    for block in (0, 1):
        for (name, got), expected in zip(
            model.model.layers[block].named_parameters(), reference.model.layers[block].parameters(), strict=True
        ):
            assert torch.equal(got, expected), name
    assert language.perplexity(language.model) < language.perplexity(reference) < language.perplexity(model)
