"""The dense weight of a compressed layer: shown, computed with, but neither stored nor written to."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_iter, tree_map_only

from ..ops._define import is_jit_tracing

Unpack = Callable[..., Tensor]


class WeightView(Tensor):
    """The dense weight of a compressed layer, which is made anew by whatever computes with it.

    Shape, dtype, device and the like cost nothing, and so does a view of it, such as ``weight.T`` or ``weight.data``.
    Everything else (``clone()``, a product) returns plain tensors. A write into it would be lost, so it raises
    RuntimeError. Gradients reach the tensors that the weight is packed in.
    """

    _make: Callable[[], Tensor]  # the plain tensor that this one shows
    _meta: Tensor | None  # the same without data: of which shape and strides a view is
    _parts: tuple[Tensor, ...] = ()  # of the layer whose weight it is; a view of that has none

    @staticmethod
    def of(
        shape: Sequence[int], stride: Sequence[int], offset: int, like: Tensor, make: Callable[[], Tensor]
    ) -> "WeightView":
        """Makes one with the dtype and device of ``like``, of what ``make`` returns."""
        view: WeightView = Tensor._make_wrapper_subclass(
            WeightView, shape, strides=stride, storage_offset=offset, dtype=like.dtype, device=like.device
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

    # Here every call arrives as an op whose schema says what it writes to and what is a view.
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
    @torch.inference_mode(False)  # torch wants a view of a normal tensor to be one
    def _view(meta: Tensor, base: "WeightView", make: Callable[[], Tensor]) -> "WeightView":
        view = WeightView.of(meta.shape, meta.stride(), int(meta.storage_offset()), base, make)
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
        """Raises: there is no memory to point to."""
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


def show_weight(
    unpack: Unpack, parts: tuple[Tensor, ...], shape: tuple[int, int], stride: tuple[int, int], refusal: str | None
) -> Tensor:
    """Returns the dense weight that ``unpack(*parts)`` makes, without making it.

    Gradients reach those of ``parts`` that require one. Where a graph is traced or transformed (``torch.compile``,
    ``torch.export``, ``torch.jit.trace``, ``torch.func``) it is made at once, a plain tensor.

    Args:
        unpack: makes the weight of ``parts``; differentiable.
        parts: the tensors it is packed in; the first has the weight's dtype and device.
        shape: of the weight.
        stride: of the weight.
        refusal: why a gradient of the weight is an error; None where it is none.
    """
    if torch.compiler.is_compiling() or is_jit_tracing() or torch._C._are_functorch_transforms_active():
        return unpack(*parts)
    view = _show_trained(unpack, parts, shape, stride, refusal)
    view._parts = parts
    return view


def shows(value: object, parts: tuple[Tensor, ...]) -> bool:
    """Whether ``value`` is the weight that is packed in these very tensors."""
    known = value._parts if isinstance(value, WeightView) else ()
    return len(known) == len(parts) and all(one is other for one, other in zip(known, parts, strict=True))


# Under no_grad too, as a Parameter does, the weight says that it is trained, and takes a gradient later. By decorators,
# for an interrupt may come just before a `with` block is left.
@torch.inference_mode(False)
@torch.enable_grad()
def _show_trained(
    unpack: Unpack, parts: tuple[Tensor, ...], shape: tuple[int, int], stride: tuple[int, int], refusal: str | None
) -> WeightView:
    if refusal is None and not any(part.requires_grad for part in parts):
        return _show(unpack, parts, shape, stride)
    wanted = None if refusal is None else torch.empty(0, device=parts[0].device, requires_grad=True)
    return _Unpack.apply(unpack, shape, stride, refusal, wanted, *parts)


def _show(unpack: Unpack, parts: tuple[Tensor, ...], shape: tuple[int, int], stride: tuple[int, int]) -> WeightView:
    held = [part.detach() for part in parts]  # a Parameter may get other data
    return WeightView.of(shape, stride, 0, parts[0], lambda: unpack(*held))


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        unpack: Unpack,
        shape: tuple[int, int],
        stride: tuple[int, int],
        refusal: str | None,
        _: Tensor | None,
        *parts: Tensor,
    ) -> Tensor:
        ctx.unpack, ctx.refusal = unpack, refusal
        ctx.save_for_backward(*parts)
        return _show(unpack, parts, shape, stride)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.refusal is not None:
            raise RuntimeError(ctx.refusal)
        parts = [part.detach().requires_grad_(part.requires_grad) for part in ctx.saved_tensors]
        with torch.enable_grad():
            dense = ctx.unpack(*parts)
        trained = [part for part in parts if part.requires_grad]
        gradients = iter(torch.autograd.grad(dense, trained, grad, create_graph=torch.is_grad_enabled()))
        return *[None] * 5, *(next(gradients) if part.requires_grad else None for part in parts)


def _changes(func: Any, weight: Any, value: Any = None) -> bool:
    """Whether a function of Tensor changes ``weight``, its first argument; torch refuses some before they are ops."""
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
