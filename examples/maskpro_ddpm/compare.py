"""Compares the published rule of learning masks with ours, at equal forward passes and from the same masks.

    python examples/maskpro_ddpm/compare.py               # after weight_prune.py and get_mask_diffusion.py
    python examples/maskpro_ddpm/compare.py --rules ours "published: lr 50, logits 10" --passes 1000 --seeds 0 1 2

A pass is one of 32 images, whatever the batches of a rule are. Every image that goes through the model counts, those
for the initial masks, for the choice of logits and for checks included; then a rule writes its best masks, or the
initial ones where those are no worse on images of its own: the published code would write the last ones. The table, of
losses of held-out images on which nothing was chosen, is also in comparison.json in ``--output_dir``.
"""

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from judge import compared
from mask_files import masked_copy, masks_of
from models import Denoiser, UNet
from noisy import Noisy, NoisyBatches, image_losses, loss
from settings import INITIAL, OUT, Source, check_counts, explained, judged_on, run_command
from torch import Tensor, nn
from train_diffusion import Training, new_learner

from sparsekit._table import table_lines
from sparsekit.cli.variants import read_variants

PASS = 32  # images


def named_rules() -> dict[str, dict[str, Any]]:
    """Returns the options of train_diffusion.py for each rule: as published, with five published presets, and ours."""
    found: dict[str, dict[str, Any]] = {"published: lr 50, logits 10": {"parity": True}}
    for preset in read_variants(Path(__file__).with_name("presets.toml")):
        of = tyro.cli(Training, args=preset.command[2:])  # less python and the script
        options = {"lr": of.lr, "logits": of.logits, "batch_size": of.batch_size, "parity": True}
        found[f"published: lr {of.lr:g}, logits {of.logits:g}, {of.batch_size} images"] = options
    return {**found, "ours": {}}


RULES = named_rules()


@dataclass
class Comparison(Source):
    """What compare.py takes."""

    initial_mask_path: Path = INITIAL
    rules: tuple[str, ...] = tuple(RULES)  # of those in the table
    seeds: tuple[int, ...] = (0,)
    passes: int = 500  # of 32 images, for each rule and seed
    dataset_size: int = 2048  # images to learn from
    held_out: int = 1000  # images that losses are compared on
    output_dir: Path = OUT / "comparison"

    def __post_init__(self) -> None:
        check_counts(self, "passes", "dataset_size", "held_out")
        if unknown := [rule for rule in self.rules if rule not in RULES]:
            raise SystemExit(f"--rules must be of {'; '.join(RULES)}, got {unknown[0]}")


class CountedLoss:
    """The loss of a batch, and the number of images so far in ``images``."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, unet: nn.Module, batch: Noisy) -> Tensor:
        self.images += len(batch[1])
        return loss(unet, batch)


def main(settings: Comparison) -> dict[str, Any]:
    """Learns by every rule with every seed, and returns what it also writes."""
    denoiser = settings.denoiser()
    part = tuple(each[: settings.held_out] for each in judged_on(denoiser, settings.dataset))
    judged = NoisyBatches(denoiser, part, 128, settings.seed + 2)
    initial = image_losses(masked_copy(denoiser.unet, settings.initial_mask_path), judged, "losses, initial")
    dense = image_losses(denoiser.unet, judged, "losses, dense").mean().item()
    rules: dict[str, list[dict[str, Any]]] = {}
    for rule in settings.rules:
        for seed in settings.seeds:
            unet, learned = learn(settings, denoiser, rule, seed)
            rules.setdefault(rule, []).append({**learned, **compared(image_losses(unet, judged, rule), initial)})
    result = {"passes": settings.passes, "dense": dense, "initial": initial.mean().item(), "rules": rules}
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    (settings.output_dir / "comparison.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    show(result)
    return result


def learn(settings: Comparison, denoiser: Denoiser, rule: str, seed: int) -> tuple[UNet, dict[str, Any]]:
    """Returns a copy of the model with the masks that a rule has learned in the given passes, and what it did."""
    source = {name: getattr(settings, name) for name in ("original_model", "dataset", "device", "dataset_size")}
    training = Training(**source, seed=seed, **RULES[rule])
    masks = masks_of(masked_copy(denoiser.unet, settings.initial_mask_path))
    own = replace(denoiser, unet=copy.deepcopy(denoiser.unet))
    batches = NoisyBatches(own, training.part(own), training.batch_size, seed)
    counted = CountedLoss()
    with explained(training.batch_size):
        learner = new_learner(training, own, batches, masks, counted)
        step = 0
        while counted.images < PASS * settings.passes:
            step += 1
            learner.learn(step)
        passes = counted.images / PASS
        report = learner.finish()
    return own.unet, {"seed": seed, "steps": step, "passes": passes, "kept": report.kept, "flips": report.flips}


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['passes']} passes; dense {result['dense']:.4f}, initial masks {result['initial']:.4f}")
    rows = [("", "seed", "steps", "loss", "more than initial (95 %, paired)", "changed groups")]
    for rule, runs in result["rules"].items():
        for run in runs:
            low, high = run["interval"]
            more = f"{run['above']:+.4f} ({low:+.4f} to {high:+.4f})" if run["kept"] else "not better: initial"
            rows.append((rule, str(run["seed"]), f"{run['steps']:,}", f"{run['loss']:.4f}", more, f"{run['flips']:,}"))
    print(*table_lines(rows, "<>>>>>"), sep="\n")


if __name__ == "__main__":
    run_command(main, Comparison, __doc__)
