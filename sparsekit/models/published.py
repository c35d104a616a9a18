"""The weights that RADD's authors published, or that their training code leaves, as tensors by their names."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FILES = ("model.safetensors", "pytorch_model.bin", "checkpoints-meta/checkpoint.pth")  # of a folder, the first that is


def read_published(source: str | os.PathLike[str], *, ema: bool = True) -> dict[str, Tensor]:
    """Returns published weights by their published names.

    Args:
        source: a file of weights (``.safetensors``, else what ``torch.save`` writes), a checkpoint of the original's
            training, a folder with one of them, or the id of a model on the Hugging Face Hub.
        ema: of a checkpoint, whether to take the moving averages of the weights, as the original does.

    Raises:
        ValueError: the file holds something else.
        FileNotFoundError: there is none in the folder.
    """
    path = Path(source)
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise FileNotFoundError(f"{path} has none of {', '.join(FILES)}")
        path = found[0]
    elif not path.is_file():
        path = _download(os.fspath(source))
    if path.suffix == ".safetensors":
        return load_file(path)
    stored = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(stored, Mapping) and "model" in stored:
        stored = _of_checkpoint(stored, ema)
    if not isinstance(stored, Mapping) or not all(isinstance(each, Tensor) for each in stored.values()):
        raise ValueError(f"{path} must hold tensors by name, or a checkpoint with model and ema")
    return {name.removeprefix("module."): tensor for name, tensor in stored.items()}


def _of_checkpoint(stored: Mapping[str, Any], ema: bool) -> Mapping[str, Tensor]:
    """Returns the weights of a checkpoint; its averages are a list in the order of the model's parameters."""
    model: Mapping[str, Tensor] = stored["model"]
    if not ema or "ema" not in stored:
        return model
    names = [name for name in model if not name.endswith("rotary_emb.inv_freq")]  # a buffer, which has no average
    averages = stored["ema"]["shadow_params"]
    if [each.shape for each in averages] != [model[name].shape for name in names]:
        raise ValueError("the averages of the checkpoint do not fit its model: pass ema=False to read the weights")
    return dict(zip(names, averages, strict=True))


def _download(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        try:
            return Path(hf_hub_download(name, FILES[0]))
        except EntryNotFoundError:
            return Path(hf_hub_download(name, FILES[1]))
    except HFValidationError as error:
        raise FileNotFoundError(f"{name} is no file, no folder and no name on the Hugging Face Hub") from error
