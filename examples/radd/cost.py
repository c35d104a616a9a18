"""What sampling costs: evaluations against the formula, and seconds against a sampler that caches as published."""

import random
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsekit.diffusion import DiffusionSampler
from sparsekit.diffusion._row_random import row_seeds, row_uniforms
from sparsekit.diffusion.token_choice import choose_tokens
from sparsekit.models import RADD


@torch.no_grad()
def cached_sample(model: RADD, sampler: DiffusionSampler, start: Tensor, seeds: range) -> tuple[Tensor, int]:
    """Draws what ``sampler`` draws, as published: all rows are evaluated as soon as one of them has changed.

    The last prediction is kept meanwhile, also in steps that unmask nothing.

    Returns:
        The tokens, and the number of evaluations of rows.
    """
    uniforms = row_uniforms(row_seeds(seeds, start.device), start.shape[1])
    step = sampler._times(uniforms[..., 0])
    tokens, log_probs, evaluations = start.clone(), None, 0
    for now in range(sampler.steps):
        if log_probs is None:
            log_probs, evaluations = model(tokens), evaluations + len(tokens)
        taken = (step == now) & (tokens == model.mask_token)
        if taken.any():
            tokens[taken] = choose_tokens(log_probs[taken], uniforms[..., 1][taken], None, None)
            log_probs = None
    return tokens, evaluations


def sample(model: RADD, sampler: DiffusionSampler, start: Tensor, seeds: range) -> tuple[Tensor, int]:
    """Draws with ``sampler`` itself; returns the same as ``cached_sample``."""
    found = sampler.sample(model, start, model.mask_token, seeds)
    return found.tokens, int(found.evaluations.sum())


def count_calls(model: RADD, length: int, steps: tuple[int, ...], rows: int) -> dict[str, dict[str, float]]:
    """Counts evaluations of rows without drawing them, which is known in advance; against ``n (1 - (1 - 1/n)^l)``."""
    start, found = torch.full((rows, length), model.mask_token), {}
    for n in steps:
        sampler = DiffusionSampler(n)
        calls = sampler.evaluations(start, model.mask_token, range(rows)).double()
        found[str(n)] = {
            "calls": calls.mean().item(),
            "standard_error": calls.std().item() / rows**0.5,
            "formula": n * (1 - (1 - 1 / n) ** length),
        }
    return found


def time_samplers(
    models: dict[str, Any], length: int, steps: int, batches: tuple[int, ...], rounds: int
) -> list[dict[str, Any]]:
    """Times whole draws in turns: ours by every model, and one that caches as published by the model ``"dense"``."""
    sampler, found = DiffusionSampler(steps), []
    dense = models["dense"]
    device = next(dense.parameters()).device
    for batch in batches:
        start = torch.full((batch, length), dense.mask_token, device=device)
        calls = {"cached as published": partial(cached_sample, dense, sampler, start, range(batch))}
        for name, model in models.items():
            calls[name] = partial(sample, model, sampler, start, range(batch))
        times: dict[str, list[float]] = {name: [] for name in calls}
        evaluations = {}
        for _ in range(rounds):
            for name in random.sample(list(calls), len(calls)):
                begin = time.perf_counter()
                evaluations[name] = calls[name]()[1]
                times[name].append(time.perf_counter() - begin)
        for name, each in times.items():
            found.append(
                {
                    "batch": batch,
                    "steps": steps,
                    "sampler": name,
                    "seconds": min(each),
                    "evaluations": evaluations[name],
                }
            )
    return found
