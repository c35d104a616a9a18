"""Statistics of a layer's inputs, which take memory that does not grow with the number of batches."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..layers import PrunableLayer

Reduce = Callable[[Tensor], None]  # sums a tensor over all processes, in place
Exchange = Callable[[Any], list[Any]]  # returns the values of all processes, in the order of their ranks
TOGETHER = 256  # rows of small batches that one product adds at once, because each product reads and writes all sums


class Statistic(Protocol):
    """A statistic of all inputs of one layer, such as a sum. A method names the class that it needs."""

    def __init__(self, layer: PrunableLayer) -> None: ...

    def update(self, x: Tensor) -> None:
        """Adds one input of the layer, which is what the layer was called with, without padding."""

    def reduce(self, reduce: Reduce) -> None:
        """Adds the statistics of all other processes.

        It calls ``reduce``, which sums a tensor over all processes in place, on each of its tensors: in every process
        on the same ones in the same order, even if no input came.
        """


class InputNorm:
    """The input norm of Wanda: the root mean square of every input column over all positions, in fp32."""

    def __init__(self, layer: PrunableLayer) -> None:
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
        """The norms, float32 ``[cols]``: one per entry of the dimension that groups run along.

        A Conv2d has one per input channel, which is the mean over its kernel; with ``axis="flatten"`` it has one per
        channel and kernel position.

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
    """The Gram matrix of the inputs, and their norms; methods that update the kept weights need it.

    It takes ``4 * cols ** 2`` bytes for each layer of the stage that is being calibrated.
    """

    def __init__(self, layer: PrunableLayer) -> None:
        super().__init__(layer)
        self._products: Tensor | None = None  # made for the first input, so that layers not reached take no memory
        self._waiting: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        super().update(x)
        for rows in self._layer.rows(x):
            if len(rows) >= TOGETHER:
                self._add(rows)
            else:
                self._waiting.append(rows.clone())  # the model may overwrite the tensor that it is a view of
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
        """The mean of ``x x^T``, float32 ``[cols, cols]``.

        The columns are those of the weight that ``Method.prune`` gets, flattened.

        Raises:
            ValueError: an input was NaN or infinite, or so large that a product is.
        """
        matrix = self._sum() / self._count
        if not torch.isfinite(matrix).all():
            raise ValueError(f"a calibration input of {self._layer.name or 'the model'} is NaN or infinite")
        return matrix
