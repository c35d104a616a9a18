"""Estimates the running statistics of BatchNorm again from batches: pruning the layers before it makes them wrong."""

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from .._batches import Forward, as_batches, check_functions, eagerly, evaluating, layer_input, run_batch
from .._forwards import Around, around_forwards
from .._layers import check_model
from .._trees import copied
from .._undo import Undo, change, restoring
from .calibration.batch_runner import check_count
from .calibration.ranks import Group, Ranks, local_buffers
from .full_precision import full_precision


def reestimate_batchnorm_(
    model: nn.Module, batches: Any, *, forward: Forward | None = None, group: Group = "world"
) -> tuple[str, ...]:
    """Estimates the running statistics of every BatchNorm of a model again, in place.

    ``prune_`` does so by itself; this function is for weights that were changed in another way. All batches go through
    the model once, in evaluation mode, but every BatchNorm normalizes by the batch, as in training. The new
    ``running_mean`` and ``running_var`` are the plain averages of the batches' means and unbiased variances: each batch
    counts the same, whatever ``momentum`` is. ``num_batches_tracked`` is the number of batches. Padding counts.

    A BatchNorm is not changed if no batch reaches it, if it tracks no statistics, or if it is in evaluation mode inside
    a model in training mode, since it was frozen on purpose. Inputs with a single value per channel have no variance:
    they are normalized as before and do not count. If anything fails, the model is as it was.

    Args:
        model: any tree of modules.
        batches: as for ``prune_``, but read only once. A few hundred samples are enough, in batches that are not tiny.
        forward: ``forward(model, batch)`` runs a batch, instead of calling the model on it.
        group: the processes that estimate together, each with its own batches, as in ``Calibration``.

    Returns:
        The names of the modules that have new statistics.

    Raises:
        TypeError: ``model`` is not a module or ``batches`` are not batches.
        ValueError: there is no batch, or an input of a BatchNorm is NaN or infinite, or too large for its dtype.
        RuntimeError: the model is being changed already, here or in another thread, or another process has failed.
    """
    check_model(model)
    check_functions(forward=forward)
    found, ranks = tracked_batchnorms(model), Ranks(group, None)

    def work(undo: Undo) -> tuple[str, ...]:
        ranks.agree({"batchnorms": sorted(found)}, [])
        with evaluating(model), local_buffers(model):
            return reestimate(model, found, as_batches(batches), forward, ranks, undo)

    return change(model, "re-estimated", ranks.together(work))


def tracked_batchnorms(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the BatchNorm modules with running statistics by name, except frozen ones.

    A BatchNorm is frozen if it is in evaluation mode while the model is in training mode.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and not is_lazy(module.running_mean)
        and not module.running_mean.is_meta
        and (module.training or not model.training)
    }


def reestimate(
    model: nn.Module,
    batchnorms: Mapping[str, nn.Module],
    batches: Iterable[Any],
    forward: Forward | None,
    ranks: Ranks,
    undo: Undo,
    after: Collection[nn.Module] | None = None,
) -> tuple[str, ...]:
    """Estimates the statistics of some BatchNorms of a model in evaluation mode; ``undo`` records how to restore them.

    With ``after``, a BatchNorm gets new statistics only if one of the modules ``after`` runs before it in the same
    pass, because the inputs of the others have not changed.
    """
    estimates = {name: _Estimate(name, module) for name, module in batchnorms.items()}
    changed = after is None

    def after_which(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal changed
        output = forward(*args, **kwargs)
        changed = True
        return output

    def estimating(estimate: _Estimate) -> Around:
        def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if changed:
                estimate.enter(layer_input(args, kwargs))
            output = forward(*args, **kwargs)
            estimate.leave()
            return output

        return run

    def restore() -> None:
        for estimate in estimates.values():
            estimate.leave()

    arounds = dict.fromkeys(after or (), after_which)
    arounds |= {estimate.module: estimating(estimate) for estimate in estimates.values()}
    with restoring(restore), eagerly(), around_forwards(arounds):
        count = 0
        for count, batch in enumerate(batches, start=1):  # noqa: B007
            changed = after is None
            run_batch(model, copied(batch), forward)
        check_count(count)
    ranks.exchange()
    with full_precision():
        return tuple(name for name, estimate in estimates.items() if estimate.write(ranks, undo))


class _Estimate:
    """The new statistics of one BatchNorm, which normalizes by the current batch while it runs."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.module = module
        self._name = name
        self._own = module.get_buffer("running_mean"), module.get_buffer("running_var")
        with full_precision():
            self._mean, self._var = (torch.zeros_like(own, dtype=torch.float32) for own in self._own)
        self._count = 0

    def enter(self, x: Tensor) -> None:
        """Adds an input, and lets the module normalize by it."""
        values = x.numel() // max(len(self._mean), 1)
        if values < 2:
            return
        with full_precision():
            channels = x.movedim(1, 0).flatten(1).float() if x.dim() > 1 else x.float()[None]
            var, mean = torch.var_mean(channels, 1, correction=0)
            self._mean += mean
            self._var += var * (values / (values - 1))
            self._count += 1
            self._show(mean.to(self._own[0].dtype), var.to(self._own[1].dtype))

    def leave(self) -> None:
        """Restores the statistics of the module."""
        self._show(*self._own)

    def _show(self, mean: Tensor, var: Tensor) -> None:
        self.module._buffers.update(running_mean=mean, running_var=var)

    def write(self, ranks: Ranks, undo: Undo) -> bool:
        """Stores the averages over all batches of all processes; returns False if there were none."""
        count = torch.tensor(self._count, dtype=torch.int64, device=self._mean.device)
        for each in (self._mean, self._var, count):
            ranks.all_reduce(each)
        if count == 0:
            return False
        tracked = self.module._buffers.get("num_batches_tracked")
        new = [
            (own, mean.div_(count).to(own.dtype)) for own, mean in zip(self._own, (self._mean, self._var), strict=True)
        ]
        if not all(torch.isfinite(value).all() for _, value in new):
            raise ValueError(f"an input of the BatchNorm {self._name or 'model'} is NaN, infinite or too large")
        for own, value in [*new, *([] if tracked is None else [(tracked, count)])]:
            undo.callback(_copy, own, own.clone())
            _copy(own, value)
        return True


def _copy(own: Tensor, value: Tensor) -> None:
    with torch.inference_mode() if own.is_inference() else nullcontext():  # the only mode in which it can be written to
        own.copy_(value)
