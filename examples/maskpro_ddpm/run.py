"""Learns 2:4 masks for a diffusion model, tests and fine-tunes them; all figures are in result.json at the end.

    python examples/maskpro_ddpm/run.py                            # the trained MNIST UNet of SPARSEKIT_DATA
    python examples/maskpro_ddpm/run.py --short                    # a rehearsal with little of everything
    python examples/maskpro_ddpm/run.py --original_model FOLDER    # a pipeline of diffusers, or a UNet2DModel

Without SPARSEKIT_DATA and a model it first trains a small UNet, as examples/ddpm does. After a kill, the same command
goes on. Each step is also a script with more options.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import finetune
import get_mask_diffusion
import inference_loss_diffusion
import test_ddpm_maskpro
import train
import train_diffusion
import weight_prune
from ddpm_parts import Config
from models import CHECKPOINT
from settings import run_command


@dataclass
class Settings:
    """What run.py takes."""

    out: Path | None = None  # None is examples/maskpro_ddpm/out, or short/ in it
    original_model: str = "auto"  # auto is the MNIST UNet where SPARSEKIT_DATA has it, else one that is trained here
    dataset: str = "auto"
    pruner: weight_prune.Pruner = "wanda+swaps"
    max_step: int = 1000  # of learning
    finetuning_steps: int = 500
    device: str = "auto"
    seed: int = 0
    short: bool = False


def main(settings: Settings) -> dict[str, Any]:
    """Returns all figures."""
    short = settings.short
    out = settings.out or Path(__file__).parent / "out" / ("short" if short else "")
    seconds: dict[str, float] = {}

    def step(name: str, work: Callable[[], Any]) -> Any:
        print(f"\n{name}")
        start = time.monotonic()
        found = work()
        seconds[name] = round(time.monotonic() - start, 1)
        print(f"  {seconds[name]:.0f} s")
        return found

    model = settings.original_model
    if model == "auto" and not CHECKPOINT.exists():
        model = str(out / "unet")
        size = {"epoch": 1, "held_out": 0.8, "channel": 8, "channel_mult": (1, 2)} if short else {"epoch": 8}
        config = Config(save_dir=out / "unet", data=settings.dataset, seed=settings.seed, sample_every=0, **size)
        step("train a UNet", lambda: train.main(config))
    source = {"original_model": model, "dataset": settings.dataset, "device": settings.device, "seed": settings.seed}
    initial, pruned, baselines = out / "initial_mask_diffusion", out / "pruned", out / "baseline_losses"
    sizes = {**source, "dataset_size": 512 if short else 2048}
    pruning = weight_prune.Pruning(**source, save_path=pruned, pruner=settings.pruner)
    extraction = get_mask_diffusion.Extraction(**source, model_path=pruned, output_dir=initial)
    baseline = inference_loss_diffusion.Baseline(**sizes, initial_mask_path=initial, output_dir=baselines)
    training = train_diffusion.Training(
        **sizes,
        initial_mask_path=initial,
        baseline_path=baselines,
        out=out / "learn",
        max_step=48 if short else settings.max_step,
    )
    learned = out / "learn" / "learned_mask"
    tuning = finetune.Finetuning(
        **source,
        mask_path=learned,
        out=out / "finetune",
        max_step=24 if short else settings.finetuning_steps,
        held_out=256 if short else 1000,
    )
    less = {"held_out": 256, "count": 40, "sampling_steps": 10, "classifier_epochs": 1, "resamples": 5, "seconds": 0.5}
    testing = test_ddpm_maskpro.Testing(
        **source,
        initial_mask_path=initial,
        learned_mask_path=learned,
        finetuned_path=out / "finetune" / "checkpoint",
        output_dir=out / "test",
        **(less if short else {}),
    )
    result = {
        "prune": step("prune", lambda: weight_prune.main(pruning)),
        "mask": step("take the masks", lambda: get_mask_diffusion.main(extraction)),
        "baseline": step("measure the initial mask", lambda: str(inference_loss_diffusion.main(baseline))),
        "learn": step("learn masks", lambda: train_diffusion.main(training)),
        "finetune": step("fine-tune", lambda: finetune.main(tuning)),
        "test": step("test", lambda: test_ddpm_maskpro.main(testing)),
    }
    path = out / "result.json"
    path.write_text(json.dumps({"seconds": seconds, **result}, indent=2, default=str) + "\n", "utf-8")
    print(f"\nThe figures are in {path}")
    return result


if __name__ == "__main__":
    run_command(main, Settings, __doc__)
