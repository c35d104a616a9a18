"""The plan of one iteration: which blocks of which layers it demotes."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..ops import tier_scores
from ..ops.tiers import SPARSE24, TOPK
from ..prune.calibration.inputs import LayerInputs
from ..prune.calibration.padding import TokenMask
from ..prune.calibration.ranks import Ranks
from ..prune.calibration.statistics import Gram, InputNorm
from ..prune.full_precision import full_precision
from ..prune.layers import PrunableLayer
from ..prune.methods import Method
from ..prune.refinements import LeastSquares
from .demote import Costs, Criterion, Demotion, demote_together, demotion_costs, prune_tiers
from .schedule import Step
from .tier_map import Ratios, TierMap

Allocation = Literal["layer", "model"]
Stages = Generator[tuple[Sequence[PrunableLayer], Sequence[LayerInputs]]]
RunStages = Callable[[Callable[[PrunableLayer], LayerInputs], bool], Stages]  # (make_inputs, sequential)
TIE = 1e-6  # weight of the second demotion's cost in the order of the first: it breaks ties


@dataclass(frozen=True)
class Plan:
    """The new tier map of one layer, and the one at the end of the schedule."""

    tier_map: TierMap
    demotion: Demotion
    last: TierMap | None


@dataclass(frozen=True)
class Planner:
    """Decides which blocks of which layers are demoted.

    Args:
        before: the tier maps now, by layer name.
        step: the shares to reach.
        goal: the shares after the last step; None marks nothing to fade.
        criterion: see ``demote``.
        statistic: what is collected of the inputs; with ``Gram`` the kept weights get new values.
        token_mask: which tokens of a batch count.
    """

    before: Mapping[str, TierMap]
    step: Step
    goal: Ratios | None
    criterion: Criterion
    statistic: type[InputNorm]
    token_mask: TokenMask | None = None

    def plans(
        self, run: RunStages, ranks: Ranks, allocation: Allocation
    ) -> Generator[tuple[PrunableLayer, LayerInputs, Plan]]:
        """Yields each layer with its inputs and its plan; it must be pruned before the next one is asked for."""
        if allocation == "layer":
            for layer, inputs in self._reached(run, ranks, self.statistic, sequential=True):
                yield layer, inputs, self._plan([(layer, inputs)])[0]
            return
        together = list(self._reached(run, ranks, InputNorm, sequential=False))
        plans = self._plan(together)
        if self.statistic is InputNorm:
            yield from ((*each, plan) for each, plan in zip(together, plans, strict=True))
            return
        by_name = {layer.name: plan for (layer, _), plan in zip(together, plans, strict=True)}
        for layer, inputs in self._reached(run, ranks, self.statistic, sequential=True):
            if layer.name in by_name:  # a router may choose other experts once the stages before it are pruned
                yield layer, inputs, by_name[layer.name]

    def _reached(
        self, run: RunStages, ranks: Ranks, statistic: type[InputNorm], *, sequential: bool
    ) -> Generator[tuple[PrunableLayer, LayerInputs]]:
        """Yields the layers that any calibration batch reached, with their inputs."""
        make_inputs = partial(LayerInputs, statistic=statistic, token_mask=self.token_mask)
        with closing(run(make_inputs, sequential)) as stages:
            for layers, collected in stages:
                yield from (each for each in zip(layers, ranks.add_up(collected), strict=True) if len(each[1].sample))

    def _plan(self, group: list[tuple[PrunableLayer, LayerInputs]]) -> list[Plan]:
        """Plans layers that are demoted together, so that the group as a whole reaches the shares."""
        if not group:
            return []
        with full_precision():
            return self._demoted(group)

    def _demoted(self, group: list[tuple[PrunableLayer, LayerInputs]]) -> list[Plan]:
        costs = [self._costs(layer, inputs) for layer, inputs in group]
        maps, demotions = demote_together(
            [self.before[layer.name] for layer, _ in group], costs, self.step.ratios, criterion=self.criterion
        )
        last: Sequence[TierMap | None] = [None] * len(maps)
        if self.goal is not None:
            last, _ = demote_together(maps, costs, self.goal, criterion=self.criterion)
        return [Plan(*each) for each in zip(maps, demotions, last, strict=True)]

    def _costs(self, layer: PrunableLayer, inputs: LayerInputs) -> Costs:
        """Computes ``demotion_costs`` as shares of the layer's total, so that layers can be compared.

        Blocks that have faded cost nothing to demote: among them those that cost least as top-k go first.
        """
        weight, norm, before = layer.matrix(layer.weight.detach()), _norm(inputs).norm, self.before[layer.name]
        first, second = demotion_costs(weight, norm, before, self.criterion)
        if self.criterion == "published":  # its first costs add up to the total
            whole = first.sum().clamp(min=1e-30)
            return first / whole, second / whole
        whole = tier_scores(weight, 0, before.block, score_scale=norm, squared=True)[0].sum().clamp(min=1e-30)
        return (first + TIE * second) / whole, second / whole

    def prune(self, layer: PrunableLayer, inputs: LayerInputs, plan: Plan) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the pruned weight, its mask, and the mask of what fades, in the weight's own layout."""
        weight, statistic = layer.matrix(layer.weight.detach()), _norm(inputs)
        tiers = _Tiers("tiers", plan.tier_map, self.criterion)
        pruned, mask = (
            LeastSquares(tiers).prune(weight, statistic)
            if isinstance(statistic, Gram)
            else tiers.prune(weight, statistic)
        )
        own = (lambda matrix: matrix.t().contiguous()) if layer.axis == 0 else (lambda matrix: matrix)
        if plan.last is None or plan.last.counts == plan.tier_map.counts:
            return own(pruned), own(mask), None
        now, last = plan.tier_map.tiers, plan.last.tiers
        on_the_way = torch.where(now == TOPK, now, last.clamp(max=SPARSE24))  # a dense block is 2:4 before it is top-k
        for tier_map in (replace(plan.last, tiers=on_the_way), plan.last):
            weight, left = _Tiers("tiers", tier_map, self.criterion).prune(weight, statistic)
        return own(pruned), own(mask), own(mask & ~left)


@dataclass(frozen=True)
class _Tiers(Method):
    """A method that prunes by a tier map, so that ``LeastSquares`` can refine it."""

    tier_map: TierMap
    criterion: Criterion

    statistic = InputNorm

    def __post_init__(self) -> None:
        """Accepts every tier map: the pattern is not parsed."""

    def prune(self, weight: Tensor, statistic: InputNorm) -> tuple[Tensor, Tensor]:
        return prune_tiers(weight, statistic.norm, self.tier_map, self.criterion)


def _norm(inputs: LayerInputs) -> InputNorm:
    assert isinstance(inputs.statistic, InputNorm)
    return inputs.statistic
