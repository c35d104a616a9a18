"""Tier maps on disk: one safetensors file for a model, with its structure as JSON in the header."""

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._files import replacing
from .tier_map import TierMap

KEY, VERSION = "sparsekit.tier_maps", 1


def save_tier_maps(tier_maps: Mapping[str, TierMap], path: str | os.PathLike[str]) -> None:
    """Writes the tier maps of a model by layer name, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    structure = {
        "version": VERSION,
        "layers": {
            name: {"shape": tier_map.shape, "block": tier_map.block, "k": tier_map.k}
            for name, tier_map in tier_maps.items()
        },
    }
    tensors = {name: tier_map.tiers.cpu().contiguous() for name, tier_map in tier_maps.items()}
    with replacing(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={KEY: json.dumps(structure)})


def load_tier_maps(
    path: str | os.PathLike[str], *, block: tuple[int, int] = (16, 16), k: int = 10
) -> dict[str, TierMap]:
    """Reads what ``save_tier_maps`` wrote, or the ``.pt`` of the published pruner (keys as ``layer_0.mlp.up``).

    Nothing is unpickled but tensors (``weights_only``). A ``.pt`` holds neither shapes nor blocks: its weights are
    taken to be whole blocks of ``block``. ``tier_iteration`` matches its names to the model's by their ends.

    Args:
        path: the file.
        block: rows and columns of a block, for ``.pt`` files.
        k: weights that a top-k block keeps, for ``.pt`` files.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        return _read_pt(path, block, k) if path.suffix in (".pt", ".pth") else _read(path)
    except (SafetensorError, pickle.UnpicklingError, KeyError, TypeError, ValueError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} holds no tier maps: {reason}") from error


def _read(path: Path) -> dict[str, TierMap]:
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(KEY)
        if text is None:
            raise ValueError(f"its header has no {KEY}")
        structure = json.loads(text)
        if structure["version"] != VERSION:
            raise ValueError(f"it is of version {structure['version']}, this release reads {VERSION}")
        return {
            name: TierMap(file.get_tensor(name), tuple(layer["shape"]), tuple(layer["block"]), layer["k"])
            for name, layer in structure["layers"].items()
        }


def _read_pt(path: Path, block: tuple[int, int], k: int) -> dict[str, TierMap]:
    stored = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(stored, dict) or not all(
        isinstance(tiers, Tensor) and tiers.dim() == 2 for tiers in stored.values()
    ):
        raise ValueError("it is not a dict of matrices")
    for name, tiers in stored.items():
        if tiers.is_floating_point() or not bool(((tiers >= 0) & (tiers <= 2)).all()):
            raise ValueError(f"a tier is 0, 1 or 2, and {name} has others")
    return {
        name: TierMap(tiers.to(torch.uint8), (tiers.shape[0] * block[0], tiers.shape[1] * block[1]), block, k)
        for name, tiers in stored.items()
    }
