"""Two trained language models, with text to calibrate on and other text to score."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from pruning import layer_error
from torch import Tensor, nn

from sparsekit.masks import Pattern
from sparsekit.prune import Gram
from sparsekit.prune.layers import find_layers

WINDOW = 128  # tokens
UPDATES = 400


@dataclass(frozen=True, eq=False)
class Language:
    """A model, and rows of ``WINDOW`` tokens: those that pruning may see, and those that it may not."""

    model: nn.Module
    calibration: Tensor
    held_out: Tensor

    @property
    def batches(self) -> list[dict[str, Tensor]]:
        return [{"input_ids": rows} for rows in self.calibration.split(16)]

    @torch.no_grad()
    def perplexity(self, model: nn.Module) -> float:
        return model(input_ids=self.held_out, labels=self.held_out).loss.exp().item()

    def errors(self, model: nn.Module, tokens: str = "calibration") -> Tensor:
        """``||X (W - W')^T||^2 / ||X W^T||^2`` of every layer, on what the dense model shows to it."""
        return torch.tensor(
            [
                layer_error(self.model.get_submodule(name).weight, model.get_submodule(name).weight, gram)
                for name, gram in grams(self, tokens).items()
            ]
        )


@functools.cache
def grams(language: Language, tokens: str) -> dict[str, Tensor]:
    """The second moments of the inputs of every layer in the dense model."""
    found = {layer.name: Gram(layer) for layer in find_layers(language.model, Pattern.parse("2:4"), "input", None)[0]}
    hooks = [
        language.model.get_submodule(name).register_forward_hook(lambda _, args, __, gram=gram: gram.update(args[0]))
        for name, gram in found.items()
    ]
    with torch.no_grad():
        language.model(getattr(language, tokens))
    for hook in hooks:
        hook.remove()
    return {name: gram.matrix for name, gram in found.items()}


def story_rows(data: Path, first: int, last: int) -> Tensor:
    """The beginnings of those stories that are long enough, as tokens of the model of ``stories``."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(data / "ckpt_stories260K" / "hf")
    texts = (data / "tinystories" / "tinystories_sample.txt").read_text("utf-8").split("<|endoftext|>")[first:last]
    ids = [tokenizer(text.strip(), max_length=WINDOW, truncation=True)["input_ids"] for text in texts]
    return torch.tensor([each for each in ids if len(each) == WINDOW])


@functools.cache
def stories(data: Path) -> Language:
    """A published Llama of 260 thousand parameters, on the stories it was trained on."""
    transformers = pytest.importorskip("transformers")
    folder = data / "ckpt_stories260K" / "hf"
    rows = story_rows(data, 0, 200)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False
    return Language(model.eval(), rows[32:64], rows[:32])


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@functools.cache
def shakespeare(data: Path) -> Language:
    """A byte-level Llama of 150 thousand parameters, trained here for some ten seconds."""
    transformers = pytest.importorskip("transformers")
    text = (data / "tinyshakespeare" / "input.txt").read_bytes()[: 8000 * WINDOW]
    rows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().view(-1, WINDOW)
    learned = rows[:-32].flatten()
    with one_thread():  # products this small take far longer where two threads wait for one core
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=128,
                hidden_size=64,
                intermediate_size=160,
                num_hidden_layers=3,
                num_attention_heads=2,
                max_position_embeddings=WINDOW,
                use_cache=False,
            )
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=UPDATES, pct_start=0.1)
        for _ in range(UPDATES):
            batch = learned[torch.randint(len(learned) - 64, (8, 1)) + torch.arange(64)]
            optimizer.zero_grad()
            model(input_ids=batch, labels=batch).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return Language(model.eval(), rows[:32], rows[-32:])


MODELS = {"stories260K": stories, "shakespeare": shakespeare}
