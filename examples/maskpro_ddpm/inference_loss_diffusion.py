"""Step 3: measures the loss of the initial mask on each batch that masks are learned from.

    python examples/maskpro_ddpm/inference_loss_diffusion.py --dataset_size 4096 --batch_size 32

The images, timesteps and noise of a batch depend on its number and the seed alone: a mask that is learned meets the
same, so the difference of two losses is that of the masks. (The published code draws them anew, and its baseline is
mostly noise.) It writes one loss for each batch, named as published, and a summary.
"""

from dataclasses import dataclass
from pathlib import Path

import baseline
import torch
from mask_files import masked_copy
from noisy import NoisyBatches
from settings import INITIAL, OUT, Sizes, check_targets, explained, run_command


@dataclass
class Baseline(Sizes):
    """What inference_loss_diffusion.py takes."""

    initial_mask_path: Path = INITIAL
    learned_mask_path: Path | None = None  # masks of an earlier run, in place of the initial ones, as for training
    output_dir: Path = OUT / "baseline_losses"
    targets: tuple[str, ...] = ("all",)  # the parts that are masked; the others are dense
    num_timesteps: int | None = None  # published; must be that of the model, which None takes


def main(settings: Baseline) -> Path:
    """Returns the path of the losses."""
    denoiser = settings.denoiser()
    check_targets(denoiser.unet, settings.targets)
    known = denoiser.diffusion.steps
    if settings.num_timesteps not in (None, known):
        raise SystemExit(
            f"the model was trained with {known} timesteps, got --num_timesteps {settings.num_timesteps}: leave it out"
        )
    learned = settings.learned_mask_path
    masks = learned or settings.initial_mask_path
    masked = masked_copy(denoiser.unet, masks, settings.targets, learned=learned is not None)
    batches = NoisyBatches(denoiser, settings.part(denoiser), settings.batch_size, settings.seed)
    with explained(settings.batch_size), torch.no_grad():
        losses = baseline.measure(masked, batches)
    path = baseline.baseline_path(settings.output_dir, settings.data_name(denoiser), batches)
    baseline.write(path, losses)
    print(f"the initial mask has a loss of {losses.mean():.6f} on {len(losses)} batches: {path}")
    return path


if __name__ == "__main__":
    run_command(main, Baseline, __doc__)
