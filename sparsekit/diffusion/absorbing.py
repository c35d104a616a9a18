"""Absorbing diffusion of tokens: what one model of masked tokens is asked, and the losses that train it.

A token is masked at most once, so that a model needs no time: it predicts each masked token from the visible ones. It
is any function ``(tokens, asked) -> log_probs``, where ``asked`` is a bool tensor like ``tokens``, True at the masked
positions to predict, and ``log_probs`` is ``[asked positions, vocabulary]``, normalized over the vocabulary, with
probability 0 for the mask token: ``lambda tokens, asked: net(tokens)[asked].log_softmax(-1)``.

Losses are in nats, one number for each row of tokens. Each estimates the same bound, the mean over all orders of what
the chain rule gives: ``AO(x) = E_order sum_i -log q(x_order[i] | x_order[<i])``, which is at least ``-log q(x)``.
Source: Ou et al., 2024, https://arxiv.org/abs/2406.03736.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from .noise import Noise

MaskedModel: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def t_dse_loss(
    model: MaskedModel,
    tokens: Tensor,
    mask_token: int,
    noise: Noise,
    *,
    t: Tensor | None = None,
    masked: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Computes the denoising score entropy at a random time, published as ``t_DSE``.

    With the score ``s_v = r q_v`` of each masked position it is ``rate * sum_masked (sum_v s_v - r log s_x + r (log r -
    1))``. The probabilities ``q`` add up to 1, so that this equals ``rate * r * sum_masked -log q_x`` for every sample,
    the weighted cross-entropy of MDLM, which is what is computed. Its mean is the bound but for what the times leave
    out, which makes perplexities too low (by 0.6 % where the cross-entropy is ``2.5 + 5 lambda^3``): measure with
    ``evaluate_bound``.

    Args:
        model: predicts masked tokens; see ``sparsekit.diffusion.absorbing``.
        tokens: int64 ``[rows, length]`` without the mask token.
        mask_token: the number of the mask token.
        noise: the schedule; ``rate`` and ``r``, its ``score_factor``, are those at the time.
        t: the time of each row, within 0 and 1, ``[rows]``; None draws it from 1e-3 to 1, evenly over the rows.
        masked: which tokens are masked, bool like ``tokens``; None draws them with the probability of the time.
        generator: what is drawn from, on any device; None is the global random state.

    Returns:
        ``[rows]`` in nats, float32 or the wider dtype of the model's.

    Raises:
        ValueError: tokens are not such rows, or contain the mask token, as a row to predict must not.
    """
    t, masked = _time_and_masked(tokens, mask_token, noise, t, masked, generator)
    cross_entropy = token_losses(model, tokens, mask_token, masked).sum(1)
    return noise.loss_weight(t).to(cross_entropy) * cross_entropy


def t_dce_loss(
    model: MaskedModel,
    tokens: Tensor,
    mask_token: int,
    noise: Noise,
    *,
    t: Tensor | None = None,
    masked: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Computes the denoising cross-entropy at a random time, published as ``t_DCE``.

    It is ``rate * r * sum_masked (-log q_x - log r)``: that of ``t_dse_loss`` less a term that no weight of the model
    changes, so that the gradients are the same. That term has mean 0 over all mask probabilities, but makes the loss
    negative at small times even for a perfect model: train with it, and watch another one.

    Arguments, result and errors are those of ``t_dse_loss``.
    """
    t, masked = _time_and_masked(tokens, mask_token, noise, t, masked, generator)
    cross_entropy = token_losses(model, tokens, mask_token, masked).sum(1)
    constant = masked.sum(1) * noise.score_factor(t).log()
    return noise.loss_weight(t).to(cross_entropy) * (cross_entropy - constant.to(cross_entropy))


def lambda_dce_loss(
    model: MaskedModel,
    tokens: Tensor,
    mask_token: int,
    *,
    probability: Tensor | None = None,
    masked: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Computes the cross-entropy at a random mask probability, published as ``lambda_DCE``.

    It is ``1 / lambda * sum_masked -log q_x`` with lambda uniform from 0 to 1. Its mean is the bound exactly, with no
    schedule; its variance is large, since few tokens that happen to be masked at a small lambda weigh much.

    Args:
        probability: lambda of each row, above 0, ``[rows]``; None draws it, one from each of as many equal parts of 0
            to 1 as there are rows.

    The other arguments, the result and the errors are those of ``t_dse_loss``.
    """
    check_tokens(tokens, mask_token)
    if probability is None:
        rows = torch.arange(len(tokens), device=tokens.device)
        probability = (draw_uniform(tokens[:, 0], generator) + rows) / len(tokens)
    probability = _given("probability", probability, tokens[:, 0])
    probability = probability.clamp(min=2.0**-60)  # at 0 nothing is masked, and 0 / 0 is no number
    if masked is None:
        masked = draw_uniform(tokens, generator) < probability[:, None]
    masked = _given("masked", masked, tokens)
    cross_entropy = token_losses(model, tokens, mask_token, masked).sum(1)
    return cross_entropy / probability.to(cross_entropy)


def k_dce_loss(
    model: MaskedModel,
    tokens: Tensor,
    mask_token: int,
    *,
    k: Tensor | None = None,
    masked: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Computes the cross-entropy at a random number of masked tokens, published as ``k_DCE``.

    It is ``length / k * sum_masked -log q_x`` with k uniform from 1 to the length, and k masked tokens anywhere. Its
    mean is the bound exactly, with less variance than ``lambda_dce_loss``: none at all if all tokens are as hard.

    Args:
        k: the number of masked tokens of each row, ``[rows]``; None draws it.
        masked: which tokens are masked, bool like ``tokens``, at least one in each row, and instead of ``k``; None
            draws them.

    The other arguments, the result and the errors are those of ``t_dse_loss``.
    """
    check_tokens(tokens, mask_token)
    if masked is None:
        length = tokens.shape[1]
        if k is None:
            k = (draw_uniform(tokens[:, 0], generator) * length).long() + 1
        masked = draw_uniform(tokens, generator).argsort(1).argsort(1) < _given("k", k, tokens[:, 0])[:, None]
    elif k is not None:
        raise ValueError("pass k or masked, got both")
    masked = _given("masked", masked, tokens)
    if not (k := masked.sum(1)).all():
        raise ValueError(f"at least one token of each row must be masked, got none in row {int(k.argmin())}")
    cross_entropy = token_losses(model, tokens, mask_token, masked).sum(1)
    return cross_entropy * tokens.shape[1] / k


def token_losses(
    model: MaskedModel, tokens: Tensor, mask_token: int, masked: Tensor, asked: Tensor | None = None
) -> Tensor:
    """Computes ``-log q`` of each token that a model is asked for, given those that are visible.

    Args:
        model: predicts masked tokens.
        tokens: int64 ``[rows, length]``.
        mask_token: what is written at masked positions.
        masked: which tokens the model does not see, bool like ``tokens``.
        asked: which of these it is asked for; None is all.

    Returns:
        Like ``tokens``, 0 where it is not asked; float32 or the wider dtype of the model's.

    Raises:
        ValueError: the model returns something else than ``[asked positions, vocabulary]``.
    """
    asked = masked if asked is None else asked
    target = tokens[asked]
    log_probs = predict(model, tokens.masked_fill(masked, mask_token), asked, len(target))
    found = log_probs.gather(1, target[:, None])[:, 0]
    found = found.to(torch.promote_types(found.dtype, torch.float32))
    return -torch.zeros(tokens.shape, dtype=found.dtype, device=found.device).masked_scatter(asked, found)


def predict(model: MaskedModel, tokens: Tensor, asked: Tensor, count: int) -> Tensor:
    """Calls a model and checks the shape of what it returns."""
    log_probs = model(tokens, asked)
    if log_probs.dim() != 2 or len(log_probs) != count:
        raise ValueError(
            f"model(tokens, asked) must return log probabilities [asked positions, vocabulary], {count} rows here, "
            f"got the shape {tuple(log_probs.shape)}"
        )
    return log_probs


def _time_and_masked(
    tokens: Tensor,
    mask_token: int,
    noise: Noise,
    t: Tensor | None,
    masked: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Returns the time of each row and which tokens are masked: what is given, or what is drawn instead."""
    check_tokens(tokens, mask_token)
    if t is None:
        rows = torch.arange(len(tokens), device=tokens.device)
        spread = (draw_uniform(tokens[:1, 0], generator) + rows / len(tokens)) % 1
        t = 1e-3 + (1 - 1e-3) * spread
    t = _given("t", t, tokens[:, 0])
    if masked is None:
        masked = draw_uniform(tokens, generator) < noise.mask_probability(t)[:, None]
    return t, _given("masked", masked, tokens)


def _given(name: str, value: Tensor, like: Tensor) -> Tensor:
    """Returns an argument on the device of the tokens, for each of which or each row of which it has a value."""
    if value.shape != like.shape or (name == "masked" and value.dtype != torch.bool):
        wanted = f"{'bool ' if name == 'masked' else ''}{tuple(like.shape)}"
        raise ValueError(f"{name} must be {wanted}, got {value.dtype} {tuple(value.shape)}")
    return value.to(like.device)


def draw_uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws numbers from 0 to 1 in float64, which has so many that ties do not matter."""
    device = like.device if generator is None else generator.device
    return torch.rand(like.shape, generator=generator, device=device, dtype=torch.float64).to(like.device)


def check_tokens(tokens: Tensor, mask_token: int) -> None:
    """Rejects what is not rows of tokens to predict.

    Raises:
        ValueError: says what was got.
    """
    check_rows(tokens)
    if (tokens == mask_token).any():
        raise ValueError(f"tokens to predict must not contain the mask token, got {mask_token} among them")


def check_rows(tokens: Tensor) -> None:
    """Rejects what is not rows of tokens.

    Raises:
        ValueError: says what was got.
    """
    if tokens.dim() != 2 or tokens.dtype != torch.int64 or not tokens.numel():
        raise ValueError(f"tokens must be int64 [rows, length], got {tokens.dtype} {tuple(tokens.shape)}")
