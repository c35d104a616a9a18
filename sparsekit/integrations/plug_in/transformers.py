"""A quantizer of transformers that loads the folders of ``sparsekit.save``; importing this module registers it."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...checkpoint.pretrained import METHOD, check_folder
from ...checkpoint.skeleton import Skeleton
from .entries import Entries, refuse_new
from .skeleton import prepare_skeleton


class SparsekitConfig(Entries, QuantizationConfigMixin):  # type: ignore[misc, unused-ignore]
    """The ``quantization_config`` of a folder, as the library wants it."""


class SparsekitQuantizer(HfQuantizer):  # type: ignore[misc, unused-ignore]
    """The quantizer of such folders: it puts compressed layers into the model before any weight is read."""

    skeleton: Skeleton

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Rejects a model that is to be compressed while it is loaded."""
        refuse_new(self.pre_quantized)

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files or len(checkpoint_files) != 1:
            raise ValueError(f"sparsekit writes one file of weights, got {checkpoint_files}")
        weights = Path(checkpoint_files[0])
        check_folder(weights)
        self.skeleton = prepare_skeleton(model, self.quantization_config.to_dict(), weights)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self.skeleton.finish()
        del self.skeleton
        # The layers are part of the model now, and save_pretrained describes those that are there when it is called.
        self.remove_quantization_config(model)
        return model

    def is_serializable(self) -> bool:
        """Returns True: a loaded model can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on a loaded model."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether a loaded model can be compiled."""
        return True


if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(METHOD)(SparsekitConfig)
    register_quantizer(METHOD)(SparsekitQuantizer)
