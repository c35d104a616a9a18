"""What the ``quantization_config`` of a folder holds, for both libraries."""

from copy import deepcopy
from enum import Enum
from typing import Any

from ...checkpoint.pretrained import METHOD, parse_config


class Method(str, Enum):
    """The name of the format in ``config.json``, in the type that both libraries use for it."""

    SPARSEKIT = METHOD


class Entries:
    """The ``quantization_config`` of a folder that ``sparsekit.save(model, folder, format="transformers")`` wrote.

    It is read, not made by hand. Its entries are data: none chooses what is imported or called.

    Args:
        **entries: the entries of ``config.json``.

    Raises:
        ValueError: ``save`` did not write them.
    """

    def __init__(self, **entries: Any):
        parse_config(entries)
        vars(self).update(entries)
        self.quant_method = Method.SPARSEKIT

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Returns the configuration of the entries of ``config.json``."""
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Returns the entries of ``config.json``."""
        return deepcopy(vars(self))

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns the same: every entry is needed."""
        return self.to_dict()


def refuse_new(pre_quantized: bool) -> None:
    """Rejects a model that is to be compressed while it is loaded.

    Raises:
        ValueError: the folder does not hold a compressed model.
    """
    if not pre_quantized:
        raise ValueError(
            "sparsekit compresses a model that is loaded: call sparsekit.compress_ or sparsekit.quantize_ on it"
        )
