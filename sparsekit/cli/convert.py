"""``sparsekit convert``: packed checkpoints of llm-compressor to dense ones, and 2:4 models to packed ones."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from torch import Tensor

from .._json import parse_json, write_json
from ..checkpoint.bitmask import PARTS, find_packed, is_24, pack_all, unpack_all
from ..checkpoint.mask_file import save_masks
from ..checkpoint.shards import INDEX, Shards, write_shards
from ..masks import MaskInfo, Pattern
from . import terminal
from .errors import UsageError
from .folders import MASKS, OWN, check_folder, check_out, is_written, model_files, new_folder
from .roles import names_in, roles_of

FORMAT, METHOD = "sparse-24-bitmask", "compressed-tensors"
CONFIG = "config.json"
KEYS = ("quantization_config", "compression_config")  # of config.json, for the format; the second one is older
READ = ("dense", FORMAT, "sparse-bitmask", "float-quantized", "int-quantized", "naive-quantized")
INFO = MaskInfo(Pattern.parse("2:4"), 1)


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Turn a packed checkpoint that llm-compressor wrote into one that every library loads, or pack a 2:4 model so.

    To dense: weights packed as sparse-24-bitmask or sparse-bitmask, under all names that were in use and in any number
    of files, are unpacked with their zeros; float8 and int8 ones are multiplied by their scales; what config.json says
    of them is taken out, also where it was left over beside dense weights; and masks.safetensors, which is copied in
    either direction, is made of what was packed as 2:4 where there is none.

    Args:
        folder: a transformers folder.
        out: the folder to write; it appears when all is done.
        to: dense, or sparse-24-bitmask, which packs every linear layer that is 2:4.
        overwrite: replace what sparsekit wrote there before.
        json: print the results as JSON on stdout, and nothing else there.
        debug: show where an error comes from.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    out: Path
    to: Literal["dense", "sparse-24-bitmask"] = "dense"
    overwrite: bool = False
    json: bool = False
    debug: bool = False

    def run(self) -> int:
        check_folder(self.folder)
        check_out(self.out, overwrite=self.overwrite)
        if not (files := model_files(self.folder)):
            raise UsageError(f"{self.folder} is packed for one machine: convert the folder that it was made from")
        config = read_config_json(self.folder / CONFIG)
        shards = Shards(self.folder, skip=OWN)
        with new_folder(self.out) as folder:
            copy_others(self.folder, folder)
            changed = (
                to_dense(shards, folder, config)
                if self.to == "dense"
                else to_packed(shards, self.folder, folder, config)
            )
            write_json(folder / CONFIG, config)
            after = sum(path.stat().st_size for path in model_files(folder))
        before = sum(path.stat().st_size for path in files)
        if self.json:
            terminal.print_json({"to": self.to, "weights": changed, "bytes_before": before, "bytes_after": after})
        else:
            done = f"{changed} weights {'unpacked' if self.to == 'dense' else 'packed'}"
            terminal.write(f"{done}, {terminal.size(before)} -> {terminal.size(after)}, written to {self.out}")
        return 0


def to_dense(shards: Shards, folder: Path, config: dict[str, Any]) -> int:
    """Writes all tensors dense, with the masks of the packed 2:4 ones; returns how many tensors were packed."""
    packed = find_packed(shards)
    masks = dict[str, Tensor]()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in unpack_all(shards):
            # Float8 and int8 weights have been multiplied by their scales, which leaves zeros as they are.
            if name in packed and is_24(tensor):
                masks[name.removesuffix(".weight")] = shards[packed[name]["bitmask"]]
            yield name, tensor

    write_shards(tensors(), folder)
    shapes = {layer: tuple(shards[packed[f"{layer}.weight"]["shape"]].flatten().tolist()) for layer in masks}
    if masks and not (folder / MASKS).exists():
        save_masks(folder / MASKS, {layer: (bits, shapes[layer], INFO) for layer, bits in masks.items()})
    for key in KEYS:
        config.pop(key, None)
    return len(packed)


def to_packed(shards: Shards, source: Path, folder: Path, config: dict[str, Any]) -> int:
    """Writes all tensors, with the 2:4 weights of linear layers packed; returns how many are packed.

    Raises:
        UsageError: some are packed already.
        ValueError: no layer is 2:4.
    """
    if find_packed(shards):
        raise UsageError(f"{source} is packed already")
    roles = roles_of(source, names_in(model_files(source)))
    linear = {name for name, role in roles.items() if role is not None and role.axis == 1}
    done = set[str]()

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in pack_all(shards, lambda layer: layer in linear):
            layer, _, part = name.rpartition(".")
            if part == PARTS[0]:
                done.add(layer)
            yield name, tensor

    write_shards(tensors(), folder)
    if not done:
        raise ValueError(f"{source} has no linear layer whose weight is 2:4: there is nothing to pack")
    sparsity = {
        "format": FORMAT,
        "sparsity_structure": "2:4",
        "targets": ["Linear"],
        "ignore": sorted(linear - done),
        "registry_requires_subclass": False,
    }
    config[KEYS[0]] = {"quant_method": METHOD, "format": "dense", "sparsity_config": sparsity}
    return len(done)


def read_config_json(path: Path) -> dict[str, Any]:
    """Reads the configuration of a folder.

    Raises:
        UsageError: there is none, or it names a format that cannot be read.
    """
    try:
        config = parse_json(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} is not there: a transformers folder is needed") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object")
    for key in KEYS:
        said = config.get(key) or {}
        method = said.get("quant_method", METHOD)
        formats = [said.get("format"), *(group.get("format") for group in (said.get("config_groups") or {}).values())]
        strange = [each for each in formats if each not in (None, *READ)]
        if method != METHOD or strange:
            what = method if method != METHOD else strange[0]
            raise UsageError(f"{path} names the format {what}; only {', '.join(READ)} of {METHOD} can be read")
    return config


def copy_others(source: Path, folder: Path) -> None:
    """Copies the files beside the weights: the configurations, the tokenizer, the README and stored masks."""
    for path in source.iterdir():
        weights = (path.suffix == ".safetensors" and path.name != MASKS) or path.name == INDEX
        if path.is_file() and is_written(path) and not weights:
            shutil.copyfile(path, folder / path.name)
