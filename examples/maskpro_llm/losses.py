"""The loss of a language model: how well each token is predicted from those before it."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from sparsekit.cli.models import output_of


def text_losses(model: nn.Module, rows: Tensor) -> Tensor:
    """Returns the mean negative log-likelihood of the tokens of each text, but for its first one: float32 ``[n]``."""
    logits = output_of(model, rows)[:, :-1].float()
    targets = rows[:, 1:].to(logits.device)
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)


class CountedLoss:
    """The mean loss of a batch of texts, and the number of forward passes so far in ``passes``, a part of a run."""

    def __init__(self) -> None:
        self.passes = 0

    def __call__(self, model: nn.Module, rows: Tensor) -> Tensor:
        self.passes += 1
        return text_losses(model, rows).mean()

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self.passes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.passes = state["passes"]


@torch.no_grad()
def all_losses(model: nn.Module, batches: Iterable[Tensor], what: str) -> Tensor:
    """Returns the losses of all texts of many batches: float64 ``[n]`` on the CPU."""
    bar = tqdm(batches, what, leave=False, disable=None)
    return torch.cat([text_losses(model, rows).double().cpu() for rows in bar])
