"""Partial passes of all batches, in which finished stages are not computed again but return their earlier outputs.

Every pass is an ordinary call of the model, in the caller's thread and all modes that are on, and ends when its stage
has run. What the model computes between stages is computed again in every pass. The output of a finished stage is kept,
in bounded memory, as long as a tensor that was computed from it is alive; an output that is not kept is computed again.

A stage may do more than return its output: for instance, it may add to a cache that other stages read. That cannot be
observed, so the path of each batch through the stages is tried on the dense model first. In that trial, every stage
whose output was stored runs once more on other numbers, as it would for other batches, which overwrites anything it
left behind. If a stage then returns another output than in a plain pass, the batches on this path take plain partial
passes, in which finished stages are computed again.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..._forwards import around_forwards
from ..._trees import copied, map_tree, tensors_in
from ..layers import PrunableLayer
from .batch_runner import BatchRunner
from .inputs import LayerInputs
from .lineage import Source
from .observe import observe
from .order import StageOrder, StagePath
from .output_store import OutputStore, StoredOutput
from .partial_pass import PartialPass, PassDone, StageCall, StaleOutput
from .statistics import Exchange

COMPARED = 4096  # entries of an output that the trial compares


class Replay:
    """The partial passes of all batches, stage after stage. A stage is finished when its layers are pruned."""

    def __init__(
        self, found: StageOrder, runner: BatchRunner, store: OutputStore, finished: Collection[int], exchange: Exchange
    ) -> None:
        self._stages, self._paths, self._runner, self._store = found.stages, found.paths, runner, store
        self._finished = set(finished)
        self._ends: dict[int, int | None] = {}  # by batch: the first unfinished stage that its latest pass came to
        self._now: PartialPass | _Outputs | None = None
        first = {path: index for index, path in reversed(list(enumerate(self._paths)))}
        replayed = {path: self._pays(path) and self._can_be_replayed(path, index) for path, index in first.items()}
        if not all(exchange(all(replayed.values()))):  # processes that share sharded weights must run in step
            replayed = dict.fromkeys(replayed, False)
        kept = [dict[Source, StoredOutput]() if replayed[path] else None for path in self._paths]
        self._kept: list[dict[Source, StoredOutput] | None] = kept

    def collect(self, stage: int, make_inputs: Callable[[PrunableLayer], LayerInputs]) -> list[LayerInputs]:
        """Runs every batch up to the stage, and returns the inputs of the stage's layers, in the order of the layers.

        A batch that does not enter the stage in the dense model may do so after other stages are pruned, for instance
        if their outputs decide on an early exit. So it runs too, and ends before any other unfinished stage.
        """
        inputs = {layer: make_inputs(layer) for layer in self._stages[stage].layers}

        def record(layer: PrunableLayer, x: Any) -> None:
            inputs[layer].update(x, self._runner.current)

        with observe(inputs, record), self._passing():
            for index, path in enumerate(self._paths):
                if stage not in path and self._ends.get(index, stage) != stage:
                    continue
                start = partial(PartialPass, stage, path.count(stage), self._finished, self._store)
                end = self._run(index, start, self._kept[index])
                if stage in path or end == stage:
                    self._ends.pop(index, None)
                else:
                    self._ends[index] = end
        return list(inputs.values())

    def finish(self, stage: int) -> None:
        """Marks a stage as finished: its layers are pruned."""
        self._finished.add(stage)

    def _run(
        self, index: int, start: Callable[..., PartialPass], kept: dict[Source, StoredOutput] | None
    ) -> int | None:
        """Runs a batch; returns the stage at which its pass ended, or None if the model ran to its end."""
        self._now = now = start(kept=kept)
        try:
            with now.following():
                self._runner.run(index)
            return None
        except PassDone as done:
            return done.stage
        except StaleOutput:  # nothing has been recorded yet
            assert kept is not None
            for each in kept.values():
                each.drop()
            kept.clear()
            return self._run(index, start, kept)
        finally:
            self._now = None

    @contextmanager
    def _passing(self) -> Iterator[None]:
        def around(stage: int) -> Callable[..., Any]:
            def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                call = partial(forward, *args, **kwargs)
                return call() if self._now is None else self._now.enter(stage, call)

            return run

        arounds = {stage.module: around(index) for index, stage in enumerate(self._stages)}
        with self._runner.running(), around_forwards(arounds):
            yield

    def _pays(self, path: StagePath) -> bool:
        """Returns whether replay runs stages less often than plain partial passes would, including the trial.

        Replay runs each stage twice for each batch, and four times in the trial.
        """
        batches = self._paths.count(path)
        return batches * (len(path) + 1) > 4 * (batches + 2)

    def _can_be_replayed(self, path: StagePath, index: int) -> bool:
        """Returns whether every stage returns the same in replayed passes of a batch as in a plain one."""
        plain, kept = _Outputs(), dict[Source, StoredOutput]()
        try:
            with self._passing():
                self._now = plain
                self._runner.run(index)
                for stage in sorted(set(path)):
                    replayed = _Outputs()
                    shown = partial(replayed.add, stage), _overwrite
                    finished = self._finished | set(range(stage))
                    self._run(
                        index, partial(PartialPass, stage, path.count(stage), finished, self._store, *shown), kept
                    )
                    if not replayed.equal(plain, stage):
                        return False
        except Exception:
            return False
        finally:
            self._now = None
            for each in kept.values():
                each.drop()
        return True


def _overwrite(call: StageCall) -> None:
    """Runs a stage on other numbers, which overwrites whatever the stage left behind on modules."""
    args, kwargs = map_tree(copied((call.args, call.keywords)), _halved, lambda value: value)
    call.func(*args, **kwargs)


def _halved(tensor: Tensor) -> Tensor:
    return tensor * 0.5 if tensor.is_floating_point() else tensor


class _Outputs:
    """A sample of the outputs of each stage in one pass, in order."""

    def __init__(self) -> None:
        self._of: dict[int, list[Tensor]] = {}

    def enter(self, stage: int, call: StageCall) -> Any:
        output = call()
        self.add(stage, output)
        return output

    def add(self, stage: int, output: Any) -> None:
        self._of.setdefault(stage, []).extend(
            _sampled(each) for each in tensors_in(output) if each.layout == torch.strided
        )

    def equal(self, other: "_Outputs", stage: int) -> bool:
        """Returns whether both have the same outputs of a stage, up to one rounding: a GPU may add in another order."""
        ours, theirs = self._of.get(stage, []), other._of.get(stage, [])
        return len(ours) == len(theirs) and all(map(_close, ours, theirs))


def _sampled(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    if flat.numel() <= COMPARED:
        return flat.clone()
    generator = torch.Generator().manual_seed(0)
    where = torch.randint(flat.numel(), (COMPARED,), generator=generator, device="cpu", dtype=torch.int64)
    return flat[where.to(flat.device)]


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    rounding = torch.finfo(one.dtype).eps * float(one.abs().nan_to_num(0.0, 0.0, 0.0).max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=rounding, equal_nan=True)
