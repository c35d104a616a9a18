"""Compares perplexities of the dense model, the initial masks and the learned ones, and times the result compressed.

    python examples/maskpro_llm/evaluate.py                                   # the newest result of train.py in --out
    python examples/maskpro_llm/evaluate.py --checkpoint results/NAME/checkpoint --others wanda sparsegpt

All are measured on the same held-out texts, which nothing was calibrated on or learned from. It writes
``evaluation.json`` beside the checkpoint.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import Shared, load_model, run_command
from get_mask import METHODS, prune
from losses import all_losses
from masks import apply_masks, read_masks
from texts import read
from torch import Tensor

from sparsekit._digest import digest
from sparsekit._json import parse_json
from sparsekit._table import table_lines
from sparsekit.evaluate import paired_difference


@dataclass
class Evaluation(Shared):
    """What evaluate.py takes."""

    checkpoint: Path | None = None  # None is the newest in results/ in --out
    others: tuple[str, ...] = ()  # methods to measure as well: wanda, sparsegpt and so on, weight updates included
    nsamples: int = 128  # texts that these are calibrated on
    init: Path | None = None  # the folder of the initial masks, as for train.py
    seconds: float = 2.0  # for which a pass is timed at each number of tokens; 0 leaves that out


def newest(folder: Path) -> Path:
    """Returns the checkpoint that was written last.

    Raises:
        ValueError: there is none.
    """
    found = sorted(folder.glob("*/checkpoint"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"{folder} has no checkpoint: run train.py first, or name one by --checkpoint")
    return found[-1]


def read_run(checkpoint: Path) -> dict[str, Any]:
    """Returns what the run that wrote a checkpoint depended on, or the defaults if it is of no run."""
    path = checkpoint.parent / "config.json"
    return parse_json(path.read_text("utf-8")) if path.exists() else {"targets": ["all"]}


def read_initial(settings: Evaluation, checkpoint: Path, model: Any) -> tuple[dict[str, Tensor], list[str]]:
    """Reads the initial masks of the layers that were learned, and the targets that select these.

    Raises:
        ValueError: the checkpoint was learned from other masks.
    """
    run, folder = read_run(checkpoint), settings.init or settings.masks
    masks = read_masks(folder, model, run["targets"])
    if run.get("masks", digest(masks)) != digest(masks):
        raise ValueError(
            f"{checkpoint} was learned from other masks than those in {folder}: name their folder by --init"
        )
    return masks, run["targets"]


def compared(losses: Tensor, initial: Tensor) -> dict[str, Any]:
    """Returns the perplexity with its standard error, and how the loss differs from the initial masks' on each text."""
    more = paired_difference(losses, initial)
    perplexity = losses.mean().exp().item()
    return {
        "perplexity": perplexity,
        "standard_error": perplexity * losses.std().item() / len(losses) ** 0.5,
        "loss": losses.mean().item(),
        "more_than_initial": more.mean,
        "interval": list(more.interval),
        "p": more.p,
    }


def main(settings: Evaluation) -> dict[str, Any]:
    """Measures, prints, writes and returns all figures."""
    if unknown := set(settings.others) - set(METHODS):
        raise ValueError(f"--others are {', '.join(METHODS)}, got {', '.join(sorted(unknown))}")
    checkpoint = settings.checkpoint or newest(settings.out / "results")
    model, tokenizer = load_model(settings)
    texts = read(settings, tokenizer, settings.nsamples if settings.others else 1, "--nsamples")
    batches = texts.held_out.split(16)
    losses = {"dense": all_losses(model, batches, "dense")}
    masks, targets = read_initial(settings, checkpoint, model)
    losses["initial"] = all_losses(apply_masks(model, masks), batches, "initial")
    for name in settings.others:
        model, _ = load_model(settings)
        prune(model, METHODS[name], texts.learn, targets)
        losses[name] = all_losses(model, batches, name)
    model, _ = load_model(settings, str(checkpoint))
    losses["learned"] = all_losses(model, batches, "learned")
    found: dict[str, Any] = {name: compared(each, losses["initial"]) for name, each in losses.items()}
    show(found, len(texts.held_out))
    result = {"checkpoint": str(checkpoint), "texts": len(texts.held_out), "models": found}
    if settings.seconds > 0:
        from speed import compress_and_time

        _, result["speed"] = compress_and_time(model, model.config.get_text_config().vocab_size, settings.seconds)
    (checkpoint.parent / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    return result


def show(found: dict[str, Any], texts: int) -> None:
    rows = [("", "perplexity", "standard error", "loss, more than initial (95 %, paired)", "p")]
    for name, row in found.items():
        low, high = row["interval"]
        more = "" if name == "initial" else f"{row['more_than_initial']:+.4f} ({low:+.4f} to {high:+.4f})"
        p = "" if name == "initial" else "< 1e-16" if row["p"] < 1e-16 else f"{row['p']:.1e}"
        rows.append((name, f"{row['perplexity']:.3f}", f"{row['standard_error']:.3f}", more, p))
    print(f"{texts} texts that were held out", *table_lines(rows, "<>>>>"), sep="\n")


if __name__ == "__main__":
    run_command(main, Evaluation, __doc__)
