"""Unigram and bigram models of tokens, which a model that has learned anything must beat."""

import torch
from torch import Tensor


def unigram_nats(train: Tensor, rows: Tensor, vocabulary: int) -> float:
    """Returns the mean loss of the tokens of rows, each by its frequency, with half a count more for each token."""
    return -_unigram(train, vocabulary).log()[rows].mean().item()


def bigram_nats(train: Tensor, rows: Tensor, vocabulary: int, pseudo: tuple[float, ...] = (0.3, 1, 3, 10, 30)) -> float:
    """Returns the mean loss of the tokens of rows, each by its frequency after the token before it.

    Frequencies are mixed with those of the unigram model, which weigh as much as so many counts; of these numbers the
    one that is best for the rows is taken, in favor of the bigram model.
    """
    single, text = _unigram(train, vocabulary), train.flatten()
    counts = torch.bincount(text[:-1] * vocabulary + text[1:], minlength=vocabulary**2).view(vocabulary, -1).double()
    found = []
    for weight in pseudo:
        pair = (counts + weight * single) / (counts.sum(1, keepdim=True) + weight)
        found.append(pair[rows[:, :-1], rows[:, 1:]].log().sum() + single[rows[:, 0]].log().sum())
    return -max(found).item() / rows.numel()


def _unigram(train: Tensor, vocabulary: int) -> Tensor:
    counts = torch.bincount(train.flatten(), minlength=vocabulary).double() + 0.5
    return counts / counts.sum()
