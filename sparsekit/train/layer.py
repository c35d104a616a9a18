"""The layer that trains sparse: an ``nn.Linear`` except for its product."""

from typing import Any, ClassVar, NamedTuple

import torch
import torch.fx
from torch import Tensor, nn

from .._state import CALLED, RAN_SPARSE, RECIPE, get_attribute, remove_attribute, set_attribute
from ..masks import MaskInfo, get_mask_bits, get_mask_info, remove_mask, set_mask_bits
from ..nn.common import autocast_dtype, fx_node
from . import layouts
from .layouts import hardware_layout, traced_as_constant
from .product import Recipe, multiply


class MaskedLinear(nn.Linear):
    """An ``nn.Linear`` that multiplies by its masked weight; every call chooses the mask again.

    ``sparse_training_`` only changes the class of an ``nn.Linear``: the module, its hooks, Parameters and state dict
    stay the same, so that an optimizer, DDP or a checkpoint sees no difference. Copies and pickles train sparse too.
    """

    unsupported_reason: ClassVar[str] = "it trains sparse: call finish() or undo() of its training first"

    recipe: Recipe
    called: bool  # whether the layer was called since its training began; code that only reads its weight does not

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, torch.fx.Proxy):
            return fx_node(self, input)
        self.called = True
        weight, transposable = self.weight, self.recipe.transposable
        dtype = autocast_dtype(input) or weight.dtype
        layout, _ = hardware_layout(weight.device, dtype, weight.shape, transposable)
        if layout is not None:
            # While a graph is traced, the number of tokens may be unknown.
            tokens = layouts.MAX_TOKENS if torch.compiler.is_compiling() else input.shape[:-1].numel()
            layout = _if_faster(layout, weight.device, dtype, self.out_features, self.in_features, transposable, tokens)
        return multiply(input, weight, self.bias, self.recipe, layout)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, backward={self.recipe.backward}, decay={self.recipe.decay}"


@traced_as_constant
def _if_faster(
    layout: str, device: torch.device, dtype: torch.dtype, rows: int, cols: int, transposable: bool, tokens: int
) -> str | None:
    kind = layouts.StepKind(device, dtype, torch.Size((rows, cols)), transposable, layout)
    return layout if layouts.is_faster(kind, tokens) else None


class State(NamedTuple):
    """Everything that sparse training changes in a layer: its recipe, whether it was called, and its stored mask.

    ``recipe`` is None for a plain layer.
    """

    recipe: Recipe | None
    called: bool
    bits: Tensor | None
    info: MaskInfo | None


def get_state(layer: nn.Linear) -> State:
    """Returns the state of a layer."""
    bits, info = get_mask_bits(layer), get_mask_info(layer)
    if isinstance(layer, MaskedLinear):
        return State(layer.recipe, layer.called, bits, info)
    return State(None, False, bits, info)


def set_state(layer: nn.Linear, state: State) -> None:
    """Puts a layer into a state, from any other state, even a half-changed one; its weight stays as it is."""
    layer.__class__ = nn.Linear
    if state.recipe is None:
        remove_attribute(layer, RECIPE)
        remove_attribute(layer, CALLED)
    else:
        set_attribute(layer, RECIPE, state.recipe)
        set_attribute(layer, CALLED, state.called)
        layer.__class__ = MaskedLinear
    if state.bits is None or state.info is None:
        remove_mask(layer)
    else:
        set_mask_bits(layer, state.bits, state.info)


def _note_pass(model: nn.Module, _: Any) -> None:
    set_attribute(model, RAN_SPARSE, True)


def has_run(model: nn.Module) -> bool:
    """Returns whether the model has run since ``note_passes`` began to note its forward passes."""
    return get_attribute(model, RAN_SPARSE) is not None


def notes_passes(model: nn.Module) -> bool:
    """Returns whether the forward passes of a model are being noted."""
    return any(hook is _note_pass for hook in model._forward_pre_hooks.values())


def note_passes(model: nn.Module, noting: bool, ran: bool) -> None:
    """Begins or stops noting the forward passes of a model; ``has_run`` returns ``ran`` until the next pass."""
    if noting and not notes_passes(model):
        model.register_forward_pre_hook(_note_pass)
    if not noting:
        for key in [key for key, hook in model._forward_pre_hooks.items() if hook is _note_pass]:
            del model._forward_pre_hooks[key]
    if ran:
        set_attribute(model, RAN_SPARSE, True)
    else:
        remove_attribute(model, RAN_SPARSE)
