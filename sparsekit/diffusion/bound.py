"""The bound of a model of masked tokens on a text, measured without bias and with its standard error."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from ._inferring import inferring
from ._row_random import row_seeds
from .absorbing import MaskedModel, check_tokens, token_losses
from .masking import mask_evenly

Group: TypeAlias = 'Literal["world", "alone"] | dist.ProcessGroup'  # a string: some builds of torch have no groups


@dataclass(frozen=True)
class Bound:
    """An upper bound of the negative log-likelihood of a text, as measured.

    Args:
        nats: the bound for one token.
        standard_error: that of ``nats``, from drawing which tokens are masked; the text counts as given. It is rather
            too large than too small.
        tokens: the number of tokens that were predicted.
        row_nats: the bound for all tokens of each row, float64 ``[rows]`` on the CPU. Two models that are measured with
            one seed see the same masked tokens: compare them by the differences of their rows.
    """

    nats: float
    standard_error: float
    tokens: int
    row_nats: Tensor

    @property
    def perplexity(self) -> float:
        """The perplexity by token, ``exp(nats)``; an upper bound."""
        return math.exp(self.nats)


def evaluate_bound(
    model: MaskedModel,
    rows: Tensor,
    mask_token: int,
    *,
    draws: int = 16,
    given: Tensor | None = None,
    batch_size: int = 16,
    seed: int = 0,
    device: torch.device | str | None = None,
    group: Group = "world",
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Bound:
    """Measures the bound that ``k_dce_loss`` estimates, with numbers of masked tokens spread evenly over each row.

    Draw ``j`` of ``draws`` masks ``k`` tokens with ``k / length`` from the part ``j`` of 0 to 1, which has the same
    mean as ``k`` drawn anywhere and less variance. What is masked depends on nothing but the seed, the row and the
    draw, so that the result is the same for every batch size and number of processes, up to the rounding errors of the
    model; sums are in float64.

    Args:
        model: predicts masked tokens; see ``sparsekit.diffusion.absorbing``. A module is run in evaluation mode.
        rows: int64 ``[rows, length]`` without the mask token, the same in every process.
        mask_token: the number of the mask token.
        draws: how many times each row is masked, an even number.
        given: bool like ``rows``, True at tokens that are never masked, such as a prompt; None is none.
        batch_size: how many rows are predicted at once.
        seed: what is drawn from.
        device: where the model is; None is where the rows are.
        group: the processes that share the work, each of which gets the result: ``"world"`` is all, ``"alone"`` is this
            one by itself, or a process group.
        progress: wraps the batches of this process, such as tqdm.

    Raises:
        ValueError: an argument is out of range, a row has no token to predict, or rows contain the mask token.
    """
    check_tokens(rows, mask_token)
    if draws < 2 or draws % 2:
        raise ValueError(f"draws must be an even number of at least 2, got {draws}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    rows = rows.to(device)
    free = torch.ones_like(rows, dtype=torch.bool) if given is None else ~given.to(rows.device)
    if free.shape != rows.shape or not free.any(1).all():
        raise ValueError("given must be bool like rows and leave a token to predict in each of them")
    key = row_seeds([seed], rows.device)
    rank, size = _rank_and_size(group)
    count = len(rows) * draws
    each = -(-count // size)  # in every process, since the forwards of a sharded model are calls of all of them
    losses = torch.zeros(each * size, dtype=torch.float64, device=rows.device)
    calls = torch.arange(rank, each * size, size, device=rows.device)
    with inferring(model):
        for call in progress(calls.split(batch_size)):
            row, draw = call.clamp(max=count - 1) // draws, call % draws
            masked = mask_evenly(key, free[row], call, draw, draws)
            found = token_losses(model, rows[row], mask_token, masked).double().sum(1)
            losses[call] = found * free[row].sum(1) / masked.sum(1)
    if size > 1:
        dist.all_reduce(losses, group=None if isinstance(group, str) else group)
    return _bound(losses[:count].view(len(rows), draws).cpu(), int(free.sum()))


def _bound(losses: Tensor, tokens: int) -> Bound:
    row_nats = losses.mean(1)
    # The square of the difference of two neighboring draws has as its mean the sum of their variances, and on top the
    # square of the difference of their means.
    variance = (losses[:, ::2] - losses[:, 1::2]).square().sum() / losses.shape[1] ** 2
    return Bound(float(row_nats.sum()) / tokens, float(variance.sqrt()) / tokens, tokens, row_nats)


def _rank_and_size(group: Group) -> tuple[int, int]:
    if group == "alone" or not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    of = None if isinstance(group, str) else group
    return dist.get_rank(of), dist.get_world_size(of)
