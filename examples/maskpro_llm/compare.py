"""Compares the published rule with ours, at equal forward passes and from the same masks.

    python examples/maskpro_llm/compare.py --passes 2400 --seeds 0 1 2                # after inference_loss.py

Each rule learns by train.py, in a run of its own, until it has made so many forward passes, those for the initial
masks, for the choice of logits and for checks included. It writes its best masks, or the initial ones where those are
no worse on other texts: the published code would write the last ones. The table, of perplexities on held-out texts, is
also in ``comparison.json`` in ``--out``.
"""

import json
from dataclasses import dataclass, fields
from typing import Any

import evaluate
import train
from baseline import Batched
from config import STORIES_RATE, Shared, run_command

from sparsekit._table import table_lines

RULES: dict[str, dict[str, Any]] = {  # options of train.py
    "published: lr 50, logits 10": {"parity": True},
    **{
        f"published: lr {lr:g}, logits {logits:g}": {"parity": True, "lr": lr, "logits": logits}
        for lr, logits in ((1.0, 5.0), (2.0, 7.0), (1.5, 6.0))  # later settings of its authors
    },
    "defaults": {},
    "ours: lr 0.15, logits 5.1": dict(zip(("lr", "logits"), STORIES_RATE, strict=True)),  # for stories260K
}


@dataclass
class Comparison(Batched):
    """What compare.py takes."""

    passes: int = 2400  # forward passes of each run; sets --epoch
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_counts(passes=1)


def main(settings: Comparison) -> dict[str, Any]:
    """Learns by every rule with every seed, and returns what evaluate.py finds of each."""
    learning = {each.name: getattr(settings, each.name) for each in fields(Batched)}
    learning["epoch"] = -(-settings.passes // (settings.dataset_size // settings.batchsize))  # as many as it may take
    shared = {each.name: getattr(settings, each.name) for each in fields(Shared)}
    found: dict[str, list[dict[str, Any]]] = {}
    for rule, options in RULES.items():
        for seed in settings.seeds:
            training = train.Training(**{**learning, **options, "seed": seed}, max_passes=settings.passes)
            learned = {name: train.main(training)[name] for name in ("passes", "steps", "flips")}
            checkpoint = training.result / "checkpoint"
            measured = evaluate.main(evaluate.Evaluation(**shared, checkpoint=checkpoint, seconds=0))["models"]
            found.setdefault(rule, []).append({"seed": seed, **learned, **measured})
    show(found)
    (settings.out / "comparison.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    return found


def show(found: dict[str, list[dict[str, Any]]]) -> None:
    first = next(iter(found.values()))[0]
    print(f"\ndense {first['dense']['perplexity']:.3f}, initial masks {first['initial']['perplexity']:.3f}")
    rows = [("", "seed", "steps", "perplexity", "loss, more than initial (95 %, paired)", "changed groups")]
    for rule, runs in found.items():
        for run in runs:
            learned, (low, high) = run["learned"], run["learned"]["interval"]
            more = f"{learned['more_than_initial']:+.4f} ({low:+.4f} to {high:+.4f})"
            rows.append(
                (rule, str(run["seed"]), f"{run['steps']:,}", f"{learned['perplexity']:.3f}", more, f"{run['flips']:,}")
            )
    print(*table_lines(rows, "<>>>>>"), sep="\n")


if __name__ == "__main__":
    run_command(main, Comparison, __doc__)
