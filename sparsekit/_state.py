"""What the library attaches to the objects of its users: the names, and functions that set and remove them.

On modules, as attributes of the instance:

==================  =====================  ==========================================  ===============================
name                set by                 meaning                                     removed by
==================  =====================  ==========================================  ===============================
``W_mask``          ``masks.set_mask``     bit-packed mask of the parameter ``W``, a   ``masks.remove_mask``
                                           buffer that no state dict contains
``W_mask_info``     ``masks.set_mask``     its ``MaskInfo``; without both there is     ``masks.remove_mask``
                                           no mask
``weight_fading``   ``tiers.fade``         bit-packed entries that shrink to zero, a   the next ``tier_iteration``
                                           buffer that no state dict contains
``original``        ``compress_``, load    the layer that a compressed one replaces,   goes with the compressed layer
                                           without its weight
``save_pretrained`` ``compress_``, load,   writes what ``save`` does, on models that   ``decompress_``, a load of a
                    ``slim_``              hold a compressed layer or are slim         dense model, ``unslim_``
``_apply``          ``compress_``, load    a check of dtypes before any layer is       ``decompress_``, a load of a
                                           converted, on the same models               dense model
``forward``         ``around_forwards``    a function that calls the module's own      the end of that ``with`` block
                                           forward, while a model is observed
``recipe``          ``sparse_training_``   how a ``MaskedLinear`` multiplies           ``finish()`` or ``undo()``
``called``          ``sparse_training_``   whether it was called since                 ``finish()`` or ``undo()``
``slim_plan``       ``slim_``              the ``SlimPlan`` of a model, on the model    ``unslim_``
``_ran_sparse``     a forward pre-hook     whether a pass of the model has run since   ``finish()`` or ``undo()``
==================  =====================  ==========================================  ===============================

The class of a layer changes in two places: ``sparse_training_`` makes an ``nn.Linear`` a ``MaskedLinear``, and
``integrations.peft`` gives a LoRA layer a class that masks what it adds. Hooks are registered in four places:
``keep_masks`` and ``fade`` have one on the optimizer each, ``sparse_training_`` has the one on the model that sets
``_ran_sparse``, and ``GradProbe`` has them on modules, on the tensors that pass through these in one step, and on the
steps of all optimizers. While a layer is called, ``MaskPro`` has its masked weight in place of the parameter. ``_undo``
keeps the ids of modules that are being changed, and sets nothing on them. Configurations are changed in two places:
``integrations.peft.lora_config`` registers a custom module in a ``LoraConfig``, and ``slim_`` sets ``slim_plan`` in one
of transformers, with fewer stages also ``num_hidden_layers`` and ``layer_types``. It changes integers of
modules as well: the sizes of layers, what depends on the number of heads, and the ``layer_idx`` of stages.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

FADING = "weight_fading"
ORIGINAL = "original"
SAVE_PRETRAINED = "save_pretrained"
APPLY = "_apply"
FORWARD = "forward"
RECIPE = "recipe"
CALLED = "called"
RAN_SPARSE = "_ran_sparse"
SLIM_PLAN = "slim_plan"


def mask_name(parameter: str = "weight") -> str:
    """Returns the name of the buffer that holds the mask of a parameter."""
    return f"{parameter}_mask"


def mask_info_name(parameter: str = "weight") -> str:
    """Returns the name of the attribute that says how the mask of a parameter was made."""
    return f"{parameter}_mask_info"


def set_attribute(module: nn.Module, name: str, value: Any) -> None:
    """Sets an attribute without ``nn.Module.__setattr__``, which would register modules and parameters."""
    module.__dict__[name] = value


def get_attribute(module: nn.Module, name: str) -> Any:
    """Returns an attribute of the instance, not of its class; None if there is none."""
    return module.__dict__.get(name)


def remove_attribute(module: nn.Module, name: str) -> None:
    """Removes an attribute of the instance, if it is there."""
    module.__dict__.pop(name, None)


def set_bits(module: nn.Module, name: str, bits: Tensor) -> None:
    """Registers bit-packed entries as a buffer that no state dict contains."""
    module.register_buffer(name, bits, persistent=False)


def get_bits(module: nn.Module, name: str) -> Tensor | None:
    """Returns the buffer of that name; None if there is none."""
    return module._buffers.get(name)


def remove_bits(module: nn.Module, name: str) -> None:
    """Removes the buffer of that name, if it is there."""
    module._buffers.pop(name, None)
    module._non_persistent_buffers_set.discard(name)


@dataclass(frozen=True)
class Original:
    """A holder of the layer that a compressed one replaces, because ``nn.Module`` would register the layer itself."""

    layer: nn.Module


def set_original(module: nn.Module, layer: nn.Module) -> None:
    """Stores the layer that ``module`` replaces, which ``decompress_`` brings back."""
    set_attribute(module, ORIGINAL, Original(layer))


def get_original(module: nn.Module) -> nn.Linear | nn.Conv2d | None:
    """Returns the layer that ``module`` replaces, without its weight; None if it replaces none."""
    original: Original | None = get_attribute(module, ORIGINAL)
    return None if original is None else original.layer  # type: ignore[return-value]
