"""Step 4: learns 2:4 masks from losses alone, and goes on where it was killed.

    python examples/maskpro_ddpm/train_diffusion.py                             # the defaults need no tuning
    python examples/maskpro_ddpm/train_diffusion.py --targets down_blocks up_blocks.1
    python examples/maskpro_ddpm/train_diffusion.py --parity --lr 50 --logits 10    # the published rule

It needs the initial masks of get_mask_diffusion.py and the losses of inference_loss_diffusion.py for the same sizes
(--measure_baseline measures these first). The folder of the run holds what every run has, the learned masks in
learned_mask/, the model in checkpoint/ (a pipeline of diffusers if it came as one), logits/, loss_improvements.npy,
loss_training.npy, training_summary.json and training_curves.png.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import baseline
import numpy as np
import torch
from curves import draw_curves
from ddpm_parts import read_records
from mask_files import digests, masked_copy, masks_of, write_masks
from models import Denoiser
from noisy import Noisy, NoisyBatches, loss
from safetensors.torch import save_file
from settings import INITIAL, OUT, Sizes, check_counts, check_targets, chosen_on, explained, open_run, run_command
from torch import Tensor, nn
from tqdm import tqdm

import sparsekit as sk
from sparsekit.prune.maskpro import DRAWS
from sparsekit.runs import Run

FREE = ("device", "save", "save_every", "out", "output_dir", "measure_baseline", "baseline_path", "tracker")
FREE += ("project_name", "experiment_name", "initial_mask_path", "learned_mask_path")  # what a run does not depend on


@dataclass
class Training(Sizes):
    """What train_diffusion.py takes."""

    lr: float | None = None  # how far a step moves logits; None follows from the logits (published: 50)
    epoch: int = 625  # passes over the batches, each of which is met in --draws steps
    draws: int | None = None  # masks drawn for a batch, each in a step; None is 4, or 1 with --parity
    logits: float | None = None  # of kept weights at the beginning; None follows from the number of groups (10)
    max_step: int | None = 1000
    targets: tuple[str, ...] = ("all",)  # parts or layers to learn; the others stay dense
    parity: bool = False  # the published rule: plain residuals, lr 50, logits 10
    initial_mask_path: Path = INITIAL
    learned_mask_path: Path | None = None  # masks of an earlier run to begin with, in place of the initial ones
    baseline_path: Path = OUT / "baseline_losses"
    measure_baseline: bool = False  # measures the losses of the initial mask if their file is missing
    save: bool = True  # also writes checkpoint/ and logits/
    save_every: int = 200  # steps between two stored states
    output_dir: Path = OUT / "results_diffusion"
    out: Path | None = None  # the folder of the run; None is one in --output_dir, named by the values of it
    tracker: Literal["swanlab", "wandb", "tensorboard", "trackio", "none"] = "none"
    project_name: str = "maskpro-ddpm"
    experiment_name: str | None = None

    def __post_init__(self) -> None:
        if self.draws is None:
            self.draws = 1 if self.parity else DRAWS
        check_counts(self, "epoch", "max_step", "draws", "save_every")
        super().__post_init__()

    def folder(self) -> Path:
        """Returns the folder of the run."""
        lr, logits = ("auto" if each is None else f"{each:g}" for each in (self.lr, self.logits))
        parts = [f"lr{lr}", f"epoch{self.epoch}", f"logits{logits}", f"size{self.dataset_size}", f"bs{self.batch_size}"]
        parts += [f"batches{self.max_batches}"] if self.max_batches else []
        parts += [f"step{self.max_step or 'all'}", f"draws{self.draws}", f"seed{self.seed}", "-".join(self.targets)]
        parts += ["parity"] if self.parity else []
        return self.out or self.output_dir / "_".join([*parts, "diffusion"])

    def steps(self, batches: int) -> int:
        """Returns the steps of all passes over the batches, ``--max_step`` at most."""
        steps = self.epoch * batches * self.draws
        return min(steps, self.max_step or steps)

    def of_run(self) -> dict[str, Any]:
        """Returns what the run depends on besides weights and masks: with other values, its folder does not go on."""
        return {key: value for key, value in asdict(self).items() if key not in FREE}


def main(settings: Training) -> dict[str, Any]:
    """Returns the summary that it also writes."""
    denoiser = settings.denoiser()
    check_targets(denoiser.unet, settings.targets)
    masks = settings.learned_mask_path or settings.initial_mask_path
    masked = masked_copy(denoiser.unet, masks, settings.targets, learned=settings.learned_mask_path is not None)
    initial = masks_of(masked)
    if not initial:
        raise SystemExit(f"{masks} has no masks in --targets {' '.join(settings.targets)}: pass --targets all")
    batches = NoisyBatches(denoiser, settings.part(denoiser), settings.batch_size, settings.seed)
    path = baseline.baseline_path(settings.baseline_path, settings.data_name(denoiser), batches)
    with explained(settings.batch_size), torch.no_grad():
        losses = baseline.read(path, masked if settings.measure_baseline else None, batches)
    steps = settings.steps(len(batches))
    config = {**settings.of_run(), **digests(denoiser.unet, masked)}
    with open_run(settings, settings.folder(), config, steps) as run, explained(settings.batch_size):
        if run.result is None:
            learner = new_learner(settings, denoiser, batches, initial)
            learn(run, learner, steps, settings.save_every, lambda *found: baseline.check(path, losses, *found))
            finish(run, settings, denoiser, learner)
        else:
            print(f"{run.folder} holds this run, finished")
        return run.result


def new_learner(
    settings: Training,
    denoiser: Denoiser,
    batches: NoisyBatches,
    initial: dict[str, Tensor],
    loss_fn: Callable[[nn.Module, Noisy], Tensor] = loss,
) -> sk.MaskPro:
    """Returns a learner of the layers that have an initial mask."""
    return sk.MaskPro(
        denoiser.unet,
        loss_fn,
        "2:4",
        batches=batches,
        held_out=NoisyBatches(denoiser, chosen_on(denoiser, settings.dataset), 128, settings.seed + 1),
        init=initial,
        where=lambda name, _: name in initial,
        lr=settings.lr,
        multiplier=settings.logits,
        draws=settings.draws,
        seed=settings.seed,
        parity=settings.parity,
    )


def learn(run: Run, learner: sk.MaskPro, steps: int, save_every: int, check: Any) -> None:
    """Makes the steps of a run, and checks that the initial mask has the losses that were measured before."""
    run.restore(learner=learner)
    started, before = time.monotonic(), run.step
    bar = tqdm(learner.steps(steps), "learn masks", steps, initial=run.step, leave=False, disable=None)
    for step in bar:
        check(step.turn, step.initial_loss)
        run.step = step.step
        improvement = step.initial_loss - step.loss
        run.record(loss=step.loss, initial_loss=step.initial_loss, improvement=improvement, advantage=step.advantage)
        if run.step % save_every == 0 or run.step == steps:
            run.save()
    if run.step > before:
        run.log(f"{(time.monotonic() - started) / (run.step - before):.4f} seconds a step")


def finish(run: Run, settings: Training, denoiser: Denoiser, learner: sk.MaskPro) -> None:
    """Writes the learned masks, the model, the curves and the summary."""
    state = learner.state_dict()
    report = learner.finish()
    folder, unet = run.folder, denoiser.unet
    write_masks(unet, folder / "learned_mask")
    if settings.save:
        denoiser.save(unet, folder / "checkpoint")
        (folder / "logits").mkdir(exist_ok=True)
        layers = {"layers": json.dumps(state["layers"])}  # in the order of their logits
        save_file({"logits": state["logits"].cpu()}, folder / "logits" / "logits.safetensors", layers)
    records = read_records(folder)
    np.save(folder / "loss_improvements.npy", np.array([record["improvement"] for record in records]))
    np.save(folder / "loss_training.npy", np.array([record["loss"] for record in records]))
    draw_curves(records, folder / "training_curves.png")
    result = {
        **{name: getattr(report, name) for name in ("steps", "initial_loss", "loss", "kept", "flips", "groups")},
        "multiplier": report.multiplier,
        "lr": state["lr"],
        "layers": len(report.layers),
        "held_out_batches": report.held_out,
        "original_model": settings.original_model,
    }
    (folder / "training_summary.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    run.log(str(report))
    run.finish(result)
    print(f"{report}\n{folder}")


if __name__ == "__main__":
    run_command(main, Training, __doc__)
