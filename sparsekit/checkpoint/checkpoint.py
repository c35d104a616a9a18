"""Saves and loads a model with its masks and its compressed layers."""

import copy
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from .._layers import check_model
from .._replace import release_weight
from .._safetensors import check_holds_data, read_tensors, seal, unique_tensors, write_tensors
from .._state import get_original
from .._undo import Undo, change, restoring
from ..nn import Compressed, weight_shape
from .bitmask import from_bitmask24, to_bitmask24
from .mask_file import assign_masks, collect_masks, holds_only_masks
from .rebuild import rebuild
from .shards import Shards
from .structure import LayerRecord, collect_records, dump, parse
from .verify import verify

T = TypeVar("T")
Format = Literal["sparsekit", "sparse-24-bitmask", "masks"]


def save(model: nn.Module, path: str | os.PathLike[str], *, format: Format = "sparsekit") -> None:
    """Writes a model, with its masks and its compressed layers, to one safetensors file.

    The file holds the state dict, each shared tensor once; of a compressed layer what it is packed in; of a pruned
    layer the bit-packed ``weight_mask``. Its metadata holds the structure as JSON and a SHA-256 digest of both. It is
    written beside ``path``, flushed to the disk and renamed, so an interrupted save leaves the old file.

    Args:
        model: any module; its tensors may be on any device, of any dtype that safetensors has. ``torch.compile`` and
            ``DistributedDataParallel`` around it are left out.
        path: the file; an existing one is replaced.
        format: ``"sparse-24-bitmask"`` writes the weights as llm-compressor did, for tools that read those: every
            ``Linear24`` packed, all else dense, neither other masks nor a digest. ``"masks"`` writes the masks alone,
            beside a folder of ``save_pretrained`` for one, which keeps the weights with their zeros: ``load`` gives
            them to no others.

    Raises:
        TypeError: ``model`` is not a module, or its state dict holds something that is not a tensor.
        OSError: the file cannot be written.
        ValueError: a tensor has no data here (the meta device, a DTensor, a lazy module) or is of a kind or dtype that
            safetensors has not, ``format`` is another, or has no place for a layer, a mask does not belong to its
            weight any more, or there are no masks to be written alone.
    """
    check_model(model)
    model = _unwrapped(model)
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {get_args(Format)}, got {format!r}")
    if format == "masks":
        layers, masks = collect_masks(model)
        tensors, shared = unique_tensors(masks)
        write_tensors(Path(path), tensors, seal(dump(layers, shared), tensors))
        return
    state = dict(model.state_dict())
    if format == "sparse-24-bitmask":
        tensors, _ = unique_tensors(to_bitmask24(model, state))
        write_tensors(Path(path), tensors, {"format": "pt"})
        return
    layers = {}
    for name, layer, bits in collect_records(model):
        layers[name] = layer
        if bits is not None:
            state[layer.mask_name(name)] = bits
    tensors, shared = unique_tensors(state)
    write_tensors(Path(path), tensors, seal(dump(layers, shared), tensors))


def load(model: nn.Module, path: str | os.PathLike[str], *, dense: bool = False) -> None:
    """Makes ``model`` what ``save`` wrote: weights, dtypes, shared tensors, masks and compressed layers.

    Everything is verified before the model is touched, and nothing is ever unpickled. Parameters are replaced, so make
    the optimizer afterwards. Each tensor goes to the device of the one that it replaces, to the CPU from ``meta``.
    ``decompress_`` makes the compressed layers dense again, as after ``compress_``.

    A packed 2:4 layer becomes a ``Linear24``, or keeps the plan of the ``RoutedLinear24`` that it replaces; a tiered
    one becomes a ``TieredLinear``; one that takes the place of a layer with a dense copy has one too. A file does not
    say what is fastest on another machine: on a GPU load with ``dense=True``, and let ``compress_`` measure. A file of
    masks alone leaves the weights as they are: the model has them already, with zeros wherever a mask drops one.

    Args:
        model: the same architecture, freshly made, pruned or compressed; also on the meta device, where it holds
            nothing but what a state dict has. Flags stay: what is frozen in it is frozen afterwards.
        path: a file that ``save`` wrote, in any of its formats; or another file, or folder of files, of a whole model
            in ``sparse-24-bitmask`` or ``sparse-bitmask``.
        dense: whether compressed layers come back as dense ones, to be fine-tuned or exported.

    Raises:
        TypeError: ``model`` is not a module.
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, altered or foreign, or does not fit the model; or the model is sharded, not
            initialized, offloaded by accelerate, has a buffer on the meta device that no file holds, or hooks on a
            layer that another one would replace. The message names the file and what is wrong, and the model is as it
            was.
        RuntimeError: the model is being changed already, here or in another thread.
    """
    check_model(model)
    wrapper, model = model, _unwrapped(model)
    try:
        work = _trainable(partial(_prepared, wrapper, model, Path(path), dense))
        change(model, "loaded", partial(_undoable, model, work))
    except ValueError as error:
        raise ValueError(f"cannot load {os.fspath(path)}: {error}") from error


# By decorators and `restoring`: an interrupt may come just before a `with` block is left.
@torch.no_grad()
@torch.inference_mode(False)
def _trainable(work: Callable[[], T]) -> T:
    """Returns ``work()``: what that makes can be trained, whatever modes and defaults the caller has."""
    on_cpu, before = torch.device("cpu"), torch._C._len_torch_function_stack()

    def restore() -> None:
        if torch._C._len_torch_function_stack() > before:
            on_cpu.__exit__(None, None, None)

    with restoring(restore):
        on_cpu.__enter__()
        return work()


def _prepared(wrapper: nn.Module, model: nn.Module, path: Path, dense: bool) -> Callable[[], None]:
    """What makes ``model`` what the file holds, after everything in it was verified."""
    structure, tensors = _read(path)
    layers, shared = from_bitmask24(model, tensors) if structure is None else parse(structure)
    for name, source in shared.items():
        if name in tensors or source not in tensors:
            raise ValueError(f"{name!r} cannot share the tensor {source!r}")
        tensors[name] = tensors[source]
    alone = holds_only_masks(layers, tensors)
    if not alone:
        _check_replaceable(wrapper)
        _check_fits(model, layers)
        for name, layer in layers.items():
            verify(name, layer, tensors)
        if dense:
            layers = {name: layer.densify(name, tensors) for name, layer in layers.items()}
    return partial(assign_masks if alone else rebuild, model, layers, tensors)


def _undoable(model: nn.Module, work: Callable[[], None], undo: Undo) -> None:
    """Changes the modules of a model, with the way back in ``undo``: references, no tensor is copied."""

    def registries(module: nn.Module) -> list[Any]:
        return [vars(module)[key] for key in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")]

    record = [
        (module, dict(vars(module)), [(each, copy.copy(each)) for each in registries(module)])
        for module in model.modules()
    ]

    def restore() -> None:
        for module, attributes, contents in record:
            vars(module).clear()
            vars(module).update(attributes)
            for registry, content in contents:  # the same objects, for whoever holds them
                registry.clear()
                registry.update(content)
            if (original := get_original(module)) is not None:
                release_weight(original)

    undo.callback(restore)
    _trainable(work)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model in the wrappers of ``torch.compile`` and of data parallelism."""
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return _unwrapped(model.module)
    inner = model._modules.get("_orig_mod")
    return model if inner is None else _unwrapped(inner)


def _check_replaceable(model: nn.Module) -> None:
    """Rejects a model whose parameters something else holds, and would go on with."""
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            where = f"{name} is" if name else "the model is"
            raise ValueError(
                f"{where} wrapped in DistributedDataParallel, which would go on with the parameters that load "
                "replaces: load the model before it is wrapped"
            )
        hook = vars(module).get("_hf_hook")
        if any(getattr(each, "weights_map", None) is not None for each in getattr(hook, "hooks", (hook,))):
            raise ValueError(
                f"{name or 'the model'} is offloaded by accelerate, which puts the weights that it has laid aside back "
                "at every call: load the model before it is offloaded"
            )


def _read(path: Path) -> tuple[str | None, dict[str, Tensor]]:
    """The structure, None in a foreign file, and the tensors of a file or of a folder of foreign ones."""
    return (None, dict(Shards(path))) if path.is_dir() else read_tensors(path)


def _check_fits(model: nn.Module, layers: Mapping[str, LayerRecord]) -> None:
    """Rejects a model that is not whole here, and layers that it has not in their shape: first, or a small file could
    ask for any memory.
    """
    for name, parameter in model.named_parameters():
        check_holds_data(name, parameter)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, layer in layers.items():
        module = modules.get(layer.module_name(name))
        if module is None or not (
            isinstance(module, Compressed) or isinstance(module._parameters.get(layer.parameter), Tensor)
        ):
            raise ValueError(f"it does not fit the model: there is no layer {name!r} with a weight")
        shape = weight_shape(module) if layer.parameter == "weight" else module.get_parameter(layer.parameter).shape
        if layer.shape != tuple(shape):
            raise ValueError(f"layer {name!r} has shape {layer.shape}, the model's has {tuple(shape)}")
