"""One candidate for one layer: the ways in which it may take the plain layer's place, or why there is none."""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

from .._timing import PARITY_RATIO, RATIO, WINS, Timing, Timings
from .candidates import DENSE_COPY, Candidate, no_dense_copy_reason
from .sites import LayerSite
from .sizes import Size, at_size

Objective = Literal["speed", "size"]
MAX_WRONG = 3  # wrong kernels that a remark names


class Option(NamedTuple):
    """A way in which a candidate may take a layer's place.

    Args:
        candidate: the form.
        kernels: the kernel that answers each size.
        nbytes: the bytes of the weight in the layout of these kernels, with its dense copy if there is one.
        seconds: the time of all calls in the batches.
    """

    candidate: Candidate
    kernels: dict[Size, str]
    nbytes: int
    seconds: float


class Rejection(NamedTuple):
    """Why a candidate does not take a layer's place.

    Args:
        reason: in words.
        ratio: of its fastest kernel, at the size where that is slowest; -1 where nothing right was measured.
        undecided: whether the machine was too busy to measure on.
    """

    reason: str
    ratio: float = -1.0
    undecided: bool = False


class Trial:
    """A candidate for one layer, and what was measured of its kernels.

    A kernel that was wrong at one size is refused at all of them. Another one may replace the plain layer at a
    token count where it is clearly faster; where it is not slower, if the form is wanted for its size, or if the kernel
    is that of a dense copy.

    Args:
        site: the layer.
        candidate: the form.
        timings: what was measured, by size of the input and kernel.
        objective: ``"speed"`` or ``"size"``.
    """

    def __init__(self, site: LayerSite, candidate: Candidate, timings: dict[Size, Timings], objective: Objective):
        self.site, self.candidate = site, candidate
        self.nbytes = candidate.nbytes(site.layer)
        self.for_size = objective == "size" and self.nbytes < site.layer.weight.nbytes
        self.kernel_sets = candidate.kernel_sets(
            site.layer, {name for measured in timings.values() for name in measured}
        )
        self.own = frozenset[str]().union(*self.kernel_sets)
        self.wrong: dict[str, Size] = {}  # the first size at which a kernel was wrong
        for size, measured in timings.items():
            for name in [name for name, timing in measured.items() if timing is None]:
                self.wrong.setdefault(name, size)
        self.has_copy = candidate.allows_copy and any(DENSE_COPY in measured for measured in timings.values())
        self.right = {
            size: {name: timing for name, timing in measured.items() if timing and name not in self.wrong}
            for size, measured in timings.items()
        }

    def options(self) -> Iterator[Option]:
        """Yields the ways to take the layer's place: in each layout, without and with a dense copy."""
        for kernels in self.kernel_sets:
            with_copy = self.has_copy and self.candidate.can_add_copy(kernels)
            for usable in [kernels, kernels | {DENSE_COPY}] if with_copy else [kernels]:
                fastest = {size: self._fastest(size, usable) for size in self.right}
                chosen = {size: name for size, name in fastest.items() if name is not None}
                if len(chosen) < len(fastest) or set(chosen.values()) == {DENSE_COPY}:
                    continue
                yield self._option(chosen)

    def any_way(self) -> Option | None:
        """Returns the fastest way to take this form, also where the plain layer is faster; None without a right one."""
        ways = []
        for kernels in self.kernel_sets:
            right = [{name: each for name, each in self.right[size].items() if name in kernels} for size in self.right]
            if not all(right):
                continue
            chosen = {
                size: min(timings.items(), key=lambda item: item[1].seconds)[0]
                for size, timings in zip(self.right, right, strict=True)
            }
            ways.append(self._option(chosen))
        return min(ways, key=lambda way: way.seconds, default=None)

    def _option(self, chosen: dict[Size, str]) -> Option:
        nbytes = self.nbytes + self.candidate.extra_bytes(self.site.layer, chosen.values())
        seconds = [self.site.calls[size] * self.right[size][name].seconds for size, name in chosen.items()]
        return Option(self.candidate, chosen, nbytes, sum(seconds))

    def rejection(self) -> Rejection:
        """Returns why there is no option: what the kernels that came closest were measured at, where they are worst."""
        found = [self._rejection(kernels) for kernels in self.kernel_sets if self._answers(kernels)]
        if found:
            return max(found, key=lambda each: (each.undecided, each.ratio))
        if self._answers(self.own):
            return self._rejection(self.own)
        return Rejection(f"a wrong result {at_size(min(self.wrong[name] for name in self.own & self.wrong.keys()))}")

    def _answers(self, kernels: frozenset[str]) -> bool:
        """Returns whether some of these kernels were right at every size."""
        return all(kernels & timings.keys() for timings in self.right.values())

    def _rejection(self, kernels: frozenset[str]) -> Rejection:
        """Returns what the fastest of these kernels was measured at, at the size where that is worst."""
        best: dict[Size, tuple[str, Timing]] = {}
        for size, measured in self.right.items():
            timings = [(name, timing) for name, timing in measured.items() if name in kernels]
            best[size] = max(timings, key=lambda each: (self._accepts(each[1]), each[1].ratio))
        lost = {size: timing for size, (_, timing) in best.items() if not self._accepts(timing)}
        if not lost:
            ratio = min(timing.ratio for _, timing in best.values())
            return Rejection("no single layout is faster at every number of tokens", ratio)
        worst = min(lost, key=lambda size: (lost[size].undecided, lost[size].ratio))
        (name, timing), won = best[worst], [str(size) for size in best if size not in lost]
        ratio, wins = (math.floor(100 * each + 1e-9) / 100 for each in (timing.ratio, timing.wins))
        by = f" by {name}" if len(kernels) == 1 and name != self.candidate.name else ""
        reason = f"{ratio:.2f}x, {wins:.0%} won {at_size(worst)}{by}{self._needed(timing)}"
        if timing.undecided:
            busy = f"undecided, the machine is busy (spread {timing.spread:.1f})"
            return Rejection(f"{busy}: {reason}", timing.ratio, undecided=True)
        copy = self.candidate.allows_copy
        with_copy = copy and (self.candidate.can_add_copy(kernels) or not self.has_copy)  # or it could be tried
        if won and not self.candidate.dense and not self.for_size and with_copy:
            reason += f", faster at {', '.join(won)}: {self._advice(self.right[worst].get(DENSE_COPY))}"
        return Rejection(reason, timing.ratio)

    def _needed(self, timing: Timing) -> str:
        """Returns what a ratio of 1 or more falls short of; empty for one below."""
        if self.for_size or timing.ratio < 1:
            return ""
        short = [f"{RATIO}x"] * (timing.ratio < RATIO) + [f"{WINS:.0%}"] * (timing.wins < WINS)
        return f" ({' and '.join(short)} {'is' if len(short) == 1 else 'are'} needed)"

    def _advice(self, copy: Timing | None) -> str:
        """Returns what can be done about a size at which the candidate is too slow, if it wins at others."""
        if DENSE_COPY in self.wrong:
            return f"a dense copy gives a wrong result {at_size(self.wrong[DENSE_COPY])}"
        if copy is not None:
            return f"a dense copy has {copy.ratio:.2f}x there ({PARITY_RATIO}x is needed)"
        return no_dense_copy_reason(self.site.layer) or "try keep_dense=True"

    def remarks(self) -> list[str]:
        """Returns what else there is to say: which of several kernels were wrong, and which the layer cannot have."""
        only = {self.candidate.name} if len(self.own) == 1 else set()  # of which `rejection` says it
        wrong = [name for name in self.wrong if name in (self.own | {DENSE_COPY}) - only]
        named = [f"{name}: a wrong result {at_size(self.wrong[name])}" for name in wrong[:MAX_WRONG]]
        more = [f"{len(wrong) - MAX_WRONG} more wrong results"] if len(wrong) > MAX_WRONG else []
        return [*named, *more, *filter(None, [self.candidate.remark(self.site.layer)])]

    def _fastest(self, size: Size, usable: frozenset[str]) -> str | None:
        """Returns the fastest kernel that may replace the plain layer at a size, or None."""
        timings = {name: timing for name, timing in self.right[size].items() if name in usable}
        accepted = [name for name, timing in timings.items() if self._accepts(timing, dense_copy=name == DENSE_COPY)]
        return min(accepted, key=lambda name: timings[name].seconds, default=None)

    def _accepts(self, timing: Timing, *, dense_copy: bool = False) -> bool:
        """Returns whether a kernel may replace the plain layer."""
        return timing.faster or ((self.for_size or dense_copy) and timing.ratio >= PARITY_RATIO)
