"""Prunes a trained diffusion model to 2:4 by several methods, fine-tunes each, and runs the best one compressed.

    python examples/ddpm/prune.py --save-dir out/train                                        # after train.py
    python examples/ddpm/prune.py --save-dir out/train --steps 1000 --out out/prune-longer    # fine-tunes longer
    python examples/ddpm/prune.py --save-dir out/train --methods wanda sparsegpt --pattern 50% --out out/prune-half

All methods begin with the trained weights and are fine-tuned by the same batches with their masks kept. So is the dense
model, for a fair comparison. Losses are those of held-out images, at the same timesteps and with the same noise for
all. Images are drawn by the trained model and by the best pruned one, from the same noise. Each method has a run of its
own in the folder; after a kill, the same command goes on.
"""

import copy
import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import evaluate
import sample
import torch
import torch.nn.functional as F
import tyro
from config import Config, Sampling, config_of, device_of
from data import Batches, Images, load, scaled
from diffusers import UNet2DModel
from model import Eps, load_unet, new_unet
from speed import compress_and_time
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm
from trainer import draw

import sparsekit as sk
from sparsekit.masks import get_mask
from sparsekit.prune import Method
from sparsekit.runs import Run

METHODS = ("random", "magnitude", "wanda", "taylor", "diff-pruning", "sparsegpt")
SAVE_EVERY = 50  # steps
Noisy = tuple[dict[str, Tensor | None], Tensor]  # the arguments of the UNet, and the noise that it is to predict


@dataclass
class Pruning:
    """What prune.py takes."""

    save_dir: Path  # the folder of the run that has trained the model
    out: Path | None = None  # None is prune/ in that folder; other settings take another folder
    methods: tuple[str, ...] = METHODS
    pattern: str = "2:4"
    calibration: int = 256  # training images that Wanda, SparseGPT and Taylor see, each at one timestep
    timesteps: int = 25  # evenly spread, at which Diff-Pruning sees 32 images
    share: float = 0.05  # of the largest loss, below which Diff-Pruning leaves a timestep out
    steps: int = 60  # of fine-tuning
    rate: float = 1e-3  # the learning rate that fine-tuning begins with
    held_out: int = 1000  # images to measure the loss on
    count: int = 250  # images to draw
    w: float = 1.8  # guidance
    resamples: int = 50  # for the intervals of FID and KID
    classifier_epochs: int = 6
    timed_batch: int = 32  # images in the pass that is timed
    seconds: float = 4.0  # for which passes are timed
    published: bool = False  # also times the UNet of the published widths, with random weights, in about a minute
    device: str = "auto"
    seed: int = 0
    short: bool = False  # the same with little of everything, to try it

    def __post_init__(self) -> None:
        if unknown := set(self.methods) - set(METHODS):
            raise SystemExit(f"--methods are {', '.join(METHODS)}, got {', '.join(sorted(unknown))}")
        self.out = self.out or self.save_dir / "prune"
        if self.short:
            self.calibration, self.timesteps, self.steps, self.held_out, self.count = 32, 5, 5, 64, 20
            self.resamples, self.classifier_epochs, self.timed_batch, self.seconds = 5, 1, 4, 0.5

    def of_run(self) -> dict[str, Any]:
        """Returns what the runs of the methods depend on."""
        names = ("pattern", "calibration", "timesteps", "share", "steps", "rate", "held_out", "seed")
        return {name: getattr(self, name) for name in names}


class Pruner:
    """The trained model, the images, and what all methods are given and measured by."""

    def __init__(self, settings: Pruning) -> None:
        self.settings = settings
        self.config = replace(config_of(settings.save_dir), seed=settings.seed + 1)  # other noise than in training
        self.device = device_of(settings.device)
        self.images: Images = load(self.config.data, self.config.img_size, self.config.held_out)
        self.dense = load_unet(settings.save_dir / "model").to(self.device)
        self.held_out = self.noisy(self.images.held_out, settings.held_out)
        self.calibration = self.noisy(self.images.train, settings.calibration)
        self.losses: dict[str, Tensor] = {}  # of the dense model: of each held-out image, before and after tuning

    def noisy(self, part: tuple[Tensor, Tensor], count: int, t: int | None = None, batch: int = 32) -> list[Noisy]:
        """Returns batches of images with noise, each image at a timestep of its own, or all at ``t``."""
        x, labels = scaled(part[0][:count]), part[1][:count] + 1
        generator = torch.Generator().manual_seed(self.settings.seed)
        drawn = torch.randint(self.config.T, (len(x),), generator=generator)
        steps = drawn if t is None else torch.full_like(drawn, t)
        noise = torch.randn(x.shape, generator=generator)
        every = (self.config.diffusion().q_sample(x, steps, noise), steps, labels, noise)
        return [
            ({"sample": x, "timestep": t, "class_labels": labels if self.config.conditional else None}, noise)
            for x, t, labels, noise in zip(*(each.to(self.device).split(batch) for each in every), strict=True)
        ]

    def method(self, name: str) -> Method:
        """Returns a method, with its scores where it prunes by scores."""
        pattern = self.settings.pattern
        if plain := {"magnitude": sk.Magnitude, "wanda": sk.Wanda, "sparsegpt": sk.SparseGPT}.get(name):
            return plain(pattern)
        if name == "taylor":
            return sk.Scores(pattern, sk.taylor_scores(self.dense, loss, self.calibration, progress=bar(name)))
        if name == "diff-pruning":
            spread = range(0, self.config.T, max(1, self.config.T // self.settings.timesteps))
            batches = [self.noisy(self.images.train, 32, t)[0] for t in spread]
            options = {"share": self.settings.share, "progress": bar(name)}
            return sk.Scores(pattern, sk.diff_pruning_scores(self.dense, loss, batches, **options))
        generator = torch.Generator().manual_seed(self.settings.seed)
        weights = self.dense.named_parameters()
        return sk.Scores(pattern, {name: torch.rand(each.shape, generator=generator) for name, each in weights})

    def run(self, name: str) -> dict[str, Any]:
        """Prunes a copy of the trained model by a method and fine-tunes it; ``"dense"`` is fine-tuned alone."""
        unet = copy.deepcopy(self.dense)
        folder = self.settings.out / name
        with Run.open(folder, {"method": name, **self.settings.of_run()}, steps=self.settings.steps) as run:
            if run.result is None:
                result: dict[str, Any] = {}
                if name != "dense":
                    inputs = [inputs for inputs, _ in self.calibration]
                    report = sk.prune_(unet, self.method(name), inputs, progress=bar(f"prune by {name}"))
                    result = {"sparsity": report.sparsity, "seconds": report.seconds, "layer_error": report.error}
                result["pruned"] = self.compared(unet, "trained")
                self.finetune(run, unet)
                sk.save(unet, folder / "model.safetensors")
                run.finish({**result, "tuned": self.compared(unet, "tuned")})
            elif name == "dense":
                for which, path in (("trained", None), ("tuned", folder / "model.safetensors")):
                    if path:
                        sk.load(unet, path)
                    self.compared(unet, which)
            return run.result

    def compared(self, unet: nn.Module, to: str) -> dict[str, Any]:
        """Returns the loss, and how much larger it is than the dense one on the same images, with a 95 % interval."""
        unet.eval()
        with torch.no_grad():
            parts = [(unet(**inputs).sample - noise).square().flatten(1).mean(1) for inputs, noise in self.held_out]
        losses = torch.cat(parts).double().cpu()
        more = losses - self.losses.setdefault(to, losses)
        half = 1.96 * more.std().item() / len(more) ** 0.5
        mean = more.mean().item()
        return {"loss": losses.mean().item(), "more_than_dense": mean, "interval": [mean - half, mean + half]}

    def finetune(self, run: Run, unet: UNet2DModel) -> None:
        """Trains all weights that the masks keep, in a run that goes on where it was killed."""
        config, data, steps = self.config, Batches(self.images.train), self.settings.steps
        optimizer = torch.optim.AdamW(unet.parameters(), self.settings.rate, weight_decay=0.0)
        schedule = CosineAnnealingLR(optimizer, steps)
        run.restore(model=unet, optimizer=optimizer, schedule=schedule)
        epochs = -(-steps // (len(data) // config.batch_size))
        batches = run.batches(len(data), config.batch_size, epochs=epochs, seed=self.settings.seed)
        unet.train()
        masked = any(get_mask(module) is not None for module in unet.modules())
        with sk.keep_masks(unet, optimizer) if masked else nullcontext():
            todo = islice(batches, steps - run.step)
            for indices in tqdm(todo, "fine-tune", steps, initial=run.step, leave=False, disable=None):
                x, labels = (each.to(self.device) for each in data[indices])
                t, noise, kept = (each.to(self.device) for each in draw(config, run.step, x.shape[1:]))
                given = labels * kept if config.conditional else None
                with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    error = config.diffusion().loss(Eps(unet), x, given, t=t, noise=noise)
                optimizer.zero_grad()
                error.backward()
                nn.utils.clip_grad_norm_(unet.parameters(), config.grad_clip)
                optimizer.step()
                schedule.step()
                run.record(loss=error.item())
                if run.step % SAVE_EVERY == 0:
                    run.save()


def loss(unet: nn.Module, batch: Noisy) -> Tensor:
    inputs, noise = batch
    return F.mse_loss(unet(**inputs).sample, noise)


def bar(what: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    return partial(tqdm, desc=what, leave=False, disable=None)


def main(settings: Pruning) -> dict[str, Any]:
    """Returns all figures, which it also writes to result.json in the folder."""
    pruner, out = Pruner(settings), settings.out
    result = {name: pruner.run(name) for name in ("dense", *settings.methods)}
    best = min(settings.methods, key=lambda name: result[name]["tuned"]["loss"])
    pruned = copy.deepcopy(pruner.dense)
    sk.load(pruned, out / best / "model.safetensors")
    pruned.save_pretrained(out / "model")  # as diffusers has it, dense with zeros
    found: dict[str, Any] = {"methods": result, "best": best, "images": {}}
    for name, model in (("trained", settings.save_dir / "model"), (best, out / "model")):
        drawing = {each: getattr(settings, each) for each in ("count", "w", "device", "seed")}
        path = sample.main(Sampling(settings.save_dir, model, out / "samples" / name, **drawing))
        options = {"classifier_epochs": settings.classifier_epochs, "resamples": settings.resamples}
        found["images"][name] = evaluate.main(evaluate.Evaluation(settings.save_dir, path, **options))
    inputs = pruner.noisy(pruner.images.held_out, settings.timed_batch, batch=settings.timed_batch)[0][0]
    compressed, found["latency"] = compress_and_time(pruner.dense.eval(), pruned.eval(), inputs, settings.seconds)
    sk.save(compressed, out / "compressed.safetensors")
    if settings.published:
        found["published"] = time_published(pruner.images, settings)
    (out / "result.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    show(found)
    return found


def time_published(images: Images, settings: Pruning) -> dict[str, Any]:
    """Times the published UNet for CIFAR-10 at one image with guidance: weights do not change what a pass takes."""
    config = Config(preset="cifar10-conditional")
    dense = new_unet(config, images).eval()
    pruned = copy.deepcopy(dense)
    sk.prune_(pruned, sk.Magnitude(settings.pattern), progress=bar("prune"))
    x, labels = torch.randn(2, images.channels, config.img_size, config.img_size), torch.tensor([1, 0])
    inputs = {"sample": x, "timestep": torch.tensor([10, 10]), "class_labels": labels}
    return compress_and_time(dense, pruned, inputs, settings.seconds)[1]


def show(found: dict[str, Any]) -> None:
    print(f"\n{'':14}{'pruned':>10}{'tuned':>10}   more than dense, tuned as long (95 %)")
    for name, row in found["methods"].items():
        more, (low, high) = row["tuned"]["more_than_dense"], row["tuned"]["interval"]
        compared = "" if name == "dense" else f"   {more:+.4f} ({low:+.4f} to {high:+.4f})"
        print(f"{name:14}{row['pruned']['loss']:10.4f}{row['tuned']['loss']:10.4f}{compared}")
    for name, row in found["images"].items():
        scores = [f"{each.upper()} {row['generated'][each]['value']:.4g}" for each in ("fid", "kid")]
        said = f", recognized as asked {row['recognized_as_asked']:.1%}" if "recognized_as_asked" in row else ""
        print(f"images of {name}: {', '.join(scores)}, n = {row['generated']['fid']['n']}{said}")
    for speed in (found["latency"], found.get("published")):
        if speed is None:
            continue
        for name, took in speed["milliseconds"].items():
            print(f"{speed['images']} images, {name}: {took:.1f} ms, {speed['times_faster'][name]:.2f}x dense")
        if speed["given_back"]:
            print("compressed, it was not faster than dense, so its layers are plain again")


if __name__ == "__main__":
    main(tyro.cli(Pruning, description=__doc__))
