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
from ..nn import Compressed
from ..nn.compressed import weight_shape
from .bitmask import from_bitmask24, shared_names, to_bitmask24
from .bitsandbytes import from_bitsandbytes, holds_bitsandbytes
from .mask_file import assign_masks, collect_masks, holds_only_masks
from .pretrained import read_folder, save_bitsandbytes, save_folder
from .rebuild import rebuild
from .shards import Shards
from .structure import LayerRecord, collect_records, dump_structure, parse_structure
from .verify import verify

T = TypeVar("T")
Format = Literal["sparsekit", "sparse-24-bitmask", "masks", "transformers", "bitsandbytes"]


def save(model: nn.Module, path: str | os.PathLike[str], *, format: Format = "sparsekit") -> None:
    """Writes a model, with its masks and its compressed layers, to one safetensors file.

    The file holds the state dict, each shared tensor once, with the packed tensors of compressed layers, and the
    bit-packed ``weight_mask`` of each pruned layer. Its metadata holds the structure as JSON and a SHA-256 digest of
    both. The file is written beside ``path``, flushed to the disk and renamed, so an interrupted save leaves the old
    file.

    Args:
        model: any module; its tensors may be on any device and of any dtype that safetensors has. Of a model wrapped by
            ``torch.compile`` or ``DistributedDataParallel`` the inner model is saved.
        path: the file, or for some formats the folder; an existing file is replaced.
        format: ``"sparse-24-bitmask"`` writes the weights as llm-compressor did, for tools that read those: every
            ``Linear24`` packed and all other weights dense, without other masks and without a digest. ``"masks"``
            writes only the masks, for example into a folder of ``save_pretrained``, which has the weights with their
            zeros; ``load`` rejects the masks for weights that do not have these zeros. ``"transformers"`` takes
            ``path`` as a folder and writes what ``from_pretrained`` of transformers or diffusers loads, with every
            layer as it is, once ``sparsekit`` is imported; ``"bitsandbytes"`` what transformers loads with
            bitsandbytes alone, for models whose compressed layers are all nf4.

    Raises:
        TypeError: ``model`` is not a module, or its state dict holds something that is not a tensor.
        OSError: the file cannot be written.
        ValueError: a tensor has no data here (the meta device, a DTensor, a lazy module) or is of a kind or dtype that
            safetensors does not have, ``format`` is unknown or cannot hold a layer, a mask does not fit its weight any
            more, or ``format`` is ``"masks"`` and there are none.
    """
    check_model(model)
    model = _unwrapped(model)
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {get_args(Format)}, got {format!r}")
    if format == "transformers":
        save_folder(model, path)
        return
    if format == "bitsandbytes":
        save_bitsandbytes(model, path)
        return
    if format == "masks":
        layers, masks = collect_masks(model)
        tensors, shared = unique_tensors(masks)
        write_tensors(Path(path), tensors, seal(dump_structure(layers, shared), tensors))
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
    write_tensors(Path(path), tensors, seal(dump_structure(layers, shared), tensors))


def load(model: nn.Module, path: str | os.PathLike[str], *, dense: bool = False) -> None:
    """Loads a file of ``save`` into ``model``: weights, dtypes, shared tensors, masks and compressed layers.

    Everything is verified before the model is changed, and nothing is ever unpickled. Parameters are replaced, so make
    the optimizer afterwards. Each tensor goes to the device of the one that it replaces, or to the CPU from ``meta``.
    ``decompress_`` makes the compressed layers dense again, as after ``compress_``.

    A packed 2:4 layer becomes a ``Linear24``, or on a CPU an ``ArrangedLinear24`` in the layout that was saved, which
    the file names but does not hold; a convolution likewise a ``Conv2d24`` or an ``ArrangedConv2d24``; and a tiered one
    a ``TieredLinear``; one that replaces a layer with a plan (``RoutedLinear24``, ``RoutedTieredLinear``) follows that
    plan, and has a dense copy if the plan wants one. A
    file does not say what is fastest on another machine: on a GPU, load with ``dense=True`` and let ``compress_``
    measure. A file of only masks does not change the weights, which must be zero wherever a mask drops them.

    Args:
        model: the same architecture, freshly made, pruned or compressed. It may be on the meta device if all its
            tensors are in its state dict. Parameters that are frozen stay frozen.
        path: a file or folder that ``save`` wrote, in any of its formats; or another file, or folder of files, of a
            whole model in ``sparse-24-bitmask`` or ``sparse-bitmask``, or with nf4 weights of bitsandbytes.
        dense: whether compressed layers come back as dense ones, to be fine-tuned or exported.

    Raises:
        TypeError: ``model`` is not a module.
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, altered or foreign, or does not fit the model; or the model is sharded, not
            initialized, offloaded by accelerate, has a buffer on the meta device that no file holds, or has hooks on a
            layer that would be replaced. The message names the file and what is wrong; the model is unchanged.
        RuntimeError: the model is being changed already, here or in another thread.
    """
    check_model(model)
    wrapper, model = model, _unwrapped(model)
    try:
        work = _run_trainable(partial(_prepare, wrapper, model, Path(path), dense))
        change(model, "loaded", partial(_undoable, model, work))
    except ValueError as error:
        raise ValueError(f"cannot load {os.fspath(path)}: {error}") from error


# Decorators and `restoring` are used, because an interrupt just before the end of a `with` block would skip its end.
@torch.no_grad()
@torch.inference_mode(False)
def _run_trainable(work: Callable[[], T]) -> T:
    """Returns ``work()``, whose tensors can be trained whatever modes and defaults the caller has set."""
    on_cpu, before = torch.device("cpu"), torch._C._len_torch_function_stack()

    def restore() -> None:
        if torch._C._len_torch_function_stack() > before:
            on_cpu.__exit__(None, None, None)

    with restoring(restore):
        on_cpu.__enter__()
        return work()


def _prepare(wrapper: nn.Module, model: nn.Module, path: Path, dense: bool) -> Callable[[], None]:
    """Verifies the whole file, and returns the function that loads it into ``model``."""
    layers, shared, tensors = _read(model, path)
    for name, source in shared.items():
        if name in tensors or source not in tensors:
            raise ValueError(f"{name!r} cannot share the tensor {source!r}")
        tensors[name] = tensors[source]
    masks_only = holds_only_masks(layers, tensors)
    if not masks_only:
        _check_parameters_replaceable(wrapper)
        _check_fits(model, layers)
        for name, layer in layers.items():
            verify(name, layer, tensors)
        if dense:
            layers = {name: layer.densify(name, tensors) for name, layer in layers.items()}
    return partial(assign_masks if masks_only else rebuild, model, layers, tensors)


def _undoable(model: nn.Module, work: Callable[[], None], undo: Undo) -> None:
    """Runs ``work``, which changes the modules of a model; ``undo`` keeps references to the old tensors, not copies."""

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
            for registry, content in contents:  # the same dictionaries, because others may hold them
                registry.clear()
                registry.update(content)
            if (original := get_original(module)) is not None:
                release_weight(original)

    undo.callback(restore)
    _run_trainable(work)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Returns the model inside of the wrappers of ``torch.compile`` and of data parallelism."""
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return _unwrapped(model.module)
    inner = model._modules.get("_orig_mod")
    return model if inner is None else _unwrapped(inner)


def _check_parameters_replaceable(model: nn.Module) -> None:
    """Rejects a model whose old parameters would still be used by something else after they are replaced."""
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


def _read(model: nn.Module, path: Path) -> tuple[dict[str, LayerRecord], dict[str, str], dict[str, Tensor]]:
    """Returns the layers, the names of shared tensors and the tensors of a file or folder."""
    if path.is_dir() and (found := read_folder(path)) is not None:
        layers, shared, tensors = found
        return layers, shared | shared_names(model, tensors.keys() | shared.keys()), tensors
    structure, tensors = (None, dict(Shards(path))) if path.is_dir() else read_tensors(path)
    if structure is not None:
        return *parse_structure(structure), tensors
    if holds_bitsandbytes(tensors):
        return from_bitsandbytes(tensors), shared_names(model, tensors), tensors
    return *from_bitmask24(model, tensors), tensors


def _check_fits(model: nn.Module, layers: Mapping[str, LayerRecord]) -> None:
    """Rejects a model that is not complete in this process, and layers that the model lacks or has in another shape.

    This is done before anything is unpacked, because a small file could claim a shape of any size.
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
