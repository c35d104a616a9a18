"""Partial passes of all batches, in which finished stages are not computed again but return their earlier outputs.

Every pass is an ordinary call of the model, on the caller's thread and under all its modes, which ends when its stage
has run. Everything between the stages is computed again. The output of a finished stage is kept, in bounded memory, as
long as a tensor that was computed from it is alive; an output that is not kept is computed again.

A stage may do more than return its output: it may add to a cache that other stages read, for instance. That cannot be
observed, so every route is tried on the dense model first. In that trial each stored stage is run again on other
numbers, as other batches would, which overwrites anything it left behind. If a stage then returns another output than
in a plain pass, the batches on that route take plain partial passes, which repeat the finished stages.
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
from .inputs import LayerInputs
from .lineage import Source
from .observe import observe
from .order import Route, StageOrder
from .output_store import OutputStore, StoredOutput
from .partial_pass import Call, PartialPass, PassDone, StaleOutput
from .passes import Passes
from .statistics import Exchange

COMPARED = 4096  # entries of an output that the trial compares


class Replay:
    """The partial passes of all batches, stage after stage. A stage is finished when its layers are pruned."""

    def __init__(
        self, found: StageOrder, passes: Passes, store: OutputStore, finished: Collection[int], exchange: Exchange
    ) -> None:
        self._stages, self._routes, self._passes, self._store = found.stages, found.routes, passes, store
        self._finished = set(finished)
        self._ends: dict[int, int | None] = {}  # by batch: the first stage on its way that is not finished
        self._now: PartialPass | _Outputs | None = None
        first = {route: index for index, route in reversed(list(enumerate(self._routes)))}
        replayed = {route: self._pays(route) and self._can_be_replayed(route, index) for route, index in first.items()}
        if not all(exchange(all(replayed.values()))):  # processes that share sharded weights must run in step
            replayed = dict.fromkeys(replayed, False)
        kept = [dict[Source, StoredOutput]() if replayed[route] else None for route in self._routes]
        self._kept: list[dict[Source, StoredOutput] | None] = kept

    def collect(self, stage: int, make_inputs: Callable[[PrunableLayer], LayerInputs]) -> list[LayerInputs]:
        """Runs every batch up to the stage, and returns the inputs of the stage's layers, in their order.

        A batch that does not enter the stage in the dense model may enter it now that other stages are pruned, for
        instance if an early exit depends on their outputs. So it runs too, and ends before any other unfinished stage.
        """
        inputs = {layer: make_inputs(layer) for layer in self._stages[stage].layers}

        def record(layer: PrunableLayer, x: Any) -> None:
            inputs[layer].update(x, self._passes.current)

        with observe(inputs, record), self._passing():
            for index, route in enumerate(self._routes):
                if stage not in route and self._ends.get(index, stage) != stage:
                    continue
                start = partial(PartialPass, stage, route.count(stage), self._finished, self._store)
                end = self._run(index, start, self._kept[index])
                if stage in route or end == stage:
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
                self._passes.run(index)
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
        with self._passes.running(), around_forwards(arounds):
            yield

    def _pays(self, route: Route) -> bool:
        """Returns whether replay runs stages less often than plain partial passes do, the trial included.

        Replay runs each stage twice per batch, and four times in the trial.
        """
        batches = self._routes.count(route)
        return batches * (len(route) + 1) > 4 * (batches + 2)

    def _can_be_replayed(self, route: Route, index: int) -> bool:
        """Returns whether every stage returns the same in replayed passes of a batch as in a plain one."""
        plain, kept = _Outputs(), dict[Source, StoredOutput]()
        try:
            with self._passing():
                self._now = plain
                self._passes.run(index)
                for stage in sorted(set(route)):
                    replayed = _Outputs()
                    shown = partial(replayed.add, stage), _overwrite
                    finished = self._finished | set(range(stage))
                    self._run(
                        index, partial(PartialPass, stage, route.count(stage), finished, self._store, *shown), kept
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


def _overwrite(call: Call) -> None:
    """Runs a stage on other numbers, so that whatever it left on modules belongs to another pass."""
    args, kwargs = map_tree(copied((call.args, call.keywords)), _halved, lambda value: value)
    call.func(*args, **kwargs)


def _halved(tensor: Tensor) -> Tensor:
    return tensor * 0.5 if tensor.is_floating_point() else tensor


class _Outputs:
    """A sample of the outputs of each stage in one pass, in order."""

    def __init__(self) -> None:
        self._of: dict[int, list[Tensor]] = {}

    def enter(self, stage: int, call: Call) -> Any:
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
