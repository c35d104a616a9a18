"""Distills a classifier of sentences from a teacher, prunes, recovers, slims and quantizes it; ends with result.json.

    python examples/distilbert/run.py                                  # small models on SST-2, minutes on two cores
    python examples/distilbert/run.py --short                          # a rehearsal with little of everything
    python examples/distilbert/run.py --stages quantize report         # some stages; others are as they were
    python examples/distilbert/run.py --teacher ID --student ID        # the published recipe, on a GPU
    accelerate launch examples/distilbert/run.py ...                   # in several processes

A stage is skipped if nothing that it depends on has changed. After a kill, the same command goes on. Each part is also
a command: download_model.py, prune_finetune.py, quantize.py, evaluate.py, compare.py.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal

import compare
from accelerate import Accelerator
from config import Settings, run_command
from pipeline import Pipeline
from stages import run_stage

StageName = Literal["distill", "prune", "recover", "slim", "quantize", "report"]
TRAINED = ("distill", "prune", "recover")  # in all processes; the others in the first one alone


@dataclass
class Run(Settings):
    """What run.py takes."""

    stages: tuple[StageName, ...] = ("distill", "prune", "recover", "slim", "quantize", "report")

    def __post_init__(self) -> None:
        if self.short:
            self.out = self.out / "short"
        super().__post_init__()


def main(settings: Run) -> dict[str, Any]:
    """Runs the stages, and returns the figures of all."""
    accelerator = Accelerator(cpu=settings.device == "cpu")
    pipeline = Pipeline(settings, accelerator)
    stages = {**pipeline.stages(), "report": compare.report_stage(settings, pipeline)}
    settings.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {}
    for name, stage in stages.items():
        if name in settings.stages and (name in TRAINED or accelerator.is_main_process):
            result[name] = run_stage(stage, settings.out, accelerator if name in TRAINED else Alone())
    if accelerator.is_main_process:
        path = settings.out / "result.json"
        path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
        if "report" in result:
            print((settings.out / "results" / "model_comparison.md").read_text("utf-8"))
        print(f"The figures are in {path}")
    return result


class Alone:
    """The one process that works in a stage that trains nothing."""

    is_main_process = True

    def wait_for_everyone(self) -> None:
        """Returns at once."""


if __name__ == "__main__":
    run_command(main, Run, __doc__)
