"""Texts as rows of tokens: documents in their order, each with an end token after it, cut into rows."""

import json
import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from config import resolved
from torch import Tensor

SEPARATOR = "<|endoftext|>"
# Data sets of the hub: their id, configuration, branch, part, and column.
HUB: dict[str, tuple[str, str | None, str | None, str, str]] = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "test", "text"),
    "wikitext103": ("Salesforce/wikitext", "wikitext-103-raw-v1", None, "test", "text"),
    "ptb": ("ptb-text-only/ptb_text_only", None, "refs/convert/parquet", "test", "sentence"),
    "lambada": ("EleutherAI/lambada_openai", None, "refs/convert/parquet", "test", "text"),
    "lm1b": ("dvruette/lm1b", None, None, "test", "text"),
    "openwebtext": ("Skylion007/openwebtext", None, "refs/convert/parquet", "train", "text"),
}
SPACED = {"wikitext2", "wikitext103", "ptb", "lm1b"}  # texts in which a space comes before punctuation
JOINED = (
    *((f" {mark} ", f"{mark} ") for mark in (",", ".", ";", ":", "!", "?", ")", "]")),
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {ending}", ending) for ending in ("n't", "'s", "'re", "'ve", "'ll", "'d", "'m")),
    ("( ", "("),
    ("[ ", "["),
)


@dataclass
class Texts:
    """Rows of tokens ``[rows, length]``: to learn from, and those that are never learned from."""

    train: Tensor
    held_out: Tensor


def load_texts(train: str, valid: str, tokenizer: Any, length: int, held_out: int, cache_dir: str | None) -> Texts:
    """Reads both parts; one source for both holds out its first documents, until they fill the rows.

    Raises:
        ValueError: a source cannot be read, or is too short.
    """
    if resolved(train) != resolved(valid):
        rest = read_rows(train, tokenizer, length, cache_dir)
        return Texts(
            _at_least(1, rest, train), _at_least(held_out, read_rows(valid, tokenizer, length, cache_dir), valid)
        )
    documents = [*dict.fromkeys(read_documents(train, cache_dir))]  # each once: a copy could be in both parts
    tokens, first = 0, 0
    encoded = encode(documents, tokenizer)
    while first < len(encoded) and tokens < held_out * length:
        tokens, first = tokens + len(encoded[first]), first + 1
    return Texts(
        _at_least(1, cut(encoded[first:], length), train),
        _at_least(held_out, cut(encoded[:first], length), valid)[:held_out],
    )


def run_texts(run: Path, tokenizer: Any) -> Texts:
    """Returns the texts that a run of train.py learns from, and those that it holds out.

    Raises:
        ValueError: it is no run, or its texts cannot be read.
    """
    path = run / "config.json"
    known = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if "data" not in known:
        raise ValueError(f"{run} is not the folder of a run: name one that train.py made by outdir=FOLDER")
    data = known["data"]
    length = known["model"]["length"]
    return load_texts(data["train"], data["valid"], tokenizer, length, data["held_out"], data["cache_dir"])


def read_rows(name: str, tokenizer: Any, length: int, cache_dir: str | None = None) -> Tensor:
    """Returns all rows of a text, int64 ``[rows, length]``; what is left at the end is dropped, once."""
    return cut(encode(read_documents(name, cache_dir), tokenizer), length)


def read_documents(name: str, cache_dir: str | None = None) -> list[str]:
    """Returns the documents of a text by its name, without empty ones.

    Args:
        name: ``"auto"`` is TinyStories if it is at hand, else ``"builtin"``, Python's documentation; a name in ``HUB``;
            or a UTF-8 file, documents separated by ``<|endoftext|>``, else by empty lines.
        cache_dir: where what the hub sends is kept.

    Raises:
        ValueError: it cannot be read.
    """
    name = resolved(name)
    if name == "builtin":
        documents = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    elif name in HUB:
        documents = _download(name, cache_dir)
    else:
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"a text must be auto, builtin, {', '.join(HUB)} or a file, got {name}")
        text = path.read_text("utf-8")
        documents = text.split(SEPARATOR if SEPARATOR in text else "\n\n")
    if name in SPACED:
        documents = [detokenize(document) for document in documents]
    return [document.strip() for document in documents if document.strip()]


def detokenize(text: str) -> str:
    """Joins punctuation and endings of words, which some published texts have apart, to what they belong to."""
    text = f"{text} "
    for apart, together in JOINED:
        text = text.replace(apart, together)
    return text.strip()


def encode(documents: list[str], tokenizer: Any) -> list[Tensor]:
    """Returns the tokens of each document, with an end token after them."""
    rows = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    return [torch.tensor([*row, tokenizer.eos_token_id]) for row in rows]


def cut(encoded: list[Tensor], length: int) -> Tensor:
    tokens = torch.cat([torch.empty(0, dtype=torch.long), *encoded])
    return tokens[: len(tokens) // length * length].view(-1, length)


def _at_least(count: int, rows: Tensor, name: str) -> Tensor:
    if len(rows) < count:
        raise ValueError(f"the text {name} gives {len(rows)} rows of {rows.shape[1]} tokens, {count} are needed")
    return rows


def _download(name: str, cache_dir: str | None) -> list[str]:
    from datasets import load_dataset

    source, configuration, revision, part, column = HUB[name]
    try:
        found = load_dataset(source, configuration, split=part, revision=revision, cache_dir=cache_dir)
    except Exception as error:
        raise ValueError(f"the text {name} cannot be had from the hub: {str(error).splitlines()[0]}") from error
    return list(found[column])
