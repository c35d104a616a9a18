"""What all samplers of masked tokens share: rows with given tokens, a seed for each row, and turns."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ._inferring import inferring
from ._row_random import row_seeds, row_uniforms
from .absorbing import MaskedModel, check_rows, predict
from .token_choice import check_choice, choose_tokens

Progress: TypeAlias = Callable[[Iterable[Any]], Iterable[Any]]  # wraps a loop and iterates it, as tqdm does


@dataclass(frozen=True)
class TokenSample:
    """Rows of tokens that were drawn.

    Args:
        tokens: int64 ``[rows, length]``, without the mask token.
        evaluations: how often the model was evaluated on each row, int64 ``[rows]`` on the CPU.
    """

    tokens: Tensor
    evaluations: Tensor


class TokenSampler(ABC):
    """A rule that replaces the masked tokens of rows by tokens that a model predicts."""

    def sample(
        self, model: MaskedModel, start: Tensor, mask_token: int, seeds: Sequence[int], *, progress: Progress = iter
    ) -> TokenSample:
        """Draws tokens for all masked positions; the others, such as a prompt anywhere in the row, stay as they are.

        Random numbers come from the seed of the row alone, so that a row is drawn the same alone and in any batch, as
        far as the model computes the same there: its rounding errors may depend on the batch.

        Args:
            model: predicts masked tokens; see ``sparsekit.diffusion.absorbing``. A module is run in evaluation mode.
            start: int64 ``[rows, length]`` where the model is, with ``mask_token`` at positions to fill.
            mask_token: the number of the mask token.
            seeds: what each row is drawn from, one integer for each.
            progress: wraps the turns, such as tqdm.

        Raises:
            ValueError: an argument is out of range, or the model predicts the mask token or no token.
        """
        tokens, free, uniforms = _begin(start, mask_token, seeds)
        with inferring(model):
            evaluations = self._fill(model, tokens, free, uniforms, progress)
        if (tokens[free] == mask_token).any():
            raise ValueError(f"the model must give the mask token {mask_token} the probability 0, but predicted it")
        return TokenSample(tokens, evaluations.cpu())

    @abstractmethod
    def _fill(
        self, model: MaskedModel, tokens: Tensor, free: Tensor, uniforms: Tensor, progress: Progress = iter
    ) -> Tensor:
        """Fills the free positions of tokens, in place, and returns how often each row was evaluated.

        Args:
            model: predicts masked tokens.
            tokens: int64 ``[rows, length]``.
            free: which of the masked positions to fill, bool like ``tokens``.
            uniforms: float64 ``[rows, length, 2]``: numbers to choose the turn and the token by.
            progress: wraps the turns.
        """


@dataclass(frozen=True, kw_only=True)
class PlannedSampler(TokenSampler):
    """A sampler that draws in advance in which turn each position is filled, so that its cost is known in advance.

    A row is evaluated once for each of its turns, and rows do not wait for each other: there are as many calls of the
    model as the row with the most turns has.

    Args:
        top_k: draws each token from this many of the likeliest; None is all.
        top_p: draws it from the fewest of the likeliest that have at least this probability together; None is all.

    Raises:
        ValueError: an option is out of range.
    """

    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        check_choice(self.top_k, self.top_p)

    def evaluations(self, start: Tensor, mask_token: int, seeds: Sequence[int]) -> Tensor:
        """Returns how often ``sample`` is going to evaluate each row, int64 ``[rows]`` on the CPU.

        Arguments and errors are those of ``sample``.
        """
        _, free, uniforms = _begin(start, mask_token, seeds)
        return (self._turns(free, uniforms[..., 0]).amax(1) + 1).cpu()

    @abstractmethod
    def _times(self, keys: Tensor) -> Tensor:
        """Returns when each position would be filled if it were free, int64 like ``keys``, of any size."""

    def _turns(self, free: Tensor, keys: Tensor) -> Tensor:
        return dense_turns(self._times(keys), free)

    def _fill(
        self, model: MaskedModel, tokens: Tensor, free: Tensor, uniforms: Tensor, progress: Progress = iter
    ) -> Tensor:
        turns = self._turns(free, uniforms[..., 0])
        last = turns.amax(1)
        for turn in progress(range(int(last.max()) + 1)):
            rows = (last >= turn).nonzero()[:, 0]
            asked = turns[rows] == turn
            seen = tokens[rows]
            log_probs = predict(model, seen, asked, int(asked.sum()))
            seen[asked] = choose_tokens(log_probs, uniforms[rows, :, 1][asked], self.top_k, self.top_p)
            tokens[rows] = seen
        return last + 1


def dense_turns(times: Tensor, free: Tensor) -> Tensor:
    """Returns turns, which number the different times of each row's free positions from 0; -1 elsewhere.

    Args:
        times: int64 ``[rows, length]``, from 0.
        free: bool like ``times``.
    """
    ordered, place = times.masked_fill(~free, -1).sort(1)
    numbers = torch.zeros_like(ordered)
    numbers[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
    numbers -= (~free).any(1, keepdim=True).to(numbers)  # they come first
    return torch.empty_like(numbers).scatter_(1, place, numbers)


def _begin(start: Tensor, mask_token: int, seeds: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a copy of the rows, their masked positions, and random numbers for each."""
    check_rows(start)
    if len(seeds) != len(start):
        raise ValueError(f"seeds must be one for each row, got {len(seeds)} for {len(start)} rows")
    return start.clone(), start == mask_token, row_uniforms(row_seeds(seeds, start.device), start.shape[1])
