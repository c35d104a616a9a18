"""Partial passes that do not repeat what is known: finished stages give the outputs that they gave before.

Every pass is an ordinary call of the model, on the caller's thread and under all its modes, that ends when its stage
has run. Between the stages everything is computed anew. What a finished stage returned is kept while a tensor is alive
that comes from it, in bounded memory; what is not kept is computed again. What a stage does beside its output, such as
adding to a cache that other stages read, nobody can see: so every route is tried on the dense model first, where what a
kept stage leaves behind is overwritten, as other batches overwrite it. Where a stage then returns something else than
in a plain pass, the batches on that route take plain partial passes.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._forwards import around_forwards
from .._trees import copied, map_tree, tensors_in
from .inputs import Exchange, Gather, Inputs
from .layers import Layer
from .lineage import Source
from .observe import observe
from .partial_pass import Call, Done, PartialPass, Stale
from .passes import Passes
from .store import Kept, Store
from .survey import Route, Survey

SAMPLE = 4096  # entries of an output that are compared


class Replay:
    """The partial passes of all batches, stage after stage; a stage is finished when its layers are pruned."""

    def __init__(
        self, found: Survey, passes: Passes, store: Store, finished: Collection[int], exchange: Exchange
    ) -> None:
        self._stages, self._routes, self._passes, self._store = found.stages, found.routes, passes, store
        self._finished = set(finished)
        self._ends: dict[int, int | None] = {}  # by batch: all that it enters before this stage is finished
        self._now: PartialPass | _Outputs | None = None
        first = {route: index for index, route in reversed(list(enumerate(self._routes)))}
        fit = {route: self._pays(route) and self._can_be_replayed(route, index) for route, index in first.items()}
        if not all(exchange(all(fit.values()))):  # processes that share weights must run in step
            fit = dict.fromkeys(fit, False)
        self._kept: list[dict[Source, Kept] | None] = [{} if fit[route] else None for route in self._routes]

    def collect(self, stage: int, gather: Gather) -> list[Inputs]:
        """Runs every batch that enters the stage as far as that, and returns what its layers were shown, in order.

        One that does not enter it in the dense model is tried: behind what is pruned by now it may, as where an exit
        depends on what a stage produces. It ends before any other stage that is not finished.
        """
        inputs = {layer: gather(layer) for layer in self._stages[stage].layers}

        def record(layer: Layer, x: Any) -> None:
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
        """Says that the layers of a stage are pruned."""
        self._finished.add(stage)

    def _run(self, index: int, start: Callable[..., PartialPass], kept: dict[Source, Kept] | None) -> int | None:
        """Runs a batch; returns the stage that its pass ended at, or None where the model came to its own end."""
        self._now = now = start(kept=kept)
        try:
            with now.following():
                self._passes.run(index)
            return None
        except Done as done:
            return done.stage
        except Stale:  # nothing has been recorded yet
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
        """Whether two runs of each stage, and four of the trial, are fewer than plain partial passes take."""
        batches = self._routes.count(route)
        return batches * (len(route) + 1) > 4 * (batches + 2)

    def _can_be_replayed(self, route: Route, index: int) -> bool:
        """Whether every stage returns in replayed passes of a batch what it returns in a plain one."""
        plain, kept = _Outputs(), dict[Source, Kept]()
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
    """Calls a stage on other numbers, so that what it has left on modules is not of this pass any more."""
    args, kwargs = map_tree(copied((call.args, call.keywords)), _halved, lambda value: value)
    call.func(*args, **kwargs)


def _halved(tensor: Tensor) -> Tensor:
    return tensor * 0.5 if tensor.is_floating_point() else tensor


class _Outputs:
    """A sample of what each stage returned in a pass, in this order."""

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
        """Whether both saw the same of a stage, but for one rounding: on a GPU sums may come out in another order."""
        ours, theirs = self._of.get(stage, []), other._of.get(stage, [])
        return len(ours) == len(theirs) and all(map(_close, ours, theirs))


def _sampled(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    if flat.numel() <= SAMPLE:
        return flat.clone()
    generator = torch.Generator().manual_seed(0)
    where = torch.randint(flat.numel(), (SAMPLE,), generator=generator, device="cpu", dtype=torch.int64)
    return flat[where.to(flat.device)]


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    rounding = torch.finfo(one.dtype).eps * float(one.abs().nan_to_num(0.0, 0.0, 0.0).max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=0.0, atol=rounding, equal_nan=True)
