"""What one layer is shown in calibration: the statistic that a method needs, and a sample to measure its error on."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .layers import Layer
from .statistics import Statistic

Gather = Callable[[Layer], "Inputs"]  # makes what gathers the inputs of one layer


class Inputs:
    """What one layer's calibration inputs amounted to."""

    def __init__(self, layer: Layer, statistic: type[Statistic] | None) -> None:
        self.sample = InputSample(layer)
        self.statistic = None if statistic is None else statistic(layer)

    def update(self, x: Tensor, batch: Any) -> None:
        """Takes in one input ``x`` of the layer, as the layer was called with it while ``batch`` ran."""
        self.sample.update(x)
        if self.statistic is not None:
            self.statistic.update(x)


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
