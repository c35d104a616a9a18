"""Text as windows of tokens: some to calibrate on and learn from, others to measure perplexity on."""

import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

SEPARATOR = "<|endoftext|>"


@dataclass
class Text:
    """Token ids as windows ``[n, window]``: ``train`` to learn from, ``held_out`` to measure perplexity on."""

    train: Tensor
    held_out: Tensor


def read(data: str, tokenizer: PreTrainedTokenizerBase, window: int, held_out: int) -> Text:
    """Cuts documents into windows; the first ``held_out`` windows, with the documents they are from, are held out.

    Args:
        data: ``"builtin"`` (the documentation that comes with Python), ``"wikitext2"`` or ``"c4"`` (downloaded by the
            package datasets), or a UTF-8 file, documents separated by ``<|endoftext|>``, else by blank lines.
        tokenizer: the model's tokenizer.
        window: tokens in a window.
        held_out: the number of held-out windows.

    Raises:
        ValueError: the text is too short, or cannot be read.
    """
    scored: list[Tensor] = []
    documents = iter(dict.fromkeys(_documents(data)))  # each once, since a duplicate could be in both parts
    while sum(map(len, scored)) < held_out * window and (document := next(documents, None)) is not None:
        scored.append(_tokens(document, tokenizer))
    text = Text(
        _windows([_tokens(document, tokenizer) for document in documents], window), _windows(scored, window)[:held_out]
    )
    if len(text.held_out) < held_out or len(text.train) < held_out:
        raise ValueError(
            f"--data {data} gives {len(text.held_out)} windows of {window} tokens to score and {len(text.train)} to "
            f"learn from, {held_out} of each are needed"
        )
    return text


def _documents(data: str) -> list[str]:
    if data == "builtin":
        return [text for _, text in sorted(pydoc_data.topics.topics.items())]
    if data in ("wikitext2", "c4"):
        return _download(data)
    path = Path(data)
    if not path.is_file():
        raise ValueError(f"--data must be builtin, wikitext2, c4 or a file, got {data}")
    text = path.read_text("utf-8")
    documents = text.split(SEPARATOR if SEPARATOR in text else "\n\n")
    return [document.strip() for document in documents if document.strip()]


def _download(data: str) -> list[str]:
    """Downloads a data set: the documents on which perplexity is usually reported, then those to learn from."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"--data {data} is downloaded by a package that is missing: pip install datasets") from None
    if data == "wikitext2":
        parts = (load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=part) for part in ("test", "train"))
        return ["".join(part["text"]) for part in parts]
    streams = (load_dataset("allenai/c4", "en", split=part, streaming=True) for part in ("validation", "train"))
    counts = (1000, 20000)
    return [row["text"] for stream, count in zip(streams, counts, strict=True) for row in stream.take(count)]


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    return torch.tensor(tokenizer(text, verbose=False).input_ids, dtype=torch.long)


def _windows(documents: list[Tensor], window: int) -> Tensor:
    tokens = torch.cat(documents) if documents else torch.empty(0, dtype=torch.long)
    return tokens[: len(tokens) // window * window].view(-1, window)
