"""prune_ interrupted at its n-th line: the model, its hooks, flags and masks are as they were."""

import pytest
import torch
from interrupts import assert_all_or_nothing
from torch import nn

import sparsekit as sk
from sparsekit.prune.calibration.replay import Replay


class Branches(nn.Module):
    """Stages that are replayed, one outside a list, one that batches may leave out, and a frozen part."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)])
        self.blocks[1].eval()
        self.dropout = nn.Dropout()
        self.first.register_forward_hook(lambda *_: None)

    def forward(self, x, short=False):
        x = skip = self.first(x)
        for block in self.blocks[: 2 if short else 3]:
            x = self.dropout(block(x))
        return x + skip


def make():
    torch.manual_seed(0)
    model = Branches()
    sk.prune_(model, sk.Magnitude("1:4"), where=lambda name, _: name == "first")
    return (model,)


BATCHES = [torch.randn(3, 4), (torch.randn(2, 4), True)]


@pytest.mark.parametrize("method", [sk.Wanda("2:4"), sk.SparseGPT("2:4")], ids=["wanda", "sparsegpt"])
@pytest.mark.parametrize("sequential", [True, False], ids=["sequential", "one-pass"])
@pytest.mark.parametrize("runs", [20, pytest.param(250, marks=pytest.mark.slow)], ids=["few", "many"])
def test_no_line_leaves_a_trace(monkeypatch, runs, sequential, method):
    if sequential and runs:
        monkeypatch.setattr(Replay, "_pays", lambda *_: True)

    def act(model):
        with torch.autocast("cpu", torch.bfloat16):
            sk.prune_(model, method, BATCHES, calibration=sk.Calibration(sequential=sequential))

    assert_all_or_nothing(make, act, runs=runs)
