"""Experts in one parameter, the same as layers of their own, and a router between them."""

import torch
import torch.nn.functional as F
from torch import nn

EXPERTS, HIDDEN, INNER = 4, 8, 12


class Stacked(nn.Module):
    """Gated experts as ``[experts, outputs, inputs]``, or transposed; ``how`` names the method that multiplies."""

    def __init__(self, *, transposed=False, how="loop"):
        super().__init__()
        self.is_transposed, self.how = transposed, how
        shapes = {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
        for key, shape in shapes.items():
            weight = torch.randn(EXPERTS, *shape, generator=torch.Generator().manual_seed(len(key))) / 3
            setattr(self, key, nn.Parameter(weight.mT.contiguous() if transposed else weight))

    def forward(self, x, chosen):
        return getattr(self, self.how)(x, chosen)

    def matrix(self, key, expert):
        matrix = getattr(self, key)[expert]
        return matrix.T if self.is_transposed else matrix

    def act(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def loop(self, x, chosen):
        y = torch.zeros_like(x)
        for expert in chosen.unique():
            rows = (chosen == expert).nonzero().flatten()
            inner = self.act(F.linear(x[rows], self.matrix("gate_up_proj", expert)))
            y[rows] = inner @ self.matrix("down_proj", expert).T
        return y

    def picked(self, x, chosen):
        first, second = (getattr(self, key)[chosen] for key in ("gate_up_proj", "down_proj"))
        if not self.is_transposed:
            first, second = first.mT, second.mT
        return torch.bmm(self.act(torch.bmm(x.unsqueeze(1), first)), second).squeeze(1)

    def grouped(self, x, chosen):
        order = chosen.argsort(stable=True)
        ends = torch.bincount(chosen, minlength=EXPERTS).cumsum(0).to(torch.int32)
        first, second = (getattr(self, key) for key in ("gate_up_proj", "down_proj"))
        if not self.is_transposed:
            first, second = first.mT, second.mT
        y = F.grouped_mm(self.act(F.grouped_mm(x[order], first, offs=ends)), second, offs=ends)
        return torch.zeros_like(y).index_copy(0, order, y)


class Separate(nn.Module):
    """The same experts as Linear layers."""

    def __init__(self, stacked):
        super().__init__()
        for key in ("gate_up_proj", "down_proj"):
            layers = nn.ModuleList()
            for expert in range(EXPERTS):
                weight = stacked.matrix(key, expert).detach().clone()
                layers.append(nn.Linear(weight.shape[1], weight.shape[0], bias=False))
                layers[-1].weight = nn.Parameter(weight)
            setattr(self, key, layers)

    def forward(self, x, chosen):
        y = torch.zeros_like(x)
        for expert in chosen.unique():
            rows = (chosen == expert).nonzero().flatten()
            gate, up = self.gate_up_proj[expert](x[rows]).chunk(2, -1)
            y[rows] = self.down_proj[expert](F.silu(gate) * up)
        return y


class Block(nn.Module):
    """Sends every token to one expert, by its largest entry among the first: the last expert gets none."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x):
        return x + self.experts(x, x[:, : EXPERTS - 1].argmax(1))


def stacked_and_separate(**how):
    stacked = Stacked(**how)
    return nn.Sequential(Block(stacked)), nn.Sequential(Block(Separate(stacked)))
