"""Step 1: prunes the weights of a model by a method that leaves the kept ones as they are.

    python examples/maskpro_ddpm/weight_prune.py                                   # the MNIST UNet, by Wanda with swaps
    python examples/maskpro_ddpm/weight_prune.py --original_model FOLDER --pruner magnitude
    python examples/maskpro_ddpm/weight_prune.py --pruning_ratio 0.3               # unstructured, as published

It writes the pruned model, for a UNet2DModel as a pipeline of diffusers, and pruning_stats.json. With a pruning ratio
the masks are not 2:4: get_mask_diffusion.py then chooses the 2:4 masks that are nearest to them.
"""

import copy
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from noisy import NoisyBatches
from settings import OUT, Source, check_counts, check_targets, explained, in_targets, is_protected, run_command
from tqdm import tqdm

import sparsekit as sk
from sparsekit.prune import Method

Pruner = Literal["magnitude", "random", "wanda", "wanda+swaps"]


@dataclass
class Pruning(Source):
    """What weight_prune.py takes."""

    save_path: Path = OUT / "pruned"
    pruner: Pruner = "wanda+swaps"  # published: magnitude and random
    pattern: str = "2:4"
    pruning_ratio: float | None = None  # the share of each layer that is dropped, in place of the pattern
    targets: tuple[str, ...] = ("all",)  # parts or layers to prune
    calibration: int = 512  # training images that Wanda sees, each at one timestep
    batch_size: int = 128

    def __post_init__(self) -> None:
        check_counts(self, "calibration", "batch_size")
        if self.pruning_ratio is not None:
            if not 0 < self.pruning_ratio < 1:
                raise SystemExit(f"--pruning_ratio must be between 0 and 1, got {self.pruning_ratio}")
            if self.pruner == "wanda+swaps":
                raise SystemExit("swaps are for n:m patterns: pass --pruner wanda with --pruning_ratio")

    def method(self, weights: dict[str, torch.Tensor]) -> Method:
        pattern = self.pattern if self.pruning_ratio is None else f"{100 * self.pruning_ratio:.12g}% layer"
        if self.pruner == "random":
            generator = torch.Generator().manual_seed(self.seed)
            scores = {name: torch.rand(each.shape, generator=generator) for name, each in weights.items()}
            return sk.Scores(pattern, scores)
        if self.pruner == "magnitude":
            return sk.Magnitude(pattern)
        return sk.Swaps(sk.Wanda(pattern)) if self.pruner == "wanda+swaps" else sk.Wanda(pattern)


def main(settings: Pruning) -> dict[str, Any]:
    """Returns the statistics that it also writes."""
    denoiser = settings.denoiser()
    check_targets(denoiser.unet, settings.targets)
    pruned = copy.deepcopy(denoiser.unet)
    batches = None
    if settings.pruner.startswith("wanda"):
        part = tuple(each[: settings.calibration] for each in denoiser.images(settings.dataset).train)
        noisy = NoisyBatches(denoiser, part, settings.batch_size, settings.seed)
        batches = [inputs for inputs, _ in noisy]
    with explained(settings.batch_size):
        report = sk.prune_(
            pruned,
            settings.method(dict(denoiser.unet.named_parameters())),
            batches,
            where=lambda name, _: in_targets(name, settings.targets) and not is_protected(name),
            calibration=sk.Calibration(sequential=False),
            progress=partial(tqdm, desc=f"prune by {settings.pruner}", leave=False, disable=None),
        )
    denoiser.save(pruned, settings.save_path)
    stats = {
        "original_model": settings.original_model,
        "pruner": settings.pruner,
        "pattern": report.layers[0].pattern,
        "sparsity": report.sparsity,
        "layers": {layer.name: layer.sparsity for layer in report.layers},
        "dense": {each.name: each.reason for each in report.skipped},
    }
    (settings.save_path / "pruning_stats.json").write_text(json.dumps(stats, indent=2, default=str) + "\n", "utf-8")
    if settings.pruning_ratio is not None:
        print("these masks are not 2:4: get_mask_diffusion.py chooses the 2:4 masks that keep the most of them")
    print(f"{len(report.layers)} layers pruned, {report.sparsity:.1%} of their weights: {settings.save_path}")
    return stats


if __name__ == "__main__":
    run_command(main, Pruning, __doc__)
