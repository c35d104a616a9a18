"""Pictures: a grid of images, and the curve of the loss."""

import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

SCALE = 2  # pixels of a picture for each of an image


def save_grid(images: Tensor, path: Path, nrow: int) -> None:
    """Writes uint8 images ``[n, channels, height, width]`` in rows of ``nrow``."""
    count, channels, height, width = images.shape
    rows = -(-count // nrow)
    grid = torch.zeros(channels, rows * height, nrow * width, dtype=torch.uint8)
    for index, image in enumerate(images):
        y, x = index // nrow * height, index % nrow * width
        grid[:, y : y + height, x : x + width] = image
    values = grid[0] if channels == 1 else grid.permute(1, 2, 0)
    picture = Image.fromarray(values.contiguous().numpy())
    picture.resize((picture.width * SCALE, picture.height * SCALE), Image.Resampling.NEAREST).save(path, optimize=True)


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Reads what a run recorded."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def draw_losses(records: list[dict[str, Any]], path: Path) -> list[float]:
    """Draws the loss and the norm of the gradient over the steps; returns the losses."""
    records = [record for record in records if "loss" in record]
    steps = [record["step"] for record in records]
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for each, name in zip(figure.subplots(1, 2), ("loss", "grad_norm"), strict=True):
        values = [record[name] for record in records]
        windows = [values[max(0, end - 50) : end] for end in range(1, len(values) + 1)]
        each.plot(steps, values, color="#c9d3e3", linewidth=0.8)
        each.plot(steps, [sum(window) / len(window) for window in windows], color="#2f5d9b")
        each.set(xlabel="step", ylabel=name.replace("_", " "), yscale="log")
    figure.savefig(path, dpi=100)
    return [record["loss"] for record in records]
