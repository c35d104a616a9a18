"""Shows what layers are run on."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .._batches import layer_input
from .._forwards import around_forwards
from .layers import Layer

Record = Callable[[Layer, Tensor], None]


@contextmanager
def observe(layers: Iterable[Layer], record: Record) -> Iterator[None]:
    """Calls ``record(layer, x)`` with every input ``x`` that a layer has been run on, until the end."""

    def around(layer: Layer) -> Callable[..., Any]:
        def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            record(layer, layer_input(args, kwargs))
            return output

        return run

    with around_forwards({layer.module: around(layer) for layer in layers}):
        yield
