"""Errors for batches that a model cannot be called with."""

import pytest
import torch
from torch import nn

import sparsekit as sk

X, LABELS = torch.randn(4, 8), torch.zeros(4)
BATCHES = {
    "pair": ((X, LABELS), r"model\(\*batch\) with a batch of 2: too many positional"),
    "loader": ([[X, LABELS]], r"model\(\*batch\) with a batch of 2: too many positional"),
    "mapping": ({"input": X, "labels": LABELS}, r"model\(\*\*batch\) with the keys input, labels: got an unexpected"),
}


@pytest.mark.parametrize(("batches", "how"), BATCHES.values(), ids=BATCHES)
def test_batches_that_do_not_fit_name_forward(batches, how, ratios):
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    said = f"Sequential cannot be called as {how}.*; pass forward=lambda model, batch: "
    for sequential in (True, False):
        with pytest.raises(TypeError, match=said) as caught:
            sk.prune_(model, sk.Wanda("2:4"), batches, calibration=sk.Calibration(sequential=sequential))
        assert isinstance(caught.value.__cause__, TypeError)
    with pytest.raises(TypeError, match=said):
        sk.compress_(model, batches)
    sk.prune_(
        model, sk.Wanda("2:4"), [(X, LABELS)], calibration=sk.Calibration(forward=lambda model, batch: model(batch[0]))
    )


def test_what_goes_wrong_inside_is_left_as_it_is():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(x, x)

    with pytest.raises(TypeError, match=r"^Linear\.forward\(\) takes 2 positional arguments but 3 were given"):
        sk.prune_(Broken(), sk.Wanda("2:4"), [X])
