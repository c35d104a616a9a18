"""The sentences of SST-2, from a folder or from the hub, as word pieces in batches of about one length."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from config import Settings
from torch import Tensor

CHECKED = 872  # sentences that training is checked on where a data set has no third part


@dataclass(frozen=True)
class Sentences:
    """A list of sentences with their labels: 1 for a good review, 0 for a bad one."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> "Sentences":
        return Sentences([self.texts[index] for index in indices], [self.labels[index] for index in indices])

    def some(self, count: int | None, seed: int) -> "Sentences":
        """Returns so many of them, drawn at random."""
        if count is None or count >= len(self):
            return self
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.take(order[:count].tolist())


@dataclass(frozen=True)
class Parts:
    """The sentences to train on, those that decide when training ends, and those that figures are measured on."""

    train: Sentences
    validation: Sentences
    test: Sentences


def load(settings: Settings) -> Parts:
    """Reads SST-2.

    Raises:
        ValueError: it is not where the settings say, or nothing can be reached.
    """
    source = settings.data
    if source == "auto":
        local = Path(os.environ.get("SPARSEKIT_DATA") or ".") / "sst2"
        source = str(local) if local.is_dir() else "hub"
    parts = from_hub() if source == "hub" else from_folder(Path(source))
    train = parts.train.some(settings.train_examples, settings.seed)
    return Parts(train, parts.validation, parts.test.some(settings.test_examples, settings.seed))


def from_folder(folder: Path) -> Parts:
    """Reads ``train.tsv``, ``dev.tsv`` and, where it has labels, ``test.tsv``, with a label and a sentence a line."""
    for name in ("train.tsv", "dev.tsv"):
        if not (folder / name).is_file():
            raise ValueError(f"there is no {name} in {folder}: name a folder of SST-2 by --data, or --data hub")
    train, dev = read_tsv(folder / "train.tsv"), read_tsv(folder / "dev.tsv")
    if (folder / "test.tsv").is_file():
        return Parts(train, dev, read_tsv(folder / "test.tsv"))
    return split(train, dev)


def from_hub() -> Parts:
    """Reads SST-2 of the GLUE benchmark by ``datasets``, whose test sentences have no labels."""
    import datasets

    try:
        found = datasets.load_dataset("nyu-mll/glue", "sst2")
    except Exception as error:  # of the network, in many classes
        raise ValueError(
            f"SST-2 cannot be loaded from the hub ({type(error).__name__}): name a folder with train.tsv and dev.tsv "
            "by --data"
        ) from error
    train, dev = (
        Sentences(list(found[part]["sentence"]), list(found[part]["label"])) for part in ("train", "validation")
    )
    return split(train, dev)


def split(train: Sentences, dev: Sentences) -> Parts:
    """Returns parts that measure on ``dev``, and check on sentences that are taken out of ``train``."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    count = min(CHECKED, len(train) // 10)
    return Parts(train.take(order[count:]), train.take(order[:count]), dev)


def read_tsv(path: Path) -> Sentences:
    """Reads a file of labels and sentences, in either order, below a line with their names.

    Raises:
        ValueError: a line is something else.
    """
    head, *lines = path.read_text("utf-8").splitlines()
    place = head.split("\t").index("label") if "label" in head.split("\t") else 0
    texts, labels = [], []
    for number, line in enumerate(lines, start=2):
        fields = line.split("\t")
        if len(fields) != 2 or fields[place] not in ("0", "1"):
            raise ValueError(f"{path}, line {number}: expected a label 0 or 1, a tab and a sentence, got {line[:60]!r}")
        texts.append(fields[1 - place].strip())
        labels.append(int(fields[place]))
    return Sentences(texts, labels)


class Pieces:
    """The word pieces of sentences, which are put into batches by index."""

    def __init__(self, sentences: Sentences, tokenizer: Any, max_length: int) -> None:
        encoded = tokenizer(sentences.texts, truncation=True, max_length=max_length).input_ids
        self.tokens = [torch.tensor(each) for each in encoded]
        self.labels = torch.tensor(sentences.labels)
        self.padding = tokenizer.pad_token_id

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Returns the arguments of a model for some sentences, padded to the longest of them."""
        chosen = [self.tokens[index] for index in indices]
        ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=self.padding)
        lengths = torch.tensor([len(each) for each in chosen])
        return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}

    def groups(self, size: int, seed: int | None = None) -> list[list[int]]:
        """Returns the indices of batches whose sentences have about one length, drawn anew for each seed."""
        order = torch.arange(len(self))
        if seed is not None:
            order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        lengths = torch.tensor([len(each) for each in self.tokens])[order]
        return [group.tolist() for group in order[lengths.argsort(stable=True)].split(size)]

    def in_order(self, size: int = 32) -> list[dict[str, Tensor]]:
        """Returns batches of all sentences in their order."""
        return [self.batch(range(begin, min(begin + size, len(self)))) for begin in range(0, len(self), size)]
