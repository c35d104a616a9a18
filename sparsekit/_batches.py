"""Runs models on batches: how a batch is passed to a model, and the state that a model is run in."""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ._settings import SharedSetting
from ._undo import restoring

Forward = Callable[[nn.Module, Any], Any]
Progress = Callable[[Iterable[Any]], Iterable[Any]]  # wraps a loop and iterates it, as tqdm does


def run_batch(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """Calls a model on one batch.

    A mapping is passed as ``model(**batch)``, a tuple or list (which DataLoader makes) as ``model(*batch)``, and
    anything else as ``model(batch)``. ``forward(model, batch)`` replaces this rule.

    Raises:
        TypeError: the model cannot be called like that.
    """
    if forward is not None:
        return forward(model, batch)
    args: Iterable[Any] = () if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else (batch,)
    kwargs: Mapping[str, Any] = batch if isinstance(batch, Mapping) else {}
    try:
        return model(*args, **kwargs)
    except TypeError as error:
        if (mismatch := _signature_mismatch(model, args, kwargs)) is None:
            raise
        how = f"**batch) with the keys {', '.join(kwargs)}" if isinstance(batch, Mapping) else "batch)"
        how = f"*batch) with a batch of {len(batch)}" if isinstance(batch, tuple | list) else how
        raise TypeError(
            f"{type(model).__name__} cannot be called as model({how}: {mismatch}; "
            "pass forward=lambda model, batch: ... to call it otherwise"
        ) from error


def _signature_mismatch(model: nn.Module, args: Iterable[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Returns why a model's forward does not take these arguments; None if it does, or if its signature is unknown."""
    inner: Any = model
    while isinstance(wrapped := getattr(inner, "_orig_mod", getattr(inner, "module", None)), nn.Module):
        inner = wrapped  # torch.compile or DistributedDataParallel
    try:
        signature = inspect.signature(inner.forward)
    except (TypeError, ValueError):
        return None
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return None


def check_functions(**functions: object) -> None:
    """Rejects arguments that are neither functions nor None.

    Raises:
        TypeError: names the first such argument.
    """
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be a function or None, got {function!r}")


def as_batches(batches: Any, *, reused: bool = False) -> Iterable[Any]:
    """Returns the batches in ``batches``: a tensor, mapping or tuple is one batch, any other iterable holds batches.

    Args:
        batches: one batch, or an iterable of them, such as a list or a DataLoader.
        reused: whether the caller iterates more than once, which a generator or another iterator does not allow.

    Raises:
        TypeError: ``batches`` is neither a batch nor an iterable, or it is an iterator and ``reused`` is set.
    """
    if isinstance(batches, Tensor | Mapping | tuple):
        return [batches]
    if not isinstance(batches, Iterable) or isinstance(batches, str):
        raise TypeError(
            f"batches must be a tensor, a mapping, a tuple or an iterable of batches, got {type(batches).__name__}"
        )
    if reused and isinstance(batches, Iterator):
        raise TypeError(
            f"batches must be iterable more than once, as a list or a DataLoader is, got {type(batches).__name__}"
        )
    return batches


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Returns the input of a layer, given the arguments of its forward."""
    return args[0] if args else next(iter(kwargs.values()))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into evaluation mode without gradients; at the end, every module gets its training flag back.

    A module that overrides ``train``, for example to merge weights or to keep a part frozen, is switched back by its
    own ``train``. Meanwhile the fast paths of ``nn.MultiheadAttention`` and ``nn.TransformerEncoder`` are off, because
    they do not call their layers.
    """
    flags = {module: module.training for module in model.modules()}
    grad = torch.is_grad_enabled()

    def restore() -> None:
        torch.set_grad_enabled(grad)
        _restore_modes(flags)

    with restoring(restore), _FAST_ATTENTION.changed():
        torch.set_grad_enabled(False)
        if any(flags.values()):
            model.eval()
        yield


_FAST_ATTENTION = SharedSetting(
    torch.backends.mha.get_fastpath_enabled,
    lambda: torch.backends.mha.set_fastpath_enabled(False),
    torch.backends.mha.set_fastpath_enabled,
)


def eagerly() -> AbstractContextManager[None]:
    """Runs compiled models and functions uncompiled inside the ``with``, because compiled code calls no hooks."""
    return _STANCE.changed()


_stances: list[Any] = []


def _make_eager() -> None:
    if "torch._dynamo" in sys.modules and not _stances:  # without it nothing is compiled, and importing takes seconds
        _stances.append(torch.compiler.set_stance("force_eager"))


def _restore_stance(_: None) -> None:
    for stance in _stances:
        stance.__exit__(None, None, None)
    _stances.clear()


_STANCE = SharedSetting(lambda: None, _make_eager, _restore_stance)


@contextmanager
def observing(model: nn.Module) -> Iterator[None]:
    """Prepares a model to be run and observed: in evaluation mode, uncompiled, and on a copy of the random state."""
    gpus = list({tensor.device for tensor in model.parameters() if tensor.is_cuda})
    with torch.random.fork_rng(gpus), eagerly(), evaluating(model):
        yield


@contextmanager
def hooking() -> Iterator[list[RemovableHandle]]:
    """Yields a list for the handles of hooks, which are removed at the end.

    ``handles.append(module.register_forward_hook(hook))`` leaves no moment for an interrupt between the two.
    """
    handles: list[RemovableHandle] = []

    def remove() -> None:
        for handle in handles:
            handle.remove()

    with restoring(remove):
        yield handles


def _restore_modes(flags: Mapping[nn.Module, bool]) -> None:
    failed: BaseException | None = None
    for module, flag in flags.items():  # parents first: their train() switches all that is below them
        if module.training != flag and getattr(module.train, "__func__", module.train) is not nn.Module.train:
            try:
                module.train(flag)
            except BaseException as error:
                failed = failed or error
    for module, flag in flags.items():
        if module.training != flag:
            module.training = flag
    if failed is not None:
        raise failed
