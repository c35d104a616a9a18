"""What all functions on models ask about layers: which dimension their inputs have, and why one must be skipped."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from .masks import get_mask_bits, get_mask_info, masked_parameters
from .ops._define import DTYPES

Where = Callable[[str, nn.Module], bool]
Reasons = dict[tuple[nn.Module, str], str]  # by module and name of the parameter


def check_model(model: nn.Module) -> None:
    """Raises a TypeError unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def check_where(where: Where | None) -> None:
    """Raises a TypeError unless ``where`` is a function or None."""
    if where is not None and not callable(where):
        raise TypeError(
            f"where must be a function of (name, module) that says which layers are meant, such as "
            f'lambda name, module: "mlp" in name, got {where!r}'
        )


def declared_shape(layer: nn.Module) -> tuple[int, ...]:
    """Returns the shape of a layer's weight without reading the weight, which may be computed from others."""
    weight = layer._parameters.get("weight")
    if weight is not None and not is_lazy(weight) and weight.dim() > 1:  # FSDP flattens some weights
        return tuple(weight.shape)
    if isinstance(layer, nn.Conv2d):
        return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    return int(getattr(layer, "out_features", 0)), int(getattr(layer, "in_features", 0))


def count_weights(model: nn.Module) -> int:
    """Returns the number of entries of all initialized parameters of a model; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters() if not is_lazy(parameter))


def selects(where: Where | None, name: str, module: nn.Module) -> bool:
    """Returns whether ``where`` selects a module.

    If ``where`` raises an exception for a module that is no layer to be selected, the result is False: ``where`` may
    use ``module.in_features``, which an embedding does not have.
    """
    try:
        return where is None or bool(where(name, module))
    except Exception:
        if input_dim(module) is not None:
            raise
        return False


def input_dim(module: nn.Module) -> int | None:
    """Returns the weight dimension of the inputs; None if the module is no Linear, Conv2d or transformers' Conv1D."""
    kind = _layer_class(module)
    return None if kind is None else 1 if issubclass(kind, nn.Linear | nn.Conv2d) else 0


def is_transposed(layer: nn.Module) -> bool:
    """Returns whether the layer is transformers' ``Conv1D`` itself, whose weight is ``[inputs, outputs]``."""
    return input_dim(layer) == 0 and type(layer) is _layer_class(layer)


def _layer_class(module: nn.Module) -> type[nn.Module] | None:
    """Returns the base class that defines the computation: Linear, Conv2d or transformers' Conv1D (not imported)."""
    for base in type(module).__mro__:
        if base in (nn.Linear, nn.Conv2d) or (base.__module__, base.__name__) == (
            "transformers.pytorch_utils",
            "Conv1D",
        ):
            return base
    return None


def expert_axes(module: nn.Module) -> dict[str, int]:
    """Returns the parameters that hold one matrix per expert, ``[experts, ...]``, with their input dimension, 1 or 2.

    The dimension is known in three cases. Modules of transformers say whether they are transposed. If a module has two
    such parameters, and one has twice as many outputs as the other has inputs, because it yields gates and values, they
    fit together in only one way. And a parameter with a mask has it stored with the mask.
    """
    masks = {key: info for key in masked_parameters(module) if (info := get_mask_info(module, key)) is not None}
    pruned = {key: info.axis for key, info in masks.items() if is_stack(module._parameters.get(key))}
    return {**_declared_axes(module), **{key: axis for key, axis in pruned.items() if isinstance(axis, int)}}


def _declared_axes(module: nn.Module) -> dict[str, int]:
    stacks = {key: parameter for key, parameter in module._parameters.items() if is_stack(parameter)}
    transposed = getattr(module, "is_transposed", None)
    if isinstance(transposed, bool):
        return dict.fromkeys(stacks, 1 if transposed else 2)
    if len(stacks) == 2:
        (_, *one), (_, *other) = (tuple(parameter.shape) for parameter in stacks.values() if parameter is not None)
        for (a, b), (c, d) in ((one, other), (other, one)):
            if (a, b) == (2 * d, c):
                return dict.fromkeys(stacks, 2)
            if (a, b) == (d, 2 * c):
                return dict.fromkeys(stacks, 1)
    return {}


def is_stack(parameter: Tensor | None) -> bool:
    """Returns whether a parameter has the dimensions of one matrix per expert."""
    return parameter is not None and not is_lazy(parameter) and parameter.dim() == 3


def output_head(model: nn.Module) -> nn.Module | None:
    """Returns the layer that computes the logits of a language model; None if the model has none or does not say."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def unsupported_reason(module: nn.Module, parameter: str = "weight", *, prepare: bool = False) -> str | None:
    """Returns why a parameter can neither be pruned nor swapped; None if it can.

    A weight that is computed from others is never read, because ``spectral_norm`` changes its buffers at every read.
    With ``prepare`` the values of the weight are not needed yet, so it may be on the meta device or sharded.
    """
    if reason := getattr(type(module), "unsupported_reason", None):  # a layer that this package has put in place
        return str(reason)
    weight = module._parameters.get(parameter)
    if weight is None:
        kind = f", as a {type(module).__name__} does" if is_parametrized(module) else ""
        return f"its {parameter} is not a parameter but computed{kind}"
    if is_lazy(weight):
        return f"its {parameter} is not initialized: run the model on a batch first"
    if get_mask_bits(module, parameter) is None and hasattr(module, f"{parameter}_mask"):
        return f"it has a {parameter}_mask of its own, and that is where masks are stored"
    if reason := _own_forward_reason(module) or _unsupported_tensor_reason(weight, parameter, prepare):
        return reason
    dims = 4 if isinstance(module, nn.Conv2d) else 2
    if _layer_class(module) is not None and weight.dim() != dims and not prepare:
        return f"its {parameter} has the shape {tuple(weight.shape)}, not {dims} dimensions: FSDP flattens such ones"
    return None


def hooks_reason(module: nn.Module) -> str | None:
    """Returns why a module cannot be replaced, which is that its hooks or its own forward would be lost; else None."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks"
    return "its forward is replaced" if "forward" in vars(module) else None


def _own_forward_reason(module: nn.Module) -> str | None:
    """Returns why a module may compute something else than its base class does; None if it does not."""
    kind, own = _layer_class(module), vars(module)
    if kind is None:
        return None
    for method in ("forward", "_conv_forward", "__call__"):
        if getattr(type(module), method, None) is not getattr(kind, method, None):
            return f"{type(module).__name__} has a {method} of its own and may compute something else"
    # accelerate's hooks wrap the forward to move tensors, and do not change its result.
    hooked = "_hf_hook" in own and getattr(own.get("_old_forward"), "__func__", None) is kind.forward
    if "_conv_forward" in own or ("forward" in own and not hooked):
        return "its forward is replaced"
    return None


def _unsupported_tensor_reason(weight: Tensor, parameter: str, prepare: bool) -> str | None:
    its, sharded = f"its {parameter}", type(weight).__name__ == "DTensor"
    if type(weight) is not nn.Parameter and not (sharded and prepare):
        part = ", of which this process may hold a part only" if sharded else ""
        return f"{its} is a {type(weight).__name__}{part}, not a plain nn.Parameter"
    if weight.is_meta and not prepare:
        return f"{its} is on the meta device: load it first"
    if weight.dtype not in DTYPES:
        return f"{its} is {weight.dtype}, not float32, float16 or bfloat16"
    if weight.layout is not torch.strided:
        return f"{its} is {weight.layout}, not strided"
    if weight.numel() == 0:
        return f"{its} is empty"
    if any(size > 1 and stride == 0 for size, stride in zip(weight.shape, weight.stride(), strict=True)):
        return f"{its} is expanded: several of its entries are one number in memory"
    return None


def shared_weight_reasons(model: nn.Module, *, fast_paths: bool = True) -> Reasons:
    """Returns, for each shared parameter, the tensor that shares its memory or the parent that reads it without a call.

    Args:
        model: any tree of modules.
        fast_paths: whether to include layers that are called in training and only read by torch's fast paths: such a
            layer can be pruned, but not replaced.
    """
    reasons: Reasons = {}
    for (name, owner, key, tensor), (other_name, other, other_key, other_tensor) in _overlapping(model):
        if owner is not other:
            verb = "is tied to" if _same_place(tensor, other_tensor) else "shares memory with"
            for module, own, holder in ((owner, key, other_name), (other, other_key, name)):
                known = reasons.get((module, own))
                reasons[module, own] = f"{known}, {holder}" if known else f"its {own} {verb} {holder}"
    for parent, children in _fused(model, fast_paths):
        for child in children:
            reasons[child, "weight"] = f"{type(parent).__name__} reads its weight without calling it"
    return reasons


_Owned = tuple[str, nn.Module, str, Tensor]  # the full name of a tensor, its module, its name there, the tensor


def _overlapping(model: nn.Module) -> Iterator[tuple[_Owned, _Owned]]:
    """Yields all pairs of parameters and buffers that have memory in common."""
    alive: list[tuple[int, _Owned]] = []
    for start, end, held in sorted(_spans(model), key=lambda span: span[0]):
        alive = [(last, other) for last, other in alive if last > start]
        for _, other in alive:
            if _overlap(other[3], held[3]):
                yield other, held
        alive.append((end, held))


def _spans(model: nn.Module) -> Iterator[tuple[int, int, _Owned]]:
    """Yields every tensor with the address of its first byte and of the byte after its last."""
    for name, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            held = (f"{name}.{key}".lstrip("."), module, key, tensor)
            plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
            if plain and (start := tensor.data_ptr()):
                last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                yield start, start + (last + 1) * tensor.itemsize, held
            else:  # without an address (meta, empty, not initialized, wrappers): shared only if it is the same object
                yield -id(tensor), 1 - id(tensor), held


def _same_place(one: Tensor, other: Tensor) -> bool:
    if one is other:
        return True
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Returns whether two tensors whose spans of memory overlap share an entry; two columns of a matrix do not."""
    if one is other or one.itemsize != other.itemsize or _same_place(one, other):
        return True
    first, second = sorted((one, other), key=Tensor.data_ptr)
    offset, rest = divmod(second.data_ptr() - first.data_ptr(), one.itemsize)
    if rest:
        return True
    ends = [
        1 + start + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        for start, tensor in ((0, first), (offset, second))
    ]
    taken = torch.zeros(max(ends), dtype=torch.bool, device="cpu")
    taken.as_strided(first.shape, first.stride()).fill_(True)
    return bool(taken.as_strided(second.shape, second.stride(), offset).any())


def _fused(model: nn.Module, fast_paths: bool) -> Iterator[tuple[nn.Module, tuple[nn.Module, ...]]]:
    for parent in model.modules():
        if isinstance(parent, nn.MultiheadAttention):
            yield parent, (parent.out_proj,)
        elif fast_paths and isinstance(parent, nn.TransformerEncoderLayer):
            yield parent, (parent.linear1, parent.linear2)
