"""Writes, verifies and reads a folder that ``from_pretrained`` of transformers or diffusers loads."""

import copy
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._files import replacing
from .._json import parse_json
from .._pretrained import has_config
from .._safetensors import check_header, digest_file, read_metadata, seal, unique_tensors, write_tensors
from .._state import SLIM_PLAN, get_attribute
from .bitsandbytes import to_bitsandbytes
from .fields import field
from .shards import Shards
from .structure import PARTS, LayerRecord, collect_records, join, parts_of

METHOD = "sparsekit"  # the quantization method that config.json names
KEY = "sparsekit_folder"  # of the metadata of the weights
CONFIG, GENERATION = "config.json", "generation_config.json"
VERSION = 1
SHARD = re.compile(r".*-\d{5}-of-\d{5}\.safetensors|.*\.safetensors\.index\.json")


def save_folder(
    model: nn.Module, folder: str | os.PathLike[str], state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the weights of a model and its configuration to a folder, and leaves other files there as they are.

    The configuration describes the layers that are compressed or pruned, and what ``slim_`` has removed. The weights
    hold digests of themselves and of the configuration, so that no mixture of an old and a new folder is ever loaded.

    Args:
        model: a model of transformers or diffusers.
        folder: is made where it is missing.
        state_dict: tensors to write instead of the model's own, under the same names.

    Raises:
        TypeError: the model is none of transformers or diffusers.
        OSError: a file cannot be written.
        ValueError: a tensor cannot be written, a mask does not fit its weight any more, the model is quantized by
            another library, or ``state_dict`` has other names.
    """
    config, weights = describe(model)
    layers, state = dict[str, LayerRecord](), dict(model.state_dict())
    if state_dict is not None and (other := state_dict.keys() ^ state.keys()):
        raise ValueError(f"state_dict must have the names of model.state_dict(), {min(other)!r} is in one of them only")
    state |= state_dict or {}
    for name, layer, bits in collect_records(model):
        layers[name] = layer
        if bits is not None:
            state[layer.mask_name(name)] = bits
    tensors, shared = _stored(model, layers, state)
    plan = get_attribute(model, SLIM_PLAN)
    if layers or plan is not None:
        config["quantization_config"] = {
            "quant_method": METHOD,
            "version": VERSION,
            "layers": {name: layer.to_json() for name, layer in layers.items()},
            "shared": shared,
            **({} if plan is None else {"slim": plan.to_json()}),
        }
    write_folder(model, Path(folder), config, weights, tensors)


def save_bitsandbytes(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Writes a model whose compressed layers are nf4 as transformers loads it with bitsandbytes, without sparsekit.

    Raises:
        TypeError, OSError, ValueError: as ``save_folder`` and ``to_bitsandbytes`` say.
    """
    config, weights = describe(model)
    state, config["quantization_config"] = to_bitsandbytes(model, model.state_dict())
    tensors, _ = _stored(model, {}, state)
    write_folder(model, Path(folder), config, weights, tensors)


def write_folder(
    model: Any, folder: Path, config: Mapping[str, Any], weights: str, tensors: Mapping[str, Tensor]
) -> None:
    """Writes the weights, then the configurations; the weights hold the digests of all."""
    files = {CONFIG: json.dumps(config, indent=2, sort_keys=True) + "\n"}
    if (generation := getattr(model, "generation_config", None)) is not None and model.can_generate():
        files[GENERATION] = generation.to_json_string()
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
    structure = json.dumps({"version": VERSION, "files": digests})
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / weights, tensors, {"format": "pt", **seal(structure, tensors, KEY)})
    for name, text in files.items():
        with replacing(folder / name) as file:
            file.write(text.encode())
    for path in folder.iterdir():  # another save may have left shards, which some loaders prefer
        if SHARD.fullmatch(path.name) and path.name.startswith(weights.removesuffix(".safetensors")):
            path.unlink()


def describe(model: Any) -> tuple[dict[str, Any], str]:
    """Returns the configuration that ``save_pretrained`` of a model would write, and the name of its weights file.

    Raises:
        TypeError: the model is none of transformers or diffusers.
        ValueError: another library has quantized the model.
    """
    if not has_config(model):
        raise TypeError(f"only a model of transformers or diffusers is saved as a folder, got {type(model).__name__}")
    if callable(getattr(model, "to_json_string", None)):  # diffusers
        config, weights = json.loads(model.to_json_string()), "diffusion_pytorch_model.safetensors"
    else:
        own = copy.deepcopy(model.config)
        own.architectures, own.dtype = [type(model).__name__], str(model.dtype).removeprefix("torch.")
        config, weights = json.loads(own.to_json_string()), "model.safetensors"
    method = (config.pop("quantization_config", None) or {}).get("quant_method", METHOD)
    if method != METHOD:
        raise ValueError(f"the model is quantized by {method}, which has a format of its own: use save_pretrained")
    return config, weights


def stored_name(name: str, layer: LayerRecord, part: str) -> str:
    """Returns the name in a folder of a tensor in which a layer stores its weight.

    The first tensor of a packed weight is called ``weight`` and has one dimension more than weights have, so that a
    reader which does not know the layer finds a weight that does not fit, instead of none.
    """
    return join(name, "weight" if part == parts_of(layer)[0] else part)


def _stored(
    model: Any, layers: Mapping[str, LayerRecord], state: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors of the file, and of each mask that is also the bits of its packed weight, the name of those.

    Any other shared tensor is written under each of its names, as readers do not know sharing, except where the model
    itself ties weights.
    """
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target in state and source in state and state[target].data_ptr() == state[source].data_ptr():
            ignored.add(target)
    unique, same = unique_tensors({name: tensor for name, tensor in state.items() if name not in ignored})
    masks = {layer.mask_name(name) for name, layer in layers.items() if layer.mask}
    shared = {name: source for name, source in same.items() if name in masks}
    tensors = unique | {name: unique[source] for name, source in same.items() if name not in shared}
    renamed = {
        join(name, part): stored_name(name, layer, part)
        for name, layer in layers.items()
        for part in PARTS.get(layer.kind, ())[:1]  # those of a prepacked layer are called weight
    }
    return {
        renamed.get(name, name): tensor.unsqueeze(0) if name in renamed else tensor for name, tensor in tensors.items()
    }, shared


def check_folder(weights: Path) -> None:
    """Verifies the digests of the weights and the configurations that ``save_folder`` wrote; reads all of them.

    Raises:
        ValueError: a file was altered, or belongs to another save; the message names it.
        OSError: a file cannot be read.
    """
    try:
        structure = read_metadata(weights).get(KEY)
        if structure is None:
            raise ValueError("it was altered, or not written by sparsekit with its configuration")
        if digest_file(structure, Shards([weights])) != read_metadata(weights).get("sha256"):
            raise ValueError("it was altered: its digest is not the one that was saved")
        check_header(weights)
        files = field("the metadata", parse_json(structure), "files", dict)
    except ValueError as error:
        raise ValueError(f"cannot load {weights}: {error}") from error
    for name in (CONFIG, GENERATION):
        path = weights.parent / name
        if name in files and (name == CONFIG or path.exists()):
            if hashlib.sha256(path.read_bytes()).hexdigest() != files[name]:
                raise ValueError(
                    f"cannot load {path}: it was altered, or belongs to other weights: its digest is not the one that "
                    f"was saved with {weights.name}. After a change that is meant, load the old folder and save it anew"
                )


def parse_config(data: Mapping[str, Any]) -> tuple[dict[str, LayerRecord], dict[str, str]]:
    """Returns the layers that the ``quantization_config`` of a folder describes, and its shared masks.

    Raises:
        ValueError: it is not one that ``save_folder`` wrote.
    """
    where = "the quantization_config of sparsekit"
    version = field(where, data, "version", int)
    if version != VERSION:
        raise ValueError(f"{where} has version {version}, this sparsekit reads version {VERSION}")
    if unknown := data.keys() - {"quant_method", "version", "layers", "shared", "slim"}:
        raise ValueError(f"{where} has an unknown entry {min(unknown)!r}: a newer sparsekit may have written it")
    shared = field(where, data, "shared", dict)
    if not all(isinstance(name, str) for name in shared.values()):
        raise ValueError(f"{where}: 'shared' must map names to names")
    return {name: LayerRecord.parse(name, each) for name, each in field(where, data, "layers", dict).items()}, shared


def described(folder: Path) -> dict[str, Any] | None:
    """Returns what the configuration of a folder says of its compressed layers; None if ``save_folder`` wrote none."""
    try:
        config = parse_json((folder / CONFIG).read_text(encoding="utf-8"))
        about = config.get("quantization_config") or {}
        return about if about.get("quant_method") == METHOD else None
    except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError):
        return None


def read_folder(folder: Path) -> tuple[dict[str, LayerRecord], dict[str, str], dict[str, Tensor]] | None:
    """Returns the layers, the shared masks and the tensors, under the names of the state dict, of a folder.

    Returns:
        None if the configuration of the folder does not name sparsekit's format.

    Raises:
        ValueError: a file was altered.
    """
    if (about := described(folder)) is None:
        return None
    layers, shared = parse_config(about)
    shards = Shards(folder, skip=("masks.safetensors", "compressed.safetensors"))
    if len(files := set(shards.files())) != 1:
        raise ValueError(f"its weights are in {len(files)} files, and sparsekit writes one")
    check_folder(files.pop())
    tensors = dict(shards)
    for name, layer in layers.items():
        for part in PARTS.get(layer.kind, ()):
            stored = stored_name(name, layer, part)
            if stored not in tensors:
                raise ValueError(f"the tensor {stored!r} is missing")
            tensor = tensors.pop(stored)
            tensors[join(name, part)] = tensor.squeeze(0) if part == PARTS[layer.kind][0] else tensor
    return layers, shared, tensors
