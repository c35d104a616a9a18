"""Models of masked tokens that are tables, so that all that is expected of them can be enumerated."""

import math
from itertools import product

import torch


class Table:
    """A model whose log probabilities are looked up by the whole row, float64 ``[rows that there are, length, V]``."""

    def __init__(self, log_probs, vocabulary, length):
        self.log_probs, self.vocabulary, self.length = log_probs, vocabulary, length
        self.mask_token = vocabulary
        self.rows_seen = 0

    def __call__(self, tokens, asked):
        assert (tokens[asked] == self.mask_token).all()
        self.rows_seen += len(tokens)
        place = (self.vocabulary + 1) ** torch.arange(self.length, device=tokens.device)
        found = self.log_probs[(tokens * place).sum(1)][asked]
        return torch.nn.functional.pad(found, (0, 1), value=-math.inf)


def wrong_table(vocabulary=4, length=5):
    """Conditionals that belong to no distribution, so that every order gives another loss."""
    count = (vocabulary + 1) ** length * length * vocabulary
    logits = 3 * (torch.arange(count, dtype=torch.float64) ** 1.5).sin()
    return Table(logits.view(-1, length, vocabulary).log_softmax(-1), vocabulary, length)


def joint(vocabulary=2, length=3):
    """A distribution over all rows, float64 ``[vocabulary] * length``, none of them rare."""
    weight = 1.1 + torch.arange(vocabulary**length, dtype=torch.float64).mul(2.3).sin()
    return (weight / weight.sum()).view([vocabulary] * length)


def true_table(p):
    """The conditionals of a distribution."""
    vocabulary, length = p.shape[0], p.dim()
    log_probs = torch.zeros((vocabulary + 1) ** length, length, vocabulary, dtype=torch.float64)
    for index, row in enumerate(product(range(vocabulary + 1), repeat=length)):
        row = row[::-1]  # the first position is the lowest digit
        for i in range(length):
            seen = [slice(None) if token == vocabulary or j == i else token for j, token in enumerate(row)]
            marginal = p[tuple(slice(None) if isinstance(s, slice) else slice(s, s + 1) for s in seen)]
            over = marginal.sum([j for j in range(length) if j != i])
            log_probs[index, i] = (over / over.sum()).log()
    return Table(log_probs, vocabulary, length)


def all_masks(length):
    """All ways to mask at least one position, bool ``[2^length - 1, length]``."""
    return torch.tensor([*product([False, True], repeat=length)][1:])
