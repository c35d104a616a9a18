"""Samplers of masked tokens: their exact laws, how often they evaluate, and rows that do not depend on their batch."""

from itertools import permutations

import pytest
import torch
from absorbing import Table, joint, true_table, wrong_table

from sparsekit.diffusion import (
    BlockSampler,
    ConfidenceSampler,
    DiffusionSampler,
    GeometricNoise,
    LogLinearNoise,
    OrderedSampler,
)
from sparsekit.diffusion._row_random import row_seeds, row_uniforms
from sparsekit.diffusion.token_sampler import dense_turns

CPU = torch.device("cpu")
EVERY_ROW = torch.cartesian_prod(*[torch.arange(2)] * 3)
ONE, TWO = row_uniforms(row_seeds([0, 1], CPU), 4)


def masked_rows(rows, length, mask_token):
    return torch.full((rows, length), mask_token)


def uniform_model(vocabulary):
    """A model that knows nothing, of rows of any length."""

    def log_probs(tokens, asked):
        return torch.full((int(asked.sum()), vocabulary), 1 / vocabulary).log()

    return log_probs


def chance(sizes, p):
    """The probability that sets of positions of these sizes are unmasked in steps one after the other."""
    before = torch.ones_like(p)
    for size in sizes:
        now = before * p**size
        before = now.cumsum(0) - now
    return now.sum()


def law(sampler, p):
    """The exact law of a sampler's rows of three positions and two tokens, over all ways to order the positions."""
    table, total = true_table(p), torch.zeros(8, dtype=torch.float64)
    turns = torch.cartesian_prod(*[torch.arange(3)] * 3)
    for each in turns[(dense_turns(turns, turns >= 0) == turns).all(1)]:
        likelihood = torch.zeros(8, dtype=torch.float64)
        for turn in range(int(each.max()) + 1):
            asked = (each == turn).expand(8, 3)
            found = table(EVERY_ROW.masked_fill(each >= turn, 2), asked).gather(1, EVERY_ROW[asked][:, None])
            likelihood += found.view(8, -1).sum(1)
        total += chance(each.bincount().tolist(), sampler.step_probabilities) * likelihood.exp()
    assert total.sum().item() == pytest.approx(1, abs=1e-12)
    return total


def chi_squared(tokens, expected):
    counts = (tokens * torch.tensor([4, 2, 1])).sum(1).bincount(minlength=8)
    expected = expected.flatten() * len(tokens)
    return ((counts - expected) ** 2 / expected).sum().item()


def test_numbers_of_a_row_literal():
    """Philox4x32-10 of the counter 0 and the key 0 begins with 6627e8d5 e169c58d bc57ac4c 9b00dbd8."""
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert ONE[0].tolist() == [(((words[i] >> 6) << 26) + (words[i + 1] >> 6) + 0.5) * 2.0**-52 for i in (0, 2)]
    assert torch.equal(row_uniforms(row_seeds([1], CPU), 2)[0], TWO[:2])
    many = row_uniforms(row_seeds([5], CPU), 20_000)
    assert many.mean().item() == pytest.approx(0.5, abs=0.01) and many.min() > 0 and many.max() < 1


def test_turns_literal():
    times = torch.tensor([[7, 2, 7, 9], [3, 3, 0, 5], [1, 2, 3, 4]])
    free = torch.tensor([[True] * 4, [True, False, True, True], [False] * 4])
    assert dense_turns(times, free).tolist() == [[1, 0, 1, 2], [1, -1, 0, 2], [-1] * 4]


def test_probabilities_of_steps():
    for method in ("tweedie", "euler"):
        even = DiffusionSampler(4, method=method).step_probabilities
        torch.testing.assert_close(even, torch.full((4,), 0.25, dtype=torch.float64), atol=1e-12, rtol=0)
    noise = GeometricNoise(0.1, 5)
    one, two = (DiffusionSampler(64, noise, method).step_probabilities for method in ("tweedie", "euler"))
    assert [one.sum().item(), two.sum().item()] == pytest.approx([1, 1]) and (one - two).abs().max() > 1e-3
    fine = [DiffusionSampler(4096, noise, method).step_probabilities for method in ("tweedie", "euler")]
    assert (fine[0].cumsum(0) - fine[1].cumsum(0)).abs().max() < 2e-3
    coarse = DiffusionSampler(2, GeometricNoise(), "euler").step_probabilities
    assert coarse.min() >= 0 and coarse.sum() == pytest.approx(1)
    published = DiffusionSampler(16, LogLinearNoise(), last_t=1e-5).step_probabilities
    assert published[:-1].tolist() == pytest.approx([(1 - 1e-5) / 16] * 15) and published[-1] > published[0]


@pytest.mark.parametrize(
    ("steps", "free", "expected"),
    [(8, 1, 1.0), (32, 4, 3.816), (64, 64, 40.641), (1024, 64, 62.07), (1024, 1024, 647.48)],
)
def test_evaluations_are_known_in_advance(steps, free, expected):
    sampler = DiffusionSampler(steps)
    assert sampler.expected_evaluations(free) == pytest.approx(steps * (1 - (1 - 1 / steps) ** free), rel=1e-9)
    assert sampler.expected_evaluations(free) == pytest.approx(expected, abs=5e-3)
    start = masked_rows(400, free + 2, 9)
    start[:, [0, -1]] = 3  # given
    counts = sampler.evaluations(start, 9, range(400)).double()
    assert counts.max() <= min(steps, free)
    assert abs(counts.mean() - expected) <= 3 * counts.std() / 20 + 5e-3


def test_a_batch_is_evaluated_as_often_as_its_rows():
    table = wrong_table()
    start, sampler = masked_rows(16, 5, 4), DiffusionSampler(6)
    sample = sampler.sample(table, start, 4, range(16))
    assert sample.evaluations.tolist() == sampler.evaluations(start, 4, range(16)).tolist()
    assert table.rows_seen == sample.evaluations.sum() < 16 * 5
    assert (start == 4).all(), "what is given is not changed"


def test_a_sample_is_that_of_the_sampler_that_evaluates_every_step():
    table, sampler, start = wrong_table(), DiffusionSampler(6), masked_rows(16, 5, 4)
    uniforms = row_uniforms(row_seeds(range(16), CPU), 5)
    steps, tokens = (uniforms[..., 0] * 6).long(), start.clone()
    for step in range(6):
        found = table(tokens, tokens == 4).exp()
        chosen = torch.zeros_like(tokens)
        chosen[tokens == 4] = (found.cumsum(1) < uniforms[..., 1][tokens == 4][:, None]).sum(1)
        tokens = torch.where(steps == step, chosen, tokens)
    assert torch.equal(sampler.sample(table, start, 4, range(16)).tokens, tokens)


@pytest.mark.parametrize(
    "sampler",
    [
        DiffusionSampler(4),
        DiffusionSampler(4, GeometricNoise(), top_p=0.7),
        OrderedSampler("random", top_k=2),
        ConfidenceSampler(0.6),
        BlockSampler(OrderedSampler("random"), 2, 5),
    ],
    ids=["diffusion", "geometric", "ordered", "confidence", "blocks"],
)
def test_a_row_does_not_depend_on_its_batch(sampler):
    table, seeds = wrong_table(), [*range(100, 116)]
    start = masked_rows(16, 5, 4)
    start[::2, 1] = 3
    start[5] = 2  # nothing is masked
    batch = sampler.sample(table, start, 4, seeds)
    assert (batch.tokens < 4).all() and torch.equal(batch.tokens[start != 4], start[start != 4])
    for i in (0, 1, 5, 15):
        alone = sampler.sample(table, start[i : i + 1], 4, seeds[i : i + 1])
        assert torch.equal(alone.tokens[0], batch.tokens[i]) and alone.evaluations[0] == batch.evaluations[i]
    assert batch.evaluations[5] == 0 and batch.evaluations.max() <= 5
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode():
            assert torch.equal(sampler.sample(table, start, 4, seeds).tokens, batch.tokens)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_law_of_the_steps_nears_that_of_the_model():
    p = joint(2, 3)
    laws = {n: law(DiffusionSampler(n), p) for n in (1, 2, 4, 8, 16, 64, 256)}
    distances = [((each - p.flatten()).abs().sum() / 2).item() for each in laws.values()]
    assert distances == pytest.approx([0.26256, 0.12761, 0.06289, 0.03122, 0.01555, 0.00388, 0.00097], abs=1e-5)
    for n in (1, 2, 8):
        sample = DiffusionSampler(n).sample(true_table(p), masked_rows(20_000, 3, 2), 2, range(20_000))
        assert chi_squared(sample.tokens, laws[n]) < 24.3  # that of 7 degrees of freedom, one time in 1000
        assert n == 8 or chi_squared(sample.tokens, p) > 100


@pytest.mark.parametrize("order", ["forward", "backward", "random", *permutations(range(3))], ids=str)
def test_every_order_draws_from_the_distribution(order):
    p = joint(2, 3)
    sample = OrderedSampler(order).sample(true_table(p), masked_rows(20_000, 3, 2), 2, range(20_000))
    assert chi_squared(sample.tokens, p) < 24.3 and (sample.evaluations == 3).all()


def test_given_tokens_condition_what_is_drawn():
    p = joint(2, 3)
    start = torch.tensor([[2, 1, 2]]).expand(20_000, 3)
    conditional = torch.where(torch.tensor([0, 1])[None, :, None] == 1, p, 0) / p[:, 1].sum()
    sample = OrderedSampler("random").sample(true_table(p), start, 2, range(20_000))
    assert (sample.evaluations == 2).all() and (sample.tokens[:, 1] == 1).all()
    possible = conditional.flatten() > 0
    counts = (sample.tokens * torch.tensor([4, 2, 1])).sum(1).bincount(minlength=8)[possible]
    expected = conditional.flatten()[possible] * 20_000
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # 3 degrees of freedom


@pytest.mark.parametrize("given", [slice(0, 2), slice(-2, None), slice(1, 4)], ids=["prefix", "suffix", "middle"])
@pytest.mark.parametrize("method", ["tweedie", "euler"])
@pytest.mark.parametrize("choice", [{}, {"top_k": 2}, {"top_p": 0.7}], ids=["direct", "top_k", "top_p"])
def test_given_tokens_stay_and_cost_nothing(given, method, choice):
    table, start = wrong_table(), masked_rows(50, 5, 4)
    start[:, given] = torch.arange(5)[given].clamp(max=3)
    free = int((start[0] == 4).sum())
    for sampler in (DiffusionSampler(1000, GeometricNoise(), method, **choice), OrderedSampler("random", **choice)):
        sample = sampler.sample(table, start, 4, range(50))
        assert (sample.tokens < 4).all() and torch.equal(sample.tokens[start != 4], start[start != 4])
        assert sample.evaluations.max() == free


@pytest.mark.parametrize(
    "sampler",
    [DiffusionSampler(4, top_p=0.9), OrderedSampler(top_k=1), ConfidenceSampler()],
    ids=lambda each: type(each).__name__,
)
def test_a_mask_token_is_never_drawn(sampler):
    def raw(tokens, asked):  # the published network gives the mask token a logit
        return torch.tensor([0.1, 0.1, 0.8]).log().expand(int(asked.sum()), 3)

    with pytest.raises(ValueError, match="must give the mask token 2 the probability 0, but predicted it"):
        sampler.sample(raw, masked_rows(40, 3, 2), 2, range(40))


def test_confidence_takes_what_is_sure():
    log_probs = torch.tensor([[0.95, 0.05], [0.3, 0.7], [0.08, 0.92]]).log()

    def model(tokens, asked):
        calls.append(asked.tolist())
        return log_probs.expand(len(tokens), 3, 2)[asked]

    calls = []
    sample = ConfidenceSampler(0.9).sample(model, masked_rows(1, 3, 2), 2, [0])
    assert sample.tokens.tolist() == [[0, 1, 1]] and sample.evaluations.tolist() == [2]
    assert calls == [[[True, True, True]], [[False, True, False]]]
    calls = []
    assert ConfidenceSampler(1.1).sample(model, masked_rows(1, 3, 2), 2, [0]).evaluations.tolist() == [3]
    assert calls[1:] == [[[False, True, True]], [[False, True, False]]]


def test_blocks_see_their_context():
    seen = []

    def model(tokens, asked):
        seen.append((tokens.tolist()[0], asked.tolist()[0]))
        return torch.tensor([0.0, 1.0, 0.0]).log().expand(int(asked.sum()), 3)

    start = torch.tensor([[2, 0, 2, 2, 0, 0, 2]])
    sample = BlockSampler(DiffusionSampler(1), block=2, context=4).sample(model, start, 2, [3])
    assert sample.tokens.tolist() == [[1, 0, 1, 1, 0, 0, 1]] and sample.evaluations.tolist() == [3]
    assert seen == [
        ([2, 0, 2, 2], [True, False, False, False]),
        ([1, 0, 2, 2], [False, False, True, True]),
        ([1, 0, 0, 2], [False, False, False, True]),
    ]


def test_one_block_is_the_whole_row():
    table, start = wrong_table(), masked_rows(4, 5, 4)
    plain = DiffusionSampler(3).sample(table, start, 4, range(4))
    blocks = BlockSampler(DiffusionSampler(3), 5, 5).sample(table, start, 4, range(4))
    assert torch.equal(plain.tokens, blocks.tokens) and torch.equal(plain.evaluations, blocks.evaluations)
    longer = BlockSampler(DiffusionSampler(3), 2, 5).sample(uniform_model(4), masked_rows(2, 31, 4), 4, range(2))
    assert (longer.tokens < 4).all() and longer.evaluations.max() <= 31


def test_modules_are_evaluated_without_gradients():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout, self.head = torch.nn.Dropout(0.5), torch.nn.Linear(5, 4)

        def forward(self, tokens, asked):
            assert not self.training and not torch.is_grad_enabled()
            return self.head(torch.nn.functional.one_hot(tokens, 5).float()[asked]).log_softmax(-1)

    net, turns = Net(), []
    DiffusionSampler(3).sample(net, masked_rows(2, 5, 4), 4, [0, 1], progress=lambda loop: turns.extend(loop) or turns)
    assert net.training and turns == [*range(len(turns))] and 1 <= len(turns) <= 3


def test_rejects():
    table, start = Table(torch.zeros(27, 3, 2), 2, 3), masked_rows(2, 3, 2)
    with pytest.raises(ValueError, match="one for each row, got 1 for 2 rows"):
        OrderedSampler().sample(table, start, 2, [0])
    with pytest.raises(ValueError, match=r"from 0 to 2\^63 - 1, got -1"):
        OrderedSampler().sample(table, start, 2, [0, -1])
    with pytest.raises(ValueError, match="each position from 0 to 2 once"):
        OrderedSampler([0, 1]).sample(table, start, 2, [0, 1])
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        DiffusionSampler(0)
    with pytest.raises(ValueError, match="tweedie or euler, got 'heun'"):
        DiffusionSampler(4, method="heun")
    with pytest.raises(ValueError, match="last_t must be from 0 to below 1, got 1"):
        DiffusionSampler(4, last_t=1)
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        OrderedSampler(top_k=0)
    with pytest.raises(ValueError, match=r"top_p must be above 0 and at most 1, got 1\.5"):
        DiffusionSampler(4, top_p=1.5)
    with pytest.raises(ValueError, match="threshold must be above 0, got 0"):
        ConfidenceSampler(0)
    with pytest.raises(ValueError, match="block must be from 1 to the context of 4, got 5"):
        BlockSampler(OrderedSampler(), 5, 4)
