"""``CubicSchedule``: how much is dropped at each step of gradual pruning."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CubicSchedule:
    """The share that is dropped at a step: ``final * (1 - (1 - p)^3)`` at progress ``p`` from ``begin`` to ``end``.

    ::

        schedule = sk.slim.CubicSchedule(0.2, begin=4210, end=16840, every=20)
        sk.mask_units_(model, units.keep())
        with sk.keep_masks(model, optimizer):
            for step, batch in enumerate(batches):
                if schedule.prunes_at(step):
                    scores = sk.slim.unit_scores(model, units)
                    sk.mask_units_(model, sk.slim.choose_units(model, units, scores, schedule.at(step)))
                ...

    Args:
        final: the share at the end, from 0 to 1.
        begin: the first step, at which nothing is dropped yet.
        end: the step at which the share is reached.
        every: steps from one pruning to the next.

    Raises:
        ValueError: a number is out of range.

    Source: Zhu and Gupta, 2017, https://arxiv.org/abs/1710.01878, from a sparsity of 0.
    """

    final: float
    begin: int
    end: int
    every: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.final <= 1:
            raise ValueError(f"final must be a share from 0 to 1, got {self.final}")
        if not 0 <= self.begin < self.end or self.every < 1:
            raise ValueError(
                "begin must be at least 0 and before end, and every at least 1, "
                f"got {self.begin}, {self.end} and {self.every}"
            )

    def at(self, step: int) -> float:
        """Returns the share that is dropped at a step."""
        progress = min(max((step - self.begin) / (self.end - self.begin), 0.0), 1.0)
        return self.final * (1 - (1 - progress) ** 3)

    def prunes_at(self, step: int) -> bool:
        """Returns whether more is dropped at a step: every so many, and at the end."""
        inside = self.begin <= step <= self.end
        return inside and ((step - self.begin) % self.every == 0 or step == self.end)
