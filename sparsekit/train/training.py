"""The one verb: make a model train with 2:4 weights, in place and undoably."""

import math
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor, nn

from .._changing import claiming
from .._layers import Where, check_model
from .._optimizers import sharding
from .._undo import Undo, undoing
from ..compress.tune import RATIO
from ..masks import MaskInfo, Pattern, get_mask_bits
from ..nn import autocast_dtype
from ..ops import pack_bits, unpack_bits
from .choose import RATIOS, Kind
from .find import find_layers
from .hardware import hardware_layout
from .layer import MaskedLinear, State, get_state, has_run, note_passes, notes_passes, set_state
from .product import Recipe
from .report import LayerReport, table

INFO = MaskInfo(Pattern(2, 4), 1)
SHARDED = "the model is sharded by FSDP: finish a plain copy that has loaded its full state dict"
UNCALLED = "it was never called: what reads its weight instead goes on with the dense one"


class SparseTraining:
    """A model's training with 2:4 weights, until ``finish()`` or ``undo()``; ``str`` gives a table.

    Made by ``sparse_training_``. The end of a ``with`` calls ``undo()``, which changes nothing after ``finish()``.
    """

    def __init__(self, model: nn.Module, layers: dict[str, nn.Linear], skipped: tuple[LayerReport, ...]) -> None:
        self._model = model
        self._layers = layers
        self._skipped = skipped
        self._left: dict[str, str] = {}  # why layers were left dense, by name

    @property
    def layers(self) -> tuple[LayerReport, ...]:
        """Every layer that was selected: how it is multiplied now, on the device it is on and under this autocast."""
        return (*(_report(name, layer, self._left.get(name)) for name, layer in self._layers.items()), *self._skipped)

    def __str__(self) -> str:
        return table(self.layers)

    @torch.inference_mode(False)
    @torch.no_grad()
    def finish(self) -> None:
        """Makes the weights what they were multiplied as: 2:4, in plain layers that have their masks stored.

        What the model computes stays the same. A layer that no pass of the model has called stays dense: something
        reads its weight, as it is, without calling it. A model that has not run at all is finished whole.
        ``keep_masks``, ``compress_`` and ``save`` go on from there. Finished once more, it does nothing.

        Raises:
            ValueError: a weight contains NaN or Inf or is computed since the training began, FSDP has sharded the
                model, or the training was undone; nothing is changed then.
            RuntimeError: the model is being changed already, here or in another thread.
        """
        if sharding(self._model):
            raise ValueError(SHARDED)
        running = self._running()
        if not running:
            if all(get_mask_bits(layer) is None for layer in self._layers.values()):
                raise ValueError("the sparse training of this model was undone: there is nothing to finish")
            return
        called = {name: layer for name, layer in running.items() if layer.called}
        if not called and not has_run(self._model):
            called = running
        bits = {name: _mask_bits(name, layer) for name, layer in called.items()}
        with claiming(self._model, "trained sparsely"), undoing() as undo:
            undo.callback(setattr, self, "_left", self._left)
            self._left = dict.fromkeys(running.keys() - called.keys(), UNCALLED)
            for name, layer in running.items():
                if name in bits:
                    weight = layer.weight.detach()
                    dropped = ~unpack_bits(bits[name], weight.shape[1])
                    undo.callback(_refill, weight, bits[name], weight[dropped])
                    weight.masked_fill_(dropped, 0)
                    _change(undo, layer, State(None, False, bits[name], INFO))
                else:
                    _change(undo, layer, get_state(layer)._replace(recipe=None, called=False))
            self._end(undo)
            undo.commit()
        torch.clear_autocast_cache()

    def undo(self) -> None:
        """Makes the layers plain ones again, with their dense weights as they are now.

        Raises:
            ValueError: a weight is computed since the training began, or FSDP has sharded a layer by itself; nothing is
                changed then.
            RuntimeError: the model is being changed already, here or in another thread.
        """
        with claiming(self._model, "trained sparsely"), undoing() as undo:
            for layer in self._running().values():
                _change(undo, layer, get_state(layer)._replace(recipe=None, called=False))
            self._end(undo)
            undo.commit()

    def _end(self, undo: Undo) -> None:
        """Notes passes no longer, unless another training of the model goes on."""
        if not any(isinstance(module, MaskedLinear) for module in self._model.modules()):
            _note(undo, self._model, False, False)

    def __enter__(self) -> "SparseTraining":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.undo()
        except (ValueError, RuntimeError):
            if error is None:  # what the caller raised says more
                raise

    def _running(self) -> dict[str, MaskedLinear]:
        running = {name: layer for name, layer in self._layers.items() if isinstance(layer, MaskedLinear)}
        for name, layer in running.items():
            if sharding(layer):  # which gave it a class of its own
                raise ValueError(SHARDED)
            if type(layer) is not MaskedLinear or layer._parameters.get("weight") is None:
                raise ValueError(
                    f"the weight of {name or 'the model'} is computed since its training began: remove its "
                    "parametrizations first"
                )
        return running


def _change(undo: Undo, layer: nn.Linear, state: State) -> None:
    undo.callback(set_state, layer, get_state(layer))
    set_state(layer, state)


def _note(undo: Undo, model: nn.Module, noting: bool, ran: bool) -> None:
    undo.callback(note_passes, model, notes_passes(model), has_run(model))
    note_passes(model, noting, ran)


def _mask_bits(name: str, layer: MaskedLinear) -> Tensor:
    """The packed mask by which a layer multiplies now."""
    if not torch.isfinite(layer.weight).all():
        kind = "NaN" if torch.isnan(layer.weight).any() else "Inf"
        raise ValueError(f"the weight of {name or 'the model'} contains {kind}: its training has diverged")
    return pack_bits(layer.recipe.mask(layer.weight))


def _refill(weight: Tensor, bits: Tensor, dropped: Tensor) -> None:
    """Puts back what was dropped."""
    weight.masked_scatter_(~unpack_bits(bits, weight.shape[1]), dropped)


def sparse_training_(
    model: nn.Module,
    *,
    backward: Literal["straight_through", "transposable"] = "straight_through",
    decay: float = 0.0,
    where: Where | None = None,
) -> SparseTraining:
    """Makes the linear layers of a model train with 2:4 weights, in place.

    Every call of a layer keeps the two largest magnitudes of every four consecutive inputs of its weight as it is then,
    and multiplies by these alone. The gradient reaches the whole dense weight behind, so that what is dropped can come
    back. The optimizer, new or used, goes on with the same Parameters; hooks, state dict, autocast, gradient
    checkpointing, ``torch.compile``, DDP and copies of the model work as before::

        with sk.sparse_training_(model) as training:
            for batch in batches:
                ...
            training.finish()
        sk.compress_(model)

    Where a GPU's 2:4 tensor cores take the shape, and the product is of 16 bits (by autocast, too), weights are packed
    anew in every call; but only at token counts where a forward and backward pass was measured to be right and at least
    1.05 times as fast as by a dense product with the masked weight. That is how all others train: as a dense layer,
    plus one pass over the weight. ``print(training)`` says which, and why. A process measures once per shape and power
    of two of tokens, at the first call, or when it is compiled, which waits for the GPU some tens of milliseconds. It
    measures nothing while a CUDA graph is captured: train a few steps before, or the graph multiplies densely.

    From the forward to the backward pass a layer holds one pruned or packed copy of its weight. Sharded by FSDP, a
    model trains as well, but it is finished in a plain copy that has loaded the full state dict.

    Layers whose weight is tied or read by their parent train dense, as do subclasses of ``nn.Linear``; the table says
    why. Stored masks of the others are forgotten. A layer that trains sparse already, in a copy of a model for
    instance, goes on by the new arguments.

    Args:
        model: any module tree.
        backward: ``"straight_through"`` multiplies the gradient of the input by the pruned weight as a dense matrix,
            because the transpose of a 2:4 weight is not 2:4. ``"transposable"`` chooses the best mask that keeps two
            of every four in both directions (https://arxiv.org/abs/2102.08124), so that this product can be sparse
            too; it drops a little more of the weight. The weight's gradient is dense and straight-through in both.
        decay: adds ``decay * weight`` to the gradients of dropped weights, which makes masks settle: SR-STE
            (https://arxiv.org/abs/2102.04010), where 2e-4 is used with SGD. Adam, which evens out the sizes of
            gradients, needs more: 0.05 served a small language model best. It is added in every backward pass: divide
            it by the number of passes that are accumulated, and multiply it by the scale of a gradient scaler.
        where: a predicate on ``(name, module)`` that selects layers; None selects all.

    Returns:
        A handle with ``finish()``, which makes the weights 2:4, and ``undo()``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``backward`` or ``decay`` is none of the above, or no layer can be trained sparse.
        RuntimeError: the model is being changed already, here or in another thread.
    """
    check_model(model)
    if backward not in ("straight_through", "transposable"):
        raise ValueError(f'backward must be "straight_through" or "transposable", got {backward!r}')
    if not 0 <= decay < math.inf:
        raise ValueError(f"decay must be a number from 0, got {decay!r}")
    recipe = Recipe(backward, decay)
    layers, skipped = find_layers(model, where)
    if not layers:
        who = "the model has" if where is None else "where selects"
        reasons = "".join(f"; {layer.name}: {layer.reason}" for layer in skipped[:3])
        raise ValueError(f"nothing to train: {who} no layer that can be trained sparse{reasons}")
    training = SparseTraining(model, layers, skipped)
    with claiming(model, "trained sparsely"), undoing() as undo:
        for layer in layers.values():
            _change(undo, layer, State(recipe, get_state(layer).called, None, None))
        _note(undo, model, True, has_run(model))
        undo.commit()
    return training


def _report(name: str, layer: nn.Linear, left: str | None) -> LayerReport:
    """How a layer is multiplied now; ``left`` says why it was left dense."""
    weight, shape = layer.weight, tuple(layer.weight.shape)
    if not isinstance(layer, MaskedLinear):
        return LayerReport(name, shape, "plain", left or "its sparse training is over")
    dtype = autocast_dtype(weight) or weight.dtype
    layout, reason = hardware_layout(weight.device, dtype, weight.shape, layer.recipe.transposable)
    if layout is None:
        return LayerReport(name, shape, "masked dense", reason)
    ratios = RATIOS.get(Kind(weight.device, dtype, weight.shape, layer.recipe.transposable, layout), {})
    slower = ratios and max(ratios.values()) < RATIO
    measured = ", ".join(f"{ratio:.2f}x at {tokens} tokens" for tokens, ratio in sorted(ratios.items()))
    return LayerReport(name, shape, "masked dense" if slower else layout, f"{layout} is {measured}" if ratios else "")
