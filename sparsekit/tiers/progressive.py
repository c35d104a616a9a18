"""Progressive pruning: demote, fine-tune, save; again and again, from wherever it stopped."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import distributed, nn

from .._batches import Forward, Progress, evaluating
from .._files import write_json
from .._layers import Where, check_model
from ..checkpoint import load, save
from .demote import Criterion
from .files import load_tier_maps, save_tier_maps
from .iteration import IterationReport, tier_iteration
from .planner import Allocation
from .schedule import Step
from .tier_map import Ratios, TierMap


def progressive_tiers(
    model: nn.Module,
    schedule: Sequence[Step],
    calibrate: Any,
    finetune: Callable[[nn.Module, Step], object],
    *,
    tier_maps: Mapping[str, TierMap] | None = None,
    folder: str | os.PathLike[str] | None = None,
    criterion: Criterion = "loss",
    allocation: Allocation = "layer",
    reconstruct: bool = False,
    goal: Ratios | None = None,
    block: tuple[int, int] = (16, 16),
    k: int = 10,
    where: Where | None = None,
    forward: Forward | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, TierMap], list[IterationReport]]:
    """Prunes the linear layers of a model by tiers, in the steps of a schedule with fine-tuning between them.

    Each iteration scores the weights as they were fine-tuned last, demotes blocks (``tier_iteration``), and fine-tunes
    what is left::

        def finetune(model, step):
            optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
            with sk.keep_masks(model, optimizer):
                train(model, optimizer, step.epochs)

    Args:
        model: pruned in place.
        schedule: what ``read_schedule`` read; all of it, or what is left of it after ``tier_maps``.
        calibrate: calibration batches, as ``prune_`` takes them.
        finetune: called with the model and the step after each demotion; it has to keep the masks.
        tier_maps: where earlier iterations left the blocks; None starts dense.
        folder: every finished iteration is kept in ``folder/iteration-N``: model, tier maps and report. The same call
            after a kill loads the last one and goes on. Of several processes (torch.distributed) the first one writes,
            and all read: give each the same calibration batches, since each decides for itself.
        criterion, allocation, reconstruct, goal, block, k, where, forward, progress: as in ``tier_iteration``.
        evaluate: gives a number for the report, say perplexity, after every iteration; in evaluation mode, without
            gradients.

    Returns:
        The tier maps by layer name, and a report for each iteration, also of those that were found in ``folder``.

    Raises:
        ValueError: the schedule is empty, or ``folder`` holds iterations of another one; and what ``tier_iteration``
            raises.
    """
    check_model(model)
    if not schedule:
        raise ValueError("schedule must have at least one step, got none")
    kept = _Folder(Path(folder), schedule) if folder is not None else None
    reports = kept.reports() if kept else []
    maps = None if tier_maps is None else dict(tier_maps)
    if kept and reports:
        maps = kept.restore(model, reports[-1].step)
    for step in schedule[len(reports) :]:
        begin = time.perf_counter()
        maps, report = tier_iteration(
            model,
            step,
            calibrate,
            maps,
            criterion=criterion,
            allocation=allocation,
            reconstruct=reconstruct,
            goal=goal,
            block=block,
            k=k,
            where=where,
            forward=forward,
            progress=progress,
        )
        scored = time.perf_counter()
        finetune(model, step)
        seconds = (scored - begin, time.perf_counter() - scored)
        report = replace(report, seconds=seconds, metric=_evaluate(model, evaluate))
        if kept:
            kept.add(model, maps, report)
        reports.append(report)
    assert maps is not None
    return maps, reports


def _evaluate(model: nn.Module, evaluate: Callable[[nn.Module], float] | None) -> float | None:
    if evaluate is None:
        return None
    with evaluating(model):
        return float(evaluate(model))


class _Folder:
    """The finished iterations: ``iteration-N/{model,tier_maps}.safetensors`` and, written last, ``report.json``."""

    def __init__(self, folder: Path, schedule: Sequence[Step]) -> None:
        self._folder, self._schedule = folder, schedule

    def _path(self, step: Step, name: str) -> Path:
        return self._folder / f"iteration-{step.iteration}" / name

    def reports(self) -> list[IterationReport]:
        """The reports of the iterations that are finished, up to the first that is not."""
        found = []
        for step in self._schedule:
            path = self._path(step, "report.json")
            if not path.exists():
                break
            try:
                report = _parse(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{path} is not the report of an iteration: {error}") from error
            if report.step != step:
                raise ValueError(f"{path} belongs to another schedule: {report.step}, not {step}; name another folder")
            found.append(report)
        return found

    def restore(self, model: nn.Module, step: Step) -> dict[str, TierMap]:
        load(model, self._path(step, "model.safetensors"))
        return load_tier_maps(self._path(step, "tier_maps.safetensors"))

    def add(self, model: nn.Module, tier_maps: Mapping[str, TierMap], report: IterationReport) -> None:
        if distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0:
            return
        self._path(report.step, "").mkdir(parents=True, exist_ok=True)
        save(model, self._path(report.step, "model.safetensors"))
        save_tier_maps(tier_maps, self._path(report.step, "tier_maps.safetensors"))
        write_json(self._path(report.step, "report.json"), asdict(report))


def _parse(data: dict[str, Any]) -> IterationReport:
    step = Step(**{**data["step"], "ratios": Ratios(*data["step"]["ratios"])})
    demoted = {name: (first, second) for name, (first, second) in data["demoted"].items()}
    seconds = (data["seconds"][0], data["seconds"][1])
    return IterationReport(
        **{**data, "step": step, "ratios": Ratios(*data["ratios"]), "demoted": demoted, "seconds": seconds}
    )
