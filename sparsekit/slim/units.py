"""``find_units``: the neurons, heads and stages of a model that can be removed as a whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .._batches import Forward, check_functions
from .._layers import Where, check_model, expert_axes, is_stack, selects, shared_weight_reasons
from .._undo import change
from ..prune.report import Skipped, summary
from .check import check_whole
from .coupling import find_units as coupled_units
from .graph import closed_branches, trace
from .plan import Branch, SlimPlan, Stages
from .trial import Trial


@dataclass(frozen=True)
class Units:
    """What ``find_units`` found; ``str(units)`` says it in words.

    Args:
        branches: feed-forward blocks and attentions, with their neurons and heads.
        stages: lists of stages of which some can be dropped.
        skipped: what was selected and cannot be made smaller, each with the reason.
    """

    branches: tuple[Branch, ...]
    stages: tuple[Stages, ...]
    skipped: tuple[Skipped, ...]

    def __str__(self) -> str:
        lines = [f"{each.units} {each.kind}s in {each.reader}" for each in self.branches]
        lines += [f"{each.count} stages in {each.name}" for each in self.stages]
        lines = lines or ["no units were found"]
        return "\n".join(lines + [f"skipped {text}" for text in summary((e.reason, e.name) for e in self.skipped)])

    def keep(
        self, units: Mapping[str, Sequence[int]] | None = None, stages: Mapping[str, Sequence[int]] | None = None
    ) -> SlimPlan:
        """Returns a plan that keeps these units and stages, and all of those that are not named.

        Args:
            units: the indices of the units that stay, ascending, by the name of a branch's reader.
            stages: the indices of the stages that stay, by the name of their list.

        Raises:
            ValueError: a name is unknown, or indices are not ascending or out of range.
        """
        units, stages = units or {}, stages or {}
        known = {each.reader for each in self.branches} | {each.name for each in self.stages}
        if unknown := [name for name in (*units, *stages) if name not in known]:
            raise ValueError(f"there are no units of {unknown[0]!r}, but of {', '.join(sorted(known)) or 'nothing'}")
        return SlimPlan(
            {each: tuple(units.get(each.reader, range(each.units))) for each in self.branches},
            {each: tuple(stages.get(each.name, range(each.count))) for each in self.stages},
        )


def find_units(model: nn.Module, example: Any, *, where: Where | None = None, forward: Forward | None = None) -> Units:
    """Finds the units of a model: neurons of feed-forward blocks, attention heads, and stages.

    A unit is found by what the model computes, not by its names. A layer, the reader, and the layers that write what it
    reads are a branch if nothing else reads what those write, and its channels fall into units if no gradient joins
    them: neurons with or without gates, heads, and with fewer key and value heads each of these with its query heads.
    Every branch is then tried: a model without one unit must compute what it does with zeros in its place. That takes
    the memory of the branches' weights a second time.

    That finds the units of BERT, DistilBERT, RoBERTa, ViT, GPT-2 and Llama, and of models that are built alike. Not
    supported are ``nn.MultiheadAttention`` and experts, which hold several matrices in one parameter, heads with a
    position bias of their own that comes from outside (T5, BLOOM), keys and values that share one layer with more
    queries (Phi-3), norms over all heads at once, and layers that are called more than once (ALBERT).

    Args:
        model: any module; it is run in evaluation mode and is as before afterwards.
        example: one batch, which should have at least two tokens.
        where: ``where(name, module)`` is asked for the reader of each branch. None selects those in a ``ModuleList``,
            or all if the model has none, so that the head of a classifier keeps its shape.
        forward: ``forward(model, batch)`` replaces how the model is called.

    Returns:
        The units, and what was selected and has none.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: the model is sharded or wrapped.
        RuntimeError: the model is being changed already.
    """
    check_model(model)
    check_functions(where=where, forward=forward)
    check_whole(model)
    with torch.inference_mode(False), torch.enable_grad():
        return change(model, "examined", lambda undo: _find(model, example, where, forward))


def _find(model: nn.Module, example: Any, where: Where | None, forward: Forward | None) -> Units:
    found = trace(model, example, forward)
    shared = {id(module): reason for (module, _), reason in shared_weight_reasons(model, fast_paths=False).items()}
    closed = [*closed_branches(found)]
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if where is None and lists:
        closed = [each for each in closed if _inside(each[0], lists)]
    branches: list[Branch] = []
    skipped = [*_unsupported(model, where), *(Skipped(name, "it is called more than once") for name in found.again)]
    for reader, writers in closed:
        if not selects(where, reader, model.get_submodule(reader)):
            continue
        reason = next((shared[id(m)] for m in map(model.get_submodule, (reader, *writers)) if id(m) in shared), None)
        if reason is None:
            leaves = {name: found.outputs[name] for name in writers}
            if (branch := coupled_units(reader, found.inputs[reader], leaves)) is not None:
                branches.append(branch)
                continue
            reason = f"its inputs do not fall into units that {', '.join(writers)} would write apart from each other"
        skipped.append(Skipped(reader, reason))
    trial = Trial(model, example, forward)
    right, wrong = trial.branches(branches)
    lists = [name for name in lists if any(_inside(each.reader, [name]) for each in right)]
    stages, failed = trial.stages([each for name in lists if (each := _alike(model, name)) is not None])
    return Units(tuple(right), tuple(stages), (*skipped, *wrong, *failed))


def _inside(name: str, lists: Sequence[str]) -> bool:
    return any(name.startswith(f"{each}.") for each in lists)


def _alike(model: nn.Module, name: str) -> Stages | None:
    """Returns a list of modules as stages, if there are several and all are of one class."""
    modules = [*model.get_submodule(name).children()]
    return Stages(name, len(modules)) if len(modules) > 1 and len({*map(type, modules)}) == 1 else None


def _unsupported(model: nn.Module, where: Where | None) -> list[Skipped]:
    """Returns the parts of a model that hold several matrices in one parameter."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and selects(where, name, module):
            found.append(Skipped(name, "a MultiheadAttention holds query, key and value in one parameter"))
        elif expert_axes(module) and any(map(is_stack, module._parameters.values())) and selects(where, name, module):
            found.append(Skipped(name, "it holds the matrices of experts in one parameter"))
    return found
