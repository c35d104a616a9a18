"""What all model-level functions ask about a layer: where its inputs are, and whether its weight is its own."""

from collections.abc import Callable, Iterator

from torch import nn

Where = Callable[[str, nn.Module], bool]


def check_model(model: nn.Module) -> None:
    """Rejects what is not a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def input_dim(module: nn.Module) -> int | None:
    """The weight dimension of the inputs; None for a module that is no Linear, Conv2d or transformers' Conv1D."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        return 1
    names = ((base.__module__, base.__name__) for base in type(module).__mro__)
    return 0 if ("transformers.pytorch_utils", "Conv1D") in names else None


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer is transformers' ``Conv1D`` itself: a linear layer with its weight as ``[inputs, outputs]``."""
    return input_dim(layer) == 0 and type(layer).__name__ == "Conv1D"


def borrowed(model: nn.Module) -> dict[nn.Module, str]:
    """Why a module's weight is not its own: others hold it too, or read it without calling the module."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                address = parameter.data_ptr() or id(parameter)  # empty and meta tensors have no address
                owners.setdefault(address, []).append((f"{name}.{key}".lstrip("."), module))
    reasons: dict[nn.Module, str] = {}
    for holders in owners.values():
        for name, module in holders:
            others = [other for other, owner in holders if owner is not module]
            if others and name.endswith("weight"):
                reasons[module] = f"its weight is tied to {', '.join(others)}"
    for parent, children in _fused(model):
        for child in children:
            reasons[child] = f"{type(parent).__name__} reads its weight without calling it"
    return reasons


def _fused(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[nn.Module, ...]]]:
    for parent in model.modules():
        if isinstance(parent, nn.MultiheadAttention):
            yield parent, (parent.out_proj,)
        elif isinstance(parent, nn.TransformerEncoderLayer):
            yield parent, (parent.linear1, parent.linear2)
