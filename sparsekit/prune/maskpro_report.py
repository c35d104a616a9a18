"""What ``MaskPro`` says: after each step, and at the end."""

from dataclasses import asdict, dataclass
from typing import Any

from .report import Skipped, summary


@dataclass(frozen=True)
class MaskProStep:
    """One step of ``MaskPro``.

    Args:
        step: how many steps are done with it, from 1.
        turn: the number of its batches, from 0; the steps of a turn draw masks for the same ones.
        loss: the mean loss of the mask that was drawn.
        initial_loss: the mean loss of the initial mask on the same batches.
        baseline: what the loss is measured against: that of the likeliest mask, of the initial one with ``parity``.
        advantage: how much worse than usual the loss was: the logits were moved away from the mask by
            ``lr`` times that times the gradient; negative is towards it.
    """

    step: int
    turn: int
    loss: float
    initial_loss: float
    baseline: float
    advantage: float


@dataclass(frozen=True)
class MaskProReport:
    """The result of ``MaskPro``; ``str(report)`` says it in words.

    Args:
        steps: the steps that were made.
        initial_loss: the mean loss of the initial mask on the batches that were held out.
        loss: that of the learned mask.
        kept: whether the learned mask is in the model; if not, the initial one is, because its loss was no larger.
        flips: the groups in which the learned mask differs from the initial one.
        groups: all groups.
        layers: names of the layers that have a mask.
        skipped: everything that was selected and left dense, each with the reason.
        multiplier: the logit that kept entries began with.
        held_out: the batches that were held out, of all processes.
    """

    steps: int
    initial_loss: float
    loss: float
    kept: bool
    flips: int
    groups: int
    layers: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    multiplier: float
    held_out: int

    def __str__(self) -> str:
        outcome = "the learned mask is in the model" if self.kept else "no better, so the initial mask is in the model"
        lines = [
            f"loss {self.initial_loss:.6g} -> {self.loss:.6g} on {self.held_out} batches that were held out: {outcome}",
            f"{self.steps} steps, {self.flips:,} of {self.groups:,} groups changed in {len(self.layers)} layers",
        ]
        return "\n".join(lines + [f"skipped {text}" for text in summary((e.reason, e.name) for e in self.skipped)])

    def to_json(self) -> dict[str, Any]:
        """Returns the report for JSON."""
        return asdict(self)
