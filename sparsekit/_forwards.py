"""Observes the forwards of a model's modules, and finds weights that are read without the forward of their layer."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ._state import FORWARD, get_attribute, remove_attribute, set_attribute
from ._trees import tensors_in
from ._undo import restoring

Around = Callable[..., Any]  # around(forward, *args, **kwargs) runs in place of forward(*args, **kwargs)


@contextmanager
def around_forwards(arounds: Mapping[nn.Module, Around]) -> Iterator[None]:
    """Replaces the forward of each module, until the end, by ``arounds[module](forward, *args, **kwargs)``.

    Unlike a hook, the function also gets direct calls of ``module.forward``, as in ``checkpoint(module.forward, x)``,
    and it may leave out the call of ``forward``. The hooks of the module are called as usual.
    """
    own = {module: get_attribute(module, FORWARD) for module in arounds}

    def restore() -> None:
        for module, forward in own.items():
            if forward is None:
                remove_attribute(module, FORWARD)
            else:
                set_attribute(module, FORWARD, forward)

    with restoring(restore):
        for module, around in arounds.items():
            set_attribute(module, FORWARD, _bound(around, module.forward))
        yield


def _bound(around: Around, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(forward, *args, **kwargs)

    return wrapper


@contextmanager
def watch_reads(model: nn.Module, layers: Iterable[nn.Module]) -> Iterator[dict[nn.Module, str]]:
    """Finds, until the end, the ``layers`` whose weight something else computes with, without calling the layer.

    Such a layer cannot be replaced, and its inputs cannot be observed.

    Yields:
        The reason for each such layer, which names the class of the innermost module that ran. A read that needs no
        values, as of ``layer.weight.dtype``, does not count.
    """
    running: list[nn.Module] = []
    reasons: dict[nn.Module, str] = {}

    def around(module: nn.Module) -> Callable[..., Any]:
        def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            running.append(module)
            try:
                return forward(*args, **kwargs)
            finally:
                running.pop()

        return run

    def read(layer: nn.Module) -> None:
        if layer not in running:
            reader = type(running[-1]).__name__ if running else "what runs the model"
            reasons.setdefault(layer, f"{reader} reads its weight without calling it")

    weights: dict[int, nn.Module] = {}
    for address, own in _by_address(layers).items():
        if len(own) == 1:  # weights that share memory cannot be told apart
            weights[address] = own[0]
    mode, before = _Reads(weights, read), torch._C._len_torch_function_stack()

    def restore() -> None:
        while torch._C._len_torch_function_stack() > before:
            mode.__exit__(None, None, None)

    with around_forwards({module: around(module) for module in model.modules()}), restoring(restore):
        mode.__enter__()
        yield reasons


class _Reads(TorchFunctionMode):
    """A mode that calls ``read`` with a layer whenever a tensor is computed from the memory of the layer's weight."""

    def __init__(self, weights: dict[int, nn.Module], read: Callable[[nn.Module], None]) -> None:
        super().__init__()
        self._weights, self._read = weights, read

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if next(iter(tensors_in(result)), None) is not None:
            for tensor in tensors_in((args, kwargs)):
                if (layer := self._weights.get(_address(tensor))) is not None:
                    self._read(layer)
        return result


def _by_address(layers: Iterable[nn.Module]) -> dict[int, list[nn.Module]]:
    found: dict[int, list[nn.Module]] = {}
    for layer in dict.fromkeys(layers):
        if (weight := layer._parameters.get("weight")) is not None:
            found.setdefault(_address(weight), []).append(layer)
    return found


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr() or -id(tensor)
    except (NotImplementedError, RuntimeError, ValueError):  # a wrapper, or a parameter that is not initialized
        return -id(tensor)
