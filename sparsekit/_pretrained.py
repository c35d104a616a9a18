"""``save_pretrained`` of a model that holds compressed layers."""

import os
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

Writer = Callable[[nn.Module, str | os.PathLike[str], Mapping[str, Tensor] | None], None]
WRITERS: list[Writer] = []  # what checkpoint, which lies above, registers


def has_config(model: Any) -> bool:
    """Returns whether a model has a configuration as those of diffusers or transformers have it, and no adapters."""
    if getattr(model, "peft_config", None):  # whose layers no configuration describes
        return False
    return any(callable(getattr(each, "to_json_string", None)) for each in (model, getattr(model, "config", None)))


class SavePretrained:
    """A replacement for the ``save_pretrained`` of a model, which writes its compressed layers as they are.

    It is an attribute of one module; a copied or unpickled module gets one of its own.
    """

    def __init__(self, module: nn.Module):
        self._module = weakref.ref(module)

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **arguments: Any,
    ) -> None:
        """Writes a folder that ``from_pretrained`` loads once ``sparsekit`` is imported.

        Args:
            save_directory: the folder, made where it is missing; files that are not written stay.
            is_main_process: False writes nothing.
            state_dict: tensors to write instead of the model's own, under the same names.
            push_to_hub: must be False: ``model.push_to_hub(name)`` uploads what this writes.
            **arguments: other arguments of the library are accepted and have no meaning here: the weights are always
                one safetensors file.

        Raises:
            RuntimeError: the model is none of transformers or diffusers, so nothing could load what it would write.
            ValueError: ``push_to_hub`` is not False, or ``state_dict`` has other names.
        """
        module = self._guarded()
        if not has_config(module):
            raise RuntimeError(
                "save_pretrained cannot write a compressed model of this class, because nothing could load it: "
                "use sparsekit.save, or call sparsekit.decompress_ first"
            )
        if push_to_hub:
            raise ValueError("save_pretrained of a compressed model does not upload: call model.push_to_hub(name)")
        if is_main_process:
            WRITERS[0](module, save_directory, state_dict)

    def _guarded(self) -> nn.Module:
        module = self._module()
        assert module is not None  # this is its attribute, and does not outlive it
        return module

    def __deepcopy__(self, memo: dict[int, Any]) -> "SavePretrained":
        return SavePretrained(memo.get(id(self._guarded()), self._guarded()))

    def __reduce__(self) -> Any:
        return SavePretrained, (self._guarded(),)
