"""What a model does between its stages: replayed passes show every stage what plain passes show it."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from interrupts import difference, model_state, surroundings
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparsekit as sk
from sparsekit.prune.calibration.lineage import Lineage
from sparsekit.prune.calibration.partial_pass import StaleOutput
from sparsekit.prune.calibration.replay import Replay


@dataclass
class Output:
    hidden: torch.Tensor
    kind: str = "record"


class Stage(nn.Module):
    """Returns its output in one of many forms; may write to its input, or leave something behind in ``context``."""

    def __init__(self, kind):
        super().__init__()
        self.up, self.down, self.kind = nn.Linear(8, 8), nn.Linear(8, 8), kind

    def forward(self, x, context):
        if self.kind == "writes":
            x.mul_(0.9)
        y = self.down(self.up(x).relu())
        context.append(y if self.kind == "leaves" else None)
        forms = {"tuple": (y, None, y[:1]), "mapping": {"hidden": y, "more": [1]}, "record": Output(y), "list": [y]}
        return forms.get(self.kind, y)


def hidden(y):
    if isinstance(y, Output):
        return y.hidden
    return y["hidden"] if isinstance(y, dict) else y[0] if isinstance(y, tuple | list) else y


def in_place(x):
    x[:2] = x[2:4] * 2
    return x


def buffer(x):
    y = torch.zeros_like(x)
    y[1:] = x[1:]
    return y


GLUE = {  # of the output, the input, all inputs before, and what stages left behind
    "nothing": lambda y, x, xs, left: y,
    "function": lambda y, x, xs, left: F.gelu(y),
    "view": lambda y, x, xs, left: y.view(-1, 4).reshape(-1, 8),
    "residual": lambda y, x, xs, left: x + y,
    "skip": lambda y, x, xs, left: y + xs[0],
    "all of them": lambda y, x, xs, left: y + sum(xs),
    "in place": lambda y, x, xs, left: in_place(y),
    "through a buffer": lambda y, x, xs, left: buffer(y),
    "NumPy": lambda y, x, xs, left: torch.from_numpy(y.numpy() * 1.5),
    "a decision": lambda y, x, xs, left: y * 2 if y.mean().item() > 0 else y,
    "noise": lambda y, x, xs, left: y + torch.rand_like(y),
    "what was left": lambda y, x, xs, left: y + sum(each for each in left if each is not None),
    "a list that grows": lambda y, x, xs, left: torch.cat([y, y[:1]]),
}


class Model(nn.Module):
    def __init__(self, kinds, glue, call):
        super().__init__()
        self.stages = nn.ModuleList(map(Stage, kinds))
        self.glue, self.call = glue, call
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        xs, left = [], []
        for stage, glue in zip(self.stages, self.glue, strict=True):
            xs.append(x)
            given = x.clone() if stage.kind == "writes" else x
            x = GLUE[glue](hidden(self.call(stage, given, left)), x, xs, left)
        return self.head(x)


KINDS = ["tensor", "tuple", "mapping", "record", "list", "writes"]
CALLS = {
    "called": lambda stage, x, left: stage(x, left),
    "checkpointed": lambda stage, x, left: checkpoint(stage, x, left, use_reentrant=False),
    "forward": lambda stage, x, left: stage.forward(x, left),
}


def prune_both_ways(monkeypatch, model, batches):
    tried, trial = [], Replay._can_be_replayed
    monkeypatch.setattr(Replay, "_pays", lambda *_: True)
    monkeypatch.setattr(Replay, "_can_be_replayed", lambda *args: tried.append(trial(*args)) or tried[-1])
    other = copy.deepcopy(model)
    report = sk.prune_(model, sk.Wanda("2:4"), batches)
    monkeypatch.setattr(Replay, "_can_be_replayed", lambda *_: False)
    assert sk.prune_(other, sk.Wanda("2:4"), batches).error == report.error
    for name, weight in model.named_parameters():
        assert torch.equal(weight, other.get_parameter(name)), name
    return tried


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("glue", GLUE)
def test_every_glue(monkeypatch, glue, call):
    shift = list(GLUE).index(glue)
    kinds = [KINDS[(shift + index) % len(KINDS)] for index in range(5)]
    kinds[1] = "leaves" if glue == "what was left" else kinds[1]
    around = ["function", glue, "nothing", glue, "nothing"]
    tried = prune_both_ways(monkeypatch, Model(kinds, around, CALLS[call]), [torch.randn(5, 8), torch.randn(7, 8)])
    assert tried == [glue != "what was left"]  # that can only be right when every stage runs


def test_a_dropped_output_that_is_needed_after_all(monkeypatch):
    """A pruned stage may turn a decision: what was dropped on the other way is computed again."""

    class Turns(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(5))
            self.way = []

        def forward(self, x):
            first = self.stages[0](x)
            y = self.stages[1](first)
            far = bool((self.stages[2].weight == 0).any())
            self.way.append(far)
            first = first if far else None
            y = self.stages[2](y)
            return self.stages[4](self.stages[3](y + first if far else y))

    needed = []
    monkeypatch.setattr(StaleOutput, "__init__", lambda self: needed.append(self))
    model = Turns()
    assert prune_both_ways(monkeypatch, model, [torch.randn(5, 8)]) == [True]
    assert True in model.way and False in model.way and needed


def test_lineage():
    lineage, others = Lineage(), torch.ones(4)
    with lineage.following():
        x, y = torch.ones(4), torch.ones(4)
        lineage.mark([x], [(0, 0)])
        lineage.mark({"y": y}, [(1, 0)])
        z, view = x + y, y[1:]
        del x, y
        assert lineage.alive() == {(0, 0), (1, 0)}
        del z
        assert lineage.alive() == {(1, 0)}
        others[:2] = view[:2]
        assert view.shape == (3,) and view.device.type == "cpu" and len(view) == 3
        del view
        assert lineage.alive() == {(1, 0)}  # in what was written to
        others.fill_(0)
        lineage.pause()
        assert torch._C._len_torch_function_stack() == 0
        lineage.resume()
        x = torch.ones(2)
        lineage.mark(x, [(2, 0)])
        assert x.sum().item() == 2
        del x, others
        assert lineage.alive() == {(2, 0)}  # what left torch may decide anything
    assert torch._C._len_torch_function_stack() == 0


def test_what_progress_raises_leaves_nothing_behind():
    model = Model(KINDS[:3], ["nothing"] * 3, CALLS["called"])
    before, around = model_state(model), surroundings()

    def progress(stages):
        for index, stage in enumerate(stages):
            if index == 2:
                raise ZeroDivisionError
            yield stage

    with pytest.raises(ZeroDivisionError) as caught:
        sk.prune_(model, sk.Wanda("2:4"), [torch.randn(4, 8)] * 3, progress=progress)
    assert surroundings() == around  # while the traceback lives
    assert difference(model_state(model), before) is None, caught
