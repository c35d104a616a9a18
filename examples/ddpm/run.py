"""Trains a diffusion model, draws images by it, evaluates and prunes it; all figures are in result.json at the end.

    python examples/ddpm/run.py                    # digits where MNIST is found, else shapes; minutes on two cores
    python examples/ddpm/run.py --short            # a rehearsal with little training
    python examples/ddpm/run.py --data FOLDER      # images at FOLDER/CLASS/NAME.png

After a kill, the same command goes on. Each part is also a command with more options:
train.py, sample.py, evaluate.py, prune.py.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
import prune
import sample
import train
import tyro
from config import Config, Sampling


@dataclass
class Settings:
    out: Path | None = None  # None is examples/ddpm/out, or short/ in it
    data: str = "auto"
    epoch: int | None = None
    w: float = 1.8  # guidance
    count: int = 1000  # images to draw and to compare
    seed: int = 0
    short: bool = False


def main(settings: Settings) -> dict[str, Any]:
    short = settings.short
    out = settings.out or Path(__file__).parent / "out" / ("short" if short else "")
    folder = out / "train"
    size = {"epoch": 1, "held_out": 0.8, "channel": 8, "channel_mult": (1, 2)} if short else {"epoch": settings.epoch}
    count = 100 if short else settings.count
    config = Config(save_dir=folder, data=settings.data, seed=settings.seed, w=settings.w, **size)
    sampling = Sampling(save_dir=folder, count=count, seed=settings.seed, w=settings.w)
    evaluation = evaluate.Evaluation(folder, classifier_epochs=3 if short else 6, resamples=10 if short else 50)

    parts: dict[str, Callable[[], Any]] = {
        "train": lambda: train.main(config),
        "sample": lambda: sample.main(sampling),
        "evaluate": lambda: evaluate.main(evaluation),
        "prune": lambda: prune.main(prune.Pruning(folder, seed=settings.seed, w=settings.w, short=short)),
    }
    seconds: dict[str, float] = {}
    for name, part in parts.items():
        print(f"\n{name}")
        start = time.monotonic()
        part()
        seconds[name] = round(time.monotonic() - start, 1)
        print(f"  {seconds[name]:.0f} s")
    result = {
        "seconds": seconds,
        "train": json.loads((folder / "result.json").read_text("utf-8")),
        "evaluate": json.loads((folder / "samples" / "evaluation.json").read_text("utf-8")),
        "prune": json.loads((folder / "prune" / "result.json").read_text("utf-8")),
    }
    path = out / "result.json"
    path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    show(result)
    print(f"\nThe figures are in {path}, and the images in {folder / 'samples'}")
    return result


def show(result: dict[str, Any]) -> None:
    trained, found = result["train"], result["evaluate"]
    print(
        f"\n{trained['weights']:,} weights, {trained['steps']} steps, {trained['images']} images: {trained['source']}"
    )
    print(f"loss {trained['loss']:.4f}; recognized as asked: {found['recognized_as_asked']:.1%}")
    print(f"the classifier on real held-out images: {found['classifier_accuracy_on_real']:.1%}")
    for who in ("generated", "real"):
        for metric, score in found[who].items():
            low, high = score["interval"]
            print(
                f"{metric.upper()} of {who} images {score['value']:.4g} ({low:.4g} to {high:.4g}), n = {score['n']}, "
                f"{score['extractor']} {score['digest'][:8]}"
            )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
