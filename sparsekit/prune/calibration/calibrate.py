"""The entry point of calibration, which yields the layers of one stage after the other with their inputs."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..._batches import Forward, Progress, as_batches, check_functions, run_batch
from ..layers import PrunableLayer
from .batch_runner import BatchRunner, check_count
from .held_batches import HeldBatches
from .inputs import LayerInputs
from .observe import observe
from .order import find_order
from .output_store import OutputStore
from .padding import TokenMask
from .ranks import Group, Ranks
from .replay import Replay
from .stages import split_stages

MakeInputs = Callable[[PrunableLayer], LayerInputs]


@dataclass(frozen=True)
class Calibration:
    """Options of how a model is run on its calibration batches.

    Args:
        sequential: whether every stage is calibrated on the outputs of the pruned stages before it, which gives better
            masks. A stage is an item of an outermost ModuleList or Sequential, or a layer outside them. Each batch runs
            through each stage three times in all: to find the order of the stages, to collect the inputs, and after the
            stage is pruned. The model is called from its start for every stage, but finished stages only return what
            they returned before, in bounded memory; if a stage leaves more behind than its output, such as a cache that
            others read, the finished stages run again. False calibrates all layers in one pass over the dense model.
        forward: ``forward(model, batch)`` runs a batch. By default a mapping is called as ``model(**batch)``, a tuple
            or list as ``model(*batch)``, and anything else as ``model(batch)``.
        token_mask: ``token_mask(batch)`` returns which tokens of a batch count, ``[batch, tokens]`` with 0 for padding,
            or None if all of them do. By default, if a batch is a mapping, this is its ``attention_mask``, and for a
            decoder its ``decoder_attention_mask``; a mask that is not ``[batch, tokens]`` is not about padding and not
            used. All inputs of a convolution count.
        batchnorm: whether the statistics of every BatchNorm that runs after a pruned layer are estimated again, in one
            more pass over the batches (``reestimate_batchnorm_``), because those of the dense model do not fit any
            more.
        group: the processes that prune the model together if ``torch.distributed`` is initialized. Each makes the same
            call with its own batches; their statistics are added up, and all get the same masks and weights.
            ``"world"`` is all processes, ``"alone"`` only this one; or a process group.

    Raises:
        TypeError: ``forward`` or ``token_mask`` cannot be called.
    """

    sequential: bool = True
    forward: Forward | None = None
    token_mask: TokenMask | None = None
    batchnorm: bool = True
    group: Group = "world"

    def __post_init__(self) -> None:
        check_functions(forward=self.forward, token_mask=self.token_mask)


def calibrate(
    model: nn.Module,
    layers: Sequence[PrunableLayer],
    make_inputs: MakeInputs,
    batches: Any,
    calibration: Calibration,
    ranks: Ranks,
    *,
    progress: Progress,
    finished: Collection[str] = (),
) -> Iterator[tuple[Sequence[PrunableLayer], Sequence[LayerInputs]]]:
    """Yields the layers of each stage with their inputs; the caller prunes them before asking for the next stage.

    Without ``calibration.sequential`` all layers come at once. While this generator waits, nothing is attached to the
    model. All processes get the same layers in the same order, also those that none of their own batches reached.

    Args:
        model: in evaluation mode.
        layers: the layers to calibrate.
        make_inputs: makes the object that collects a layer's inputs.
        batches: one batch or many, as ``prune_`` takes them, or ``HeldBatches``.
        calibration: how the model is run.
        ranks: the processes that calibrate together.
        progress: wraps the loop over the stages, or over the batches if there is only one pass.
        finished: names of layers that are pruned already: their stages run, but are not yielded.
    """
    forward = calibration.forward
    with closing(OutputStore()) as store:
        if not isinstance(batches, HeldBatches):
            reused = calibration.sequential
            batches = HeldBatches(as_batches(batches, reused=reused), store if reused else None)
        runner = BatchRunner(model, batches, forward)
        if not calibration.sequential:
            with runner.running():
                inputs = _collect_all(model, layers, make_inputs, progress(batches), forward)
            yield layers, inputs
            return
        order = find_order(split_stages(model, layers), runner, ranks.exchange)
        done = {i for i, stage in enumerate(order.stages) if {layer.name for layer in stage.layers} & set(finished)}
        replay = Replay(order, runner, store, done, ranks.exchange)
        for index in progress([index for index in range(len(order.stages)) if index not in done]):
            yield order.stages[index].layers, replay.collect(index, make_inputs)
            replay.finish(index)


def _collect_all(
    model: nn.Module,
    layers: Sequence[PrunableLayer],
    make_inputs: MakeInputs,
    batches: Any,
    forward: Forward | None,
) -> list[LayerInputs]:
    inputs = {layer: make_inputs(layer) for layer in layers}
    batch: Any = None

    def record(layer: PrunableLayer, x: Any) -> None:
        inputs[layer].update(x, batch)

    count = 0
    with observe(inputs, record):
        for count, batch in enumerate(batches, start=1):  # noqa: B007
            run_batch(model, batch, forward)
    check_count(count)
    return list(inputs.values())
