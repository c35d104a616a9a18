"""``UnitLearner``: learns which units go from losses alone, without back-propagation."""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._batches import check_functions, hooking, observing
from .._layers import check_model
from .._trees import copied
from .._undo import claiming
from ..prune.advantage import Advantage
from ..prune.masked_losses import LossFn, set_noise, split_batches
from .plan import SlimPlan
from .scores import choose_units, unit_scores, unit_weights
from .units import Units

MOST = 0.5  # of the logit that units begin with: the furthest that one draw moves a logit at an advantage of 1
WIDEST, BISECTIONS = 60.0, 50  # how far logits are shifted at most, and how exactly
SPEED = 0.03  # a unit's draws move its logit to the other side in about 1 / SPEED steps


@dataclass(frozen=True)
class UnitStep:
    """One step of ``UnitLearner``.

    Args:
        step: how many steps are done with it, from 1.
        loss: the loss of the units that were drawn.
        initial_loss: the loss of the initial plan on the same batch.
        advantage: how far the logits were moved away from what was drawn; negative is towards it.
    """

    step: int
    loss: float
    initial_loss: float
    advantage: float


@dataclass(frozen=True)
class UnitReport:
    """The result of ``UnitLearner``.

    Args:
        plan: the learned plan, or the initial one where that has no larger loss on the batches that were held out.
        learned: whether it is the learned one.
        loss: the mean loss of the learned plan on the batches that were held out.
        initial_loss: that of the initial plan.
        scores: the logit of every unit, as ``choose_units`` takes them.
    """

    plan: SlimPlan
    learned: bool
    loss: float
    initial_loss: float
    scores: Mapping[str, Tensor]


class UnitLearner:
    """A learner of which units go, that runs the model forward only, as ``MaskPro`` does for single weights.

    Every unit has a logit, and is kept at random with the probability ``sigmoid(logit)``. Each step draws the units,
    and makes what was drawn more likely if its loss is lower than that of the initial plan on the same batch, less
    likely if it is higher. All logits are shifted together, so that the share of the weights that is kept stays what
    was asked for on average; the plan at the end has it exactly::

        learner = sk.slim.UnitLearner(model, loss_fn, units, 0.2, batches=train, held_out=valid)
        for step in learner.steps(2000):
            print(step)
        sk.slim_(model, learner.finish().plan)

    It takes a pass for each step, so good scores come first: of the small Llama of ``gate_scores``, without 10 % of its
    weights, 400 steps lower the perplexity from 6.9, with the plan that norms choose, to 5.2, and find no better plan
    than that of ``gate_scores``, 4.5.

    The model is unchanged: a unit that is not drawn is zero where it is read. It is run in evaluation mode, and the
    random state of torch is seeded by the number of the batch, so that all draws meet the same noise. In a run, the
    learner is a part: ``run.restore(learner=learner)``. It learns in one process alone.

    Args:
        model: the model.
        loss_fn: ``loss_fn(model, batch)`` returns the loss, a number or a tensor of one.
        units: what ``find_units`` found in it.
        sparsity: the share of the weights of all branches that goes.
        batches: what is learned from, as for ``MaskPro``.
        held_out: other batches, on which the result is compared with the initial plan. None holds out the last tenth.
        scores: the scores that the initial plan is chosen by; None takes ``unit_scores(model, units)``.
        flips: how many units a first draw changes on average; None is the root of their number. At most half of them.
        floor: as for ``choose_units``.
        round_to: as for ``choose_units``.
        seed: chooses draws and noise.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: an argument is out of range, or there are too few batches to hold one out.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        units: Units,
        sparsity: float,
        *,
        batches: Any,
        held_out: Any = None,
        scores: Mapping[str, Tensor] | None = None,
        flips: float | None = None,
        floor: float = 0.25,
        round_to: int = 64,
        seed: int = 0,
    ) -> None:
        check_model(model)
        check_functions(loss_fn=loss_fn)
        self._model, self._loss_fn, self._units, self._seed = model, loss_fn, units, seed
        self._options = {"sparsity": sparsity, "floor": floor, "round_to": round_to}
        self._batches, self._held_out = split_batches(batches, held_out)
        self._weights = torch.cat(
            [
                torch.full((each.units,), unit_weights(model, each), dtype=torch.float64, device="cpu")
                for each in units.branches
            ]
        )
        self._initial = self._plan(unit_scores(model, units) if scores is None else scores)
        count = len(self._weights)
        flips = min(math.sqrt(count), count / 2) if flips is None else flips
        if not 0 < flips <= count / 2:
            raise ValueError(f"flips must be above 0 and at most {count / 2:g}, half of the units, got {flips}")
        share = flips / count
        start = math.log((1 - share) / share)
        self._lr = max(start, 1.0) * min(SPEED / share, MOST)
        self._logits = self._shifted(start * (2 * self._kept(self._initial).double() - 1))
        self._advantage, self._step = Advantage(), 0
        self._baselines: dict[int, float] = {}

    def steps(self, count: int) -> Iterator[UnitStep]:
        """Learns until ``count`` steps are done in all, those before a restore included; yields each step.

        Raises:
            ValueError: a loss is NaN or infinite.
        """
        while self._step < count:
            yield self._learn()

    def learn(self, count: int) -> None:
        """Learns until ``count`` steps are done in all."""
        for _ in self.steps(count):
            pass

    def finish(self) -> UnitReport:
        """Returns the likeliest plan, or the initial one where it is no better on the batches that were held out."""
        scores = self._by_branch(self._logits)
        plan, every = self._plan(scores), range(len(self._held_out))
        with claiming(self._model, "scored"), observing(self._model):
            loss, initial = (
                math.fsum(self._loss("held out", self._kept(each), index) for index in every) / len(every)
                for each in (plan, self._initial)
            )
        learned = loss < initial
        return UnitReport(plan if learned else self._initial, learned, loss, initial, scores)

    def state_dict(self) -> dict[str, Any]:
        """Returns what learning goes on from."""
        advantage = (self._advantage.steps, self._advantage.mean, self._advantage.variance)
        return {"step": self._step, "logits": self._logits, "initial": self._initial.to_json(), "advantage": advantage}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets the learner to a state of one that was made with the same arguments.

        Raises:
            ValueError: it is of other units; then nothing is changed.
        """
        logits = state["logits"].to("cpu", torch.float64, copy=True)
        if logits.shape != self._logits.shape:
            raise ValueError(f"the state has logits of {len(logits)} units, and this learner of {len(self._logits)}")
        steps, mean, variance = state["advantage"]
        self._initial, self._logits = SlimPlan.from_json(state["initial"]), logits
        self._advantage = Advantage(steps=steps, mean=mean, variance=variance)
        self._step, self._baselines = state["step"], {}

    def _plan(self, scores: Mapping[str, Tensor]) -> SlimPlan:
        return choose_units(self._model, self._units, scores, **self._options)  # type: ignore[arg-type]

    def _kept(self, plan: SlimPlan) -> Tensor:
        """Returns which units a plan keeps, of all branches in a row."""
        kept = [torch.zeros(branch.units, dtype=torch.bool, device="cpu") for branch in plan.units]
        for each, indices in zip(kept, plan.units.values(), strict=True):
            each[list(indices)] = True
        return torch.cat(kept)

    def _by_branch(self, values: Tensor) -> dict[str, Tensor]:
        branches = self._units.branches
        parts = values.split([branch.units for branch in branches])
        return {branch.reader: part for branch, part in zip(branches, parts, strict=True)}

    def _learn(self) -> UnitStep:
        index = self._step % len(self._batches)
        generator = torch.Generator("cpu").manual_seed(_seed(self._seed, "draw", self._step))
        probabilities = self._logits.sigmoid()
        drawn = torch.bernoulli(probabilities, generator=generator).bool()
        with claiming(self._model, "scored"), observing(self._model):
            if index not in self._baselines:
                self._baselines[index] = self._loss("learn", self._kept(self._initial), index)
            loss, initial = self._loss("learn", drawn, index), self._baselines[index]
        advantage, self._advantage = self._advantage.after(loss - initial)
        self._logits = self._shifted(self._logits - self._lr * advantage * (drawn.double() - probabilities))
        self._step += 1
        return UnitStep(self._step, loss, initial, advantage)

    def _shifted(self, logits: Tensor) -> Tensor:
        """Returns the logits plus a number, so that as many weights are kept on average as were asked for."""
        target = (1 - self._options["sparsity"]) * float(self._weights.sum())
        low, high = -WIDEST, WIDEST
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            kept = float(self._weights @ (logits + middle).sigmoid())
            low, high = (middle, high) if kept < target else (low, middle)
        return logits + middle

    def _loss(self, kind: Literal["learn", "held out"], kept: Tensor, index: int) -> float:
        batch = (self._batches if kind == "learn" else self._held_out)[index]
        set_noise(self._model, _seed(self._seed, kind, index))
        with dropping(self._model, self._units, self._by_branch(kept)):
            loss = float(self._loss_fn(self._model, copied(batch)))
        if not math.isfinite(loss):
            raise ValueError(f"the loss without some units is {loss} on batch {index}: use fewer flips")
        return loss


@contextmanager
def dropping(model: nn.Module, units: Units, kept: Mapping[str, Tensor]) -> Iterator[None]:
    """Makes units zero where they are read, until the end.

    Args:
        model: the model.
        units: what ``find_units`` found in it.
        kept: which units stay, bool, by the name of a branch's reader.
    """

    def reading(width: int, own: Tensor) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            first, *others = args
            return (first * own.repeat_interleave(width).to(first), *others)

        return hook

    with hooking() as hooks:
        for branch in units.branches:
            reader = model.get_submodule(branch.reader)
            hooks.append(reader.register_forward_pre_hook(reading(branch.width, kept[branch.reader])))
        yield


def _seed(seed: int, what: str, number: int) -> int:
    return random.Random(f"{seed} {what} {number}").getrandbits(63)
