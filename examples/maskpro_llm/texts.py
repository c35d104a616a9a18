"""Texts as rows of token ids: some that nothing is learned from, some that decide, all others to learn from."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from config import Shared
from torch import Tensor

from sparsekit.cli.text import SEPARATOR, read_text

C4_FILES = {"held out": "en/c4-validation.00000-of-00008.json.gz", "learn": "en/c4-train.00000-of-01024.json.gz"}


@dataclass(frozen=True)
class Texts:
    """Token ids, one text a row: ``held_out`` is only measured on, ``validation`` decides, ``learn`` is the rest."""

    held_out: Tensor
    validation: Tensor
    learn: Tensor


def read(settings: Shared, tokenizer: Any, count: int | None = None, option: str = "--dataset_size") -> Texts:
    """Reads texts of ``sqlen`` tokens; shorter documents are left out.

    A document is in one part only. The first ones are held out, those that follow decide, and of the rest the first
    ``count`` texts, or all, are learned from in their order; ``option`` is what asks for so many.

    Raises:
        ValueError: there are too few texts; says what to change.
    """
    held, rest = (unique(documents) for documents in documents_of(settings.data))
    parts = {
        "--held_out": take(held, settings.held_out, settings, tokenizer),
        "--validation": take(held, settings.validation, settings, tokenizer),
        option: take(chain(held, rest) if settings.data != "c4" else rest, count, settings, tokenizer),
    }
    for asked, wanted in zip(parts, (settings.held_out, settings.validation, count or 1), strict=True):
        if len(parts[asked]) < wanted:
            raise ValueError(
                f"{settings.data} has only {len(parts[asked])} texts of {settings.sqlen} tokens left for {asked} "
                f"{wanted}: lower that, --sqlen or --held_out, name more text by --data, or cut whole documents by "
                "--windows all"
            )
    return Texts(*(torch.tensor(rows) for rows in parts.values()))


def take(documents: Iterator[str], count: int | None, settings: Shared, tokenizer: Any) -> list[list[int]]:
    """Takes documents until they give ``count`` texts, and returns the token ids of these."""
    rows: list[list[int]] = []
    while (count is None or len(rows) < count) and (document := next(documents, None)) is not None:
        tokens = tokenizer(document, verbose=False)["input_ids"]
        last = len(tokens) if settings.windows == "all" else settings.sqlen
        starts = range(0, min(last, len(tokens)) - settings.sqlen + 1, settings.sqlen)
        rows += [tokens[start : start + settings.sqlen] for start in starts]
    return rows[:count]


def documents_of(data: str) -> tuple[Iterable[str], Iterable[str]]:
    """Returns documents to hold out and to learn from; where there is one source, all are in the first."""
    if data == "c4":
        return tuple(download("allenai/c4", data_files=name) for name in C4_FILES.values())
    try:
        return read_text(data).split(SEPARATOR), ()
    except ValueError as error:
        if data.count("/") != 1 or data.startswith((".", "/")):
            raise ValueError(f"--data must be c4, builtin, a UTF-8 file or an id of a data set: {error}") from None
    return download(data), ()


def download(name: str, **options: Any) -> Iterator[str]:
    """Yields the documents of a data set of the hub, which are its column ``text``, while they are downloaded."""
    try:
        from datasets import load_dataset

        rows = load_dataset(name, split="train", streaming=True, **options)
        yield from (row["text"] for row in rows)
    except ImportError:
        raise ValueError(f"--data {name} is downloaded by a package that is missing: pip install datasets") from None
    except Exception as error:  # of many kinds, where there is no network, no such data set, or no such column
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"--data {name} could not be downloaded, name a file instead: {why}") from error


def unique(documents: Iterable[str]) -> Iterator[str]:
    """Yields each document once, since a duplicate could be in two parts."""
    seen: set[int] = set()
    for document in map(str.strip, documents):
        if document and hash(document) not in seen:
            seen.add(hash(document))
            yield document
