"""Learns the 2:4 masks of a small language model, from the initial masks to the evaluation; ends with result.json.

    python examples/maskpro_llm/run.py                           # minutes on two cores
    python examples/maskpro_llm/run.py --short                   # a rehearsal with few steps
    python examples/maskpro_llm/run.py --model PATH --data FILE  # any causal LM that transformers loads

After a kill, the same command goes on. Each part is also a command with more options: get_mask.py, inference_loss.py,
train.py, evaluate.py, and compare.py for the published rule at equal forward passes.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import evaluate
import get_mask
import inference_loss
import train
from baseline import Batched
from config import STORIES, STORIES_RATE, Shared, run_command


@dataclass
class Settings(Shared):
    """What run.py takes."""

    lr: float | None = None  # if this and the logits are None: 0.15 and 5.1 for stories260K, else as for train.py
    logits: float | None = None
    epoch: int = train.Training.epoch
    max_step: int | None = None
    others: tuple[str, ...] = ("wanda", "sparsegpt")
    short: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model == str(STORIES[0]) and self.lr is self.logits is None:
            self.lr, self.logits = STORIES_RATE
        if self.short:
            self.out = self.out / "short"
            self.held_out, self.validation, self.updates, self.max_step = 64, 16, 40, 40


def main(settings: Settings) -> dict[str, Any]:
    """Runs all parts and returns the figures of all."""
    shared = {each.name: getattr(settings, each.name) for each in fields(Shared)}
    sizes = {"dataset_size": 64} if settings.short else {}
    seconds = 0.2 if settings.short else 2.0
    learning = {name: getattr(settings, name) for name in ("lr", "logits", "epoch", "max_step")}
    training = train.Training(**shared, **sizes, **learning)
    result: dict[str, Any] = {"seconds": {}}
    parts: dict[str, Callable[[], Any]] = {
        "masks": lambda: len(get_mask.main(get_mask.Masking(**shared))),
        "baseline": lambda: float(inference_loss.main(Batched(**shared, **sizes)).mean()),
        "train": lambda: train.main(training),
        "evaluate": lambda: evaluate.main(
            evaluate.Evaluation(
                **shared, checkpoint=training.result / "checkpoint", others=settings.others, seconds=seconds
            )
        ),
    }
    for name, part in parts.items():
        print(f"\n{name}")
        start = time.monotonic()
        result[name] = part()
        result["seconds"][name] = round(time.monotonic() - start, 1)
    path = settings.out / "result.json"
    path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(f"\nThe figures are in {path}, and the model in {training.result / 'checkpoint'}")
    return result


if __name__ == "__main__":
    run_command(main, Settings, __doc__)
