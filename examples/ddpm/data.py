"""Images by class: MNIST, Fashion-MNIST, CIFAR-10, a folder, or shapes that are drawn here."""

import gzip
import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

LOCAL = Path(os.environ.get("SPARSEKIT_DATA") or Path(__file__).parents[3] / "shared" / "data")
HUB = {"mnist": "ylecun/mnist", "fashion_mnist": "zalando-datasets/fashion_mnist", "cifar10": "uoft-cs/cifar10"}
SHAPES = ("disc", "ring", "square", "frame", "diamond", "plus", "cross", "triangle", "bar", "column")
Part = tuple[Tensor, Tensor]  # uint8 images [n, channels, height, width], and int64 labels from 0


@dataclass(frozen=True)
class Images:
    """A data set: images to train on, others that only evaluation sees, and the names of the classes."""

    train: Part
    held_out: Part
    classes: tuple[str, ...]
    source: str

    @property
    def channels(self) -> int:
        return self.train[0].shape[1]


class Batches(Dataset):
    """Batches of images in [-1, 1] with labels from 1; an index is the list of indices of a whole batch."""

    def __init__(self, part: Part) -> None:
        self.images, self.labels = part

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: list[int]) -> Part:
        return scaled(self.images[indices]), self.labels[indices] + 1


def scaled(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def as_bytes(images: Tensor) -> Tensor:
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


@cache
def load(name: str, size: int, held_out: float) -> Images:
    """Loads a data set by its name or folder; ``auto`` is MNIST, or shapes where that cannot be reached.

    Of data without a test set, and of MNIST's if only that is there, a share is held out, the same in every run.
    """
    if name == "shapes":
        return _split(_shapes(6000, size), held_out, SHAPES, "shapes")
    if name == "auto":
        try:
            return load("mnist", size, held_out)
        except OSError as error:
            print(f"  {error}; synthetic shapes take its place")
            return load("shapes", size, held_out)
    folder, tar = LOCAL / name, LOCAL / name / "cifar10_jpg60k.tar.xz"
    if name in HUB and next(folder.glob("*-ubyte.gz"), None):
        parts, classes, source = [_idx(folder, each) for each in ("train", "t10k")], (), f"{name} from a folder"
    elif name in HUB and tar.exists():
        (*parts, classes), source = _pictures(_members(tar), size), f"{name}, JPEG files"
    elif name in HUB:
        (*parts, classes), source = _hub(name), HUB[name]
    elif Path(name).is_dir():
        (*parts, classes), source = _pictures(_files(Path(name)), size), name
    else:
        raise FileNotFoundError(f"data must be auto, shapes, {', '.join(HUB)} or a folder, got {name}")
    train, test = ((_resized(images, size), labels) for images, labels in parts)
    count = int(max(each[1].max() if len(each[1]) else 0 for each in (train, test))) + 1
    classes = tuple(classes) or tuple(map(str, range(count)))
    if len(train[0]) and len(test[0]):
        return Images(_shuffled(train), _shuffled(test), classes, source)
    return _split(train if len(train[0]) else test, held_out, classes, source)


def _split(part: Part, held_out: float, classes: tuple[str, ...], source: str) -> Images:
    images, labels = _shuffled(part)
    first = round(len(images) * (1 - held_out))
    return Images((images[:first], labels[:first]), (images[first:], labels[first:]), classes, source)


def _shuffled(part: Part) -> Part:
    """Returns images in an order that is always the same, in which the first n are a fair choice of all classes."""
    order = torch.randperm(len(part[0]), generator=torch.Generator().manual_seed(0))
    return part[0][order], part[1][order]


def _resized(images: Tensor, size: int) -> Tensor:
    if len(images) == 0 or images.shape[2:] == (size, size):
        return images
    small = [F.interpolate(each.float(), (size, size), mode="bilinear", antialias=True) for each in images.split(1000)]
    return torch.cat(small).round().clamp(0, 255).byte()


def _idx(folder: Path, which: str) -> Part:
    paths = [folder / f"{which}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    if not all(path.exists() for path in paths):
        return torch.empty(0, 1, 0, 0, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    images, labels = (
        np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=offset)
        for path, offset in zip(paths, (16, 8), strict=True)
    )
    return torch.tensor(images).view(len(labels), 1, 28, 28), torch.tensor(labels).long()


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile():
                yield member.name, archive.extractfile(member).read()


def _files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in {".png", ".jpg", ".jpeg", ".bmp", ".webp"}:
            yield path.relative_to(folder).as_posix(), path.read_bytes()


def _pictures(files: Iterator[tuple[str, bytes]], size: int) -> tuple[Part, Part, tuple[str, ...]]:
    """Decodes images at ``CLASS/NAME`` or ``train/CLASS/NAME`` and ``test/CLASS/NAME``."""
    found: dict[bool, list[tuple[str, Image.Image]]] = {False: [], True: []}
    for name, content in files:
        picture = Image.open(io.BytesIO(content))
        picture = picture if picture.size == (size, size) else picture.resize((size, size), Image.Resampling.BILINEAR)
        path = name.split("/")
        found["test" in path[:-2]].append((path[-2] if len(path) > 1 else "", picture))
    names = tuple(sorted({name for part in found.values() for name, _ in part}))
    gray = all(picture.mode in ("L", "1") for part in found.values() for _, picture in part)
    if not names:
        raise FileNotFoundError("the folder has no images at CLASS/NAME.png or .jpg")

    def part(test: bool) -> Part:
        pictures = [np.asarray(picture.convert("L" if gray else "RGB")) for _, picture in found[test]]
        labels = torch.tensor([names.index(name) for name, _ in found[test]], dtype=torch.int64)
        shape = (len(pictures), size, size, 1 if gray else 3)
        values = np.stack(pictures) if pictures else np.empty(shape, np.uint8)
        return torch.from_numpy(values).view(shape).permute(0, 3, 1, 2).contiguous(), labels

    return part(False), part(True), names


def _hub(name: str) -> tuple[Part, Part, tuple[str, ...]]:
    try:
        from datasets import load_dataset

        sets = load_dataset(HUB[name])
    except Exception as error:  # of many kinds, where there is no network
        raise FileNotFoundError(f"{name} is neither in {LOCAL} nor can it be downloaded") from error
    image, label = ("img" if "img" in sets["train"].features else "image"), "label"

    def part(which: str) -> Part:
        pictures = np.stack([np.asarray(each) for each in sets[which][image]])
        pictures = torch.from_numpy(pictures.reshape(*pictures.shape[:3], -1)).permute(0, 3, 1, 2).contiguous()
        return pictures, torch.tensor(sets[which][label])

    return part("train"), part("test"), tuple(sets["train"].features[label].names)


def _shapes(count: int, size: int) -> Part:
    """Draws white shapes of ten kinds on black, of random size at random places."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % len(SHAPES)
    radius, x, y = (
        torch.rand(3, count, 1, 1, generator=generator) * torch.tensor([0.12, 0.3, 0.3]).view(3, 1, 1, 1)
    ) + (torch.tensor([0.2, -0.15, -0.15]).view(3, 1, 1, 1))
    line = torch.linspace(-0.5, 0.5, size)
    a, b = (line.view(1, 1, -1) - x) / radius, (line.view(1, -1, 1) - y) / radius
    a, b = a.expand(-1, size, -1), b.expand(-1, -1, size)
    far, square, thin = (a * a + b * b).sqrt(), torch.maximum(a.abs(), b.abs()), 0.3
    kinds = (
        far - 1,
        (far - 0.8).abs() - 0.2,
        square - 0.85,
        (square - 0.75).abs() - 0.2,
        a.abs() + b.abs() - 1,
        torch.maximum(torch.minimum(a.abs(), b.abs()) - thin, square - 1),
        torch.maximum(torch.minimum((a - b).abs(), (a + b).abs()) - 1.4 * thin, square - 0.9),
        torch.maximum(b - 0.8, 2 * a.abs() - b - 1),
        torch.maximum(b.abs() - thin, a.abs() - 1),
        torch.maximum(a.abs() - thin, b.abs() - 1),
    )
    inside = torch.stack(kinds)[labels, torch.arange(count)] * radius * size  # the distance to the edge in pixels
    return ((0.5 - inside).clamp(0, 1) * 255).round().byte().unsqueeze(1), labels
