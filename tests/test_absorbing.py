"""The losses of absorbing diffusion against enumeration, closed forms and each other."""

import copy
import math
from itertools import permutations, product

import numpy as np
import pytest
import torch
from absorbing import all_masks, joint, true_table, wrong_table
from torch import nn

from sparsekit.diffusion import (
    GeometricNoise,
    LogLinearNoise,
    k_dce_loss,
    lambda_dce_loss,
    ordered_loss,
    t_dce_loss,
    t_dse_loss,
)
from sparsekit.diffusion.absorbing import token_losses

X = torch.tensor([[2, 0, 3, 1, 1]])
AO = 13.70788302684338  # the mean of the chain rule over all 120 orders, which give 3.17 to 26.29
NOISES = {"loglinear": LogLinearNoise(), "geometric": GeometricNoise()}
MASKS = all_masks(5)
K = MASKS.sum(1)
TABLE = wrong_table()
EVERY = X.expand(31, 5)  # once for each of the masks
CROSS_ENTROPY = token_losses(TABLE, EVERY, 4, MASKS).sum(1)


def nodes(count, low, high):
    """Gauss-Legendre nodes and weights from low to high."""
    x, weight = np.polynomial.legendre.leggauss(count)
    return torch.from_numpy((high - low) / 2 * x + (high + low) / 2), torch.from_numpy((high - low) / 2 * weight)


def chance(probability):
    """The probability of each of the masks."""
    return probability**K * (1 - probability) ** (5 - K)


def closed_form(noise, *, constant):
    """The mean of a loss over times from 1e-3 to 1, by powers of lambda: ``rate * r dt`` is ``d lambda / lambda``."""
    low, high = noise.mask_probability(torch.tensor([1e-3, 1], dtype=torch.float64)).tolist()
    total = 0.0
    for k, loss in zip(K.tolist(), CROSS_ENTROPY.tolist(), strict=True):
        for j in range(5 - k + 1):
            power = k + j
            total += loss * math.comb(5 - k, j) * (-1) ** j * (high**power - low**power) / power
    entropy = [-x * math.log(x) - (1 - x) * math.log1p(-x) for x in (low, high)]
    return (total - constant * 5 * (entropy[1] - entropy[0])) / (1 - 1e-3)


def test_schedules_literal():
    t = torch.tensor([0.25, 1.0], dtype=torch.float64)
    linear = LogLinearNoise(0.5)
    assert linear.mask_probability(t).tolist() == [0.125, 0.5]
    assert linear.total(t).exp().tolist() == pytest.approx([1 / 0.875, 2])
    assert linear.rate(t).tolist() == pytest.approx([0.5 / 0.875, 1])
    assert linear.loss_weight(t).tolist() == [4, 1]
    geometric = GeometricNoise(0.01, 4)
    assert geometric.total(t).tolist() == pytest.approx([0.01 * 400**0.25, 4])
    assert geometric.mask_probability(t)[1].item() == pytest.approx(1 - math.exp(-4))


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_schedules_fit_together(noise):
    t = torch.linspace(0.01, 0.99, 7, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(noise.total(t).sum(), t)
    torch.testing.assert_close(noise.rate(t), slope)
    torch.testing.assert_close(noise.mask_probability(t), 1 - (-noise.total(t)).exp())
    torch.testing.assert_close(noise.loss_weight(t), noise.rate(t) / noise.total(t).expm1())


def test_bounds_are_the_mean_over_all_orders():
    orders = torch.stack([ordered_loss(TABLE, X, 4, order) for order in permutations(range(5))])
    assert orders.min() < 3.2 and orders.max() > 26.2
    assert orders.mean().item() == pytest.approx(AO, abs=1e-12)
    by_k = k_dce_loss(TABLE, EVERY, 4, masked=MASKS)
    assert sum(loss / (5 * math.comb(5, k)) for loss, k in zip(by_k.tolist(), K.tolist(), strict=True)) == (
        pytest.approx(AO, abs=1e-12)
    )
    total = 0.0
    for probability, weight in zip(*nodes(16, 0, 1), strict=True):
        losses = lambda_dce_loss(TABLE, EVERY, 4, probability=probability.expand(31), masked=MASKS)
        total += weight * (losses * chance(probability)).sum()
    assert total.item() == pytest.approx(AO, abs=1e-12)


@pytest.mark.parametrize(
    ("loss", "noise", "bias"),
    [
        (t_dse_loss, "loglinear", -0.01478),
        (t_dce_loss, "loglinear", -0.01481),
        (t_dse_loss, "geometric", 0.01250),
        (t_dce_loss, "geometric", 0.01766),
    ],
)
def test_losses_over_the_time_are_their_closed_form(loss, noise, bias):
    noise, constant = NOISES[noise], loss is t_dce_loss
    total = 0.0
    for t, weight in zip(*nodes(100, 1e-3, 1), strict=True):
        losses = loss(TABLE, EVERY, 4, noise, t=t.expand(31), masked=MASKS)
        # the mask of nothing is left out of the masks and has no loss
        total += weight * (losses * chance(noise.mask_probability(t))).sum() / (1 - 1e-3)
    assert total.item() == pytest.approx(closed_form(noise, constant=constant), abs=1e-8)
    assert total.item() - AO == pytest.approx(bias, abs=1e-5)


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
def test_score_entropy_is_a_weighted_cross_entropy(noise):
    t = torch.rand(31, dtype=torch.float64)
    rate, r = noise.rate(t), noise.score_factor(t)
    q = TABLE(EVERY.masked_fill(MASKS, 4), MASKS).exp()[:, :4]
    row, r_of = MASKS.nonzero()[:, 0], r[MASKS.nonzero()[:, 0]]
    score = r_of[:, None] * q
    true = score.gather(1, EVERY[MASKS][:, None])[:, 0]
    entropy = score.sum(1) - r_of * true.log() + r_of * (r_of.log() - 1)
    full = rate * torch.zeros(31, dtype=torch.float64).index_add(0, row, entropy)
    torch.testing.assert_close(t_dse_loss(TABLE, EVERY, 4, noise, t=t, masked=MASKS), full, atol=0, rtol=1e-12)
    torch.testing.assert_close(full, rate * r * CROSS_ENTROPY, atol=0, rtol=1e-12)
    constant = rate * r * K * r.log()
    dce = t_dce_loss(TABLE, EVERY, 4, noise, t=t, masked=MASKS)
    torch.testing.assert_close(dce, full - constant, atol=1e-11, rtol=1e-12)


class Small(nn.Module):
    """A model of masked tokens with weights."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 8), nn.Linear(8, 4)

    def forward(self, tokens, asked):
        seen = self.embed(tokens)
        return self.head((seen + seen.mean(1, keepdim=True)).tanh()[asked]).log_softmax(-1)


def test_losses_train_alike():
    first = Small().double()
    t = torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)
    tokens, noise = torch.randint(4, (4, 5)), LogLinearNoise()
    masked = torch.rand(4, 5) < t[:, None]
    models = [copy.deepcopy(first) for _ in range(3)]
    losses = [
        lambda model: t_dse_loss(model, tokens, 4, noise, t=t, masked=masked),
        lambda model: t_dce_loss(model, tokens, 4, noise, t=t, masked=masked),
        lambda model: (
            (1 - noise.eps) * lambda_dce_loss(model, tokens, 4, probability=noise.mask_probability(t), masked=masked)
        ),
    ]
    gradients = [torch.autograd.grad(loss(first).mean(), first.parameters()) for loss in losses]
    for one, two, three in zip(*gradients, strict=True):
        assert torch.equal(one, two) and one.any()
        torch.testing.assert_close(one, three, atol=1e-14, rtol=1e-14)
    for model, loss in zip(models, losses, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(10):
            optimizer.zero_grad()
            loss(model).mean().backward()
            optimizer.step()
    for one, two, three, before in zip(*(model.parameters() for model in (*models, first)), strict=True):
        assert torch.equal(one, two) and not torch.equal(one, before)
        torch.testing.assert_close(one, three, atol=1e-13, rtol=0)


def test_drawn_losses_have_the_mean():
    tokens, generator = X.expand(20_000, 5), torch.Generator().manual_seed(1)
    draws = {"generator": generator}
    noise = LogLinearNoise()
    means = {
        lambda_dce_loss: (lambda_dce_loss(TABLE, tokens, 4, **draws), AO),
        k_dce_loss: (k_dce_loss(TABLE, tokens, 4, **draws), AO),
        t_dse_loss: (t_dse_loss(TABLE, tokens, 4, noise, **draws), closed_form(noise, constant=False)),
        t_dce_loss: (t_dce_loss(TABLE, tokens, 4, noise, **draws), closed_form(noise, constant=True)),
        ordered_loss: (ordered_loss(TABLE, tokens, 4, "random", batch_size=50_000, **draws), AO),
    }
    for loss, (losses, expected) in means.items():
        error = losses.std() / len(losses) ** 0.5
        assert abs(losses.mean() - expected) < 4 * error, loss
        assert losses.isfinite().all() and error < 0.2
    assert means[k_dce_loss][0].std() < means[lambda_dce_loss][0].std() / 1.5


def test_true_conditionals_have_the_true_likelihood_in_every_order():
    p = joint(3, 4)
    table, tokens = true_table(p), torch.tensor([[0, 2, 1, 1], [2, 2, 0, 1]])
    exact = torch.stack([-p[tuple(row)].log() for row in tokens])
    for order in ("forward", "backward", "random", *permutations(range(4))):
        torch.testing.assert_close(ordered_loss(table, tokens, 3, order), exact, atol=1e-12, rtol=0)


def test_the_score_is_a_factor_of_the_time_times_the_conditional():
    """The ratio of the probabilities of two rows that differ in one masked token, from the joint distribution alone."""
    p, noise = joint(2, 3), GeometricNoise(0.1, 3)
    t = torch.tensor(0.6, dtype=torch.float64)
    left = (-noise.total(t)).exp().item()

    def probability(row):  # of a row with masked tokens, 2, at this time
        total = 0.0
        for clean in product(range(2), repeat=3):
            steps = [left if a == b else 1 - left if a == 2 else 0.0 for a, b in zip(row, clean, strict=True)]
            total += p[clean].item() * math.prod(steps)
        return total

    table = true_table(p)
    for row in ((2, 2, 2), (2, 0, 1), (1, 2, 2)):
        i = row.index(2)
        asked = (torch.arange(3) == i)[None]
        conditional = table(torch.tensor([row]), asked).exp()[0]
        for v in range(2):
            score = probability([*row[:i], v, *row[i + 1 :]]) / probability(row)
            assert score / noise.score_factor(t).item() == pytest.approx(conditional[v].item(), abs=1e-12)


def test_what_is_drawn_depends_on_the_generator_alone():
    tokens, state = torch.randint(4, (6, 5)), torch.get_rng_state()
    noise = LogLinearNoise()
    for loss, args in ((t_dse_loss, [noise]), (t_dce_loss, [noise]), (lambda_dce_loss, []), (k_dce_loss, [])):
        one, two, other = (
            loss(TABLE, tokens, 4, *args, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
        )
        assert torch.equal(one, two) and not torch.equal(one, other) and one.shape == (6,)
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_masked_is_no_loss_and_bfloat16_is_summed_in_float32():
    nothing = torch.zeros(1, 5, dtype=torch.bool)
    zero = torch.zeros(1)
    assert lambda_dce_loss(TABLE, X, 4, probability=zero, masked=nothing).item() == 0

    def half(tokens, asked):
        return TABLE(tokens, asked).bfloat16()

    assert k_dce_loss(half, X, 4, masked=~nothing).dtype == torch.float32
    given = k_dce_loss(TABLE, X, 4, k=torch.tensor([5]))
    assert torch.equal(given, k_dce_loss(TABLE, X, 4, masked=~nothing))


def test_rejects():
    nothing = torch.zeros(1, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="must not contain the mask token, got 4 among them"):
        k_dce_loss(TABLE, torch.tensor([[4, 0, 0, 0, 0]]), 4)
    with pytest.raises(ValueError, match=r"int64 \[rows, length\], got torch.int64 \(5,\)"):
        lambda_dce_loss(TABLE, X[0], 4)
    with pytest.raises(ValueError, match="at least one token of each row must be masked, got none in row 0"):
        k_dce_loss(TABLE, X, 4, masked=nothing)
    with pytest.raises(ValueError, match="pass k or masked"):
        k_dce_loss(TABLE, X, 4, masked=~nothing, k=torch.tensor([1]))
    with pytest.raises(ValueError, match=r"t must be \(1,\), got torch.float32 \(\)"):
        t_dse_loss(TABLE, X, 4, LogLinearNoise(), t=torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"k must be \(1,\), got torch.int64 \(2,\)"):
        k_dce_loss(TABLE, X, 4, k=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"masked must be bool \(1, 5\), got torch.int64 \(1, 5\)"):
        lambda_dce_loss(TABLE, X, 4, masked=(~nothing).long())
    with pytest.raises(ValueError, match=r"5 rows here, got the shape \(1, 5, 4\)"):
        k_dce_loss(lambda tokens, asked: torch.zeros(1, 5, 4), X, 4, masked=~nothing)
    with pytest.raises(ValueError, match="order must be forward, backward, random or all positions, got 'up'"):
        ordered_loss(TABLE, X, 4, "up")
    with pytest.raises(ValueError, match="each position from 0 to 4 once"):
        ordered_loss(TABLE, X, 4, [0, 1, 2, 3, 3])
    with pytest.raises(ValueError, match="eps must be from 0 to below 1, got 1"):
        LogLinearNoise(1)
    with pytest.raises(ValueError, match="noise must rise from above 0, got 2 to 1"):
        GeometricNoise(2, 1)
