"""The dense weight of a compressed layer as a tensor that is not stored: it is unpacked whenever it is read."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_iter, tree_map_only

from ..ops._define import is_jit_tracing

Unpack = Callable[..., Tensor]


class WeightView(Tensor):
    """The dense weight of a compressed layer, read-only, which every operation that reads its values unpacks again.

    Reading its shape, dtype, device and the like unpacks nothing, and neither does a view such as ``weight.T`` or
    ``weight.data``. Everything else (``clone()``, a product) returns plain tensors. A write would be lost, so it raises
    RuntimeError. Gradients reach the tensors that the weight is packed in.
    """

    _make: Callable[[], Tensor]  # makes the plain tensor
    _meta: Tensor | None  # the same on the meta device, from which torch computes the shape and strides of views
    _parts: tuple[Tensor, ...] = ()  # the tensors that the layer stores; a view such as weight.T has none

    @staticmethod
    def of(
        shape: Sequence[int],
        stride: Sequence[int],
        offset: int,
        dtype: torch.dtype,
        device: torch.device,
        make: Callable[[], Tensor],
    ) -> "WeightView":
        """Returns a view of what ``make`` returns."""
        view: WeightView = Tensor._make_wrapper_subclass(
            WeightView, shape, strides=stride, storage_offset=offset, dtype=dtype, device=device
        )
        view._make, view._meta = make, None
        return view

    def plain(self) -> Tensor:
        """Returns the dense weight as a plain tensor with memory of its own, without a gradient."""
        with torch.no_grad():
            return self._make()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = tree_iter(kwargs["out"]) if "out" in kwargs else ()
        if any(isinstance(leaf, cls) for leaf in written) or (args and _changes(func, *args[:2])):
            _refuse()
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs)

    # Every op arrives here; its schema says which arguments it writes to and whether it returns a view.
    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[position] if position < len(args) else kwargs.get(argument.name)
                if any(isinstance(leaf, cls) for leaf in tree_iter(given)):
                    _refuse()

        def make() -> Any:
            return func(*tree_map_only(cls, cls._make_plain, args), **tree_map_only(cls, cls._make_plain, kwargs))

        if not func.is_view or not isinstance(args[0], cls):
            return make()
        metas, structure = tree_flatten(func(args[0]._as_meta(), *args[1:], **kwargs))
        if structure.is_leaf():
            return cls._view(metas[0], args[0], make)
        return [
            cls._view(meta, args[0], lambda index=index: make()[index])  # type: ignore[misc]
            for index, meta in enumerate(metas)
        ]

    @staticmethod
    @torch.inference_mode(False)  # torch rejects a view of an ordinary tensor that is an inference tensor
    def _view(meta: Tensor, base: "WeightView", make: Callable[[], Tensor]) -> "WeightView":
        offset = int(meta.storage_offset())
        view = WeightView.of(meta.shape, meta.stride(), offset, base.dtype, base.device, make)
        view._meta = meta
        return view

    def _make_plain(self) -> Tensor:
        return self._make()

    def _as_meta(self) -> Tensor:
        if self._meta is None:
            self._meta = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")
        return self._meta

    def numpy(self, *, force: bool = False) -> Any:
        """Returns an array that cannot be written to."""
        array = (self.plain() if force else self.plain().requires_grad_(self.requires_grad)).numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        return self.plain().tolist()

    def data_ptr(self) -> NoReturn:
        """Raises RuntimeError, because there is no memory to point to."""
        raise RuntimeError("the weight of a compressed layer is not stored dense: weight.clone() returns one that is")

    const_data_ptr = untyped_storage = storage = _typed_storage = __dlpack__ = data_ptr  # type: ignore[assignment]

    def is_shared(self) -> bool:
        return False

    # Copies are plain tensors.
    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._copy().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = memo[id(self)] = self._copy()
        return copied

    def _copy(self) -> Tensor:
        return self.plain().requires_grad_(self.requires_grad)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"WeightView({self.plain()!r})"


def view_weight(
    unpack: Unpack,
    parts: tuple[Tensor, ...],
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    training_error: str | None,
) -> Tensor:
    """Returns a ``WeightView`` of ``unpack(*parts)``.

    Gradients reach those of ``parts`` that require one. While a graph is traced or transformed (``torch.compile``,
    ``torch.export``, ``torch.jit.trace``, ``torch.func``), the result is the plain tensor.

    Args:
        unpack: makes the dense weight of ``parts``; differentiable.
        parts: the tensors that the weight is packed in, on its device.
        shape: the shape of the weight.
        stride: the strides of the weight.
        dtype: the dtype of the weight.
        training_error: the message of the error that computing a gradient of the weight raises; None if it raises none.
    """
    if torch.compiler.is_compiling() or is_jit_tracing() or torch._C._are_functorch_transforms_active():
        return unpack(*parts)
    view = _differentiable_view(unpack, parts, shape, stride, dtype, training_error)
    view._parts = parts
    return view


def is_view_of(value: object, parts: tuple[Tensor, ...]) -> bool:
    """Returns whether ``value`` is the ``WeightView`` of the weight that is packed in these very tensors."""
    known = value._parts if isinstance(value, WeightView) else ()
    return len(known) == len(parts) and all(one is other for one, other in zip(known, parts, strict=True))


# Gradients are on even under no_grad, so that the weight requires a gradient there too, as a Parameter does. Both modes
# are set by decorators, because an interrupt may come just before a `with` block is left.
@torch.inference_mode(False)
@torch.enable_grad()
def _differentiable_view(
    unpack: Unpack,
    parts: tuple[Tensor, ...],
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    training_error: str | None,
) -> WeightView:
    if training_error is None and not any(part.requires_grad for part in parts):
        return _view_of_parts(unpack, parts, shape, stride, dtype)
    # With an input that requires a gradient, the backward pass calls _Unpack.backward, which raises the error.
    wanted = None if training_error is None else torch.empty(0, device=parts[0].device, requires_grad=True)
    return _Unpack.apply(unpack, shape, stride, dtype, training_error, wanted, *parts)


def _view_of_parts(
    unpack: Unpack, parts: tuple[Tensor, ...], shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype
) -> WeightView:
    held = [part.detach() for part in parts]  # the data of a Parameter may be replaced later
    return WeightView.of(shape, stride, 0, dtype, held[0].device, lambda: unpack(*held))


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        unpack: Unpack,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        dtype: torch.dtype,
        training_error: str | None,
        _: Tensor | None,
        *parts: Tensor,
    ) -> Tensor:
        ctx.unpack, ctx.training_error = unpack, training_error
        ctx.save_for_backward(*parts)
        return _view_of_parts(unpack, parts, shape, stride, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.training_error is not None:
            raise RuntimeError(ctx.training_error)
        parts = [part.detach().requires_grad_(part.requires_grad) for part in ctx.saved_tensors]
        with torch.enable_grad():
            dense = ctx.unpack(*parts)
        trained = [part for part in parts if part.requires_grad]
        gradients = iter(torch.autograd.grad(dense, trained, grad, create_graph=torch.is_grad_enabled()))
        return *[None] * 6, *(next(gradients) if part.requires_grad else None for part in parts)


def _changes(func: Any, weight: Any, value: Any = None) -> bool:
    """Returns whether ``func``, a function of Tensor, would change ``weight``, its first argument.

    Some of these functions raise other errors of torch's own before they reach ``__torch_dispatch__``.
    """
    if not isinstance(weight, WeightView):
        return False
    name = getattr(func, "__name__", "")
    if name in ("requires_grad_", "__set__") and getattr(func, "__self__", None) in (None, Tensor.requires_grad):
        return bool(weight._parts) and weight.requires_grad != (value is not False)
    return name == "__set__" or (name.endswith("_") and not name.endswith("__"))


def _refuse() -> NoReturn:
    raise RuntimeError(
        "the weight of a compressed layer cannot be written to: call sparsekit.decompress_(model) first, or merge LoRA "
        "with sparsekit.integrations.peft"
    )
