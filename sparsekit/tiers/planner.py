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
CalibratedStages = Generator[tuple[Sequence[PrunableLayer], Sequence[LayerInputs]]]  # layers and inputs of each stage
Calibrate = Callable[[Callable[[PrunableLayer], LayerInputs], bool], CalibratedStages]  # (make_inputs, sequential)
TIE = 1e-6  # the weight of the cost of becoming top-k in the order of becoming 2:4, which it only decides in a tie


@dataclass(frozen=True)
class LayerPlan:
    """The plan for one layer: its new tier map, the numbers of moved blocks, and its map at the end of the schedule."""

    tier_map: TierMap
    demotion: Demotion
    last: TierMap | None


@dataclass(frozen=True)
class Planner:
    """The choice of the blocks that are demoted in one iteration.

    Args:
        before: the tier maps so far, by layer name.
        step: the shares to reach.
        goal: the shares after the last step; None marks nothing to fade.
        criterion: which blocks are demoted first, see ``demote``.
        statistic: the statistic of the inputs; with ``Gram`` the kept weights get new values.
        token_mask: which tokens of a batch count.
    """

    before: Mapping[str, TierMap]
    step: Step
    goal: Ratios | None
    criterion: Criterion
    statistic: type[InputNorm]
    token_mask: TokenMask | None = None

    def plans(
        self, run: Calibrate, ranks: Ranks, allocation: Allocation
    ) -> Generator[tuple[PrunableLayer, LayerInputs, LayerPlan]]:
        """Yields each layer with its inputs and its plan; the caller prunes it before asking for the next one."""
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
            if layer.name in by_name:  # some may be missing: a router chooses other experts after pruned stages
                yield layer, inputs, by_name[layer.name]

    def _reached(
        self, run: Calibrate, ranks: Ranks, statistic: type[InputNorm], *, sequential: bool
    ) -> Generator[tuple[PrunableLayer, LayerInputs]]:
        """Yields the layers that any calibration batch reached, with their inputs."""
        make_inputs = partial(LayerInputs, statistic=statistic, token_mask=self.token_mask)
        with closing(run(make_inputs, sequential)) as stages:
            for layers, collected in stages:
                yield from (each for each in zip(layers, ranks.add_up(collected), strict=True) if len(each[1].sample))

    def _plan(self, layers: list[tuple[PrunableLayer, LayerInputs]]) -> list[LayerPlan]:
        """Plans the demotion of some layers so that all their blocks together reach the shares."""
        if not layers:
            return []
        with full_precision():
            return self._plan_precisely(layers)

    def _plan_precisely(self, layers: list[tuple[PrunableLayer, LayerInputs]]) -> list[LayerPlan]:
        costs = [self._costs(layer, inputs) for layer, inputs in layers]
        maps, demotions = demote_together(
            [self.before[layer.name] for layer, _ in layers], costs, self.step.ratios, criterion=self.criterion
        )
        last: Sequence[TierMap | None] = [None] * len(maps)
        if self.goal is not None:
            last, _ = demote_together(maps, costs, self.goal, criterion=self.criterion)
        return [LayerPlan(*each) for each in zip(maps, demotions, last, strict=True)]

    def _costs(self, layer: PrunableLayer, inputs: LayerInputs) -> Costs:
        """Computes ``demotion_costs`` as shares of the layer's total, so that layers can be compared.

        Blocks that have faded cost nothing to demote; of these, the blocks that would cost least as top-k go first.
        """
        weight, norm, before = layer.matrix(layer.weight.detach()), _norm(inputs).norm, self.before[layer.name]
        first, second = demotion_costs(weight, norm, before, self.criterion)
        if self.criterion == "published":  # the first costs are the scores of whole blocks, which add up to the total
            whole = first.sum().clamp(min=1e-30)
            return first / whole, second / whole
        whole = tier_scores(weight, 0, before.block, score_scale=norm, squared=True)[0].sum().clamp(min=1e-30)
        return (first + TIE * second) / whole, second / whole

    def prune(self, layer: PrunableLayer, inputs: LayerInputs, plan: LayerPlan) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the pruned weight, its mask, and which entries fade (None if none do), in the weight's own layout."""
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
        # A dense block that ends as top-k is 2:4 before that, so its entries are dropped in two steps here as well.
        on_the_way = torch.where(now == TOPK, now, last.clamp(max=SPARSE24))
        for tier_map in (replace(plan.last, tiers=on_the_way), plan.last):
            weight, left = _Tiers("tiers", tier_map, self.criterion).prune(weight, statistic)
        return own(pruned), own(mask), own(mask & ~left)


@dataclass(frozen=True)
class _Tiers(Method):
    """A pruning method that follows a tier map, so that ``LeastSquares`` can refine its result."""

    tier_map: TierMap
    criterion: Criterion

    statistic = InputNorm

    def __post_init__(self) -> None:
        """Does nothing: the pattern of this method is only a name, which is not parsed."""

    def prune(self, weight: Tensor, statistic: InputNorm) -> tuple[Tensor, Tensor]:
        return prune_tiers(weight, statistic.norm, self.tier_map, self.criterion)


def _norm(inputs: LayerInputs) -> InputNorm:
    assert isinstance(inputs.statistic, InputNorm)
    return inputs.statistic
