"""Windows of text for calibration, and perplexity on held-out text."""

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
TOKENS = 2048  # tokens in a batch


def read_text(source: str) -> str:
    """Reads a UTF-8 file; ``"builtin"`` is the documentation that comes with Python, 450,000 characters.

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
    """Cuts a text into windows of token ids, ``[windows, length]``; what is left at the end is dropped.

    ``<|endoftext|>`` separates documents, which are tokenized one by one.

    Raises:
        UsageError: there are fewer windows than ``at_least``, or the tokenizer does not know most of the text.
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


def draw_batches(windows: Tensor, count: int, seed: int) -> list[Tensor]:
    """Draws ``count`` windows at random, none twice, and returns them in batches."""
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:count]
    return in_batches(windows[chosen])


def in_batches(tokens: Tensor) -> list[Tensor]:
    """Splits windows into batches of about 2048 tokens."""
    return list(tokens.split(max(TOKENS // tokens.shape[1], 1)))


def check_causal(model: Any) -> None:
    """Rejects a model that does not predict the next token, on which perplexity is defined.

    Raises:
        UsageError: the model is such a one.
    """
    generates = getattr(model, "can_generate", None)
    if not (callable(generates) and generates()) or model.config.is_encoder_decoder:
        raise UsageError(f"perplexity needs a model that predicts the next token, {type(model).__name__} does not")


def perplexity(model: nn.Module, tokens: Tensor, progress: Progress) -> float:
    """Computes the exponential of the mean negative log-likelihood of the tokens of all windows.

    Each token is predicted from the tokens before it in its window; the first one of a window does not count.
    """
    total = 0.0
    with evaluating(model):
        for batch in progress(in_batches(tokens)):
            logits = output_of(model, batch)[:, :-1].float()
            target = batch[:, 1:].to(logits.device)
            total += F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum").item()
    return math.exp(min(total / tokens[:, 1:].numel(), 700))
