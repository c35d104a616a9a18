"""Evaluates generated images: whether they are what was asked for, and how far they are from real ones.

    python examples/ddpm/evaluate.py --save-dir out/train

A classifier that was trained on the real training images recognizes classes, and its last hidden layer is the extractor
of FID and KID, which are measured against held-out images at the same number of images. As a scale, the same is
measured for real training images. ``--inception FILE`` takes the Inception network of published FIDs instead.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from classifier import predicted, trained_classifier
from config import config_of
from data import load, scaled
from safetensors.torch import load_file
from torch import Tensor

from sparsekit.evaluate import ImageFeatures, fid, image_features, inception, kid


@dataclass
class Evaluation:
    save_dir: Path  # the folder of the run
    samples: Path | None = None  # what sample.py wrote; None is samples/samples.safetensors in the folder of the run
    inception: Path | None = None  # weights of the Inception network
    classifier_epochs: int = 6
    resamples: int = 50  # for the intervals of FID and KID


def main(settings: Evaluation) -> dict[str, Any]:
    """Returns the figures, which it also writes to evaluation.json beside the samples."""
    config = config_of(settings.save_dir)
    images = load(config.data, config.img_size, config.held_out)
    path = settings.samples or settings.save_dir / "samples" / "samples.safetensors"
    if not path.exists():
        raise SystemExit(f"{path} is missing: sample.py writes it")
    drawn = load_file(path)
    model = trained_classifier(settings.save_dir, images.train, len(images.classes), settings.classifier_epochs)
    held_out, labels = images.held_out
    result: dict[str, Any] = {"classifier_accuracy_on_real": share(predicted(model, held_out) == labels)}
    if config.conditional:
        right = predicted(model, drawn["images"]) == drawn["labels"]
        by_class = {name: share(right[drawn["labels"] == index]) for index, name in enumerate(images.classes)}
        result |= {"recognized_as_asked": share(right), "recognized_by_class": by_class}

    extractor = inception(settings.inception) if settings.inception else model.features
    name = "Inception v3" if settings.inception else "features of the classifier"

    def features(images: Tensor) -> ImageFeatures:
        batches = images.split(500)
        as_taken = ((each.expand(-1, 3, -1, -1) if settings.inception else scaled(each)) for each in batches)
        return image_features(as_taken, extractor, name=name)

    count = min(len(drawn["images"]), len(held_out), len(images.train[0]))
    real = features(held_out[:count])
    for who, others in (("generated", drawn["images"]), ("real", images.train[0])):
        found = features(others[:count])
        result[who] = {
            each.metric: asdict(each)
            for each in (score(real, found, resamples=settings.resamples) for score in (fid, kid))
        }
    path.with_name("evaluation.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    return result


def share(right: Tensor) -> float:
    return right.float().mean().item() if len(right) else float("nan")


if __name__ == "__main__":
    print(json.dumps(main(tyro.cli(Evaluation, description=__doc__)), indent=2))
