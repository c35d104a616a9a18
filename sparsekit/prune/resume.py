"""What is kept of a pruning run, block by block, so that it goes on after a kill."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._archive import read, seal, write
from .._files import write_json
from ..ops import unpack_bits
from .apply import BITS
from .layers import Layer
from .report import LayerReport

VERSION = 1


class Finished:
    """The finished blocks of one run in a folder: ``run.json``, and one safetensors file a block.

    Args:
        folder: made if it is not there.
        call: what the run was called with; a folder of another call is refused.
        layers: the model's layers with the weights they had before.

    Raises:
        ValueError: the folder holds another run, or what cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str], call: dict[str, Any], layers: list[Layer]) -> None:
        self._folder = Path(folder)
        self._call = {"version": VERSION, **call, "layers": {layer.name: _fingerprint(layer) for layer in layers}}
        self._blocks: list[list[LayerReport]] = []
        path = self._folder / "run.json"
        if not path.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            return
        try:
            known = json.loads(path.read_text(encoding="utf-8"))
            blocks = [
                [LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in rows] for rows in known["blocks"]
            ]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not the record of a pruning run: {error}") from error
        different = sorted(
            key for key in self._call if known["call"].get(key) != json.loads(json.dumps(self._call[key]))
        )
        if different:
            raise ValueError(
                f"{path} belongs to another run: it differs in {', '.join(different)}; name another folder"
            )
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def names(self) -> set[str]:
        """The layers of the finished blocks."""
        return {row.name for rows in self._blocks for row in rows}

    def read(self, index: int) -> list[tuple[LayerReport, Tensor, Tensor]]:
        """The report, weight and mask of every layer of a finished block."""
        _, tensors = read(self._folder / f"block-{index:04d}.safetensors")
        return [
            (row, tensors[f"{row.name}.weight"], _mask(tensors[f"{row.name}.mask"], row.shape))
            for row in self._blocks[index]
        ]

    def add(self, block: list[tuple[Layer, LayerReport]]) -> None:
        """Writes the weights and masks of a block that has just been pruned."""
        tensors = {}
        for layer, row in block:
            tensors[f"{row.name}.weight"] = layer.weight.detach().contiguous()
            tensors[f"{row.name}.mask"] = layer.module.get_buffer("weight_mask")
        write(self._folder / f"block-{len(self):04d}.safetensors", tensors, seal("", tensors))
        self._blocks.append([row for _, row in block])
        blocks = [[asdict(row) for row in each] for each in self._blocks]
        write_json(self._folder / "run.json", {"call": self._call, "blocks": blocks})


def _fingerprint(layer: Layer) -> list[Any]:
    """Shape, dtype and the sum of the bits: another model, or one that is pruned already, has others."""
    weight = layer.weight.detach()
    return [list(weight.shape), str(weight.dtype), int(weight.view(BITS[weight.element_size()]).sum(dtype=torch.int64))]


def _mask(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    return unpack_bits(bits, torch.Size(shape[1:]).numel()).view(shape)
