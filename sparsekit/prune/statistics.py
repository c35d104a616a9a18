"""What calibration gathers about the inputs of a layer, in memory that does not grow with the number of batches."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .layers import Layer

Reduce = Callable[[Tensor], None]
TOGETHER = 256  # rows of small batches that are multiplied at once: the product reads and writes all sums


class Statistic(Protocol):
    """Something that is summed up over every input of one layer; a method names the class that it needs."""

    def __init__(self, layer: Layer) -> None: ...

    def update(self, x: Tensor) -> None:
        """Takes in one input of the layer, as the layer was called with it; padding is left out already."""

    def reduce(self, reduce: Reduce) -> None:
        """Adds up with the same statistic of other processes.

        Calls ``reduce``, which sums in place, on every tensor of sums: the same ones in the same order in each process,
        whether or not any input came.
        """


class InputNorm:
    """Wanda's norm: the root mean square of every input column, over all positions of all batches, in fp32."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._sums = torch.zeros(layer.input_shape, dtype=torch.float32, device=layer.weight.device)
        self._count = 0

    def update(self, x: Tensor) -> None:
        sums, count = self._layer.square_sums(x)
        self._sums.add_(sums)
        self._count += count

    def reduce(self, reduce: Reduce) -> None:
        count = torch.tensor(self._count, dtype=torch.int64, device=self._sums.device)
        reduce(self._sums)
        reduce(count)
        self._count = int(count)

    @property
    def norm(self) -> Tensor:
        """float32 ``[cols]``, one per entry of the dimension that groups run along.

        A Conv2d has one per input channel, the mean over its kernel; grouped by ``"flatten"``, one per channel and
        kernel position.

        Raises:
            ValueError: an input was NaN or infinite, or so large that its square is.
        """
        mean = self._sums / self._count
        if mean.dim() > 1:
            mean = mean.flatten() if self._layer.axis == "flatten" else mean.flatten(1).mean(1)
        if not torch.isfinite(mean).all():
            raise ValueError(f"a calibration input of {self._layer.name or 'the model'} is NaN or infinite")
        return mean.sqrt()


class Gram(InputNorm):
    """The second moments of the inputs beside their norms: what methods need that update the kept weights.

    Memory: ``4 * cols ** 2`` bytes per layer of the block that is being calibrated.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self._products: Tensor | None = None  # made when the first input comes: of most layers that is much later
        self._waiting: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        super().update(x)
        for rows in self._layer.rows(x):
            if len(rows) >= TOGETHER:
                self._add(rows)
            else:
                self._waiting.append(rows.clone())  # what it is a view of may be written to
                if sum(map(len, self._waiting)) >= TOGETHER:
                    self._sum()

    def reduce(self, reduce: Reduce) -> None:
        super().reduce(reduce)
        reduce(self._sum())

    def _sum(self) -> Tensor:
        waiting, self._waiting = self._waiting, []
        return self._add(torch.cat([self._sums.new_empty(0, self._sums.numel()), *waiting]))

    def _add(self, rows: Tensor) -> Tensor:
        if self._products is None:
            cols = self._sums.numel()
            self._products = torch.zeros(cols, cols, dtype=torch.float32, device=self._sums.device)
        return self._products.addmm_(rows.t(), rows)

    @property
    def matrix(self) -> Tensor:
        """float32 ``[cols, cols]``: the mean of ``x x^T``, columns as in the weight that ``Method.prune`` gets,
        flattened.

        Raises:
            ValueError: an input was NaN or infinite, or so large that a product is.
        """
        matrix = self._sum() / self._count
        if not torch.isfinite(matrix).all():
            raise ValueError(f"a calibration input of {self._layer.name or 'the model'} is NaN or infinite")
        return matrix
