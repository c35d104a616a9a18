"""Tries whether a model without a unit or a stage computes what it does with zeros in its place."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .._batches import Forward, hooking, layer_input, observing
from .._trees import copied, tensors_in
from .._undo import undoing
from ..prune.report import Skipped
from .masking import zero_units
from .plan import Branch, SlimPlan, Stages
from .run import run_plainly
from .stages import INDEX, drop_stages
from .surgery import shrink


class Trial:
    """A model and an example to try removals on; after each, the model is as it was."""

    def __init__(self, model: nn.Module, example: Any, forward: Forward | None) -> None:
        self._model, self._example, self._forward = model, example, forward

    def branches(self, found: Sequence[Branch]) -> tuple[list[Branch], list[Skipped]]:
        """Returns the branches that a unit can be removed from, and the others with the reasons."""
        if self._failure(found) is None:
            return [*found], []
        right, wrong = [], []
        for branch in found:
            reason = self._failure([branch])
            scaled = replace(branch, attributes=tuple(_multiples(self._model, branch)))
            if reason is None:
                right.append(branch)
            elif scaled.attributes and self._failure([scaled]) is None:
                right.append(scaled)
            else:
                wrong.append(Skipped(branch.reader, reason))
        return right, wrong

    def stages(self, found: Sequence[Stages]) -> tuple[list[Stages], list[Skipped]]:
        """Returns the lists that a stage can be dropped from, and the others with the reasons."""
        right: list[Stages] = []
        wrong: list[Skipped] = []
        for each in found:
            if (reason := self._stage_failure(each)) is None:
                right.append(each)
            else:
                wrong.append(Skipped(each.name, reason))
        return right, wrong

    def _failure(self, branches: Sequence[Branch]) -> str | None:
        """Returns why the first unit of these branches cannot be removed; None if it can."""
        plan = SlimPlan({branch: tuple(range(1, branch.units)) for branch in branches})
        with undoing() as undo, torch.inference_mode(False), torch.no_grad():
            zero_units(self._model, plan, undo)
            masked = self._run()
            try:
                shrink(self._model, plan, undo)
                slim = self._run()
            except Exception as error:  # whatever the model says to another shape
                return _said(error)
        return None if _equal(masked, slim) else "without a unit the model computes something else than with zeros"

    def _stage_failure(self, stages: Stages) -> str | None:
        """Returns why the first stage cannot be dropped; None if it can."""
        if getattr(getattr(self._model, "config", None), "is_encoder_decoder", False):
            return "the configuration of an encoder with a decoder counts the stages of one of them alone"
        first = self._model.get_submodule(f"{stages.name}.0")
        with torch.inference_mode(False), torch.no_grad():
            with hooking() as hooks:
                hooks.append(first.register_forward_hook(pass_input, with_kwargs=True))
                passed = self._run()
            with undoing() as undo:
                try:
                    drop_stages(self._model, stages, range(1, stages.count), undo)
                    slim = self._run()
                except Exception as error:
                    return _said(error)
        return None if _equal(passed, slim) else "without it the model computes something else than where it is skipped"

    def _run(self) -> list[Tensor]:
        with observing(self._model):
            return [*tensors_in(run_plainly(self._model, copied(self._example), self._forward))]


def pass_input(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """Returns a stage's input in the form of its output: the hook of a stage that is skipped."""
    given = layer_input(args, kwargs)
    return (given, *output[1:]) if isinstance(output, tuple) else given


def _multiples(model: nn.Module, branch: Branch) -> list[str]:
    """Returns the integers of the modules that hold the writers which are the number of units or of their channels."""
    sizes = {branch.units, branch.units * branch.width}
    owners = dict.fromkeys(name.rpartition(".")[0] for name, _ in branch.writers)
    return [
        f"{owner}.{name}".removeprefix(".")
        for owner in owners
        for name, value in vars(model.get_submodule(owner)).items()
        if type(value) is int and value in sizes and name != INDEX
    ]


def _equal(masked: list[Tensor], slim: list[Tensor]) -> bool:
    if [tensor.shape for tensor in masked] != [tensor.shape for tensor in slim]:
        return False
    return all(_close(one, other) for one, other in zip(masked, slim, strict=True))


def _close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    most = max(float(one.abs().max()), torch.finfo(one.dtype).tiny) if one.numel() else 1.0
    tolerance = max(16 * torch.finfo(one.dtype).eps, 1e-5 if one.dtype == torch.float32 else 0.0)
    return bool(((one - other).abs() <= tolerance * most).all())


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"the model cannot be run without a part of it: {type(error).__name__}: {text[:120]}"
