"""Makes a language model 2:4 sparse, and shows what that does to its quality, its size and its speed on this CPU.

    python examples/quickstart/run.py                             # trains a small model first, for a minute
    python examples/quickstart/run.py --model PATH --text FILE    # a transformers causal LM, and text to test it on
    python examples/quickstart/run.py --short                     # the same steps in about a minute

It prunes by magnitude and by Wanda, fine-tunes with the masks kept, compresses, saves, loads and compares; then it
times a model of realistic size. It prints all figures, and writes a picture and the checkpoint to ``out/`` beside this
file.
"""

import copy
import itertools
import math
import pydoc_data.topics
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from model import GPT, logits
from show import figure, heading, mebibytes, table
from speed import compress_and_time
from torch import Tensor, nn
from tqdm import tqdm

import sparsekit as sk

# ---------------------------------------------------------------------------------------------------------- config


@dataclass
class Config:
    model: Path | None = None  # a folder that transformers can load; without it a small model is trained
    text: Path | None = None  # UTF-8, documents separated by <|endoftext|>; without it Python's own documentation
    out: Path = Path(__file__).parent / "out"
    held_out: int = 100  # documents (or windows of the built-in text) that only perplexity is measured on
    train_seconds: float = 60
    finetune_seconds: float = 20
    calibration: int = 32  # windows of text that the methods are calibrated on
    window: int = 128  # tokens in a window
    batch: int = 4  # windows in a training step: in a minute, many small steps learn more than a few large ones
    layers: int = 4  # of the small model that is trained
    dim: int = 256
    big_layers: int = 12  # of the model of realistic size, as in GPT-2 small and BERT base; its weights are random
    big_dim: int = 768
    token_counts: tuple[int, ...] = (1, 16, 128)  # tokens in a forward pass for which speed is measured
    seconds_per_timing: float = 3
    tune_budget: float = 0.5  # seconds that compress_ may measure a layer shape at a token count
    short: bool = False  # the same steps with little training, to try the example
    seed: int = 0

    def __post_init__(self) -> None:
        if self.short:
            self.train_seconds, self.finetune_seconds, self.seconds_per_timing, self.tune_budget = 8, 3, 0.5, 0.05
            self.layers, self.dim, self.calibration = 2, 128, 8


# ------------------------------------------------------------------------------------------------------------ data

Documents = list[Tensor]  # each a row of token ids


def own_model_and_text(config: Config) -> tuple[nn.Module, Documents, Documents]:
    """Makes an untrained GPT whose tokens are bytes; returns it, windows to score and windows to learn from."""
    topics = pydoc_data.topics.topics
    text = config.text.read_text("utf-8") if config.text else "\n\n".join(topics[name] for name in sorted(topics))
    data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    windows = windows_of(data, config, config.held_out + config.calibration)
    context = max(config.window, *config.token_counts)
    model = GPT(256, context, config.dim, config.layers, heads=config.dim // 32)
    return model, windows[: config.held_out], windows[config.held_out :]


def given_model_and_text(config: Config) -> tuple[nn.Module, Documents, Documents]:
    """Loads a trained transformers model; returns it, documents to score and windows of the others to learn from.

    Documents begin with the tokenizer's bos token, if it has one.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if config.text is None:
        raise SystemExit("--model needs --text: what to measure its perplexity on")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    model.config.use_cache = False
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    texts = config.text.read_text("utf-8").split("<|endoftext|>")
    documents = [
        torch.tensor(start + tokenizer(text.strip(), add_special_tokens=False, verbose=False).input_ids)
        for text in tqdm(texts, "tokenize", leave=False, disable=None)
    ]
    if len(documents) <= config.held_out:  # too few, as in one long text: windows of the text take their place
        documents = windows_of(torch.cat(documents), config, config.held_out + config.calibration)
    rest = torch.cat(documents[config.held_out :])
    return model, documents[: config.held_out], windows_of(rest, config, config.calibration)


def windows_of(tokens: Tensor, config: Config, at_least: int) -> Documents:
    """Cuts a text into windows, each with one token more than the model reads, and drops what is left at the end."""
    windows = [window for window in tokens.split(config.window + 1) if len(window) > config.window]
    if len(windows) < at_least:
        raise SystemExit(f"the text gives {len(windows)} windows of {config.window} tokens, {at_least} are needed")
    return windows


# ----------------------------------------------------------------------------------------------------------- steps


def loss(model: nn.Module, tokens: Tensor, reduction: str = "mean") -> Tensor:
    """Computes the negative log-likelihood of every token but the first of each row, given those before it."""
    return F.cross_entropy(logits(model, tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def perplexity(model: nn.Module, documents: Documents) -> tuple[float, int]:
    """Computes the exponential of the mean negative log-likelihood of all tokens; returns it and their number.

    Each document is scored by itself; its first token does not count.
    """
    total, count = 0.0, 0
    with tqdm(total=len(documents), desc="perplexity", leave=False, disable=None) as bar:
        for _, group in itertools.groupby(sorted(documents, key=len), key=len):
            same_length = list(group)
            for first in range(0, len(same_length), 16):
                tokens = torch.stack(same_length[first : first + 16])
                total += loss(model, tokens, "sum").item()
                count += tokens[:, 1:].numel()
                bar.update(len(tokens))
    return math.exp(total / count), count


def train(model: nn.Module, windows: Documents, seconds: float, rate: float, config: Config, what: str) -> int:
    """Trains by AdamW for a given time and returns the number of steps; stored masks are kept.

    The learning rate rises over 20 steps, and then falls as a cosine.
    """
    pruned = any("weight_mask" in module._buffers for module in model.modules())
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.0 if pruned else 0.1)
    keeper = sk.keep_masks(model, optimizer) if pruned else None
    model.train()
    begin, steps, done = time.perf_counter(), 0, 0.0
    bar_format = "{desc}: {percentage:3.0f}% |{bar:30}| {postfix}"
    with tqdm(total=1.0, desc=what, leave=False, disable=None, bar_format=bar_format) as bar:
        while done < 1:
            warm = min(1.0, (steps + 1) / 20)
            for group in optimizer.param_groups:
                group["lr"] = rate * warm * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
            rows = torch.randint(len(windows), (config.batch,)).tolist()
            value = loss(model, torch.stack([windows[row] for row in rows]))
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            steps += 1
            before, done = done, min(1.0, (time.perf_counter() - begin) / seconds)
            bar.set_postfix_str(f"step {steps}, loss {value.item():.3f}", refresh=False)
            bar.update(done - before)
    if keeper:
        keeper.remove()
    model.eval()
    return steps


# ------------------------------------------------------------------------------------------------------------ main


def main(config: Config) -> None:
    torch.manual_seed(config.seed)
    random.seed(config.seed)
    config.out.mkdir(parents=True, exist_ok=True)

    heading("1. A dense model")
    given = config.model is not None
    dense, held_out, learn = given_model_and_text(config) if given else own_model_and_text(config)
    dense.eval()
    vocabulary = max(int(document.max()) for document in held_out + learn) + 1
    weights = sum(weight.numel() for weight in dense.parameters())
    if not given:
        steps = train(dense, learn, config.train_seconds, 1.5e-3, config, "train")
        print(f"  trained for {config.train_seconds:.0f} s, {steps} steps of {config.batch} x {config.window} bytes")
    quality, scored = perplexity(dense, held_out)
    print(f"  {type(dense).__name__}, {weights:,} weights, {mebibytes(4 * weights)}")
    print(f"  perplexity {quality:.4f} over {len(held_out)} held-out documents, {scored:,} tokens")

    heading("2. Made 2:4 sparse")
    calibration = [torch.stack(learn[first : first + 8])[:, :-1] for first in range(0, config.calibration, 8)]
    magnitude, wanda = copy.deepcopy(dense), copy.deepcopy(dense)
    reports = {
        "magnitude": sk.prune_(magnitude, sk.Magnitude("2:4"), calibration, progress=bar("magnitude")),
        "Wanda": sk.prune_(wanda, sk.Wanda("2:4"), calibration, progress=bar("Wanda")),
    }
    quality_of = {
        "dense": quality,
        "magnitude": perplexity(magnitude, held_out)[0],
        "Wanda": perplexity(wanda, held_out)[0],
    }
    rate = 5e-4
    sparse, longer = wanda, copy.deepcopy(dense)  # the dense model trains as long, so that the comparison is fair
    train(sparse, learn, config.finetune_seconds, rate, config, "fine-tune with the masks kept")
    train(longer, learn, config.finetune_seconds, rate, config, "train the dense model as long")
    quality_of |= {"dense, tuned": perplexity(longer, held_out)[0], "Wanda, tuned": perplexity(sparse, held_out)[0]}
    rows = []
    for name, value in quality_of.items():
        report = reports.get(name)
        error, sparsity = ("-", "-") if report is None else (f"{report.error:.3f}", f"{report.sparsity:.1%}")
        rows.append((name, f"{value:.4f}", f"{value / quality - 1:+.1%}", error, sparsity))
    table(("", "perplexity", "vs dense", "output error", "zeros"), rows)
    print(f"  tuned: {config.finetune_seconds:.0f} s of AdamW on text that no perplexity is measured on")
    for skipped in reports["Wanda"].skipped:
        print(f"  left dense: {skipped.name}, {skipped.reason}")

    heading("3. Compressed for this machine")
    timing = {"counts": config.token_counts, "seconds": config.seconds_per_timing, "budget": config.tune_budget}
    compressed, small_reports, small_speeds = compress_and_time(dense, sparse, vocabulary, **timing)
    quality_of["compressed"] = perplexity(compressed, held_out)[0]
    print(f"  perplexity {quality_of['compressed']:.4f} compressed, {quality_of['Wanda, tuned']:.4f} before")

    heading("4. Saved and loaded")
    path, tokens = config.out / "model.safetensors", held_out[0][None, :-1]
    sk.save(compressed, path)
    loaded = copy.deepcopy(dense)
    sk.load(loaded, path)
    with torch.no_grad():
        identical = torch.equal(logits(loaded, tokens), logits(compressed, tokens))
    if not identical:
        raise SystemExit(f"the model that was loaded from {path} computes something else")
    print(f"  {path.name}, {mebibytes(path.stat().st_size)}; loaded into a dense model, its logits are identical")

    sizes = f"{config.big_layers} layers of {config.big_dim}/{4 * config.big_dim}"
    heading(f"5. A model of realistic size: {sizes}, random weights")
    big = GPT(256, max(config.token_counts), config.big_dim, config.big_layers, config.big_dim // 64).eval()
    sparse = copy.deepcopy(big)
    sk.prune_(sparse, sk.Magnitude("2:4"), progress=bar("magnitude"))
    _, big_reports, big_speeds = compress_and_time(big, sparse, 256, **timing)

    picture = figure(
        config.out / "quickstart.png", quality_of, (small_reports, small_speeds), (big_reports, big_speeds)
    )
    print(f"\nThe picture is {picture}")


def bar(what: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
    return lambda items: tqdm(items, what, leave=False, disable=None)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
