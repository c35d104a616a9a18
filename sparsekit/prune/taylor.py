"""Scores from gradients: how much the loss would change, to first order, if a weight became zero."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .._batches import Progress, as_batches, check_functions, observing
from .._layers import check_model
from .._optimizers import sharding
from .._trees import copied
from .._undo import claiming, restoring
from .layers import differentiable_weights

LossFn = Callable[[nn.Module, Any], Tensor]


def taylor_scores(
    model: nn.Module, loss_fn: LossFn, batches: Any, *, progress: Progress | None = None
) -> dict[str, Tensor]:
    """Returns the scores ``|weight * gradient|`` of all layers, summed over the batches, for ``Scores``.

    That is the first-order Taylor term of what a batch's loss changes by when a weight is set to zero
    (https://arxiv.org/abs/1906.10771). Gradients within a batch add up with their signs, as the loss of the batch does,
    and batches by magnitude: more and smaller batches tell more weights apart from those without influence. The model
    is run in evaluation mode, uncompiled; its gradients, modes and flags and the random state are as before afterwards.

    Args:
        model: any module whose weights are whole in this process.
        loss_fn: ``loss_fn(model, batch)`` returns the loss, a tensor of one number. It may draw random numbers.
        batches: one batch, or an iterable of them, which is read once.
        progress: wraps the loop over the batches and iterates it, as ``tqdm`` does.

    Returns:
        For each layer that a loss depends on, by its name, float32 scores in the shape of its weight.

    Raises:
        TypeError: ``model``, ``loss_fn`` or ``batches`` has a wrong type, or ``loss_fn`` returns no tensor.
        ValueError: there is no batch, the model is sharded, its weights were made in inference mode, a loss is not
            finite or not one number, or none depends on a weight.
        RuntimeError: the model is being changed already.
    """
    check_functions(progress=progress)
    scores: dict[str, Tensor] = {}
    with _scoring(model, loss_fn) as weights:
        for batch in (progress or iter)(as_batches(batches)):
            for name, gradient in _gradients(loss_fn(model, copied(batch)), weights).items():
                _add(scores, name, _product(weights[name], gradient))
    return _checked(scores)


def diff_pruning_scores(
    model: nn.Module,
    loss_fn: LossFn,
    timesteps: Iterable[Any],
    *,
    share: float = 0.05,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Returns the scores ``|weight * sum of the gradients|`` over the timesteps with a large loss, for ``Scores``.

    A timestep counts if its loss is above a share of the largest: at the others, where there is little left to predict,
    gradients say more about noise than about the image (Diff-Pruning, https://arxiv.org/abs/2305.10924). The gradients
    of different timesteps add up with their signs, as in the published code. The losses of all timesteps are computed
    first, so they may come in any order.

    The method was published for whole channels. Of the single weights of a converged model the gradients nearly cancel,
    and ``taylor_scores`` rank them better: the losses of two UNets of MNIST digits, 0.028 and 0.027, are 0.12 and 1.01
    after pruning to 2:4 by these scores without training, 0.08 and 0.59 by ``taylor_scores``, and 0.38 and 1.00 by
    random ones.

    Args:
        model: as for ``taylor_scores``, which also says how the model is run.
        loss_fn: ``loss_fn(model, timestep)`` returns the loss at a timestep, a tensor of one number.
        timesteps: whatever ``loss_fn`` takes, such as ``range(1000)``, or every tenth of them; with the images as well
            if they are not the same at all timesteps.
        share: of the largest loss; the paper uses 0.02 to 0.1, and 0 counts all with a positive loss.
        progress: wraps the loop over the timesteps that count.

    Returns:
        As ``taylor_scores``.

    Raises:
        TypeError: as ``taylor_scores``.
        ValueError: ``share`` is not in ``[0, 1)``, or as ``taylor_scores``.
        RuntimeError: the model is being changed already.
    """
    check_functions(progress=progress)
    if not 0 <= share < 1:
        raise ValueError(f"share must be at least 0 and below 1, got {share}")
    sums: dict[str, Tensor] = {}
    with _scoring(model, loss_fn) as weights:
        timesteps = list(timesteps)
        with torch.no_grad():
            losses = [_number(loss_fn(model, copied(each))) for each in timesteps]
        counting = [each for each, loss in zip(timesteps, losses, strict=True) if loss > share * max(losses)]
        for timestep in (progress or iter)(counting):
            for name, gradient in _gradients(loss_fn(model, copied(timestep)), weights).items():
                _add(sums, name, gradient.float())
        return _checked({name: _product(weights[name], total) for name, total in sums.items()})


@contextmanager
def _scoring(model: nn.Module, loss_fn: LossFn) -> Iterator[dict[str, nn.Parameter]]:
    """Prepares a model to be differentiated, and yields the weights of its layers by name."""
    check_model(model)
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function of (model, batch) that returns the loss, got {loss_fn!r}")
    if kind := sharding(model):
        raise ValueError(f"the model is sharded by {kind}: compute its scores where its weights are whole")
    weights = differentiable_weights(model)
    if inference := [name for name, weight in weights.items() if weight.is_inference()]:
        raise ValueError(f"the weight of {inference[0]!r} was made in inference mode, and has no gradient")
    frozen = [weight for weight in weights.values() if not weight.requires_grad]

    def freeze() -> None:
        for weight in frozen:
            weight.requires_grad_(False)

    # DistributedDataParallel would wait for a backward pass of all its parameters.
    alone = model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()
    with claiming(model, "scored"), restoring(freeze), observing(model), alone:
        with torch.inference_mode(False), torch.enable_grad():
            for weight in frozen:
                weight.requires_grad_(True)
            yield weights


def _gradients(loss: Any, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Returns the gradient of the loss for each weight that it depends on; no ``.grad`` is touched."""
    _number(loss)
    if not loss.requires_grad:
        raise ValueError("the loss depends on no weight: loss_fn must call the model, with gradients")
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return {name: each for name, each in zip(weights, found, strict=True) if each is not None}


def _number(loss: Any) -> float:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn must return a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(f"loss_fn must return one number, got the shape {tuple(loss.shape)}")
    if not torch.isfinite(loss):
        raise ValueError(f"loss_fn returned {loss.item()}, and scores need finite losses")
    return loss.item()


def _product(weight: Tensor, gradient: Tensor) -> Tensor:
    return torch.mul(weight.detach().float(), gradient.float()).abs_()


def _add(totals: dict[str, Tensor], name: str, value: Tensor) -> None:
    totals[name] = totals[name].add_(value) if name in totals else value.clone()


def _checked(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    if not scores:
        raise ValueError("there are no scores: no batch was given, or no loss depends on the weight of a layer")
    return scores
