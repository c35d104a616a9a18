"""Step 6: tests the learned masks against the initial ones. (A script as published, not a file of pytest's.)

    python examples/maskpro_ddpm/test_ddpm_maskpro.py --learned_mask_path results_diffusion/RUN/learned_mask
    python examples/maskpro_ddpm/test_ddpm_maskpro.py ... --finetuned_path finetuned/checkpoint

Every model meets the same held-out images, timesteps and noise, on which no mask was chosen, and draws images from the
same noise: samples.png has a row for each. evaluation_results.json has the losses with paired 95 % intervals, sparsity,
FID and KID, and the time of a pass, dense and compressed.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ddpm_parts import as_bytes, compress_and_time, save_grid
from judge import ImageJudge, compared
from mask_files import masked_copy, masks_of
from models import Denoiser, UNet, load_denoiser
from noisy import NoisyBatches, image_losses
from settings import INITIAL, OUT, Source, check_counts, explained, judged_on, run_command


@dataclass(kw_only=True)
class Testing(Source):
    """What test_ddpm_maskpro.py takes."""

    initial_mask_path: Path = INITIAL
    learned_mask_path: Path  # masks of train_diffusion.py
    finetuned_path: Path | None = None  # checkpoint/ of finetune.py
    output_dir: Path = OUT / "test_results"
    held_out: int = 1000  # images to measure the loss on
    batch_size: int = 128
    count: int = 250  # images to draw with each model
    shown: int = 10  # of them in a row of samples.png
    sampling_steps: int = 50
    classifier_epochs: int = 6
    resamples: int = 50  # for the intervals of FID and KID
    timed_batch: int = 32  # images in the pass that is timed
    seconds: float = 4.0  # for which passes are timed

    def __post_init__(self) -> None:
        check_counts(
            self, "held_out", "batch_size", "count", "shown", "sampling_steps", "classifier_epochs", "timed_batch"
        )


def main(settings: Testing) -> dict[str, Any]:
    """Returns the results that it also writes."""
    denoiser = settings.denoiser()
    dense = denoiser.unet
    learned = masked_copy(dense, settings.learned_mask_path, learned=True)
    models = {"dense": dense, "initial": initial_like(learned, dense, settings), "learned": learned}
    if settings.finetuned_path is not None:
        if not settings.finetuned_path.is_dir():
            raise SystemExit(
                f"{settings.finetuned_path} is missing: finetune.py --out {settings.finetuned_path.parent} writes it"
            )
        with explained():
            models["finetuned"] = load_denoiser(str(settings.finetuned_path), dense.device).unet
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"original_model": settings.original_model}
    with explained(settings.batch_size):
        result["loss"] = compare_losses(settings, denoiser, models)
        result["sparsity"] = sparsity(models)
        result["images"] = compare_images(settings, denoiser, models)
    with explained(settings.timed_batch):
        batch = NoisyBatches(denoiser, judged_on(denoiser, settings.dataset), settings.timed_batch, settings.seed)[0]
        fastest = models.get("finetuned", models["learned"])
        result["latency"] = compress_and_time(dense, fastest, batch[0], settings.seconds)[1]
    path = settings.output_dir / "evaluation_results.json"
    path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    show(result)
    print(f"{path}, and images in {path.with_name('samples.png')}")
    return result


def initial_like(learned: UNet, dense: UNet, settings: Testing) -> UNet:
    """Returns the initial model, masked in the layers that were learned and dense in the others, as the learned is."""
    layers = masks_of(learned)
    initial = masked_copy(dense, settings.initial_mask_path, tuple(layers))
    if missing := sorted(layers.keys() - masks_of(initial).keys()):
        raise SystemExit(
            f"{settings.initial_mask_path} has no mask of {missing[0]}, which was learned: name the masks that the "
            "learning began with by --initial_mask_path"
        )
    left = len(masks_of(masked_copy(dense, settings.initial_mask_path))) - len(layers)
    if left:
        print(f"{left} layers have an initial mask but no learned one: they are dense in both models")
    return initial


def compare_losses(settings: Testing, denoiser: Denoiser, models: dict[str, UNet]) -> dict[str, Any]:
    """Compares each masked model with the initial mask, and that with the dense model."""
    part = (each[: settings.held_out] for each in judged_on(denoiser, settings.dataset))
    batches = NoisyBatches(denoiser, tuple(part), settings.batch_size, settings.seed + 2)
    losses = {name: image_losses(unet, batches, f"losses, {name}") for name, unet in models.items()}
    others = [name for name in models if name not in ("dense", "initial")]
    return {
        "dense": {"loss": losses["dense"].mean().item(), "images": len(losses["dense"])},
        "initial": compared(losses["initial"], losses["dense"]),
        **{name: compared(losses[name], losses["initial"]) for name in others},
        "share_of_gap": (losses["initial"] - losses["learned"]).mean().item()
        / (losses["initial"] - losses["dense"]).mean().item(),
    }


def sparsity(models: dict[str, UNet]) -> dict[str, Any]:
    """Returns what the masks drop, and in how many groups the learned ones differ from the initial ones."""
    initial, learned = masks_of(models["initial"]), masks_of(models["learned"])
    weights = sum(each.numel() for each in models["dense"].parameters())
    masked = sum(each.numel() for each in learned.values())
    dropped = sum(int((~each).sum()) for each in learned.values())
    differ = {name: (mask != initial[name]).sum().item() / 2 for name, mask in learned.items() if name in initial}
    return {
        "layers": len(learned),
        "masked_weights": masked,
        "dropped_weights": dropped,
        "of_masked": dropped / masked,
        "of_model": dropped / weights,
        "exchanged_weights": sum(differ.values()),
        "exchanged_by_layer": differ,
    }


def compare_images(settings: Testing, denoiser: Denoiser, models: dict[str, UNet]) -> dict[str, Any]:
    """Draws images with each model from the same noise, and scores them."""
    images = denoiser.images(settings.dataset)
    real = judged_on(denoiser, settings.dataset)[0]
    epochs, folder = settings.classifier_epochs, settings.output_dir
    judge = ImageJudge(images.train, len(images.classes), real, folder, epochs, settings.resamples)
    drawn = {name: draw(settings, denoiser, unet) for name, unet in models.items()}
    rows = torch.cat([as_bytes(each[: settings.shown]) for each in drawn.values()])
    save_grid(rows, settings.output_dir / "samples.png", min(settings.shown, settings.count))
    return {name: judge.scores(each) for name, each in drawn.items()}


def draw(settings: Testing, denoiser: Denoiser, unet: UNet) -> torch.Tensor:
    parts = []
    for first in range(0, settings.count, settings.batch_size):
        count = min(settings.batch_size, settings.count - first)
        parts.append(denoiser.draw(unet, count, settings.sampling_steps, settings.seed + first))
    return torch.cat(parts)


def show(result: dict[str, Any]) -> None:
    loss, images = result["loss"], result["images"]
    print(f"\n{'':10}{'loss':>9}{'FID':>9}{'KID':>9}   against the initial mask (95 %, paired)")
    for name in images:
        scores = "".join(f"{images[name][each]['value']:9.4g}" for each in ("fid", "kid"))
        said = ""
        if name not in ("dense", "initial"):
            low, high = loss[name]["interval"]
            said = f"   {loss[name]['above']:+.4f} ({low:+.4f} to {high:+.4f}), {loss[name]['relative']:+.1%}"
        print(f"{name:10}{loss[name]['loss']:9.4f}{scores}{said}")
    print(f"{loss['share_of_gap']:.0%} of the gap between the initial mask and the dense model is closed")
    found = result["sparsity"]
    print(
        f"{found['of_masked']:.1%} of the weights in {found['layers']} layers dropped, {found['of_model']:.1%} of all"
    )
    speed = result["latency"]
    for name, took in speed["milliseconds"].items():
        print(f"{speed['images']} images, {name}: {took:.1f} ms, {speed['times_faster'][name]:.2f}x dense")
    if speed["given_back"]:
        print("compressed, it was not faster than dense, so its layers are plain again")


if __name__ == "__main__":
    run_command(main, Testing, __doc__)
