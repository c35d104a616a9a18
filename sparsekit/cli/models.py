"""Loads transformers models from a folder or by their id on the hub, and calls them on tokens."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import decompress_, load
from ..checkpoint.bitmask import find_packed
from ..checkpoint.pretrained import described
from ..checkpoint.shards import Shards
from .errors import UsageError
from .folders import COMPRESSED, MASKS, OWN, check_folder, model_files

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def transformers() -> Any:
    """Imports transformers, which takes seconds, and silences its messages and progress bars; returns the package."""
    import huggingface_hub
    import transformers as package

    huggingface_hub.utils.logging.set_verbosity_error()
    package.utils.logging.set_verbosity_error()
    package.utils.logging.disable_progress_bar()
    return package


def device_of(name: str) -> torch.device:
    """Returns the device of this name; ``"auto"`` is the GPU if there is one, else the CPU.

    Raises:
        UsageError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # the latter if torch was built without CUDA
        raise UsageError(f"there is no device {name!r} here: {str(error).splitlines()[0]}") from error


def read_config(source: str) -> Any:
    """Reads the configuration of a model from a folder or the hub.

    Raises:
        UsageError: there is no such folder.
        OSError: the hub has no such model.
    """
    if os.path.isdir(source):
        check_folder(Path(source))
    elif Path(source).is_absolute() or source.startswith(".") or source.count("/") > 1:
        raise UsageError(f"there is no folder {source}")
    try:
        return transformers().AutoConfig.from_pretrained(source, trust_remote_code=False)
    except OSError as error:
        if os.path.isdir(source):
            raise
        why = next(iter(str(error).splitlines()), "")
        raise OSError(f"there is no folder {source}, and the hub gives no model of that name: {why}") from error


def model_class(config: Any) -> Any:
    """Returns the class that the configuration names; a causal LM if transformers has no such class."""
    package = transformers()
    for name in config.architectures or ():
        if hasattr(package, name):
            return getattr(package, name)
    return package.AutoModelForCausalLM


def load_dense(source: str, device: str = "auto", dtype: Dtype = "auto", *, masks: bool = True) -> nn.Module:
    """Loads a model with dense weights, in evaluation mode; nothing is unpickled.

    Args:
        source: a folder, or an id on the hub.
        device: as for ``device_of``.
        dtype: ``"auto"`` is the checkpoint's own.
        masks: whether to load the masks that ``sparsekit prune`` stored.

    Raises:
        UsageError: there is no such folder.
        OSError: the hub has no such model.
        ValueError: weights are missing, or are not those of the masks.
    """
    config, folder = read_config(source), Path(source)
    target, kind = device_of(device), model_class(config)
    if folder.is_dir() and described(folder) is not None:
        model = load_packed(folder)
        decompress_(model)
    elif folder.is_dir() and not model_files(folder):
        model = empty_model(config)
        load(model, folder / COMPRESSED, dense=True)
    else:
        if folder.is_dir() and find_packed(Shards(folder, skip=OWN)):
            raise UsageError(f"{source} is packed: sparsekit convert {source} --out OTHER makes it a dense one")
        options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True, "trust_remote_code": False}
        model, told = kind.from_pretrained(source, **options)
        if missing := told["missing_keys"]:
            raise ValueError(f"the checkpoint lacks {len(missing)} weights, {min(missing)} for one")
        if masks and (folder / MASKS).exists():
            load(model, folder / MASKS)
    model = model if dtype == "auto" else model.to(getattr(torch, dtype))
    return model.to(target).eval()


def load_packed(folder: Path) -> nn.Module:
    """Loads a folder with its compressed layers as they are, on the CPU and in evaluation mode.

    Raises:
        ValueError: a file was altered.
    """
    config = read_config(str(folder))
    if described(folder) is not None:
        options = {"use_safetensors": True, "trust_remote_code": False}
        model: nn.Module = model_class(config).from_pretrained(folder, **options)
    else:
        model = empty_model(config)
        load(model, folder / COMPRESSED)
    return model.eval()


def empty_model(config: Any) -> Any:
    """Makes a model of a configuration for ``sparsekit.load`` to fill, in evaluation mode on the CPU."""
    kind = model_class(config)
    if hasattr(kind, "_from_config"):
        return kind._from_config(config).eval()
    return kind.from_config(config, trust_remote_code=False).eval()


def load_tokenizer(source: str, config: Any) -> Any:
    """Loads the model's own tokenizer.

    Raises:
        UsageError: none can be loaded, or it is not the model's: if a folder has no files of a tokenizer, transformers
            returns one that knows a handful of tokens.
    """
    try:
        tokenizer = transformers().AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:  # sentencepiece is missing, a file has no such key
        raise UsageError(f"{source} has no tokenizer that can be loaded, and text needs one") from error
    known, needed = len(tokenizer), getattr(config.get_text_config(), "vocab_size", None)
    # Embeddings are padded to round numbers, by some tenths at most.
    if needed is not None and not needed / 2 <= known <= needed:
        raise UsageError(
            f"the tokenizer that {source} gives has {known} tokens and the model {needed}: it is not the model's own, "
            "put the files of that one into the folder"
        )
    return tokenizer


def copy_tokenizer(source: str, config: Any, folder: Path) -> None:
    """Writes the model's tokenizer, if it has one, to a folder."""
    with suppress(UsageError):
        load_tokenizer(source, config).save_pretrained(folder)


def longest(model: Any, tokenizer: Any = None) -> int | None:
    """Returns the most tokens that a model can read at once; None if there is no known limit.

    This is the least of the limits of the configuration, the tokenizer and the tables of positions. A table with a
    padding index, as RoBERTa has, counts positions from the index after it.
    """
    said = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limits = [said, getattr(tokenizer, "model_max_length", None)]
    for name, module in model.named_modules():
        positions = isinstance(module, nn.Embedding) and "position" in name.rpartition(".")[2]
        if positions and module.num_embeddings == said and module.padding_idx is not None:
            limits.append(said - module.padding_idx - 1)
    return min((limit for limit in limits if limit), default=None)


def batch_of(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Returns the arguments with which the model reads ``tokens`` ``[batch, length]``.

    Raises:
        UsageError: the model reads something else than text.
    """
    reads = getattr(model, "main_input_name", "input_ids")
    if reads != "input_ids":
        raise UsageError(
            f"{type(model).__name__} reads {reads}, not text: prune it by --method magnitude --calibration none, "
            "or give sparsekit.prune_ and sparsekit.compress_ its own inputs in Python"
        )
    batch = {"input_ids": tokens.to(model.device)}
    return {**batch, "decoder_input_ids": batch["input_ids"]} if model.config.is_encoder_decoder else batch


def output_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Runs the model on ``tokens``, and returns the logits, or its first output if it has no logits."""
    output = model(**batch_of(model, tokens))
    return output.logits if hasattr(output, "logits") else output[0]


@contextmanager
def without_cache(model: Any) -> Iterator[None]:
    """Turns off the key-value cache inside the ``with``: it only takes memory when whole texts are read at once."""
    config = model.config.get_text_config()
    before = getattr(config, "use_cache", None)
    if before is not None:
        config.use_cache = False
    try:
        yield
    finally:
        if before is not None:
            config.use_cache = before
