"""What is kept of a pruning run, block by block, so that it goes on after a kill."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._archive import read, seal, write
from .._batches import Forward
from .._fingerprint import digest, digest_modules, digest_tensors, name_of, without_addresses
from .._record import check_call, read_record, write_record
from ..masks import Pattern, get_mask_bits
from ..ops import unpack_bits
from .layers import Layer
from .methods import Method
from .padding import TokenMask
from .report import LayerReport

VERSION, KEY = 2, "sparsekit.block"


def call_of(
    model: nn.Module,
    method: Method,
    layers: Sequence[Layer],
    batches: list[Any],
    forward: Forward | None,
    token_mask: TokenMask | None,
    axis: str,
) -> dict[str, Any]:
    """All that the result of a run depends on, as JSON: equal calls are gone on with, others refused.

    ``batches`` is what ``digest_batches`` says of those of each process. Of functions the name counts: what a
    function does cannot be compared between processes.
    """
    tensors = digest_tensors(model)
    own = {layer.name: layer.weight_name for layer in layers}
    return {
        "version": VERSION,
        "method": without_addresses(repr(method)),
        "axis": axis,
        "forward": name_of(forward),
        "token_mask": name_of(token_mask),
        "layers": {layer: tensors.get(name) for layer, name in own.items()},
        "other weights": {name: each for name, each in tensors.items() if name not in own.values()},
        "modules": digest_modules(model),
        "batches": batches,
    }


class Finished:
    """The finished blocks of one run in a folder: ``run.json``, and one safetensors file a block.

    Args:
        folder: need not be there yet.
        call: what the run is called with; a folder with the blocks of another call is refused.
        layers: the model's layers.

    Raises:
        ValueError: the folder holds another run, or what cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str], call: dict[str, Any], layers: Sequence[Layer]) -> None:
        self._folder, self._call = Path(folder), call
        self._layers = {layer.name: layer for layer in layers}
        self._blocks: list[list[LayerReport]] = []
        path = self._folder / "run.json"
        if path.exists():
            what = "the record of a pruning run"
            record = read_record(path, what)
            if record.get("blocks"):  # a run that has finished nothing yet is nobody's
                check_call(path, record.get("call"), call)
            try:
                blocks = [[_report(row, self._layers) for row in rows] for rows in record["blocks"]]
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{path} is not {what}: {error}") from error
            self._blocks = blocks

    def begin(self) -> None:
        """Makes the folder and its record: what cannot be kept ends before the work.

        Raises:
            OSError: the folder cannot be written to.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write()

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def names(self) -> set[str]:
        """The layers of the finished blocks."""
        return {row.name for rows in self._blocks for row in rows}

    def read(self, index: int) -> list[tuple[LayerReport, Tensor, Tensor]]:
        """The report, weight and mask of every layer of a finished block.

        Raises:
            ValueError: its file is missing, damaged, or another's; the message names it.
        """
        path = self._path(index)
        try:
            structure, tensors = read(path, KEY)
            if structure != self._structure(index):
                raise ValueError("it belongs to another run or place")
            return [self._layer(row, tensors) for row in self._blocks[index]]
        except FileNotFoundError as error:
            raise ValueError(f"{path} is missing, and run.json counts it as finished") from error
        except ValueError as error:
            raise ValueError(f"cannot go on from {path}: {error}") from error

    def add(self, block: list[tuple[Layer, LayerReport]]) -> None:
        """Writes the weights and masks of a block that has just been pruned."""
        tensors = {}
        for layer, row in block:
            bits = get_mask_bits(layer.module, layer.parameter)
            assert bits is not None
            tensors[f"{row.name}.weight"] = layer.weight.detach().cpu().contiguous()
            tensors[f"{row.name}.mask"] = bits.cpu()
        write(self._path(len(self)), tensors, seal(self._structure(len(self)), tensors, KEY))
        self._blocks.append([row for _, row in block])
        self._write()

    def _layer(self, row: LayerReport, tensors: dict[str, Tensor]) -> tuple[LayerReport, Tensor, Tensor]:
        weight, bits, now = tensors.get(f"{row.name}.weight"), tensors.get(f"{row.name}.mask"), self._layers[row.name]
        if weight is None or bits is None or (weight.shape, weight.dtype) != (now.weight.shape, now.weight.dtype):
            raise ValueError(f"it does not hold layer {row.name!r} as the model has it")
        return row, weight, unpack_bits(bits, weight.shape[1:].numel()).view(weight.shape)

    def _path(self, index: int) -> Path:
        return self._folder / f"block-{index:04d}.safetensors"

    def _structure(self, index: int) -> str:
        return digest([index, self._call])

    def _write(self) -> None:
        blocks = [[asdict(row) for row in each] for each in self._blocks]
        write_record(self._folder / "run.json", {"call": self._call, "blocks": blocks})


def _report(row: dict[str, Any], layers: Mapping[str, Layer]) -> LayerReport:
    """The report of a layer that a record holds; a number that JSON has not is a word there."""
    error, layer = row["error"], layers[row["name"]]
    if (shape := tuple(row["shape"])) != tuple(layer.weight.shape):
        raise ValueError(f"layer {layer.name!r} has the shape {shape}, the model's has {tuple(layer.weight.shape)}")
    Pattern.parse(row["pattern"])
    return LayerReport(**{**row, "shape": shape, "error": None if error is None else float(error)})
