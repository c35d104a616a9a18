"""One iteration of progressive pruning: scores the blocks of all layers, demotes some, and applies the masks."""

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .._batches import Progress, check_functions, evaluating
from .._layers import Where, check_model, check_where
from .._undo import Undo, change
from ..masks import Pattern
from ..prune.apply_mask import apply_mask
from ..prune.calibration import Calibration, calibrate
from ..prune.calibration.inputs import LayerInputs
from ..prune.calibration.ranks import Ranks, local_buffers
from ..prune.calibration.statistics import Gram, InputNorm
from ..prune.full_precision import full_precision
from ..prune.layers import PrunableLayer, check_result, check_weights, find_layers, nothing_to
from ..prune.prune_model import check_calibration
from .demote import Criterion
from .fade import fading_of, mark_fading
from .planner import Allocation, CalibratedStages, Planner
from .schedule import Step
from .tier_map import Ratios, TierMap


@dataclass(frozen=True)
class IterationReport:
    """The result of one iteration.

    Args:
        step: the step of the schedule.
        ratios: the dense, 2:4 and top-k shares of all blocks after the iteration.
        sparsity: the share of the weights that the masks drop, counted; weights that have faded but are not dropped yet
            do not count.
        expected_sparsity: the same share as it follows from the tier maps.
        demoted: the numbers of blocks that went from dense to 2:4 and from 2:4 to top-k, by layer.
        error: the mean relative output error of the layers, before fine-tuning.
        metric: the value that ``evaluate`` returned after fine-tuning; None without ``evaluate``.
        seconds: the time for scoring and demoting, and the time for fine-tuning.
    """

    step: Step
    ratios: Ratios
    sparsity: float
    expected_sparsity: float
    demoted: dict[str, tuple[int, int]]
    error: float
    metric: float | None
    seconds: tuple[float, float]


@dataclass(frozen=True)
class TierOptions:
    """Options of pruning by tiers: which blocks of which layers are demoted first, and how the model is calibrated.

    Args:
        criterion: which blocks are demoted first, see ``demote``.
        allocation: ``"layer"`` brings every layer to the same shares; each stage is calibrated on the outputs of the
            pruned stages before it. ``"model"`` brings the model as a whole to the shares, and demotes the blocks of
            any layer that add least to the relative output error of their layer; all are calibrated in one pass.
        reconstruct: whether the kept weights get the values that change the output least (``LeastSquares``). With
            ``allocation="model"`` that takes a second calibration, stage after stage.
        goal: the shares after the last step; entries that are dropped by then are marked for ``fade``. None marks none.
        block: rows and columns of a block, 16 to 128; GPUs can use 64 and more. Not used with ``tier_maps``.
        k: weights that a top-k block keeps. Not used with ``tier_maps``.
        where: ``where(name, module)`` selects layers; None selects all linear ones.
        calibration: how the model is run, as for ``prune_``. Its ``batchnorm`` is not used, and ``allocation`` decides
            instead of its ``sequential``.

    Raises:
        TypeError: ``where`` cannot be called, or ``calibration`` is not a ``Calibration``.
        ValueError: ``allocation`` is unknown.
    """

    criterion: Criterion = "loss"
    allocation: Allocation = "layer"
    reconstruct: bool = False
    goal: Ratios | None = None
    block: tuple[int, int] = (16, 16)
    k: int = 10
    where: Where | None = None
    calibration: Calibration = field(default_factory=Calibration)

    def __post_init__(self) -> None:
        check_where(self.where)
        check_calibration(self.calibration)
        if self.allocation not in ("layer", "model"):
            raise ValueError(f'allocation must be "layer" or "model", got {self.allocation!r}')


def comparable(options: TierOptions) -> dict[str, Any]:
    """Returns the options that calls and processes must agree on, by name.

    Left out are ``where``, since the layers that it selects are compared instead, and ``calibration``, whose functions
    differ from process to process.
    """
    return {name: value for name, value in vars(options).items() if name not in ("where", "calibration")}


def tier_iteration(
    model: nn.Module,
    step: Step,
    batches: Any,
    tier_maps: Mapping[str, TierMap] | None = None,
    *,
    options: TierOptions | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, TierMap], IterationReport]:
    """Demotes blocks of all linear layers until the shares of one step are reached, and prunes the layers in place.

    The masks are stored with the layers, for ``keep_masks``. Layers that ``prune_`` leaves out are left out here too.

    Args:
        model: any tree of modules; if anything fails, it is as it was.
        step: the shares to reach.
        batches: calibration batches, as ``prune_`` takes them.
        tier_maps: the maps after the step before, by layer name, or by the ends of the names (``layer_3.mlp.up_proj``
            for ``model.layers.3.mlp.up_proj``); None if every block is dense.
        options: which blocks are demoted, and how the model is calibrated; None is ``TierOptions()``.
        progress: wraps the longest loop and iterates it, as ``tqdm`` does.

    Returns:
        The new maps by layer name, and the report, which knows nothing of fine-tuning. Layers that no batch reached
        keep their maps, and are not in the report.

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: nothing can be pruned, a layer has no tier map or one of another shape, a weight or a calibration
            input is NaN or infinite, or the processes hold different models.
        RuntimeError: the model is being changed already, here or in another thread, or another process has failed.
    """
    check_model(model)
    check_functions(progress=progress)
    options = checked_options(options)
    calibration = options.calibration
    statistic = Gram if options.reconstruct else InputNorm
    ranks = Ranks(calibration.group, statistic)

    def work(undo: Undo) -> tuple[dict[str, TierMap], IterationReport]:
        layers = linear_layers(model, options.where)
        check_weights(layers)
        ranks.agree({"step": step, **comparable(options)}, layers)
        before = _starting_maps(layers, tier_maps, options)
        planner = Planner(before, step, options.goal, options.criterion, statistic, calibration.token_mask)

        def run(make_inputs: Callable[[PrunableLayer], LayerInputs], sequential: bool) -> CalibratedStages:
            how = replace(calibration, sequential=sequential)
            yield from calibrate(model, layers, make_inputs, batches, how, ranks, progress=progress or iter)

        after: dict[str, TierMap] = {}
        demoted: dict[str, tuple[int, int]] = {}
        errors: list[float] = []
        dropped = 0
        with evaluating(model), local_buffers(model), closing(planner.plans(run, ranks, options.allocation)) as plans:
            for layer, inputs, plan in plans:
                with full_precision():
                    parts = planner.prune(layer, inputs, plan)
                    ranks.exchange()  # raises if another process could not prune the layer
                    pruned, mask, fading = (part if part is None else ranks.broadcast(part) for part in parts)
                    assert pruned is not None and mask is not None
                    check_result(layer, pruned, "tier_iteration")
                    if (error := inputs.sample.relative_error(layer.weight.detach(), pruned)) is not None:
                        errors.append(error)
                    apply_mask(layer, pruned, mask, _pattern(plan.tier_map), undo)
                    undo.callback(mark_fading, layer.module, fading_of(layer.module))
                    mark_fading(layer.module, fading)
                after[layer.name] = plan.tier_map
                demoted[layer.name] = plan.demotion.dense_to_2_4, plan.demotion.mid_2_4_to_topk
                dropped += mask.numel() - int(torch.count_nonzero(mask))
        if not after:
            raise ValueError("no calibration batch reached any of the selected layers")
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

    return change(model, "pruned", ranks.together(work))


def checked_options(options: TierOptions | None) -> TierOptions:
    """Checks the type of options, and returns the default in place of None."""
    options = TierOptions() if options is None else options
    if not isinstance(options, TierOptions):
        raise TypeError(f"options must be TierOptions such as TierOptions(k=8), got {options!r}")
    return options


def linear_layers(model: nn.Module, where: Where | None) -> list[PrunableLayer]:
    """Returns the layers that ``where`` selects and that can be pruned by tiers.

    Raises:
        ValueError: there is no such layer.
    """

    def linear(name: str, module: nn.Module) -> bool:
        return not isinstance(module, nn.Conv2d) and (where is None or where(name, module))

    layers, skipped = find_layers(model, Pattern.parse("0%"), "input", linear)
    layers = [layer for layer in layers if not layer.experts]
    if not layers:
        raise ValueError(nothing_to("prune", "linear layer that can be pruned", where, skipped))
    return layers


def _starting_maps(
    layers: list[PrunableLayer], tier_maps: Mapping[str, TierMap] | None, options: TierOptions
) -> dict[str, TierMap]:
    maps = {layer.name: TierMap.dense(layer.matrix(layer.weight), options.block, options.k) for layer in layers}
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
    """Turns ``layer_3.mlp.up_proj`` into ``s.3.mlp.up_proj``, the end of ``model.layers.3.mlp.up_proj``."""
    return "s." + name.removeprefix("layer_") if name.startswith("layer_") else "." + name


def _pattern(tier_map: TierMap) -> Pattern:
    return Pattern(n=tier_map.k, unit=tier_map.block, tiers=True)


def _overall(tier_maps: Mapping[str, TierMap]) -> Ratios:
    counts = [sum(each) for each in zip(*(tier_map.counts for tier_map in tier_maps.values()), strict=True)]
    return Ratios(*(count / sum(counts) for count in counts))
