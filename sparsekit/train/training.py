"""Makes a model train with 2:4 weights, in place, until it is finished or undone."""

import math
from numbers import Real
from types import TracebackType
from typing import Literal

import torch
from torch import Tensor, nn

from .._layers import Where, check_model
from .._optimizers import sharding
from .._undo import Undo, claiming, undoing
from ..masks import MaskInfo, Pattern, get_mask_bits
from ..ops import pack_bits, unpack_bits
from .find import select_layers
from .layer import MaskedLinear, State, get_state, has_run, note_passes, notes_passes, set_state
from .product import Recipe
from .report import TrainLayerReport, layer_table, report_layer

INFO = MaskInfo(Pattern(2, 4), 1)
SHARDED = "the model is sharded by FSDP: finish a plain copy that has loaded its full state dict"
UNCALLED = "it was never called: what reads its weight instead goes on with the dense one"


class SparseTraining:
    """The training of a model with 2:4 weights, which ``finish()`` or ``undo()`` ends; ``str`` gives a table.

    ``sparse_training_`` returns it. The end of a ``with`` calls ``undo()``, which does nothing after ``finish()``.
    """

    def __init__(self, model: nn.Module, layers: dict[str, nn.Linear], skipped: tuple[TrainLayerReport, ...]) -> None:
        self._model = model
        self._layers = layers
        self._skipped = skipped
        self._dense_reasons: dict[str, str] = {}  # of the layers that finish() left dense, by name

    @property
    def layers(self) -> tuple[TrainLayerReport, ...]:
        """The reports of all selected layers, for the device that each is on and the present autocast."""
        return (
            *(report_layer(name, layer, self._dense_reasons.get(name)) for name, layer in self._layers.items()),
            *self._skipped,
        )

    def __str__(self) -> str:
        return layer_table(self.layers)

    @torch.inference_mode(False)
    @torch.no_grad()
    def finish(self) -> None:
        """Makes the weights 2:4 by their present masks, and the layers plain ones with stored masks.

        The output of the model stays the same. A layer that the model never called stays dense, because something else
        reads its dense weight. If the model has not run at all, all layers become 2:4. Continue with
        ``keep_masks``, ``compress_`` or ``save``. A second call does nothing.

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
            undo.callback(setattr, self, "_dense_reasons", self._dense_reasons)
            self._dense_reasons = dict.fromkeys(running.keys() - called.keys(), UNCALLED)
            for name, layer in running.items():
                if name in bits:
                    weight = layer.weight.detach()
                    dropped = ~unpack_bits(bits[name], weight.shape[1])
                    undo.callback(_restore_dropped, weight, bits[name], weight[dropped])
                    weight.masked_fill_(dropped, 0)
                    _change(undo, layer, State(None, False, bits[name], INFO))
                else:
                    _change(undo, layer, get_state(layer)._replace(recipe=None, called=False))
            self._end(undo)
            undo.commit()
        torch.clear_autocast_cache()

    def undo(self) -> None:
        """Makes the layers plain ones again, with their dense weights as trained so far.

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
        """Stops noting passes, unless another training of the model is running."""
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
            if error is None:  # the error of the caller is the more important one
                raise

    def _running(self) -> dict[str, MaskedLinear]:
        running = {name: layer for name, layer in self._layers.items() if isinstance(layer, MaskedLinear)}
        for name, layer in running.items():
            if sharding(layer):  # FSDP has changed its class
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
    """Returns the bit-packed mask by which a layer multiplies now.

    Raises:
        ValueError: the weight contains NaN or Inf.
    """
    if not torch.isfinite(layer.weight).all():
        kind = "NaN" if torch.isnan(layer.weight).any() else "Inf"
        raise ValueError(f"the weight of {name or 'the model'} contains {kind}: its training has diverged")
    return pack_bits(layer.recipe.mask(layer.weight))


def _restore_dropped(weight: Tensor, bits: Tensor, dropped: Tensor) -> None:
    """Writes the dropped entries of a weight back."""
    weight.masked_scatter_(~unpack_bits(bits, weight.shape[1]), dropped)


def sparse_training_(
    model: nn.Module,
    *,
    backward: Literal["straight_through", "transposable"] = "straight_through",
    decay: float = 0.0,
    where: Where | None = None,
) -> SparseTraining:
    """Makes the linear layers of a model train with 2:4 weights, in place.

    In every call, a layer multiplies only by the two largest magnitudes of every four consecutive inputs of its weight
    as it is then. The gradient reaches the whole dense weight, so that dropped entries can come back. The Parameters
    stay the same objects, so that any optimizer can go on; hooks, state dict, autocast, gradient checkpointing,
    ``torch.compile``, DDP and copies of the model work as before::

        with sk.sparse_training_(model) as training:
            for batch in batches:
                ...
            training.finish()
        sk.compress_(model)

    On a GPU whose 2:4 tensor cores take the shape of the weight, and in 16 bits (also by autocast), the weight is
    packed in every call, but only at token counts at which a forward and backward pass gave right results and was at
    least 1.05 times as fast as a dense product with the masked weight. Otherwise the layer uses that dense product,
    which costs as much as a dense layer and one pass over the weight. ``print(training)`` shows which layer uses what,
    and why. A process measures once per shape and token bucket, at the first call or during compilation; it then waits
    for the GPU for some tens of milliseconds. Nothing can be measured while a CUDA graph is captured: train a few steps
    before, or the graph multiplies densely.

    From the forward to the backward pass, a layer holds one pruned or packed copy of its weight. A model that FSDP has
    sharded can train too, but must be finished in a plain copy that has loaded the full state dict.

    A layer trains dense if its weight is tied, if its parent reads the weight, or if it is a subclass of ``nn.Linear``;
    the table says why. Stored masks of the other layers are removed. A layer that trains sparse already, as in a copy
    of a model, goes on with the new arguments.

    Args:
        model: any module tree.
        backward: ``"straight_through"`` multiplies the gradient of the input by the pruned weight as a dense matrix,
            because the transpose of a 2:4 weight is not 2:4. ``"transposable"`` chooses the best mask that keeps two
            of every four in both directions (https://arxiv.org/abs/2102.08124), so that this product can be sparse
            too; it drops a little more of the weight. The weight's gradient is dense and straight-through in both.
        decay: adds ``decay * weight`` to the gradients of dropped weights, which makes masks settle: SR-STE
            (https://arxiv.org/abs/2102.04010), where 2e-4 is used with SGD. Adam evens out the sizes of gradients and
            needs more: 0.05 was best for a small language model. It is added in every backward pass: divide it by the
            number of passes whose gradients are accumulated, and multiply it by the scale of a gradient scaler.
        where: a predicate on ``(name, module)`` that selects layers; None selects all.

    Returns:
        A handle with ``finish()``, which makes the weights 2:4, and ``undo()``.

    Raises:
        TypeError: ``model`` is not a module, or ``decay`` is not a number.
        ValueError: ``backward`` or ``decay`` is none of the above, or no layer can be trained sparse.
        RuntimeError: the model is being changed already, here or in another thread.
    """
    check_model(model)
    if backward not in ("straight_through", "transposable"):
        raise ValueError(f'backward must be "straight_through" or "transposable", got {backward!r}')
    if not isinstance(decay, Real):
        raise TypeError(f"decay must be a number, got {decay!r}")
    if not 0 <= decay < math.inf:
        raise ValueError(f"decay must be a number from 0, got {decay!r}")
    recipe = Recipe(backward, decay)
    layers, skipped = select_layers(model, where)
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
