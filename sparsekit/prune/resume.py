"""The finished stages of a pruning run, stored in a folder, so that it can go on after a kill."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._digest import digest, digest_modules, digest_tensors, name_of, without_addresses
from .._json import check_call, read_record, write_record
from .._safetensors import read_tensors, seal, write_tensors
from ..masks import Pattern, get_mask_bits
from ..ops import unpack_bits
from .calibration import Calibration
from .layers import PrunableLayer
from .methods import Method
from .report import PruneLayerReport

VERSION, KEY = 3, "sparsekit.stage"


def describe_call(
    model: nn.Module,
    method: Method,
    layers: Sequence[PrunableLayer],
    batches: list[Any],
    calibration: Calibration,
    axis: str,
) -> dict[str, Any]:
    """Describes as JSON all that the result of a run depends on; a run goes on only if its description is the same.

    ``batches`` has what ``digest_batches`` returned in each process. Functions are described by their names, because
    what they do cannot be compared between processes.
    """
    tensors = digest_tensors(model)
    own = {layer.name: layer.weight_name for layer in layers}
    return {
        "version": VERSION,
        "method": without_addresses(repr(method)),
        "axis": axis,
        "forward": name_of(calibration.forward),
        "token_mask": name_of(calibration.token_mask),
        "layers": {layer: tensors.get(name) for layer, name in own.items()},
        "other weights": {name: each for name, each in tensors.items() if name not in own.values()},
        "modules": digest_modules(model),
        "batches": batches,
    }


class FinishedStages:
    """The finished stages of one run in a folder: ``run.json``, and one safetensors file per stage.

    Args:
        folder: is made by ``begin`` if it does not exist.
        call: what ``describe_call`` returns; a folder with the stages of another call is rejected.
        layers: the model's layers.

    Raises:
        ValueError: the folder holds another run, or files that cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str], call: dict[str, Any], layers: Sequence[PrunableLayer]) -> None:
        self._folder, self._call = Path(folder), call
        self._layers = {layer.name: layer for layer in layers}
        self._stages: list[list[PruneLayerReport]] = []
        path = self._folder / "run.json"
        if path.exists():
            what = "the record of a pruning run"
            record = read_record(path, what)
            if record.get("stages"):  # before the first finished stage, any call may take the folder
                check_call(path, record.get("call"), call)
            try:
                stages = [[_report(row, self._layers) for row in rows] for rows in record["stages"]]
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{path} is not {what}: {error}") from error
            self._stages = stages

    def begin(self) -> None:
        """Makes the folder and its record, so that an error in writing comes before the work.

        Raises:
            OSError: the folder cannot be written to.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write()

    def __len__(self) -> int:
        return len(self._stages)

    @property
    def names(self) -> set[str]:
        """The names of the layers of the finished stages."""
        return {row.name for rows in self._stages for row in rows}

    def read(self, index: int) -> list[tuple[PruneLayerReport, Tensor, Tensor]]:
        """Reads the report, weight and mask of every layer of a finished stage.

        Raises:
            ValueError: the file is missing, damaged, or belongs to another run; the message names it.
        """
        path = self._path(index)
        try:
            structure, tensors = read_tensors(path, KEY)
            if structure != self._structure(index):
                raise ValueError("it belongs to another run or place")
            return [self._layer(row, tensors) for row in self._stages[index]]
        except FileNotFoundError as error:
            raise ValueError(f"{path} is missing, and run.json counts it as finished") from error
        except ValueError as error:
            raise ValueError(f"cannot go on from {path}: {error}") from error

    def add(self, stage: list[tuple[PrunableLayer, PruneLayerReport]]) -> None:
        """Writes the weights and masks of a stage that has just been pruned."""
        tensors = {}
        for layer, row in stage:
            bits = get_mask_bits(layer.module, layer.parameter)
            assert bits is not None
            tensors[f"{row.name}.weight"] = layer.weight.detach().cpu().contiguous()
            tensors[f"{row.name}.mask"] = bits.cpu()
        write_tensors(self._path(len(self)), tensors, seal(self._structure(len(self)), tensors, KEY))
        self._stages.append([row for _, row in stage])
        self._write()

    def _layer(self, row: PruneLayerReport, tensors: dict[str, Tensor]) -> tuple[PruneLayerReport, Tensor, Tensor]:
        weight, bits, now = tensors.get(f"{row.name}.weight"), tensors.get(f"{row.name}.mask"), self._layers[row.name]
        if weight is None or bits is None or (weight.shape, weight.dtype) != (now.weight.shape, now.weight.dtype):
            raise ValueError(f"it does not hold layer {row.name!r} as the model has it")
        return row, weight, unpack_bits(bits, weight.shape[1:].numel()).view(weight.shape)

    def _path(self, index: int) -> Path:
        return self._folder / f"stage-{index:04d}.safetensors"

    def _structure(self, index: int) -> str:
        return digest([index, self._call])

    def _write(self) -> None:
        stages = [[asdict(row) for row in each] for each in self._stages]
        write_record(self._folder / "run.json", {"call": self._call, "stages": stages})


def _report(row: dict[str, Any], layers: Mapping[str, PrunableLayer]) -> PruneLayerReport:
    """Makes a layer's report of its JSON record, in which NaN and Inf are strings because JSON has no such numbers."""
    error, layer = row["error"], layers[row["name"]]
    if (shape := tuple(row["shape"])) != tuple(layer.weight.shape):
        raise ValueError(f"layer {layer.name!r} has the shape {shape}, the model's has {tuple(layer.weight.shape)}")
    Pattern.parse(row["pattern"])
    return PruneLayerReport(**{**row, "shape": shape, "error": None if error is None else float(error)})
