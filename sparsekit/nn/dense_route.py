"""Sparse layers that also hold their dense weight, for the numbers of tokens at which dense is faster."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._define import is_jit_tracing
from ..ops.prepacked import prepack, prepacked_linear
from .common import Stamp, autocast_dtype, has_changed, stamp_of
from .compressed import Compressed
from .linear24 import Linear24
from .tiered import TieredLinear

Layer = TypeVar("Layer", bound="DenseRoute")
Routes = tuple[tuple[int, bool], ...]  # (the most tokens, whether dense multiplies); the last pair takes any number


class DenseRoute(Compressed):
    """A mixin for sparse layers, which multiplies some numbers of tokens by a dense copy of the weight.

    On a CPU, oneDNN reorders the copy if it can. The state dict is that of the sparse layer. The copy is made again
    when the layer is loaded, copied or moved, and when anything else writes to the weight or replaces it, such as an
    average of weights or ``torch.func.functional_call``; only a write through ``.data`` goes unnoticed. Making it at
    every step of an optimizer would cost too much, so the weight gets no gradient, and a call in training mode that
    would need one raises. The sparse weight multiplies everything under autocast to another dtype, in a transform of
    ``torch.func``, and if the weight requires a gradient nevertheless.
    """

    routes: Routes = ()
    tokens = 1  # the number of tokens that the copy is laid out for
    copy: Tensor | None = None
    reordered = False  # whether oneDNN reordered the copy; read once, because a traced tensor does not tell
    stamp: Stamp = ()  # of the weight when it was copied

    def follow(self: Layer, routes: Routes, tokens: int) -> Layer:
        """Makes a dense copy of the weight, which multiplies where ``routes`` says so from then on.

        Args:
            routes: pairs of the most tokens and whether the dense copy multiplies that many; the last pair also takes
                any larger number.
            tokens: the number of tokens that oneDNN lays the copy out for.

        Returns:
            The layer itself.
        """
        trainable = self.trainable
        self.routes, self.tokens, self.frozen = routes, tokens, trainable
        for weight in self._weights():
            weight.requires_grad_(False)
        self._update_copy()
        return self

    @property
    def trainable(self) -> bool:
        return self.frozen or super().trainable

    def resident_tensors(self) -> list[Tensor]:
        """Returns the tensors of the sparse weight, and its dense copy."""
        return [*super().resident_tensors(), *([] if self.copy is None else [self.copy])]

    def _weights(self) -> list[nn.Parameter]:
        return [weight for name, weight in self._parameters.items() if name != "bias" and weight is not None]

    @torch.inference_mode(False)  # tensors made in inference mode could not be used outside it
    def _update_copy(self) -> None:
        if self.routes:
            self.copy = prepack(self._dense(), self.tokens)
            self.reordered, self.stamp = self.copy.is_mkldnn, stamp_of(*self._weights())

    def _multiply(self, input: Tensor) -> Tensor:
        self._check_training()
        if self.copy is None or not self._is_dense_routed(input) or autocast_dtype(input) or self._needs_gradient():
            return super()._multiply(input)
        weights = self._weights()
        if weights and has_changed(self.stamp, *weights):
            self._update_copy()
        copy = self.copy
        # A replica of DataParallel has no Parameters to compare with the copy, and lives for a single call.
        if not weights or input.dtype != copy.dtype:
            return super()._multiply(input)
        return prepacked_linear(input, copy, self.bias) if self.reordered else F.linear(input, copy, self.bias)

    def _needs_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(weight.requires_grad for weight in self._weights())

    def _is_dense_routed(self, input: Tensor) -> bool:
        if is_jit_tracing() or input.shape[-1:] != (self.in_features,) or self.in_features == 0:
            return (
                False  # a trace holds one kernel for any number of tokens; a wrong shape gets the sparse layer's error
            )
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return False  # vmap may give the layer a batch of weights
        tokens = input.numel() // self.in_features
        return next((dense for most, dense in self.routes if tokens <= most), self.routes[-1][1])

    def _apply(self: Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Layer:
        before = [(weight.data_ptr(), weight.dtype, weight.device) for weight in self._weights()]
        super()._apply(fn, recurse)
        if before != [(weight.data_ptr(), weight.dtype, weight.device) for weight in self._weights()]:
            self._update_copy()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._update_copy()

    # A tensor that oneDNN has reordered can be neither copied nor pickled.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "copy": None, "stamp": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._update_copy()

    def extra_repr(self) -> str:
        routes = ", ".join(f"{'dense' if dense else 'sparse'} to {most}" for most, dense in self.routes[:-1])
        last = [f"then {'dense' if dense else 'sparse'}" for _, dense in self.routes[-1:]]
        return f"{super().extra_repr()}, routes=({', '.join(filter(None, [routes, *last]))})"


class Linear24WithDense(DenseRoute, Linear24):
    """A ``Linear24`` with a dense copy of its weight."""


class TieredLinearWithDense(DenseRoute, TieredLinear):
    """A ``TieredLinear`` with a dense copy of its weight."""
