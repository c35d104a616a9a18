"""The parts of a run: their states are taken whole, also where FSDP2 shards them, and set all or none."""

import copy
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from .._optimizers import is_sharded, sharding, stepping_optimizers, trained_parameters
from .._undo import undoing
from .random_states import get_random_states, set_random_states
from .ranks import in_each


class Stateful(Protocol):
    """The part of a run that has a state: a model, an optimizer, a schedule, a scaler, an averaged model."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


def check_parts(parts: Mapping[str, Stateful]) -> None:
    """Checks the names of the parts, and that their states can be taken.

    Raises:
        ValueError: a name is no identifier, or a model is sharded by FSDP1.
    """
    for name, part in parts.items():
        if not name.isidentifier():
            raise ValueError(f"the name of a part must be an identifier, as its file is named by it, got {name!r}")
        if isinstance(part, nn.Module) and sharding(part) == "FullyShardedDataParallel":
            raise ValueError(f"{name} is flattened by FullyShardedDataParallel (FSDP1): use fully_shard (FSDP2)")


def get_states(parts: Mapping[str, Stateful]) -> dict[str, Any]:
    """Returns the state of each part by name. All processes call it; those of sharded parts are whole in the first."""
    return {name: _get(parts, name) for name in parts}


def set_states(parts: Mapping[str, Stateful], states: Mapping[str, Any], random: Mapping[str, Any]) -> None:
    """Sets all parts and the random states of this process, or if one does not fit in any process, none in all.

    Raises:
        ValueError: a state does not fit; the message names the part.
    """

    def work() -> None:
        for name in parts:
            try:
                _set(parts, name, states[name])
            except Exception as error:
                raise ValueError(f"the state of {name} does not fit: {error}") from error
        set_random_states(random)

    with undoing() as undo:
        for part in parts.values():
            undo.callback(part.load_state_dict, _copy(part.state_dict()))
        undo.callback(set_random_states, get_random_states())
        in_each(work)
        undo.commit()


def _get(parts: Mapping[str, Stateful], name: str) -> Any:
    part = parts[name]
    if not _is_sharded(part):
        return part.state_dict()
    from torch.distributed.checkpoint import state_dict as library

    options = library.StateDictOptions(full_state_dict=True, cpu_offload=True)
    if isinstance(part, nn.Module):
        return library.get_model_state_dict(part, options=options)
    return library.get_optimizer_state_dict(*_model_of(parts, name), options=options)


def _set(parts: Mapping[str, Stateful], name: str, state: Any) -> None:
    part = parts[name]
    if not _is_sharded(part):
        part.load_state_dict(state)
        return
    from torch.distributed.checkpoint import state_dict as library

    options = library.StateDictOptions(full_state_dict=True)
    if isinstance(part, nn.Module):
        library.set_model_state_dict(part, state, options=options)
        return
    model, optimizer = _model_of(parts, name)
    if state["state"]:
        library.set_optimizer_state_dict(model, optimizer, state, options=options)
    else:  # plain SGD, which the library cannot set
        plain = optimizer.state_dict()
        for group, stored in zip(plain["param_groups"], state["param_groups"], strict=True):
            group.update({**stored, "params": group["params"]})
        optimizer.load_state_dict(plain)


def _is_sharded(part: Any) -> bool:
    """Returns whether a part is a model or an optimizer with parameters of which every process holds a part."""
    if isinstance(part, nn.Module):
        return any(map(is_sharded, part.parameters()))
    return isinstance(part, Optimizer) and any(map(is_sharded, trained_parameters((part,))))


def _model_of(parts: Mapping[str, Stateful], name: str) -> tuple[nn.Module, Optimizer]:
    """Returns the model whose parameters an optimizer trains, by which its state is named, and the optimizer."""
    (optimizer,) = stepping_optimizers(parts[name])
    trained = trained_parameters((optimizer,))
    for part in parts.values():
        if isinstance(part, nn.Module) and trained <= set(part.parameters()):
            return part, optimizer
    raise ValueError(f"{name} trains sharded parameters of no part of this run: restore their model in the same call")


def _copy(value: Any) -> Any:
    """Returns a copy of a state, whose tensors are on the CPU, as a GPU may have no room for them."""
    if isinstance(value, Tensor):
        return value.detach().clone() if is_sharded(value) else value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # of the same class, with its attributes
        for key, each in value.items():
            copied[key] = _copy(each)
        return copied
    if isinstance(value, list | tuple):
        return type(value)(map(_copy, value)) if type(value) in (list, tuple) else copy.deepcopy(value)
    return copy.deepcopy(value)
