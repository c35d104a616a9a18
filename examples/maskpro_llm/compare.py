"""Compares the published rule with ours, at equal forward passes and from the same masks.

    python examples/maskpro_llm/compare.py --passes 1920 --seeds 0 1 2                # after inference_loss.py

Each rule learns by train.py, in a run of its own that goes on after a kill, and writes its best masks, or the initial
ones where those are no worse on other texts: the published code would write the last ones. The table, of perplexities
on held-out texts, is also in ``comparison.json`` in ``--out``.
"""

import json
from dataclasses import dataclass, fields
from typing import Any

import evaluate
import train
from baseline import Batched
from config import Shared, run_command

from sparsekit._table import table_lines

RULES: dict[str, tuple[float, dict[str, Any]]] = {  # forward passes of a step on average, and options of train.py
    "published: lr 50, logits 10": (1.0, {"parity": True}),
    "published, tuned: lr 20, logits 7": (1.0, {"parity": True, "lr": 20.0, "logits": 7.0}),
    "ours": (1.25, {"lr": 0.15, "logits": 5.1}),  # after every four draws the likeliest masks are run, too
}


@dataclass
class Comparison(Batched):
    """What compare.py takes."""

    passes: int = 1920  # forward passes on a batch, without those of the initial masks and of checks; sets --epoch
    seeds: tuple[int, ...] = (0, 1, 2)


def main(settings: Comparison) -> dict[str, Any]:
    """Learns by every rule with every seed, and returns what evaluate.py finds of each."""
    learning = {each.name: getattr(settings, each.name) for each in fields(Batched)}
    learning["epoch"] = -(-settings.passes // (settings.dataset_size // settings.batchsize))
    shared = {each.name: getattr(settings, each.name) for each in fields(Shared)}
    found: dict[str, list[dict[str, Any]]] = {}
    for rule, (passes, options) in RULES.items():
        for seed in settings.seeds:
            training = train.Training(**{**learning, **options, "seed": seed}, max_step=int(settings.passes / passes))
            flips = train.main(training)["flips"]
            checkpoint = training.result / "checkpoint"
            measured = evaluate.main(evaluate.Evaluation(**shared, checkpoint=checkpoint, seconds=0))["models"]
            found.setdefault(rule, []).append({"seed": seed, "flips": flips, **measured})
    show(found)
    (settings.out / "comparison.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    return found


def show(found: dict[str, list[dict[str, Any]]]) -> None:
    first = next(iter(found.values()))[0]
    print(f"\ndense {first['dense']['perplexity']:.3f}, initial masks {first['initial']['perplexity']:.3f}")
    rows = [("", "seed", "perplexity", "loss, more than initial (95 %, paired)", "changed groups")]
    for rule, runs in found.items():
        for run in runs:
            learned, (low, high) = run["learned"], run["learned"]["interval"]
            more = f"{learned['more_than_initial']:+.4f} ({low:+.4f} to {high:+.4f})"
            rows.append((rule, str(run["seed"]), f"{learned['perplexity']:.3f}", more, f"{run['flips']:,}"))
    print(*table_lines(rows, "<>>>>"), sep="\n")


if __name__ == "__main__":
    run_command(main, Comparison, __doc__)
