"""Evaluation mode leaves no trace, even in modules that do more than set a flag."""

import pytest
import torch
import torch.nn.functional as F
from interrupts import assert_all_or_nothing, interrupted
from torch import nn

import sparsekit as sk
from sparsekit._batches import evaluating
from sparsekit._undo import Undo, restoring, undoing


class Lora(nn.Linear):
    """A layer that merges its update in evaluation mode and removes it in training mode, as loralib does."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.delta, self.merged = nn.Parameter(torch.ones_like(self.weight)), False

    def train(self, mode=True):
        super().train(mode)
        if self.merged is mode:
            self.weight.data += -self.delta.data if self.merged else self.delta.data
            self.merged = not mode
        return self

    def forward(self, x):
        return F.linear(x, self.weight if self.merged else self.weight + self.delta, self.bias)


class Frozen(nn.Module):
    """A module that keeps a part in evaluation mode whatever its own mode."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def train(self, mode=True):
        super().train(mode)
        self.part.eval()
        return self


def states(model):
    return [(module.training, getattr(module, "merged", None)) for module in model.modules()]


def test_what_train_does_is_taken_back():
    model = nn.Sequential(Lora(8, 8), nn.Sequential(Lora(8, 8)), Frozen(Lora(8, 8)), nn.Linear(8, 8)).train()
    model[1].eval()
    before = states(model)
    assert before[1] == (True, False) and before[2:4] == [(False, None), (False, True)]
    with evaluating(model):
        assert all(not training and merged in (True, None) for training, merged in states(model))
        assert not torch.is_grad_enabled()
    assert states(model) == before and torch.is_grad_enabled()
    sk.prune_(
        model,
        sk.Wanda("2:4"),
        torch.randn(4, 8),
        where=lambda name, _: name == "3",
        calibration=sk.Calibration(forward=lambda m, x: m[3](x)),
    )
    assert states(model) == before


def test_a_frozen_part_inside_a_training_part_with_its_own_train():
    class Counts(nn.Sequential):
        modes = ()

        def train(self, mode=True):
            self.modes += (mode,)
            return super().train(mode)

    model = Counts(Lora(8, 8), Lora(8, 8).eval()).train()
    model[1].eval()
    before, model.modes = states(model), ()
    with evaluating(model):
        pass
    assert states(model) == before and model.modes == (False, True)
    model.eval()
    model.modes = ()
    with evaluating(model):
        assert model.modes == ()  # nothing is switched, so no method with side effects is called


def test_train_as_an_attribute_and_a_train_that_fails():
    class Fails(nn.Linear):
        def train(self, mode=True):
            if mode and not self.training:
                raise RuntimeError("no way back")
            return super().train(mode)

    model = nn.Sequential(nn.Linear(8, 8), Fails(8, 8), Lora(8, 8))
    calls = []
    model[0].train = lambda mode=True: calls.append(mode)
    before = states(model)
    with pytest.raises(RuntimeError, match="no way back"), evaluating(model):
        model[0].training = False
    assert states(model) == before and calls[0] is False and calls[1] is True


def test_no_line_leaves_flags():
    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
        model[2].eval()
        return (model,)

    def act(model):
        with evaluating(model):
            assert not any(module.training for module in model.modules())

    assert_all_or_nothing(make, act, last=0)


def test_steps_are_taken_back_whatever_interrupts_them():
    class Counter:
        def __init__(self):
            self.done = []

    def act(counter):
        with undoing() as undo:
            for step in range(3):
                undo.callback(take_back, counter, step)
                counter.done.append(step)
            raise ZeroDivisionError

    def take_back(counter, step):
        while step in counter.done:
            counter.done.remove(step)

    ends = 0
    for line in range(200):
        counter = Counter()
        try:
            assert interrupted(lambda counter=counter: act(counter), line)
        except ZeroDivisionError:
            ends += 1
        assert counter.done == [], f"line {line}"
    assert 100 < ends < 190


def test_a_step_that_fails_does_not_keep_the_others_from_being_taken():
    order = []

    def fails():
        order.append("fails")
        raise ValueError("a step")

    undo = Undo()
    undo.callback(order.append, "first")
    undo.callback(fails)
    undo.callback(order.append, "last")
    with pytest.raises(ValueError, match="a step"):
        undo.run()
    assert order == ["last", "fails", "fails", "first"]
    with undoing() as undo:
        undo.callback(order.append, "committed")
        undo.commit()
    assert "committed" not in order
    with pytest.raises(ZeroDivisionError), restoring(lambda: order.append("restored")):
        raise ZeroDivisionError
    assert order[-2:] == ["restored", "restored"]
