"""One iteration of progressive pruning: score the blocks of all layers, demote, and put the masks in place."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._batches import Forward, Progress, evaluating
from .._layers import Where, check_model
from ..masks import Pattern
from ..ops import tier_scores
from ..ops.tiers import SPARSE24, TOPK
from ..prune.calibration import calibrated
from ..prune.inputs import Inputs
from ..prune.layers import Layer, check_weights, find_layers
from ..prune.methods import Method
from ..prune.put import put
from ..prune.refine import LeastSquares
from ..prune.statistics import Gram, InputNorm
from .demote import Costs, Criterion, Demotion, demote_together, demotion_costs, prune_tiers
from .fade import fading_of, mark_fading
from .schedule import Step
from .tier_map import Ratios, TierMap

Allocation = Literal["layer", "model"]
TIE = 1e-6  # the share of the second demotion's cost in the order of the first: it orders what costs the same there


@dataclass(frozen=True)
class IterationReport:
    """One iteration.

    Args:
        step: what the schedule asked for.
        ratios: dense, 2:4 and top-k shares of all blocks now.
        sparsity: the share of the weights that the masks drop, counted; what has faded is zero before that.
        expected_sparsity: what the tier maps promise.
        demoted: blocks that went from dense to 2:4 and from 2:4 to top-k, by layer.
        error: the mean relative output error of the layers, before fine-tuning.
        metric: what ``evaluate`` returned after fine-tuning; None without.
        seconds: for scoring and demoting, and for fine-tuning.
    """

    step: Step
    ratios: Ratios
    sparsity: float
    expected_sparsity: float
    demoted: dict[str, tuple[int, int]]
    error: float
    metric: float | None
    seconds: tuple[float, float]


def tier_iteration(
    model: nn.Module,
    step: Step,
    calibrate: Any,
    tier_maps: Mapping[str, TierMap] | None = None,
    *,
    criterion: Criterion = "loss",
    allocation: Allocation = "layer",
    reconstruct: bool = False,
    goal: Ratios | None = None,
    block: tuple[int, int] = (16, 16),
    k: int = 10,
    where: Where | None = None,
    forward: Forward | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, TierMap], IterationReport]:
    """Demotes the blocks of every linear layer to the shares of one step, and zeroes what their tiers drop, in place.

    The masks are stored with the layers, for ``keep_masks``. Left out are the layers that ``prune_`` leaves out.

    Args:
        model: any tree of modules; whatever fails, it is as it was.
        step: the shares to reach.
        calibrate: calibration batches, as ``prune_`` takes them.
        tier_maps: the maps after the step before, by layer name, or by the ends of the names (``layer_3.mlp.up_proj``
            for ``model.layers.3.mlp.up_proj``); None starts with every block dense.
        criterion: which blocks are demoted first, see ``demote``.
        allocation: ``"layer"`` gives every layer the same shares, and calibrates block after block on what the pruned
            ones before produce. ``"model"`` gives the model the shares, and demotes the blocks that add least to the
            relative output error of their layer, wherever they are; calibrated in one pass.
        reconstruct: gives the kept weights the values that change the output least (``LeastSquares``). With
            ``allocation="model"`` that is a second pass, block after block.
        goal: the shares after the last step: what they would drop is marked, for ``fade``. None marks nothing.
        block: rows and columns of a block, 16 to 128; 64 and more is what GPUs can use. Without ``tier_maps``.
        k: weights that a top-k block keeps. Without ``tier_maps``.
        where: ``where(name, module)`` selects layers; None selects all linear ones.
        forward: ``forward(model, batch)`` in place of calling the model on a batch.
        progress: wraps the longest loop and iterates it, as ``tqdm`` does.

    Returns:
        The new maps by layer name, and what was done, with no fine-tuning yet. Layers that no batch reached keep their
        maps, and are not in the report.

    Raises:
        ValueError: nothing can be pruned, a layer has no tier map or one of another shape, a calibration input is not
            a number, or an unknown allocation.
    """
    check_model(model)
    if allocation not in ("layer", "model"):
        raise ValueError(f'allocation must be "layer" or "model", got {allocation!r}')
    layers = _linear_layers(model, where)
    check_weights(layers)
    before = _starting_maps(layers, tier_maps, block, k)
    after: dict[str, TierMap] = {}
    demoted: dict[str, tuple[int, int]] = {}
    errors: list[float] = []
    dropped = 0
    planner = _Planner(before, step, goal, criterion, Gram if reconstruct else InputNorm)
    show = partial(calibrated, model, layers, batches=calibrate, forward=forward, progress=progress or iter)
    with ExitStack() as undo, evaluating(model):
        for layer, inputs, plan in planner.plans(show, allocation):
            pruned, mask, fading = planner.prune(layer, inputs, plan)
            errors.append(inputs.sample.relative_error(layer.weight, pruned) or 0.0)
            put(layer, pruned, mask, _pattern(plan.tier_map), undo)
            undo.callback(mark_fading, layer.module, fading_of(layer.module))
            mark_fading(layer.module, fading)
            after[layer.name] = plan.tier_map
            demoted[layer.name] = plan.demotion.dense_to_2_4, plan.demotion.mid_2_4_to_topk
            dropped += int((~mask).sum())
        if not after:
            raise ValueError("no calibration batch reached any of the selected layers")
        undo.pop_all()
    weights = [tier_map.shape[0] * tier_map.shape[1] for tier_map in after.values()]
    expected = sum(tier_map.sparsity * size for tier_map, size in zip(after.values(), weights, strict=True))
    report = IterationReport(
        step=step,
        ratios=_overall(after),
        sparsity=dropped / sum(weights),
        expected_sparsity=expected / sum(weights),
        demoted=demoted,
        error=sum(errors) / len(errors),
        metric=None,
        seconds=(0.0, 0.0),
    )
    return before | after, report


def _linear_layers(model: nn.Module, where: Where | None) -> list[Layer]:
    def linear(name: str, module: nn.Module) -> bool:
        return not isinstance(module, nn.Conv2d) and (where is None or where(name, module))

    layers, skipped = find_layers(model, Pattern.parse("0%"), "input", linear)
    if not layers:
        reasons = "".join(f"; {layer.name}: {layer.reason}" for layer in skipped[:3])
        raise ValueError(f"nothing to prune: where selects no linear layer that can be pruned{reasons}")
    return layers


def _starting_maps(
    layers: list[Layer], tier_maps: Mapping[str, TierMap] | None, block: tuple[int, int], k: int
) -> dict[str, TierMap]:
    maps = {layer.name: TierMap.dense(layer.matrix(layer.weight), block, k) for layer in layers}
    if tier_maps is None:
        return maps
    for layer in layers:
        ends = [name for name in tier_maps if layer.name == name or layer.name.endswith(_end(name))]
        if len(ends) != 1:
            raise ValueError(f"layer {layer.name!r} needs one tier map, got {ends or 'none'}")
        given, device = tier_maps[ends[0]], layer.weight.device
        if given.tiers.shape != TierMap.dense(layer.matrix(layer.weight), given.block, given.k).tiers.shape:
            raise ValueError(f"the tier map of {layer.name!r} is for {given.shape}, not {maps[layer.name].shape}")
        maps[layer.name] = TierMap(given.tiers.to(device), maps[layer.name].shape, given.block, given.k)
    return maps


def _end(name: str) -> str:
    """``layer_3.mlp.up_proj`` to ``s.3.mlp.up_proj``: the end of ``model.layers.3.mlp.up_proj``."""
    return "s." + name.removeprefix("layer_") if name.startswith("layer_") else "." + name


@dataclass(frozen=True)
class _Plan:
    """What becomes of one layer now, and where the schedule ends for it."""

    tier_map: TierMap
    demotion: Demotion
    last: TierMap | None


@dataclass(frozen=True)
class _Planner:
    before: Mapping[str, TierMap]
    step: Step
    goal: Ratios | None
    criterion: Criterion
    statistic: type[InputNorm]

    def plans(self, show: Any, allocation: Allocation) -> Iterator[tuple[Layer, Inputs, _Plan]]:
        """Yields layers to prune; each must be pruned before the next is asked for."""
        if allocation == "layer":
            for layer, inputs in _reached(show(gather=partial(Inputs, statistic=self.statistic), sequential=True)):
                yield layer, inputs, self._plan([(layer, inputs)])[0]
            return
        together = list(_reached(show(gather=partial(Inputs, statistic=InputNorm), sequential=False)))
        plans = self._plan(together)
        if self.statistic is InputNorm:
            yield from ((*each, plan) for each, plan in zip(together, plans, strict=True))
            return
        by_name = {layer.name: plan for (layer, _), plan in zip(together, plans, strict=True)}
        for layer, inputs in _reached(show(gather=partial(Inputs, statistic=self.statistic), sequential=True)):
            if layer.name in by_name:  # a router may choose other experts once the blocks before it are pruned
                yield layer, inputs, by_name[layer.name]

    def _plan(self, group: list[tuple[Layer, Inputs]]) -> list[_Plan]:
        """Demotes layers that share their numbers of blocks."""
        if not group:
            return []
        costs = [self._costs(layer, inputs) for layer, inputs in group]
        maps, demotions = demote_together(
            [self.before[layer.name] for layer, _ in group], costs, self.step.ratios, criterion=self.criterion
        )
        last: Sequence[TierMap | None] = [None] * len(maps)
        if self.goal is not None:
            last, _ = demote_together(maps, costs, self.goal, criterion=self.criterion)
        return [_Plan(*each) for each in zip(maps, demotions, last, strict=True)]

    def _costs(self, layer: Layer, inputs: Inputs) -> Costs:
        """``demotion_costs`` as shares of the layer's whole: so they compare between layers.

        Blocks that have faded cost nothing to demote: those that top-k costs least, and so end there, go first.
        """
        weight, norm, before = layer.matrix(layer.weight.detach()), _norm(inputs).norm, self.before[layer.name]
        first, second = demotion_costs(weight, norm, before, self.criterion)
        if self.criterion == "published":  # where the first costs are all that the blocks hold
            whole = first.sum().clamp(min=1e-30)
            return first / whole, second / whole
        whole = tier_scores(weight, 0, before.block, score_scale=norm, squared=True)[0].sum().clamp(min=1e-30)
        return (first + TIE * second) / whole, second / whole

    def prune(self, layer: Layer, inputs: Inputs, plan: _Plan) -> tuple[Tensor, Tensor, Tensor | None]:
        """The pruned weight, its mask, and what fades; all in the weight's own layout."""
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
    """The mask of a tier map, as a method: what least squares can be put on top of."""

    tier_map: TierMap
    criterion: Criterion

    statistic = InputNorm

    def __post_init__(self) -> None:
        """Every tier map is one to prune by."""

    def prune(self, weight: Tensor, statistic: InputNorm) -> tuple[Tensor, Tensor]:
        return prune_tiers(weight, statistic.norm, self.tier_map, self.criterion)


def _norm(inputs: Inputs) -> InputNorm:
    assert isinstance(inputs.statistic, InputNorm)
    return inputs.statistic


def _reached(shown: Iterable[tuple[Sequence[Layer], Sequence[Inputs]]]) -> Iterator[tuple[Layer, Inputs]]:
    """The layers that any calibration batch reached."""
    for members, inputs in shown:
        yield from (each for each in zip(members, inputs, strict=True) if len(each[1].sample))


def _pattern(tier_map: TierMap) -> Pattern:
    return Pattern(n=tier_map.k, unit=tier_map.block, tiers=True)


def _overall(tier_maps: Mapping[str, TierMap]) -> Ratios:
    counts = torch.tensor([tier_map.counts for tier_map in tier_maps.values()]).sum(0).double()
    return Ratios(*(counts / counts.sum()).tolist())
