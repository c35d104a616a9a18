"""Step 2: takes the masks of a pruned model, one file for all layers.

    python examples/maskpro_ddpm/get_mask_diffusion.py                                # of what weight_prune.py wrote
    python examples/maskpro_ddpm/get_mask_diffusion.py --model_path FOLDER --original_model FOLDER

A layer that has zeros gets the 2:4 mask that keeps its weights, first those that are not zero, then those that are
largest in the original model; of a model that was pruned without groups this is the nearest 2:4 mask. A bit for each
weight goes to masks.safetensors, and what each layer keeps to extraction_summary.json and .txt.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mask_files import masks_of, write_masks
from models import UNet, load_denoiser
from settings import INITIAL, OUT, Source, is_protected, run_command
from torch import Tensor, nn

import sparsekit as sk


@dataclass
class Extraction(Source):
    """What get_mask_diffusion.py takes."""

    model_path: Path = OUT / "pruned"  # what weight_prune.py wrote, or another pruned model
    output_dir: Path = INITIAL
    pattern: str = "2:4"


def scores_of(dense: UNet, pruned: UNet) -> dict[str, Tensor]:
    """Returns scores of the layers that have zeros, by which kept weights come first and larger ones before others."""
    weights, scores = dict(dense.named_parameters()), {}
    for name, module in pruned.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or is_protected(name) or module.weight.all():
            continue
        original = weights[f"{name}.weight"]
        kept = module.weight != 0
        if (module.weight[kept] != original[kept]).any():
            raise SystemExit(
                f"the kept weights of {name} differ from those of the original model: name the model that was pruned "
                "by --original_model, and prune it by weight_prune.py, which leaves kept weights as they are"
            )
        size = original.abs() / original.abs().max()
        scores[name] = torch.where(kept, 1 + size, size)
    return scores


def main(settings: Extraction) -> dict[str, Any]:
    """Returns the summary that it also writes."""
    if not settings.model_path.is_dir():
        raise SystemExit(f"{settings.model_path} is missing: run weight_prune.py --save_path {settings.model_path}")
    dense, pruned = settings.denoiser().unet, load_denoiser(str(settings.model_path)).unet.to("cpu")
    dense = copy.deepcopy(dense).to("cpu")
    names = [{name: each.shape for name, each in unet.named_parameters()} for unet in (dense, pruned)]
    if names[0] != names[1]:
        raise SystemExit(f"{settings.model_path} is pruned from another model: name that by --original_model")
    scores = scores_of(dense, pruned)
    if not scores:
        raise SystemExit(f"{settings.model_path} has no zeros: prune it by weight_prune.py first")
    report = sk.prune_(dense, sk.Scores(settings.pattern, scores), where=lambda name, _: name in scores)
    write_masks(dense, settings.output_dir)
    weights = dict(pruned.named_parameters())
    layers = {
        name: {
            "shape": list(mask.shape),
            "kept": int(mask.sum()),
            "sparsity": 1 - mask.float().mean().item(),
            "kept_zeros": int((mask & (weights[f"{name}.weight"] == 0)).sum()),
            "dropped_nonzeros": int((~mask & (weights[f"{name}.weight"] != 0)).sum()),
        }
        for name, mask in masks_of(dense).items()
    }
    moved = sum(each["dropped_nonzeros"] for each in layers.values())
    summary = {
        "model_path": str(settings.model_path),
        "pattern": settings.pattern,
        "sparsity": report.sparsity,
        "dropped_nonzeros": moved,
        "layers": layers,
    }
    (settings.output_dir / "extraction_summary.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    lines = [f"{name}: {each['shape']}, {each['sparsity']:.2%} dropped" for name, each in layers.items()]
    total = f"{len(layers)} layers, {report.sparsity:.2%} of their weights dropped"
    chosen = f"{moved} kept weights of {settings.model_path} are dropped by the {settings.pattern} masks"
    (settings.output_dir / "extraction_summary.txt").write_text("\n".join([*lines, total, chosen]) + "\n", "utf-8")
    print(f"{total}; {chosen}: {settings.output_dir}")
    return summary


if __name__ == "__main__":
    run_command(main, Extraction, __doc__)
