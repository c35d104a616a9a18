"""Files of tier maps: one safetensors file per model; its header has the shapes and sizes as JSON."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._json import parse_json
from .._safetensors import read_tensors, seal, write_tensors
from .tier_map import TierMap

KEY, VERSION = "sparsekit.tier_maps", 2


def save_tier_maps(tier_maps: Mapping[str, TierMap], path: str | os.PathLike[str]) -> None:
    """Writes the tier maps of a model to a file, whole or not at all, with a SHA-256 digest.

    Args:
        tier_maps: the maps by layer name.
        path: the file.

    Raises:
        OSError: the file cannot be written.
    """
    layers = {
        name: {"shape": tier_map.shape, "block": tier_map.block, "k": tier_map.k}
        for name, tier_map in tier_maps.items()
    }
    tensors = {name: tier_map.tiers.cpu().contiguous() for name, tier_map in tier_maps.items()}
    write_tensors(path, tensors, seal(json.dumps({"version": VERSION, "layers": layers}), tensors, KEY))


def load_tier_maps(
    path: str | os.PathLike[str], *, block: tuple[int, int] = (16, 16), k: int = 10
) -> dict[str, TierMap]:
    """Reads a file that ``save_tier_maps`` wrote, or a ``.pt`` or ``.pth`` file of the published three-tier pruner.

    Of a ``.pt``, nothing but tensors is unpickled (``weights_only``). It stores neither shapes nor block sizes: its
    weights are assumed to consist of whole blocks of the size ``block``. Its names are like ``layer_0.mlp.up``, which
    ``tier_iteration`` compares with the ends of the model's names.

    Args:
        path: the file.
        block: rows and columns of a block, for ``.pt`` files.
        k: weights that a top-k block keeps, for ``.pt`` files.

    Returns:
        The maps by layer name, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, was altered, or has another version; the message names the file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return _read_pt(path, block, k) if path.suffix in (".pt", ".pth") else _read(path)
    except PermissionError:
        raise
    except Exception as error:  # torch.load raises errors of many classes on foreign files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} holds no tier maps: {reason}") from error


def _read(path: Path) -> dict[str, TierMap]:
    text, tensors = read_tensors(path, KEY)
    if text is None:
        raise ValueError(f"its header has no {KEY}")
    structure = parse_json(text)
    version, layers = (structure.get(key) if isinstance(structure, dict) else None for key in ("version", "layers"))
    if version != VERSION:
        raise ValueError(f"it is of version {version}, this release reads {VERSION}")
    if not isinstance(layers, dict) or layers.keys() != tensors.keys():
        raise ValueError("its layers are not those of its tensors")
    return {name: _tier_map(name, layers[name], tiers) for name, tiers in tensors.items()}


def _tier_map(name: str, layer: Any, tiers: Tensor) -> TierMap:
    if not isinstance(layer, dict) or layer.keys() != {"shape", "block", "k"}:
        raise ValueError(f"layer {name!r} needs shape, block and k, got {layer!r}")
    shape, block = (tuple(side) if isinstance(side, list) else side for side in (layer["shape"], layer["block"]))
    try:
        return TierMap(tiers, shape, block, layer["k"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"layer {name!r}: {error}") from error


def _read_pt(path: Path, block: tuple[int, int], k: int) -> dict[str, TierMap]:
    stored = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(stored, dict) or not all(
        isinstance(name, str) and isinstance(tiers, Tensor) and tiers.dim() == 2 for name, tiers in stored.items()
    ):
        raise ValueError("it is not a dict of matrices")
    for name, tiers in stored.items():
        if tiers.is_meta or tiers.numel() * tiers.element_size() > tiers.untyped_storage().nbytes():
            # Without this check, a small file could ask for any amount of memory.
            raise ValueError(f"{name} has no data, or not all of it")
        if tiers.is_floating_point() or not bool(((tiers >= 0) & (tiers <= 2)).all()):
            raise ValueError(f"a tier is 0, 1 or 2, and {name} has others")
    return {
        name: TierMap(tiers.to(torch.uint8), (tiers.shape[0] * block[0], tiers.shape[1] * block[1]), block, k)
        for name, tiers in stored.items()
    }
