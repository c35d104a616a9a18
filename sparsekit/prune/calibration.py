"""Which way layers are shown their inputs: all in one pass over the dense model, or stage after stage."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from typing import Any

from torch import nn

from .._batches import Forward, Progress, as_batches, run_batch
from .held import HeldBatches
from .inputs import Exchange, Gather, Inputs
from .layers import Layer
from .observe import observe
from .passes import Passes, check_count
from .replay import Replay
from .stages import split_stages
from .store import Store
from .survey import survey


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
    exchange: Exchange = lambda value: [value],
) -> Iterator[tuple[Sequence[Layer], Sequence[Inputs]]]:
    """Yields layers when their inputs are known; with ``sequential`` they must be pruned before the next are asked for.

    ``gather(layer)`` makes what a layer's inputs are summed up in. Stages with a layer in ``finished`` are pruned
    already, and are run as they are. While it waits, nothing hangs on the model. All processes that ``exchange`` joins
    get the same layers in the same order, also those that none of their own batches reached.
    """
    with closing(Store()) as store:
        if not isinstance(batches, HeldBatches):
            batches = HeldBatches(as_batches(batches, reused=sequential), store if sequential else None)
        passes = Passes(model, batches, forward)
        if not sequential:
            with passes.running():
                inputs = _all_at_once(model, layers, gather, progress(batches), forward)
            yield layers, inputs
            return
        found = survey(split_stages(model, layers), passes, exchange)
        done = {i for i, stage in enumerate(found.stages) if {layer.name for layer in stage.layers} & set(finished)}
        replay = Replay(found, passes, store, done, exchange)
        for index in progress([index for index in range(len(found.stages)) if index not in done]):
            yield found.stages[index].layers, replay.collect(index, gather)
            replay.finish(index)


def _all_at_once(
    model: nn.Module, layers: Sequence[Layer], gather: Gather, batches: Any, forward: Forward | None
) -> list[Inputs]:
    inputs = {layer: gather(layer) for layer in layers}
    batch: Any = None

    def record(layer: Layer, x: Any) -> None:
        inputs[layer].update(x, batch)

    count = 0
    with observe(inputs, record):
        for count, batch in enumerate(batches, start=1):  # noqa: B007
            run_batch(model, batch, forward)
    check_count(count)
    return list(inputs.values())
