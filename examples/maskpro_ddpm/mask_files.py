"""The file of masks of a folder, a bit for each weight, and models that have its masks."""

import copy
import hashlib
from pathlib import Path

import torch
from models import UNet
from torch import Tensor, nn

import sparsekit as sk
from sparsekit.masks import get_mask, remove_mask

FILE = "masks.safetensors"


def masks_of(unet: nn.Module) -> dict[str, Tensor]:
    """Returns the stored masks of a model by the names of its layers."""
    found = {name: get_mask(module) for name, module in unet.named_modules()}
    return {name: mask for name, mask in found.items() if mask is not None}


def write_masks(unet: nn.Module, folder: Path) -> Path:
    """Writes the stored masks of a model to the file of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE
    sk.save(unet, path, format="masks")
    return path


def digests(dense: nn.Module, masked: nn.Module) -> dict[str, str]:
    """Returns SHA-256 digests of the weights of a model and of the masks of another, for the config of a run."""

    def of(tensors: dict[str, Tensor]) -> str:
        sha = hashlib.sha256()
        for name in sorted(tensors):
            tensor = tensors[name].detach().cpu()
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            sha.update(tensor.flatten().view(torch.uint8).numpy())
        return sha.hexdigest()

    return {"model": of(dense.state_dict()), "masks": of(masks_of(masked))}


def masked_copy(dense: UNet, folder: Path, targets: tuple[str, ...] | None = None, *, learned: bool = False) -> UNet:
    """Returns a copy of a dense model with the masks of a folder: stored, and its dropped weights zero.

    Args:
        dense: the model.
        folder: what ``write_masks`` wrote to.
        targets: the parts that are masked, as ``settings.in_targets`` has them; None masks all.
        learned: whether train_diffusion.py writes the masks, for the error where they are missing.
    """
    path = folder / FILE
    if not path.exists():
        written = (
            f"train_diffusion.py --out {folder.parent}" if learned else f"get_mask_diffusion.py --output_dir {folder}"
        )
        raise SystemExit(f"{path} is missing: {written} writes it")
    masked = copy.deepcopy(dense)
    with torch.no_grad():
        for weight in masked.parameters():
            weight.zero_()  # what a mask drops must be zero where it is loaded
        try:
            sk.load(masked, path)
        except ValueError as error:
            raise SystemExit(
                f"{error}: it is of another model, so run get_mask_diffusion.py again, or name the model by "
                "--original_model"
            ) from error
        masked.load_state_dict(dense.state_dict())
        for name, module in masked.named_modules():
            if (mask := get_mask(module)) is None:
                continue
            if in_targets(name, targets):
                module.weight.mul_(mask)
            else:
                remove_mask(module)
    return masked.requires_grad_(False)


def in_targets(name: str, targets: tuple[str, ...] | None) -> bool:
    """Returns whether a layer is one of the targets or in one; ``all`` are all layers."""
    return targets is None or any(each == "all" or f"{name}.".startswith(f"{each}.") for each in targets)
