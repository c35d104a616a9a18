"""The options for how ``compress_`` measures."""

import operator
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """Options for how ``compress_`` measures layers and the whole model.

    Args:
        tokens: token counts to measure at, such as ``(1, 128)``. They are added to those of the batches, each as one
            call. Without batches and without ``tokens``, 1, 16 and 128 are measured, on a GPU 2048 as well.
        budget: seconds for one shape at one token count, both measurements together, and for the whole model. At least
            9 rounds of a layer and 3 of the model are timed, however long they take.
        graphs: whether the model will run under CUDA graphs, so that the time of the host does not count.

    Raises:
        TypeError: ``budget`` is not a number, or ``tokens`` not an iterable of integers.
        ValueError: ``budget`` or a token count is not positive, or ``tokens`` is empty.
    """

    tokens: Iterable[int] | None = None
    budget: float = 0.5
    graphs: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.budget, int | float):
            raise TypeError(f"budget must be a positive number of seconds, got {self.budget!r}")
        if not self.budget > 0:
            raise ValueError(f"budget must be a positive number of seconds, got {self.budget}")
        if self.tokens is not None:
            object.__setattr__(self, "tokens", _token_counts(self.tokens))


def _token_counts(tokens: Iterable[int]) -> tuple[int, ...]:
    if isinstance(tokens, str | int) or not isinstance(tokens, Iterable):
        raise TypeError(f"tokens must be positive integers such as (1, 128), got {tokens!r}")
    counts = tuple(tokens)
    if not all(hasattr(count, "__index__") and not isinstance(count, bool) for count in counts):
        raise TypeError(f"tokens must be positive integers such as (1, 128), got {counts!r}")
    counts = tuple(map(operator.index, counts))
    if not counts or min(counts) < 1:
        raise ValueError(f"tokens must be positive integers such as (1, 128), got {counts!r}")
    return counts
