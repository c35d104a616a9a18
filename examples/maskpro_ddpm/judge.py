"""How models differ: their losses on the same images and noise, and how far their images are from real ones."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ddpm_parts import Part, as_bytes, predicted, scaled, trained_classifier
from torch import Tensor

from sparsekit.evaluate import ImageFeatures, fid, image_features, kid


def compared(losses: Tensor, others: Tensor) -> dict[str, Any]:
    """Compares the losses of two models on the same images.

    Returns:
        The mean loss; how much it is above the other's, with a 95 % interval; the same as a share of the other's; and
        the probability of so large a difference by chance, from the paired differences.
    """
    more = losses - others
    mean, error = more.mean().item(), (more.std() / len(more) ** 0.5).item()
    chance = math.erfc(abs(mean) / error / 2**0.5) if error > 0 else 1.0
    return {
        "loss": losses.mean().item(),
        "above": mean,
        "interval": [mean - 1.96 * error, mean + 1.96 * error],
        "relative": mean / others.mean().item(),
        "chance": chance,
        "images": len(losses),
    }


class ImageJudge:
    """FID, KID and a classifier, which is trained on real images and stored in a folder.

    Args:
        part: images and labels that the classifier is trained on.
        classes: how many classes they have.
        real: the images that drawn ones are compared with, on which nothing was trained or chosen.
        folder: where the classifier is stored.
        epochs: those of the classifier.
        resamples: for the intervals.
    """

    def __init__(self, part: Part, classes: int, real: Tensor, folder: Path, epochs: int, resamples: int) -> None:
        self.classifier = trained_classifier(folder, part, classes, epochs)
        self.real, self.resamples = real, resamples

    def scores(self, drawn: Tensor) -> dict[str, Any]:
        """Returns FID and KID of images in [-1, 1], and how many the classifier takes for each class."""
        found = as_bytes(drawn)
        count = min(len(found), len(self.real))
        real, generated = self._features(self.real[:count]), self._features(found[:count])
        kinds = torch.bincount(predicted(self.classifier, found), minlength=self.classifier.last.out_features)
        scores = {
            each.metric: asdict(each)
            for each in (score(real, generated, resamples=self.resamples) for score in (fid, kid))
        }
        return {**scores, "classes": kinds.tolist()}

    def _features(self, images: Tensor) -> ImageFeatures:
        batches = (scaled(each) for each in images.split(500))
        return image_features(batches, self.classifier.features, name="features of the classifier")
