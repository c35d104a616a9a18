"""What calibration gathers about the inputs of a layer, in memory that does not grow with the number of batches."""

from typing import Protocol

import torch
from torch import Tensor

from .layers import Layer


class Statistic(Protocol):
    """Something that is summed up over every input of one layer; a method names the class that it needs."""

    def __init__(self, layer: Layer) -> None: ...

    def update(self, x: Tensor) -> None:
        """Takes in one input of the layer, as the layer was called with it."""


class InputNorm:
    """Wanda's norm: the root mean square of every input column, over all positions of all batches, in fp32."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._sums = torch.zeros(())
        self._count = 0

    def update(self, x: Tensor) -> None:
        sums, count = self._layer.square_sums(x)
        self._sums = self._sums + sums
        self._count += count

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
        self._products = torch.zeros(())

    def update(self, x: Tensor) -> None:
        super().update(x)
        for rows in self._layer.rows(x):
            self._products = self._products + rows.t() @ rows

    @property
    def matrix(self) -> Tensor:
        """float32 ``[cols, cols]``: the mean of ``x x^T``, columns as in the weight that ``Method.prune`` gets,
        flattened.

        Raises:
            ValueError: an input was NaN or infinite, or so large that a product is.
        """
        matrix = self._products / self._count
        if not torch.isfinite(matrix).all():
            raise ValueError(f"a calibration input of {self._layer.name or 'the model'} is NaN or infinite")
        return matrix


class InputSample:
    """Up to ``size`` input rows, drawn evenly from all positions of all batches, the same ones in every run."""

    def __init__(self, layer: Layer, size: int = 256) -> None:
        self._layer = layer
        self._size = size
        self._generator = torch.Generator().manual_seed(0)
        self._keys = torch.empty(0)
        self._rows: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Keeps the rows with the largest of one random key per position: an even draw from a stream."""
        windows = self._layer.windows(x)
        positions = windows.shape[: windows.dim() - self._layer.weight.dim() + 1]
        keys = torch.cat([self._keys, torch.rand(positions.numel(), generator=self._generator)])
        chosen = keys.topk(min(self._size, len(keys))).indices
        is_new = chosen >= len(self._keys)
        new = torch.unravel_index((chosen[is_new] - len(self._keys)).to(x.device), positions)
        rows = windows[new].flatten(1)
        if self._rows is not None:
            rows = torch.cat([self._rows[chosen[~is_new].to(x.device)], rows])
        self._rows, self._keys = rows, torch.cat([keys[chosen[~is_new]], keys[chosen[is_new]]])

    def __len__(self) -> int:
        return len(self._keys)

    def relative_error(self, before: Tensor, after: Tensor) -> float | None:
        """``||X (before - after)^T|| / ||X before^T||`` over the sampled rows; None without rows."""
        if self._rows is None or len(self) == 0:
            return None
        x = self._rows.float()
        before, after = self._layer.matrix(before).float(), self._layer.matrix(after).float()
        error = torch.linalg.matrix_norm(x @ (before - after).t())
        return float(error / torch.linalg.matrix_norm(x @ before.t())) if error > 0 else 0.0  # 0 / 0 with dead inputs
