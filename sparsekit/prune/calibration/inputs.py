"""The calibration inputs of one layer: the statistic that a method needs, and a sample to measure the error on."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..full_precision import full_precision
from ..layers import PrunableLayer
from .padding import TokenMask, real_tokens
from .statistics import Exchange, Reduce, Statistic

CHUNK = 2**22  # weights whose products are compared at a time


class LayerInputs:
    """The calibration inputs of one layer, summed up.

    Args:
        layer: the layer.
        statistic: the statistic that the method needs, if any.
        token_mask: tells which tokens are padding and do not count; see ``real_tokens``.
    """

    def __init__(
        self, layer: PrunableLayer, statistic: type[Statistic] | None, token_mask: TokenMask | None = None
    ) -> None:
        self._layer, self._token_mask = layer, token_mask
        with full_precision():
            self.sample = InputSample(layer)
            self.statistic = None if statistic is None else statistic(layer)

    def update(self, x: Tensor, batch: Any) -> None:
        """Adds one input ``x`` of the layer, as the layer was called with it while ``batch`` ran."""
        with full_precision():
            x = real_tokens(x, self._layer, batch, self._token_mask)
            if x.numel() == 0:
                return
            self.sample.update(x)
            if self.statistic is not None:
                self.statistic.update(x)

    def reduce(self, exchange: Exchange, reduce: Reduce) -> None:
        """Adds up what all processes have collected for this layer, so that all of them hold the same."""
        with full_precision():
            self.sample.merge(exchange)
            if self.statistic is not None:
                self.statistic.reduce(reduce)


class InputSample:
    """A sample of at most ``size`` input rows, drawn evenly from all positions of all batches, the same in each run."""

    def __init__(self, layer: PrunableLayer, size: int = 256) -> None:
        self._layer = layer
        self._size = size
        self._generator = torch.Generator("cpu").manual_seed(0)
        self._keys = torch.empty(0, dtype=torch.float32, device="cpu")
        self._rows: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Draws a random key for each position and keeps the rows with the largest keys, which is an even draw."""
        windows = self._layer.windows(x)
        positions = windows.shape[: windows.dim() - self._layer.weight.dim() + 1]
        new_keys = torch.rand(positions.numel(), generator=self._generator, dtype=torch.float32, device="cpu")
        keys = torch.cat([self._keys, new_keys])
        chosen = keys.topk(min(self._size, len(keys))).indices
        is_new = chosen >= len(self._keys)
        if not is_new.any():
            return  # the usual case in a long stream
        rows = windows[_unravel((chosen[is_new] - len(self._keys)).to(x.device), positions)].flatten(1)
        if self._rows is not None:
            rows = torch.cat([self._rows[chosen[~is_new].to(x.device)], rows])
        self._rows, self._keys = rows, torch.cat([keys[chosen[~is_new]], keys[chosen[is_new]]])

    def merge(self, exchange: Exchange) -> None:
        """Replaces the sample by one drawn from the samples of all processes."""
        rows = None if self._rows is None else self._rows.cpu()
        given = [(keys, rows) for keys, rows in exchange((self._keys, rows)) if rows is not None]
        if given:
            keys = torch.cat([keys for keys, _ in given])
            chosen = keys.topk(min(self._size, len(keys))).indices
            device = self._layer.weight.device
            self._keys, self._rows = keys[chosen], torch.cat([rows for _, rows in given])[chosen].to(device)

    def __len__(self) -> int:
        return len(self._keys)

    def relative_error(self, before: Tensor, after: Tensor) -> float | None:
        """Computes ``||X (before - after)^T|| / ||X before^T||`` over the sampled rows; None without rows.

        The error is NaN if a sampled input or a product is NaN or infinite.
        """
        if self._rows is None or len(self) == 0:
            return None
        x = self._rows.float()
        x = x / x.abs().max().clamp(min=1e-30)  # the ratio stays the same, and nothing overflows
        before, after = self._layer.matrix(before), self._layer.matrix(after)
        outputs = max(CHUNK // max(before.shape[1], 1), 1)
        lost, whole = 0.0, 0.0
        for dense, pruned in zip(before.split(outputs), after.split(outputs), strict=True):
            dense = dense.float()
            lost += _square_sum(x @ (dense - pruned.float()).t())
            whole += _square_sum(x @ dense.t())
        if lost == 0:
            return 0.0  # also if everything is 0
        return math.sqrt(lost / whole) if whole > 0 else math.inf if whole == 0 else math.nan

    def output_error(self, layer: Callable[[Tensor], Tensor], bias: Tensor | None, before: Tensor) -> float | None:
        """Computes the same of what a linear layer returns for the sampled rows, with all that it rounds.

        Args:
            layer: stands for the layer.
            bias: what it adds, which does not count.
            before: the weight that is compared with.
        """
        if self._rows is None or len(self) == 0:
            return None
        dense = self._rows.double() @ self._layer.matrix(before).double().t()
        found = layer(self._rows).double() - (0 if bias is None else bias.double())
        lost, whole = _square_sum(found - dense), _square_sum(dense)
        return math.sqrt(lost / whole) if whole > 0 else 0.0 if lost == 0 else math.inf


def _unravel(index: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
    """Does what ``torch.unravel_index`` does, which imports sympy for its checks and takes a second."""
    parts = []
    for size in reversed(shape):
        parts.append(index % size)
        index = index // size
    return tuple(reversed(parts))


def _square_sum(matrix: Tensor) -> float:
    return float(matrix.double().square().sum())
