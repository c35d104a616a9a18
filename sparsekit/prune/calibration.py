"""Which way layers are shown their inputs: in one pass, block after block in one pass, or in partial passes."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import nn

from .._batches import Forward, Progress, as_batches
from .calibrate import Block, collect, execution_order, split_blocks
from .inputs import Gather, Inputs
from .layers import Layer
from .stream import stream


def calibrated(
    model: nn.Module,
    layers: Sequence[Layer],
    gather: Gather,
    batches: Any,
    *,
    sequential: bool,
    forward: Forward | None,
    progress: Progress,
    finished: Collection[str] = (),
) -> Iterable[tuple[Sequence[Layer], Sequence[Inputs]]]:
    """Yields layers when their inputs are known; with ``sequential`` they must be pruned before the next are asked for.

    ``gather(layer)`` makes what a layer's inputs are summed up in. Blocks with a layer in ``finished`` are pruned
    already, and are run as they are.
    """
    batches = as_batches(batches, reused=sequential)
    if not sequential:
        yield layers, collect(model, Block(model, tuple(layers)), gather, progress(batches), forward)
        return
    blocks, once = execution_order(model, split_blocks(model, layers), batches, forward)
    blocks = [block for block in blocks if not {layer.name for layer in block.layers} & set(finished)]
    if once:
        streamed = stream(model, blocks, gather, batches, forward)
        for _, (block, inputs) in zip(progress(blocks), streamed, strict=True):
            yield block.layers, inputs
        return
    for block in progress(blocks):
        yield block.layers, collect(model, block, gather, batches, forward)
