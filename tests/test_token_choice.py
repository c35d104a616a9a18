"""The draw of a token from log probabilities."""

import pytest
import torch

from sparsekit.diffusion import DiffusionSampler
from sparsekit.diffusion.token_choice import choose_tokens


def test_tokens_are_chosen_by_their_cumulative_probability():
    log_probs = torch.tensor([0.2, 0.5, 0.3, 0.0]).log().expand(5, 4)
    u = torch.tensor([0.1, 0.21, 0.69, 0.71, 1 - 2.0**-53], dtype=torch.float64)
    assert choose_tokens(log_probs, u, None, None).tolist() == [0, 1, 1, 2, 2]
    assert choose_tokens(log_probs, u, 1, None).tolist() == [1] * 5
    assert choose_tokens(log_probs, u, 2, None).tolist() == [1, 1, 2, 2, 2]  # 0.5 and 0.3 of 0.8
    assert choose_tokens(log_probs, u, None, 0.5).tolist() == [1] * 5
    assert choose_tokens(log_probs, u, None, 0.51).tolist() == [1, 1, 2, 2, 2]
    assert choose_tokens(log_probs, u, None, 1.0).tolist() == [0, 1, 1, 2, 2]


def test_rare_tokens_are_drawn_as_often_as_they_should():
    """Steps of 1/4096 times tokens of 1e-6 are less than float32 can draw, and 2^-30 vanishes in its sums."""
    p = torch.cat((torch.full((16,), (1 - 1e-4) / 16), torch.full((100,), 1e-6)))

    def model(tokens, asked):
        return p.log().expand(int(asked.sum()), 116)

    sample = DiffusionSampler(4096).sample(model, torch.full((2000, 200), 116), 116, range(2000))
    expected = 1e-4 * sample.tokens.numel()
    assert abs((sample.tokens >= 16).sum().item() - expected) < 3 * expected**0.5
    last = torch.tensor([[0.5, 0.5 - 2.0**-30, 2.0**-30]], dtype=torch.float64).log()
    uniform = 1 - torch.tensor([2.0**-31, 2.0**-29], dtype=torch.float64)
    assert choose_tokens(last.expand(2, 3), uniform, None, None).tolist() == [2, 1]


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_no_numbers_are_no_tokens(value):
    with pytest.raises(ValueError, match="must be numbers, and not minus infinity for all tokens"):
        choose_tokens(torch.full((300, 4), value), torch.full((300,), 0.5, dtype=torch.float64), None, None)
