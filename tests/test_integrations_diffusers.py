"""The scheduler of diffusers for tokens: the same tokens as the sampler, a config that is stored, and noise."""

import pytest
import torch
from absorbing import wrong_table

pytest.importorskip("diffusers")

from sparsekit.diffusion import DiffusionSampler, GeometricNoise, LogLinearNoise
from sparsekit.integrations.diffusers import AbsorbingScheduler

TABLE = wrong_table()
SEEDS = range(30, 46)


def run(scheduler, tokens, *, skip):
    """The loop that a pipeline has; returns the tokens and how many calls it took."""
    calls = 0
    for t in scheduler.timesteps:
        if not skip or scheduler.asked(t, tokens, SEEDS).any():
            logits = torch.full((*tokens.shape, 5), 1e4)  # the mask token, 4, would be drawn everywhere
            logits[tokens == 4] = TABLE(tokens, tokens == 4).float() + 7
            logits[..., 4] = 50
            tokens, calls = scheduler.step(logits, t, tokens, SEEDS).prev_sample, calls + 1
    return tokens, calls


@pytest.mark.parametrize("choice", [{}, {"top_k": 2}, {"top_p": 0.7}], ids=["direct", "top_k", "top_p"])
@pytest.mark.parametrize("method", ["tweedie", "euler"])
@pytest.mark.parametrize("noise", [LogLinearNoise(), GeometricNoise()], ids=["loglinear", "geometric"])
def test_it_draws_the_tokens_of_the_sampler(noise, method, choice):
    start = torch.full((16, 5), 4)
    start[::2, 1] = 3
    kind = "loglinear" if isinstance(noise, LogLinearNoise) else "geometric"
    scheduler = AbsorbingScheduler(4, kind, method=method, last_t=1e-5, **choice)
    scheduler.set_timesteps(50)
    expected = DiffusionSampler(50, noise, method, 1e-5, **choice).sample(TABLE, start, 4, SEEDS)
    (all_steps, calls), (some, fewer) = (run(scheduler, start, skip=skip) for skip in (False, True))
    assert torch.equal(all_steps, expected.tokens) and torch.equal(some, expected.tokens)
    assert calls == 50 > fewer >= expected.evaluations.max()


def test_it_is_stored_and_loaded(tmp_path):
    scheduler = AbsorbingScheduler(9, "geometric", sigma_max=5.0, method="euler", last_t=0.1, top_k=3)
    scheduler.save_pretrained(tmp_path)
    loaded = AbsorbingScheduler.from_pretrained(tmp_path)
    assert (tmp_path / "scheduler_config.json").exists()
    assert all(loaded.config[name] == value for name, value in scheduler.config.items() if name[0] != "_")
    loaded.set_timesteps(4)
    assert loaded.timesteps.tolist() == pytest.approx([1, 0.775, 0.55, 0.325]) and len(loaded) == 4
    again = AbsorbingScheduler.from_config(loaded.config, top_k=5)
    assert again.config.top_k == 5 and again.config.sigma_max == 5.0


def test_noise_literal():
    scheduler, rows = AbsorbingScheduler(9, eps=0.0), torch.tensor([[1, 2, 3], [4, 5, 6]])
    noise = torch.tensor([[0.1, 0.6, 0.4], [0.1, 0.6, 0.4]])
    assert scheduler.add_noise(rows, noise, torch.tensor([0.5, 0.2])).tolist() == [[9, 2, 9], [9, 5, 6]]
    assert torch.equal(scheduler.scale_model_input(rows, 0.5), rows)
    whole = scheduler.step(torch.zeros(2, 3, 9), 1.0, torch.full((2, 3), 9), [0, 1], return_dict=False)
    assert (whole[0] < 9).all(), "with one step all tokens are unmasked"


def test_rejects():
    with pytest.raises(ValueError, match="noise must be loglinear or geometric, got 'cosine'"):
        AbsorbingScheduler(4, "cosine")
    with pytest.raises(ValueError, match="tweedie or euler, got 'heun'"):
        AbsorbingScheduler(4, method="heun")
    scheduler, tokens = AbsorbingScheduler(4), torch.full((2, 3), 4)
    with pytest.raises(ValueError, match=r"timestep must be one of timesteps, got 0\.3"):
        scheduler.step(torch.zeros(2, 3, 5), 0.3, tokens, [0, 1])
    with pytest.raises(ValueError, match="one for each row, got 1 for 2 rows"):
        scheduler.asked(1.0, tokens, [0])
