"""The finished iterations of progressive pruning, stored in a folder, so that it can go on after a kill."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from .._files import try_folder
from .._json import check_call, read_record, write_record
from ..checkpoint import load, save
from .files import load_tier_maps, save_tier_maps
from .iteration import IterationReport
from .schedule import Step
from .tier_map import Ratios, TierMap

VERSION = 1


class FinishedIterations:
    """The finished iterations of a run, each in a folder ``iteration-N``.

    A folder holds ``model.safetensors``, ``tier_maps.safetensors``, ``call.json``, and ``report.json``, written last.

    Args:
        folder: is made if it does not exist. Writing to it is tried at once, so that an error comes before any work.
        call: a description of the call, as JSON; iterations of another call are rejected.

    Raises:
        OSError: the folder cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike[str], call: Mapping[str, Any]) -> None:
        self._folder, self._call = Path(folder), {"version": VERSION, **call}
        try_folder(self._folder)

    def _path(self, step: Step, name: str) -> Path:
        return self._folder / f"iteration-{step.iteration}" / name

    def reports(self, schedule: Sequence[Step]) -> list[IterationReport]:
        """Returns the reports of the iterations before the first unfinished one.

        Raises:
            ValueError: one belongs to another schedule or call, or a file is damaged; the message names it.
        """
        found = []
        for step in schedule:
            path = self._path(step, "report.json")
            if not path.exists():
                break
            what = "the report of an iteration"
            data = read_record(path, what)
            try:
                report = _parse(data)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{path} is not {what}: {error}") from error
            if report.step != step:
                raise ValueError(f"{path} belongs to another schedule: {report.step}, not {step}; name another folder")
            call = self._path(step, "call.json")
            try:
                check_call(call, read_record(call, "the call of an iteration"), self._call)
            except FileNotFoundError as error:
                raise ValueError(f"{call} is missing, and its iteration is finished") from error
            found.append(report)
        return found

    def restore(self, model: nn.Module, step: Step) -> dict[str, TierMap]:
        """Loads the weights and masks after an iteration into ``model``, and returns the tier maps.

        Raises:
            ValueError: a file is missing or damaged; the message names it, and the model is as it was.
        """
        try:
            tier_maps = load_tier_maps(self._path(step, "tier_maps.safetensors"))
            load(model, self._path(step, "model.safetensors"))
        except FileNotFoundError as error:
            raise ValueError(f"a file of a finished iteration is missing: {error}") from error
        return tier_maps

    def add(self, model: nn.Module, tier_maps: Mapping[str, TierMap], report: IterationReport) -> None:
        """Writes a finished iteration."""
        self._path(report.step, "").mkdir(parents=True, exist_ok=True)
        save(model, self._path(report.step, "model.safetensors"))
        save_tier_maps(tier_maps, self._path(report.step, "tier_maps.safetensors"))
        write_record(self._path(report.step, "call.json"), self._call)
        write_record(self._path(report.step, "report.json"), asdict(report))


def _parse(data: Mapping[str, Any]) -> IterationReport:
    """Makes a report of its JSON record, in which NaN and Inf are strings because JSON has no such numbers."""
    step, metric, (scoring, tuning) = data["step"], data["metric"], data["seconds"]
    return IterationReport(
        step=Step(
            iteration=step["iteration"],
            ratios=_ratios(step["ratios"]),
            **{name: float(step[name]) for name in ("dense_to_2_4", "mid_2_4_to_topk", "epochs")},
        ),
        ratios=_ratios(data["ratios"]),
        sparsity=float(data["sparsity"]),
        expected_sparsity=float(data["expected_sparsity"]),
        demoted={name: (int(first), int(second)) for name, (first, second) in data["demoted"].items()},
        error=float(data["error"]),
        metric=None if metric is None else float(metric),
        seconds=(float(scoring), float(tuning)),
    )


def _ratios(shares: Sequence[Any]) -> Ratios:
    return Ratios(*(float(share) for share in shares))
