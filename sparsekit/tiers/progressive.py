"""Progressive pruning: demotes, fine-tunes and saves step by step, and goes on after the last saved step."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from .._batches import Progress, as_batches, evaluating
from .._digest import digest, digest_batches, digest_modules, digest_tensors, name_of
from .._layers import check_model
from ..prune.calibration.ranks import Ranks
from .finished import FinishedIterations
from .iteration import IterationReport, TierOptions, checked_options, comparable, linear_layers, tier_iteration
from .schedule import Step
from .tier_map import TierMap


def progressive_tiers(
    model: nn.Module,
    schedule: Sequence[Step],
    batches: Any,
    finetune: Callable[[nn.Module, Step], object],
    *,
    tier_maps: Mapping[str, TierMap] | None = None,
    folder: str | os.PathLike[str] | None = None,
    options: TierOptions | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, TierMap], list[IterationReport]]:
    """Prunes the linear layers of a model by tiers, in the steps of a schedule with fine-tuning between them.

    Each iteration scores the weights, demotes blocks (``tier_iteration``), and fine-tunes the remaining weights::

        def finetune(model, step):
            optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
            with sk.keep_masks(model, optimizer):
                train(model, optimizer, step.epochs)

    Args:
        model: pruned in place.
        schedule: the steps, such as those of ``read_schedule``; with ``tier_maps``, the steps that remain.
        batches: calibration batches, as ``prune_`` takes them.
        finetune: is called with the model and the step after each demotion; it has to keep the masks.
        tier_maps: the maps after earlier iterations; None if every block is dense.
        folder: the model, tier maps and report of every finished iteration are written to ``folder/iteration-N``. After
            a kill, the same call loads the last one and goes on. A different call is rejected: the weights, batches and
            their order at the start must be the same, and so must the arguments; functions are compared by name. What
            ``finetune`` and ``evaluate`` do cannot be compared: name another folder when they change. Of several
            processes (torch.distributed) the first one writes, and all read.
        options, progress: as in ``tier_iteration``.
        evaluate: returns a number for the report, such as perplexity; is called after every iteration, with the model
            in evaluation mode and without gradients.

    Returns:
        The tier maps by layer name, and a report for each iteration, also for those that were found in ``folder``.

    Raises:
        OSError: ``folder`` cannot be written to.
        TypeError, RuntimeError: for the reasons of ``tier_iteration``.
        ValueError: the schedule is empty, ``folder`` holds iterations of another call, or files in it are damaged or
            missing; and for the reasons of ``tier_iteration``.
    """
    check_model(model)
    if not schedule:
        raise ValueError("schedule must have at least one step, got none")
    finished, reports = None, list[IterationReport]()
    maps = None if tier_maps is None else dict(tier_maps)
    options = checked_options(options)
    calibration = options.calibration
    ranks = Ranks(calibration.group, None)
    if folder is not None:
        call = {
            **comparable(options),
            "layers": [layer.name for layer in linear_layers(model, options.where)],
            "forward": name_of(calibration.forward),
            "token_mask": name_of(calibration.token_mask),
            "tier_maps": None if tier_maps is None else {name: digest(each) for name, each in tier_maps.items()},
            "weights": digest_tensors(model),
            "modules": digest_modules(model),
            "batches": ranks.exchange(digest_batches(as_batches(batches, reused=True))),
        }
        finished = ranks.all_or_none(lambda: FinishedIterations(folder, call))
        reports = ranks.all_or_none(lambda: finished.reports(schedule))
        if reports:
            maps = ranks.all_or_none(lambda: finished.restore(model, reports[-1].step))
    for step in schedule[len(reports) :]:
        begin = time.perf_counter()
        maps, report = tier_iteration(model, step, batches, maps, options=options, progress=progress)
        scored = time.perf_counter()
        finetune(model, step)
        seconds = (scored - begin, time.perf_counter() - scored)
        report = replace(report, seconds=seconds, metric=_evaluate(model, evaluate))
        if finished is not None:
            ranks.all_or_none(partial(finished.add, model, maps, report) if ranks.rank == 0 else lambda: None)
        reports.append(report)
    assert maps is not None
    return maps, reports


def _evaluate(model: nn.Module, evaluate: Callable[[nn.Module], float] | None) -> float | None:
    if evaluate is None:
        return None
    with evaluating(model):
        return float(evaluate(model))
