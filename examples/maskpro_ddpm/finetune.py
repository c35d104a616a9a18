"""Step 5: trains the weights that the learned masks keep, with an average of the weights, in a run that can be killed.

    python examples/maskpro_ddpm/finetune.py --mask_path results_diffusion/RUN/learned_mask
    python examples/maskpro_ddpm/finetune.py --max_step 100000 --batch_size 128 --lr 2e-4 --ema 0.9999   # as published

Dropped weights stay zero, as sk.keep_masks sees to. The folder of the run gets the average in checkpoint/, with its
masks beside it, and its loss on held-out images beside those of the dense model and of the masked one before.
"""

from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from judge import compared
from mask_files import digests, masked_copy, write_masks
from noisy import NoisyBatches, add_noise, image_losses, loss
from settings import OUT, Source, check_counts, explained, judged_on, open_run, run_command
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import sparsekit as sk

FREE = ("device", "out", "save_every", "mask_path", "tracker", "project_name", "experiment_name")


@dataclass(kw_only=True)
class Finetuning(Source):
    """What finetune.py takes."""

    mask_path: Path  # masks of train_diffusion.py
    out: Path = OUT / "finetuned"  # the folder of the run
    max_step: int = 1000
    batch_size: int = 64
    lr: float = 1e-3  # at the beginning; it falls to 0 as a cosine
    ema: float = 0.995  # decay of the average of the weights
    grad_clip: float = 1.0
    held_out: int = 1000  # images to measure the loss on
    save_every: int = 100  # steps between two stored states
    tracker: Literal["swanlab", "wandb", "tensorboard", "trackio", "none"] = "none"
    project_name: str = "maskpro-ddpm"
    experiment_name: str | None = None

    def __post_init__(self) -> None:
        check_counts(self, "max_step", "batch_size", "held_out", "save_every")

    def of_run(self) -> dict[str, Any]:
        """Returns what the run depends on besides weights and masks: with other values, its folder does not go on."""
        return {key: value for key, value in asdict(self).items() if key not in FREE}


def main(settings: Finetuning) -> dict[str, Any]:
    """Returns the losses."""
    denoiser = settings.denoiser()
    unet = masked_copy(denoiser.unet, settings.mask_path, learned=True).requires_grad_(True)
    images, labels = denoiser.images(settings.dataset).train
    if not 1 <= settings.batch_size <= len(images):
        raise SystemExit(f"--batch_size must be from 1 to {len(images)} images, got {settings.batch_size}")
    part = (each[: settings.held_out] for each in judged_on(denoiser, settings.dataset))
    held_out = NoisyBatches(denoiser, tuple(part), 128, settings.seed + 2)
    steps = settings.max_step
    config = {**settings.of_run(), **digests(denoiser.unet, unet)}
    with open_run(settings, settings.out, config, steps) as run, explained(settings.batch_size):
        if run.result is not None:
            print(f"{run.folder} holds this run, finished")
            return run.result
        before = image_losses(unet, held_out, "losses before")
        average = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
        optimizer = torch.optim.AdamW(unet.parameters(), settings.lr, weight_decay=0.0)
        schedule = CosineAnnealingLR(optimizer, steps)
        run.restore(model=unet, average=average, optimizer=optimizer, schedule=schedule)
        epochs = -(-steps // (len(images) // settings.batch_size))
        batches = run.batches(len(images), settings.batch_size, epochs=epochs, seed=settings.seed)
        unet.train()
        with sk.keep_masks(unet, optimizer):
            todo = islice(batches, steps - run.step)
            for indices in tqdm(todo, "fine-tune", steps, initial=run.step, leave=False, disable=None):
                error = loss(unet, add_noise(denoiser, (images[indices], labels[indices]), settings.seed, run.step))
                optimizer.zero_grad()
                error.backward()
                norm = nn.utils.clip_grad_norm_(unet.parameters(), settings.grad_clip)
                optimizer.step()
                schedule.step()
                average.update_parameters(unet)
                run.record(loss=error.item(), grad_norm=norm.item())
                if run.step % settings.save_every == 0 or run.step == steps:
                    run.save()
        tuned = average.module
        denoiser.save(tuned, run.folder / "checkpoint")
        write_masks(tuned, run.folder / "checkpoint")
        after, dense = image_losses(tuned, held_out, "losses after"), image_losses(denoiser.unet, held_out, "dense")
        result = {
            "steps": run.step,
            "dense": dense.mean().item(),
            "masked": compared(before, dense),
            "finetuned": compared(after, before),
        }
        run.finish(result)
        print(f"loss {before.mean():.4f} -> {after.mean():.4f}, dense {dense.mean():.4f}: {run.folder}")
        return result


if __name__ == "__main__":
    run_command(main, Finetuning, __doc__)
