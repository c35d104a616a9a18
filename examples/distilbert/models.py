"""The models: those that are named, or small ones that begin with random weights; and the folders they are kept in."""

import os
from pathlib import Path
from typing import Any

import torch
from config import Settings
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)
from transformers.utils.logging import disable_progress_bar

import sparsekit as sk
from sparsekit.checkpoint.pretrained import KEY, check_folder

disable_progress_bar()  # of loading a model, which takes a moment

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WEIGHTS = "model.safetensors"


def load_model(source: str | Path) -> Any:
    """Loads a classifier by ``from_pretrained``, after the digests of a folder that this example wrote are verified.

    Raises:
        ValueError: a file of the folder was altered, the folder holds no classifier of two classes, or is missing.
    """
    weights = Path(source) / WEIGHTS
    try:
        if weights.is_file() and metadata(weights).keys() & {KEY, "sha256"}:
            check_folder(weights)
        model, info = AutoModelForSequenceClassification.from_pretrained(source, output_loading_info=True)
    except OSError as error:
        raise ValueError(
            f"there is no model {source}: name a folder or an id of the hub ({first_line(error)})"
        ) from error
    if model.config.num_labels != 2:
        raise ValueError(f"{source} must be a model of two classes, it has {model.config.num_labels}")
    model.new_head = any("classifier" in name for name in info["missing_keys"])
    return model.eval()


def load_teacher(source: str | Path) -> Any:
    """Loads a classifier that was trained.

    Raises:
        ValueError: its classifier has no weights.
    """
    model = load_model(source)
    if model.new_head:
        raise ValueError(f"the teacher {source} is no trained classifier: name one, or train it by --teacher_epochs")
    return model


def metadata(weights: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"cannot load {weights}: it was altered or is no safetensors file ({error})") from error


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes a folder that ``from_pretrained`` loads, with digests, and the tokenizer."""
    sk.save(model, folder, format="transformers")
    tokenizer.save_pretrained(folder)


def small_tokenizer(texts: list[str]) -> BertTokenizerFast:
    """Returns BERT's tokenizer with the pieces that occur in texts, and all single characters, so that all can be read.

    A vocabulary of 30,522 would be most of a small model, and most of its rows would never be trained.

    Raises:
        ValueError: there is no vocabulary.
    """
    local = os.environ.get("SPARSEKIT_DATA")
    path = Path(local or "") / "bert_vocab" / "vocab.txt"
    if not local or not path.is_file():
        raise ValueError(
            "there is no vocabulary of word pieces: set SPARSEKIT_DATA to a folder with bert_vocab/vocab.txt, or name "
            "--teacher and --student"
        )
    whole = BertTokenizerFast(vocab=str(path))
    used = {piece for ids in whole(texts).input_ids for piece in whole.convert_ids_to_tokens(ids)}
    pieces = path.read_text("utf-8").splitlines()
    kept = [piece for piece in pieces if piece in used or piece in SPECIAL or len(piece.removeprefix("##")) == 1]
    return BertTokenizerFast(vocab={piece: index for index, piece in enumerate(kept)})


def small_model(settings: Settings, kind: str, tokenizer: Any) -> nn.Module:
    """Returns a BERT as teacher or a DistilBERT as student, with random weights."""
    width, layers = settings.sizes["width"], settings.sizes[f"{kind}_layers"]
    shared = {"vocab_size": len(tokenizer), "max_position_embeddings": 128, "pad_token_id": tokenizer.pad_token_id}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if kind == "teacher":
            sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 4 * width}
            return BertForSequenceClassification(BertConfig(**shared, **sizes, num_attention_heads=width // 64))
        sizes = {"dim": width, "n_layers": layers, "hidden_dim": 4 * width, "n_heads": width // 64}
        return DistilBertForSequenceClassification(DistilBertConfig(**shared, **sizes))


def load_tokenizer(source: str | Path) -> Any:
    return AutoTokenizer.from_pretrained(source)


def in_encoder(model: nn.Module) -> Any:
    """Returns the function ``where(name, module)`` that selects the linear layers of a model's encoder."""
    lists = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    return lambda name, module: isinstance(module, nn.Linear) and name.startswith(lists)


def encoder_weights(model: nn.Module) -> int:
    """Returns the number of weights, zeros too, of the layers in a model's encoder, without biases and norms."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return sum(
        module.weight.numel()
        for each in lists
        for module in each.modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.dim() == 2
    )
