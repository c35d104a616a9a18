"""One pass of one batch up to one stage, in which finished stages return what they returned before."""

from collections import Counter
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeAlias

from .lineage import Lineage, Source
from .output_store import OutputStore, StoredOutput

Call: TypeAlias = "partial[Any]"  # a stage's forward with its arguments


class PassDone(BaseException):
    """Ends a pass that has run its stage as often as the model does. Not an Exception, so that no model catches it.

    Args:
        stage: the stage in which, or before which, the pass ended.
    """

    def __init__(self, stage: int) -> None:
        super().__init__(stage)
        self.stage = stage


class StaleOutput(BaseException):
    """Ends a pass that needs an output that was dropped."""


class PartialPass:
    """A pass: decides at every stage that the model enters whether the stage runs or its stored output is returned.

    Args:
        stage: the pass ends when this stage has run ``entries`` times.
        entries: how often the dense model ran it. With 0 the pass ends after one run, or before any other stage that is
            not finished.
        finished: stages whose weights do not change any more.
        store: where outputs are kept.
        returned: called with every output of ``stage``.
        keeping: called with the call of a finished stage whose output has just been stored.
        kept: the outputs of finished stages from earlier passes of this batch, which the pass updates; None runs all
            stages.
    """

    def __init__(
        self,
        stage: int,
        entries: int,
        finished: Collection[int],
        store: OutputStore,
        returned: Callable[[Any], None] = lambda _: None,
        keeping: Callable[[Call], object] = lambda _: None,
        *,
        kept: dict[Source, StoredOutput] | None,
    ) -> None:
        self._stage, self._finished, self._store = stage, finished, store
        self._left, self._is_new = max(entries, 1), entries == 0
        self._kept: dict[Source, StoredOutput] = {} if kept is None else kept
        self._entered: Counter[int] = Counter()
        self._inside = False
        self._follows = kept is not None  # until an unfinished stage runs: everything after it will change
        self._returned, self._keeping = returned, keeping
        self._lineage = Lineage()

    def following(self) -> AbstractContextManager[None]:
        """Returns the context in which the model must run."""
        return self._lineage.following() if self._follows else nullcontext()

    def enter(self, stage: int, call: Call) -> Any:
        """Runs a stage, or returns its stored output.

        Raises:
            PassDone: the stage has run as often as the model runs it.
            StaleOutput: an output is needed that was dropped; no unfinished stage has run yet.
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

    def _run(self, stage: int, call: Call) -> Any:
        self._follows = self._follows and stage in self._finished
        output = call()
        if stage == self._stage:
            self._left -= 1
            self._returned(output)
        return output

    def _replayed(self, key: Source, call: Call) -> Any:
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
