"""The losses of the initial mask, batch by batch, and the file that they are kept in."""

from pathlib import Path

import numpy as np
from noisy import NoisyBatches, loss
from torch import nn
from tqdm import tqdm

CLOSE = 1e-3  # relative difference of the same losses in two processes


def baseline_path(folder: Path, dataset: str, batches: NoisyBatches) -> Path:
    """Returns the file, named as published."""
    return folder / f"inference_loss_diffusion_{dataset}_bs{batches.batch_size}_size{len(batches)}.npy"


def measure(unet: nn.Module, batches: NoisyBatches) -> np.ndarray:
    """Computes the loss of a masked model on each batch, in evaluation mode."""
    unet.eval()
    bar = tqdm(range(len(batches)), "losses of the initial mask", leave=False, disable=None)
    return np.array([loss(unet, batches[index]).item() for index in bar])


def read(path: Path, masked: nn.Module | None, batches: NoisyBatches) -> np.ndarray:
    """Reads the file; if a masked model is given, measures that and writes the file where it is missing or of another.

    Whether the file is of this model is decided by the number of losses and that of the first batch.
    """
    if path.exists():
        losses = np.load(path, allow_pickle=False)
        if masked is None or _fits(losses, masked, batches):
            return losses
        print(f"{path} is of another model, mask or seed: its losses are measured again")
    elif masked is None:
        known = ", ".join(sorted(each.name for each in path.parent.glob("*.npy"))) or "none"
        raise SystemExit(
            f"{path} is missing: run inference_loss_diffusion.py with the same --dataset_size, --batch_size, "
            f"--max_batches and --targets, or pass --measure_baseline (there are: {known})"
        )
    return write(path, measure(masked, batches))


def _fits(losses: np.ndarray, masked: nn.Module, batches: NoisyBatches) -> bool:
    if losses.shape != (len(batches),):
        return False
    masked.eval()
    return bool(np.isclose(loss(masked, batches[0]).item(), losses[0], rtol=CLOSE))


def write(path: Path, losses: np.ndarray) -> np.ndarray:
    """Writes the file and a summary beside it; returns the losses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, losses)
    said = f"{len(losses)} batches: mean {losses.mean():.6f}, deviation {losses.std():.6f}, "
    said += f"from {losses.min():.6f} to {losses.max():.6f}"
    path.with_name(f"{path.stem}_summary.txt").write_text(said + "\n", "utf-8")
    return losses


def check(path: Path, losses: np.ndarray, turn: int, found: float) -> None:
    """Ends the script if the initial mask has another loss on the batch of a turn than in the file."""
    index = turn % len(losses)
    if not np.isclose(found, losses[index], rtol=CLOSE):
        raise SystemExit(
            f"{path} has the loss {losses[index]:.6g} for batch {index}, and the initial mask has {found:.6g}: the "
            "file is of another model, mask, seed or --targets: run inference_loss_diffusion.py again, or pass "
            "--measure_baseline"
        )
