"""Whatever fails, a model is as it was."""

import math
from dataclasses import dataclass

import pytest
import torch
from pruning import assert_restored, snapshot, stack
from torch import nn

import sparsekit as sk
from sparsekit.prune import InputNorm, Method


@dataclass(frozen=True)
class Fails(Method):
    """Prunes two layers, then gives up."""

    error: type[BaseException] = RuntimeError
    statistic = InputNorm

    def prune(self, weight, statistic):
        if weight.shape[0] == 7:
            raise self.error("the third layer")
        return torch.zeros_like(weight) - weight, torch.ones_like(weight, dtype=torch.bool)


@pytest.mark.parametrize("sequential", [True, False], ids=["sequential", "one-pass"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("pruned", [False, True], ids=["fresh", "pruned"])
def test_a_failing_method_leaves_no_trace(error, sequential, pruned):
    model = stack(8, 6, 5, 7, 8)
    if pruned:
        sk.prune_(model, sk.Magnitude("1:4"))
    model[0].weight.data[0, 0] = -0.0
    model[2].eval()
    before = snapshot(model)
    with pytest.raises(error, match="the third layer"):
        sk.prune_(model, Fails("2:4", error), [torch.randn(3, 8)], calibration=sk.Calibration(sequential=sequential))
    assert_restored(model, before)


def test_a_failing_batch_leaves_no_trace():
    model = stack(8, 6, 5, 7, 8)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        sk.prune_(model, sk.Wanda("2:4"), [torch.randn(3, 8), torch.randn(3, 9)])
    calls = []

    def forward(model, x):
        calls.append(x)
        x = model[:4](x)
        if len(calls) >= 3:
            raise KeyboardInterrupt("late")
        return model[4:](x)

    with pytest.raises(KeyboardInterrupt, match="late"):
        sk.prune_(model, sk.Wanda("2:4"), [torch.randn(3, 8)] * 2, calibration=sk.Calibration(forward=forward))
    assert_restored(model, before)


def test_nan_weights_are_an_error():
    model = stack(8, 8, 8)
    model[2].weight.data[3, 5] = math.nan
    before = snapshot(model)
    with pytest.raises(ValueError, match="the weight of 2 contains NaN"):
        sk.prune_(model, sk.Magnitude("2:4"))
    assert_restored(model, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inputs_that_are_not_numbers_are_an_error(value):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Identity(), nn.Linear(8, 8)), torch.randn(5, 8)
    before = snapshot(model)
    x[2, 3] = value
    with pytest.raises(ValueError, match="a calibration input of 0 is NaN or infinite"):
        sk.prune_(model, sk.Wanda("2:4"), [x])
    assert_restored(model, before)
