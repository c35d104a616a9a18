"""A pass of one batch up to one stage, in which finished stages return what they returned before."""

from collections import Counter
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeAlias

from .lineage import Lineage, Source
from .output_store import OutputStore, StoredOutput

StageCall: TypeAlias = "partial[Any]"  # a stage's forward with its arguments


class PassDone(BaseException):
    """Raised to end a pass that has run its stage as often as the model does.

    It is not an Exception, so that no model catches it.

    Args:
        stage: the stage in which, or before which, the pass ended.
    """

    def __init__(self, stage: int) -> None:
        super().__init__(stage)
        self.stage = stage


class StaleOutput(BaseException):
    """Raised to end a pass that needs an output that was dropped."""


class PartialPass:
    """A pass that runs each stage that the model enters, or returns the stage's stored output instead.

    Args:
        stage: the pass ends when this stage has run ``entries`` times.
        entries: how often the dense model ran the stage. With 0 the pass ends after one run, or before any other stage
            that is not finished.
        finished: the stages that are pruned.
        store: keeps outputs.
        returned: is called with every output of ``stage``.
        keeping: is called with the call of a finished stage when its output has been stored.
        kept: the outputs of finished stages from earlier passes of this batch, which the pass updates; None if all
            stages run.
    """

    def __init__(
        self,
        stage: int,
        entries: int,
        finished: Collection[int],
        store: OutputStore,
        returned: Callable[[Any], None] = lambda _: None,
        keeping: Callable[[StageCall], object] = lambda _: None,
        *,
        kept: dict[Source, StoredOutput] | None,
    ) -> None:
        self._stage, self._finished, self._store = stage, finished, store
        self._left, self._is_new = max(entries, 1), entries == 0
        self._kept: dict[Source, StoredOutput] = {} if kept is None else kept
        self._entered: Counter[int] = Counter()
        self._inside = False
        self._follows = kept is not None  # False once an unfinished stage runs: what comes after it will change
        self._returned, self._keeping = returned, keeping
        self._lineage = Lineage()

    def following(self) -> AbstractContextManager[None]:
        """Returns the context in which the model has to run."""
        return self._lineage.following() if self._follows else nullcontext()

    def enter(self, stage: int, call: StageCall) -> Any:
        """Runs a stage, or returns its stored output.

        Raises:
            PassDone: the stage has run as often as the model runs it.
            StaleOutput: the pass needs an output that was dropped; no unfinished stage has run yet.
        """
        if self._inside:
            output = self._run(stage, call)
        else:
            if self._is_new and stage != self._stage and stage not in self._finished:
                raise PassDone(stage)
            key = stage, self._entered[stage]
            self._entered[stage] += 1
            self._inside = True
            try:
                output = self._replayed(key, call) if self._follows else self._run(stage, call)
            finally:
                self._inside = False
        if self._left <= 0 and not self._inside:
            raise PassDone(self._stage)
        return output

    def _run(self, stage: int, call: StageCall) -> Any:
        self._follows = self._follows and stage in self._finished
        output = call()
        if stage == self._stage:
            self._left -= 1
            self._returned(output)
        return output

    def _replayed(self, key: Source, call: StageCall) -> Any:
        lineage = self._lineage
        lineage.pause()
        if key in self._kept and key[0] in self._finished:
            output = self._kept[key].load()
            lineage.mark(output, [key])
        else:
            needed = lineage.alive()
            if any(self._kept[each].dropped for each in needed):
                raise StaleOutput
            output = self._run(key[0], call)
            if not self._follows:  # the stage, or one inside it, is not finished
                for each in self._kept.keys() - needed:
                    self._kept[each].drop()
                return output
            if (kept := self._store.keep(output)) is None:
                lineage.pin(needed)  # the stage runs again in every pass, and needs its inputs
            else:
                self._kept[key] = kept
                lineage.mark(output, [key])
                self._keeping(call)
        lineage.resume()
        return output
