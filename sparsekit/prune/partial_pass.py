"""One pass of one batch, as far as one stage, in which finished stages give what they gave before."""

from collections import Counter
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeAlias

from .lineage import Lineage, Source
from .store import Kept, Store

Call: TypeAlias = "partial[Any]"  # of a stage's forward


class Done(BaseException):
    """Ends a pass that has shown its stage everything. Not an Exception, so no model swallows it.

    Args:
        stage: where the pass ended: in this one, or before it.
    """

    def __init__(self, stage: int) -> None:
        super().__init__(stage)
        self.stage = stage


class Stale(BaseException):
    """Ends a pass that needs an output which was dropped."""


class PartialPass:
    """What is done at every stage that the model enters.

    Args:
        stage: the pass ends when this one has run ``entries`` times.
        entries: how often the dense model ran it; with 0 the pass ends after one run, or before any other stage that is
            not finished.
        finished: stages whose weights do not change any more.
        store: where outputs are kept.
        returned: called with what the stage returns, every time.
        keeping: called with the call of a finished stage whose output has just been kept.
        kept: what finished stages returned in earlier passes of the batch, brought up to date; None runs all of them.
    """

    def __init__(
        self,
        stage: int,
        entries: int,
        finished: Collection[int],
        store: Store,
        returned: Callable[[Any], None] = lambda _: None,
        keeping: Callable[[Call], object] = lambda _: None,
        *,
        kept: dict[Source, Kept] | None,
    ) -> None:
        self._stage, self._finished, self._store = stage, finished, store
        self._left, self._is_new = max(entries, 1), entries == 0
        self._kept: dict[Source, Kept] = {} if kept is None else kept
        self._entered: Counter[int] = Counter()
        self._inside = False
        self._follows = kept is not None  # until a stage runs that is not finished: what comes after it will change
        self._returned, self._keeping = returned, keeping
        self._lineage = Lineage()

    def following(self) -> AbstractContextManager[None]:
        """What surrounds the pass."""
        return self._lineage.following() if self._follows else nullcontext()

    def enter(self, stage: int, call: Call) -> Any:
        """Runs a stage, or gives what it returned before.

        Raises:
            Done: the pass has shown its stage everything.
            Stale: an output is needed that was dropped; nothing unfinished has run yet.
        """
        if self._inside:
            output = self._run(stage, call)
        else:
            if self._is_new and stage != self._stage and stage not in self._finished:
                raise Done(stage)
            key = stage, self._entered[stage]
            self._entered[stage] += 1
            self._inside = True
            try:
                output = self._replayed(key, call) if self._follows else self._run(stage, call)
            finally:
                self._inside = False
        if self._left <= 0 and not self._inside:
            raise Done(self._stage)
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
                raise Stale
            output = self._run(key[0], call)
            if not self._follows:  # it is not finished, or something in it is not
                for each in self._kept.keys() - needed:
                    self._kept[each].drop()
                return output
            if (kept := self._store.keep(output)) is None:
                lineage.pin(needed)  # it runs again in every pass, on what it needs
            else:
                self._kept[key] = kept
                lineage.mark(output, [key])
                self._keeping(call)
        lineage.resume()
        return output
