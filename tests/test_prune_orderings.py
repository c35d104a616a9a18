"""The orderings that must hold between the methods, on a published language model and on one trained here."""

import copy
import functools
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from language import MODELS
from torch import nn

import sparsekit as sk
from sparsekit.masks import Pattern, get_mask
from sparsekit.prune import Method

WANDA, RIA = sk.Wanda("2:4"), sk.RIA("2:4")


@dataclass(frozen=True)
class Random(Method):
    def prune(self, weight, statistic):
        generator = torch.Generator().manual_seed(weight.numel())
        mask = Pattern.parse(self.pattern).mask(torch.rand(weight.shape, generator=generator))
        return weight * mask, mask


LADDER = (Random("2:4"), sk.Magnitude("2:4"), WANDA, sk.Swaps(WANDA), sk.SparseGPT("2:4"), sk.ADMM("2:4"))
METHODS = (*LADDER, RIA, sk.LeastSquares(WANDA))  # the last two have assertions of their own


@pytest.fixture(scope="module", params=MODELS)
def language(request, data):
    return MODELS[request.param](data)


@functools.cache
def result(language, method):
    """The model pruned on what the dense one shows to every layer, and the report."""
    model = copy.deepcopy(language.model)
    return model, sk.prune_(model, method, language.batches, calibration=sk.Calibration(sequential=False))


def test_every_layer_but_the_tied_head_is_pruned(language):
    tied = language.model.lm_head.weight is language.model.model.embed_tokens.weight
    for method in METHODS:
        model, report = result(language, method)
        pruned = {name: get_mask(module) for name, module in model.named_modules() if get_mask(module) is not None}
        assert set(pruned) == {layer.name for layer in report.layers} and report.sparsity == 0.5
        assert ("lm_head" in pruned) == (not tied)
        skipped = {layer.name: layer.reason for layer in report.skipped}
        embedding = skipped.pop(next(name for name in skipped if name.endswith("embed_tokens")))
        assert list(skipped) == ["lm_head"] * tied and "embedding" in embedding
        for name, mask in pruned.items():
            assert torch.equal(model.get_submodule(name).weight != 0, mask)
    assert torch.equal(language.model.lm_head.weight, model.lm_head.weight) == tied


@pytest.mark.parametrize("tokens", ["calibration", "held_out"])
def test_layer_errors(language, tokens):
    """Each method of ``LADDER`` is clearly better than the one before, and RIA is about as good as Wanda."""
    error = {method: language.errors(result(language, method)[0], tokens).mean().item() for method in METHODS}
    for worse, better in pairwise(LADDER):
        assert error[better] < 0.97 * error[worse], error
    assert error[RIA] < 0.97 * error[sk.Magnitude("2:4")] and error[RIA] == pytest.approx(error[WANDA], rel=0.1)
    solved = error[sk.LeastSquares(WANDA)]
    assert solved < 0.97 * error[sk.SparseGPT("2:4")] and solved < 1.25 * error[sk.ADMM("2:4")]


def test_refinements_lower_the_error_of_every_layer(language):
    before = language.errors(result(language, WANDA)[0])
    for method in (sk.Swaps(WANDA), sk.LeastSquares(WANDA)):
        assert (language.errors(result(language, method)[0]) < before).all()


def test_perplexity(language):
    """Nothing is said of Wanda and magnitude: on models this small either can be the better one."""
    perplexity = {method: language.perplexity(result(language, method)[0]) for method in METHODS}
    dense, random = language.perplexity(language.model), perplexity[Random("2:4")]
    assert all(dense < each <= random for each in perplexity.values())
    assert perplexity[sk.SparseGPT("2:4")] < 0.95 * perplexity[WANDA]
    assert perplexity[sk.ADMM("2:4")] <= perplexity[sk.SparseGPT("2:4")]


@pytest.mark.parametrize("method", [sk.Wanda, sk.SparseGPT, sk.ADMM])
def test_more_freedom_costs_less(language, method):
    """4:8 allows whatever 2:4 does, and 2:4 keeps twice of what 1:4 does."""
    errors = [language.errors(result(language, method(pattern))[0]).mean() for pattern in ("4:8", "2:4", "1:4")]
    assert errors[0] < 0.9 * errors[1] and errors[1] < 0.6 * errors[2]


@torch.no_grad()
def with_outlier_channels(model):
    """The same function, bit for bit: gains of the norms times powers of two near exp(N(0, 1)), and the columns that
    read them divided by the same.
    """
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            scale = torch.randn(len(norm.weight), generator=generator).div(torch.tensor(2.0).log()).round().exp2()
            norm.weight.mul_(scale)
            for reader in readers:
                reader.weight.div_(scale)
    return model


def test_outlier_channels_that_the_weights_cancel(language):
    """Magnitude breaks, Wanda does not move, and SparseGPT does a little: its damping is the same for all channels."""
    scaled = replace(language, model=with_outlier_channels(language.model))
    assert scaled.perplexity(scaled.model) == language.perplexity(language.model)
    masks, worse, perplexity = {}, {}, {}
    for method in (sk.Magnitude("2:4"), WANDA, sk.SparseGPT("2:4")):
        before, after = (result(each, method)[0] for each in (language, scaled))
        masks[type(method)] = all_masks(before), all_masks(after)
        worse[type(method)] = (scaled.errors(after).mean() / language.errors(before).mean()).item()
        perplexity[type(method)] = language.perplexity(before), language.perplexity(after)
    assert torch.equal(*masks[sk.Wanda]) and perplexity[sk.Wanda][0] == perplexity[sk.Wanda][1]
    assert worse[sk.Magnitude] > 1.5 and 1 < worse[sk.SparseGPT] < 1.4
    grown = {method: after / before - 1 for method, (before, after) in perplexity.items()}
    assert grown[sk.Magnitude] > 0.08 and abs(grown[sk.SparseGPT]) < 0.4 * grown[sk.Magnitude]
    assert perplexity[sk.SparseGPT][1] < perplexity[sk.Wanda][1]


def all_masks(model: nn.Module):
    return torch.cat([mask.flatten() for module in model.modules() if (mask := get_mask(module)) is not None])
