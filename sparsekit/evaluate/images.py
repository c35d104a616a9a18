"""FID and KID of generated images, with all that a figure needs to be compared with another one.

::

    real = image_features(real_batches, extractor)
    score = fid(real, image_features(generated_batches, extractor))

FID falls with the number of images even if they are as good as before (of two sets from one 64-dimensional normal
distribution it is 22 at 100 images and 1.1 at 2000), so a score holds that number, and is not compared with one at
another number. It holds the extractor as well, by its name and by a digest of its weights.
"""

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._batches import evaluating
from .._digest import digest, digest_modules, digest_tensors

INSTALL = "pip install 'sparsekit-kernels[systems]'"
KID_SUBSET = 5000  # images whose kernel matrices, n^2 numbers each, are in memory at once


@dataclass(frozen=True)
class ImageFeatures:
    """The features of a set of images.

    Args:
        values: float64 ``[images, features]`` on the CPU.
        extractor: the name of what computed them.
        digest: the digest of its structure and weights.
    """

    values: Tensor
    extractor: str
    digest: str


@dataclass(frozen=True)
class ImageScore:
    """The distance between generated and real images, lower is better.

    Args:
        metric: ``"fid"`` or ``"kid"``.
        value: the distance.
        interval: 95 % interval of the value at this number of images: the value plus and minus 1.96 standard deviations
            over bootstrap resamples of both sets; None if there were none. It is centered on the value, because
            resamples, which have images twice, are farther apart than the sets.
        n: the number of generated images.
        n_real: the number of real images.
        extractor: the name of the extractor.
        digest: the digest of the extractor.
    """

    metric: Literal["fid", "kid"]
    value: float
    interval: tuple[float, float] | None
    n: int
    n_real: int
    extractor: str
    digest: str

    def minus(self, other: "ImageScore") -> float:
        """Returns how much larger this score is than another one, which must have been measured in the same way.

        Raises:
            ValueError: metric, number of images or extractor differ.
        """
        for name in ("metric", "n", "n_real", "digest"):
            if (mine := getattr(self, name)) != (theirs := getattr(other, name)):
                raise ValueError(f"scores of different {name} cannot be compared: {mine} and {theirs}")
        return self.value - other.value


def image_features(images: Iterable[Tensor], extractor: nn.Module, *, name: str | None = None) -> ImageFeatures:
    """Computes the features of images.

    Args:
        images: batches as the extractor takes them; they are moved to its device.
        extractor: a module that returns ``[batch, features]``; it is run in evaluation mode without gradients or the
            caller's autocast, and then has its modes back. More dimensions are flattened.
        name: a name for the scores; None takes that of the class.

    Raises:
        ValueError: there are no images, or features are not finite.
    """
    where = next(iter(extractor.parameters()), torch.empty(0, device="cpu")).device

    def features(batch: Tensor) -> Tensor:
        with torch.autocast(where.type, enabled=False):  # of the caller, which the digest does not know
            found: Tensor = extractor(batch.to(where))
        return found.flatten(1).to("cpu", torch.float64)

    with evaluating(extractor):
        parts = [features(batch) for batch in images]
    if not sum(map(len, parts)):
        raise ValueError("there are no images to compute features of")
    values = torch.cat(parts)
    if not values.isfinite().all():
        raise ValueError(f"features must be finite, got {int((~values.isfinite()).sum())} that are not")
    what = digest([digest_modules(extractor), digest_tensors(extractor)])
    return ImageFeatures(values, type(extractor).__name__ if name is None else name, what)


def inception(weights: str | os.PathLike[str]) -> nn.Module:
    """Returns the Inception v3 network of published FIDs, with weights from a file, for uint8 images of 3 channels.

    Args:
        weights: ``weights-inception-2015-12-05-6726825d.pth``, which torch-fidelity offers for download.

    Raises:
        ImportError: torch-fidelity is not installed.
    """
    try:
        import torch_fidelity  # type: ignore[import-not-found]  # noqa: F401
        from torchmetrics.image.fid import NoTrainInceptionV3
    except ImportError as error:
        raise ImportError("the Inception network needs torch-fidelity and torchvision: pip install both") from error
    network: nn.Module = NoTrainInceptionV3("inception-v3-compat", ["2048"], os.fspath(weights))
    return network


def fid(real: ImageFeatures, generated: ImageFeatures, *, resamples: int = 100, seed: int = 0) -> ImageScore:
    """Computes the Fréchet distance between normal distributions that are fitted to the features, by torchmetrics.

    Args:
        real: features of at least 2 real images; more images than features make it less noisy.
        generated: features of generated images, by the same extractor.
        resamples: bootstrap resamples for the interval; 0 leaves it out.
        seed: what the resamples are drawn from.

    Raises:
        ValueError: the extractors differ, or there are too few images.
        ImportError: torchmetrics is not installed.

    Source: Heusel et al., 2017, https://arxiv.org/abs/1706.08500.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ImportError(f"FID needs torchmetrics, without torch-fidelity or with torchvision: {INSTALL}") from error
    with torch.device("cpu"):  # whatever the default device is
        metric = FrechetInceptionDistance(_Given(real), sync_on_compute=False)
    return _score("fid", lambda *sets: float(_compute(metric, *sets)), real, generated, resamples, seed)


def kid(real: ImageFeatures, generated: ImageFeatures, *, resamples: int = 100, seed: int = 0) -> ImageScore:
    """Computes the squared distance of kernel means, which unlike FID has no bias at few images, by torchmetrics.

    The kernel is the usual cubic one. All images are taken at once up to 5000, and subsets of 5000 beyond.

    Args:
        real: features of at least 2 real images.
        generated: features of generated images, by the same extractor.
        resamples: bootstrap resamples for the interval; 0 leaves it out.
        seed: what the resamples and subsets are drawn from.

    Raises:
        ValueError: the extractors differ, or there are too few images.
        ImportError: torchmetrics is not installed.

    Source: Binkowski et al., 2018, https://arxiv.org/abs/1801.01401.
    """
    try:
        from torchmetrics.image.kid import KernelInceptionDistance
    except ImportError as error:
        raise ImportError(f"KID needs torchmetrics, without torch-fidelity or with torchvision: {INSTALL}") from error
    smaller = min(len(real.values), len(generated.values))
    subset = max(1, min(smaller, KID_SUBSET))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # says that features are kept
        metric = KernelInceptionDistance(
            _Given(real), subsets=max(1, smaller // subset), subset_size=subset, sync_on_compute=False
        )
    return _score("kid", lambda *sets: float(_compute(metric, *sets)[0]), real, generated, resamples, seed)


class _Given(nn.Module):
    """The extractor of features that are given."""

    def __init__(self, features: ImageFeatures) -> None:
        super().__init__()
        self.num_features = features.values.shape[1]

    def forward(self, features: Tensor) -> Tensor:
        return features


def _compute(metric: Any, real: Tensor, generated: Tensor) -> Any:
    metric.reset()
    metric.update(real, real=True)
    metric.update(generated, real=False)
    return metric.compute()


def _score(
    metric: Literal["fid", "kid"],
    compute: Callable[[Tensor, Tensor], float],
    real: ImageFeatures,
    generated: ImageFeatures,
    resamples: int,
    seed: int,
) -> ImageScore:
    if real.digest != generated.digest:
        said = f"{real.extractor} {real.digest} and {generated.extractor} {generated.digest}"
        raise ValueError(f"real and generated features must be of the same extractor, got {said}")
    sets = real.values, generated.values
    if min(map(len, sets)) < 2:
        raise ValueError(f"at least 2 real and 2 generated images are needed, got {len(sets[0])} and {len(sets[1])}")
    generator = torch.Generator("cpu").manual_seed(seed)

    def resample(values: Tensor) -> Tensor:
        return values[torch.randint(len(values), (len(values),), generator=generator, device="cpu")]

    with (
        torch.device("cpu"),
        torch.random.fork_rng(devices=[]),
    ):  # torchmetrics draws its subsets from the global random state
        torch.manual_seed(seed)
        value = compute(*sets)
        drawn = torch.tensor([compute(*map(resample, sets)) for _ in range(resamples)], dtype=torch.float64)
    half = 1.96 * float(drawn.std()) if resamples > 1 else None
    interval = None if half is None else (value - half, value + half)
    return ImageScore(metric, value, interval, len(sets[1]), len(sets[0]), generated.extractor, generated.digest)
