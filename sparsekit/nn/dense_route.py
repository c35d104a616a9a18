"""Sparse layers that hold their dense weight as well, for the numbers of tokens at which dense is faster."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._define import is_jit_tracing
from ..ops.prepacked import prepack, prepacked_linear
from .compressed import Compressed
from .linear24 import Linear24
from .shared import Stamp, autocast_dtype, has_changed, stamp_of
from .tiered import TieredLinear

Layer = TypeVar("Layer", bound="DenseRoute")
Routes = tuple[tuple[int, bool], ...]  # (the most tokens, whether the dense copy answers); the last takes any number


class DenseRoute(Compressed):
    """Mixed into a sparse layer: a dense copy of its weight answers some numbers of tokens.

    On a CPU the copy is reordered by oneDNN where it can be. The state dict is that of the sparse layer; loading,
    copying and moving make the copy anew, and so does whatever else writes to the weight or replaces it, such as an
    average of weights or ``torch.func.functional_call``; only a write through ``.data`` goes unnoticed. It costs too
    much to follow an optimizer: the weight gets no gradient, and a call in training mode that would need it raises.
    Under autocast to another dtype, in a transform of ``torch.func``, and where the weight requires a gradient all the
    same, the sparse weight answers every call.
    """

    routes: Routes = ()
    tokens = 1  # that the copy is laid out for
    copy: Tensor | None = None
    reordered = False  # whether the copy is oneDNN's; tracing forgets it
    stamp: Stamp = ()  # of the weight that was copied

    def follow(self: Layer, routes: Routes, tokens: int) -> Layer:
        """Keeps a dense copy, laid out for ``tokens``, and takes these routes from now on; returns the layer itself."""
        trainable = self.trainable
        self.routes, self.tokens, self.frozen = routes, tokens, trainable
        for weight in self._weights():
            weight.requires_grad_(False)
        self._keep()
        return self

    @property
    def trainable(self) -> bool:
        return self.frozen or super().trainable

    def _weights(self) -> list[nn.Parameter]:
        return [weight for name, weight in self._parameters.items() if name != "bias" and weight is not None]

    @torch.inference_mode(False)  # what is made there could not be used outside
    def _keep(self) -> None:
        if self.routes:
            self.copy = prepack(self._dense(), self.tokens)
            self.reordered, self.stamp = self.copy.is_mkldnn, stamp_of(*self._weights())

    def _multiply(self, input: Tensor) -> Tensor:
        self._check_training()
        if self.copy is None or not self._takes_dense(input) or autocast_dtype(input) or self._wants_gradient():
            return super()._multiply(input)
        weights = self._weights()
        if weights and has_changed(self.stamp, *weights):
            self._keep()
        copy = self.copy
        if (
            not weights or input.dtype != copy.dtype
        ):  # a replica of DataParallel has no Parameters, and lives for a call
            return super()._multiply(input)
        return prepacked_linear(input, copy, self.bias) if self.reordered else F.linear(input, copy, self.bias)

    def _wants_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(weight.requires_grad for weight in self._weights())

    def _takes_dense(self, input: Tensor) -> bool:
        if is_jit_tracing() or input.shape[-1:] != (self.in_features,) or self.in_features == 0:
            return False  # a trace holds one kernel for any number of tokens; the sparse layer rejects the others
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return False  # the weight may be many
        tokens = input.numel() // self.in_features
        return next((dense for most, dense in self.routes if tokens <= most), self.routes[-1][1])

    def _apply(self: Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Layer:
        before = [(weight.data_ptr(), weight.dtype, weight.device) for weight in self._weights()]
        super()._apply(fn, recurse)
        if before != [(weight.data_ptr(), weight.dtype, weight.device) for weight in self._weights()]:
            self._keep()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._keep()

    # An opaque tensor can be neither copied nor pickled.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "copy": None, "stamp": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._keep()

    def extra_repr(self) -> str:
        routes = ", ".join(f"{'dense' if dense else 'sparse'} to {most}" for most, dense in self.routes[:-1])
        last = [f"then {'dense' if dense else 'sparse'}" for _, dense in self.routes[-1:]]
        return f"{super().extra_repr()}, routes=({', '.join(filter(None, [routes, *last]))})"


class Linear24WithDense(DenseRoute, Linear24):
    """A ``Linear24`` with a dense copy of its weight."""


class TieredLinearWithDense(DenseRoute, TieredLinear):
    """A ``TieredLinear`` with a dense copy of its weight."""
