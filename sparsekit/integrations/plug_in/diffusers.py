"""A quantizer of diffusers that loads the folders of ``sparsekit.save``; importing this module registers it.

diffusers has no function that registers a quantizer, so the two tables that it looks them up in get an entry.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from ...checkpoint.pretrained import METHOD, check_folder
from ...checkpoint.skeleton import Skeleton, StoredLayer
from .entries import Entries, refuse_new
from .skeleton import prepare_skeleton


class SparsekitConfig(Entries, QuantizationConfigMixin):  # type: ignore[misc, unused-ignore]
    """The ``quantization_config`` of a folder, as the library wants it."""


class SparsekitQuantizer(DiffusersQuantizer):  # type: ignore[misc, unused-ignore]
    """The quantizer of such folders: it puts compressed layers into the model before any weight is read."""

    weights: Path
    skeleton: Skeleton

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Rejects a model that is to be compressed while it is loaded."""
        refuse_new(self.pre_quantized)

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Remembers the file, after a check of the folder; returns the names as they are."""
        if len(checkpoint_files) != 1:
            raise ValueError(f"sparsekit writes one file of weights, got {checkpoint_files}")
        self.weights = Path(checkpoint_files[0])
        check_folder(self.weights)
        return loaded_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.skeleton = prepare_skeleton(model, self.quantization_config.to_dict(), self.weights)

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Returns whether a tensor belongs to a compressed layer."""
        owner, _, part = param_name.rpartition(".")
        module = model.get_submodule(owner)
        return isinstance(module, StoredLayer) and part in module._buffers

    def create_quantized_param(  # type: ignore[override, unused-ignore]
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Puts a tensor into its layer, in the dtype that the layer needs, whatever the model is converted to."""
        owner, _, part = param_name.rpartition(".")
        module = model.get_submodule(owner)
        stored, wanted = state_dict[param_name], module.get_buffer(part)
        module._buffers[part] = stored.to(target_device, wanted.dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.skeleton.finish()
        del self.skeleton
        # The layers are part of the model now, and save_pretrained describes those that are there when it is called.
        config = dict(model.config)
        config.pop("quantization_config", None)
        model._internal_dict = type(model._internal_dict)(config)
        return model

    @property
    def is_serializable(self) -> bool:
        """Whether a loaded model can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on a loaded model."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether a loaded model can be compiled."""
        return True


AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, SparsekitConfig)
AUTO_QUANTIZER_MAPPING.setdefault(METHOD, SparsekitQuantizer)
