"""Measures one model of a folder: accuracy with its interval, operations, bytes, the time and memory to load it.

python examples/distilbert/evaluate.py --folder examples/distilbert/out/2-4
"""

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from config import Settings, run_command
from data import Pieces, load
from models import WEIGHTS, encoder_weights, load_model, load_tokenizer
from pipeline import passed
from torch import Tensor

from sparsekit.evaluate import (
    classification_score,
    count_flops,
    disk_bytes,
    measure_latency,
    measure_process,
    predict_logits,
)

LENGTH = 128  # tokens of the pass whose operations are counted


@dataclass
class Evaluation(Settings):
    """What evaluate.py takes."""

    folder: Path = Path()  # of the model


def measure(folder: Path, test: Pieces, loads: int) -> tuple[dict[str, Any], Tensor]:
    """Returns the figures of a model but its latency, and its logits for the test sentences."""
    model = load_model(folder)
    logits = predict_logits(model, test.in_order())
    score = classification_score(logits, test.labels)
    flops = count_flops(model, passed(1, LENGTH))
    costs = [measure_process(partial(load_model, folder)) for _ in range(loads)]
    best = min(costs, key=lambda cost: cost.seconds)
    return {
        **asdict(score),
        "parameters": sum(each.numel() for each in model.parameters()),
        "encoder_weights": encoder_weights(model),
        "flops": asdict(flops),
        "macs": flops.macs,
        "bytes": disk_bytes(folder / WEIGHTS),
        "load_seconds": best.seconds,
        "load_bytes": best.peak_bytes - best.before_bytes,
    }, logits


def test_pieces(settings: Settings, tokenizer: Any) -> Pieces:
    return Pieces(load(settings).test, tokenizer, settings.max_length or 128)


def main(settings: Evaluation) -> dict[str, Any]:
    """Measures a model, prints all figures and returns them."""
    if not (settings.folder / "config.json").is_file():
        raise ValueError(f"{settings.folder} is not the folder of a model: it has no config.json")
    row, _ = measure(settings.folder, test_pieces(settings, load_tokenizer(settings.folder)), settings.loads)
    model = load_model(settings.folder)
    times = measure_latency({settings.folder.name: model}, passed, settings.grid, budget=settings.seconds)
    row["latency"] = [asdict(each) for each in times]
    print(json.dumps(row, indent=2))
    return row


if __name__ == "__main__":
    run_command(main, Evaluation, __doc__)
