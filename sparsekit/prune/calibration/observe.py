"""Records the inputs on which layers are run."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..._batches import layer_input
from ..._forwards import around_forwards
from ..layers import PrunableLayer
from .experts import watch_experts

Record = Callable[[PrunableLayer, Any], None]


@contextmanager
def observe(layers: Iterable[PrunableLayer], record: Record) -> Iterator[None]:
    """Calls ``record(layer, x)`` with every input ``x`` that a layer has been run on, until the end of the ``with``.

    For a layer of experts, ``x`` is a ``Product``: one for each product that one of the experts makes.
    """
    members: dict[nn.Module, list[PrunableLayer]] = {}
    for layer in layers:
        members.setdefault(layer.module, []).append(layer)

    def around(module: nn.Module, own: list[PrunableLayer]) -> Callable[..., Any]:
        experts = [layer for layer in own if layer.experts]

        def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            for layer in own:
                record(layer, layer_input(args, kwargs))
            return output

        def run_experts(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            with watch_experts(module, experts, record):
                return forward(*args, **kwargs)

        return run_experts if experts else run

    with around_forwards({module: around(module, own) for module, own in members.items()}):
        yield
