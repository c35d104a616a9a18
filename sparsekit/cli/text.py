"""Windows of text for calibration, and perplexity on text held out."""

import math
import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._batches import Progress, evaluating
from .errors import UsageError
from .models import output_of

SEPARATOR = "<|endoftext|>"
TOKENS = 2048  # in a batch


def read_text(source: str) -> str:
    """A UTF-8 file, or ``"builtin"``: the documentation of Python, 450,000 characters that every Python brings.

    Raises:
        UsageError: there is no such file, or it is not UTF-8.
    """
    if source == "builtin":
        topics = pydoc_data.topics.topics
        return SEPARATOR.join(topics[name] for name in sorted(topics))
    try:
        return Path(source).read_text("utf-8")
    except OSError as error:
        raise UsageError(f"cannot read the text {source}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"the text {source} is not UTF-8: {error.reason} at byte {error.start}") from error


def windows(tokenizer: Any, source: str, length: int, at_least: int) -> Tensor:
    """The text as token ids ``[windows, length]``; documents end at ``<|endoftext|>``, the rest at the end is dropped.

    Raises:
        UsageError: there are fewer than ``at_least``, or the tokenizer does not know most of the text.
    """
    documents = [document.strip() for document in read_text(source).split(SEPARATOR)]
    rows = tokenizer([document for document in documents if document] or [""], verbose=False)["input_ids"]
    tokens = torch.tensor([token for row in rows for token in row], dtype=torch.long)
    unknown = 0 if tokenizer.unk_token_id is None else int((tokens == tokenizer.unk_token_id).sum())
    if 2 * unknown > len(tokens):
        raise UsageError(
            f"the tokenizer does not know {unknown / len(tokens):.0%} of the text {source}: "
            "it is not the model's own, or the text is of another language"
        )
    count = len(tokens) // length
    if count < at_least:
        raise UsageError(
            f"the text {source} gives {count} windows of {length} tokens, {at_least} are needed: "
            "give more text, or lower --nsamples or --window"
        )
    return tokens[: count * length].view(count, length)


def sample(tokens: Tensor, count: int, seed: int) -> list[Tensor]:
    """``count`` of the windows, drawn evenly without repetition, in batches."""
    chosen = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:count]
    return batches(tokens[chosen])


def batches(tokens: Tensor) -> list[Tensor]:
    """Windows in batches of about 2048 tokens."""
    return list(tokens.split(max(TOKENS // tokens.shape[1], 1)))


def check_causal(model: Any) -> None:
    """Rejects a model whose perplexity is not that of the next token.

    Raises:
        UsageError: it does not predict the next token.
    """
    generates = getattr(model, "can_generate", None)
    if not (callable(generates) and generates()) or model.config.is_encoder_decoder:
        raise UsageError(f"perplexity needs a model that predicts the next token, {type(model).__name__} does not")


def perplexity(model: nn.Module, tokens: Tensor, progress: Progress) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each window, given those before it."""
    total = 0.0
    with evaluating(model):
        for batch in progress(batches(tokens)):
            logits = output_of(model, batch)[:, :-1].float()
            target = batch[:, 1:].to(logits.device)
            total += F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum").item()
    return math.exp(min(total / tokens[:, 1:].numel(), 700))
