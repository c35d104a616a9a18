"""Trains a model of masked tokens, draws texts, evaluates and prunes it; all figures are in result.json at the end.

    python examples/radd/run.py              # bytes of stories, or of Python's documentation; minutes on two cores
    python examples/radd/run.py --short      # a rehearsal with little training
    python examples/radd/run.py --data FILE  # a UTF-8 text

After a kill, the same command goes on. Each part is also a command with more options: train.py, run_sample.py,
run_sample_cond.py, evaluation_modeling.py, generative_perplexity.py, prune.py.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from config import HERE, LOSSES, read_config
from cost import count_calls
from data import run_texts
from evaluation_modeling import measure
from generative_perplexity import STORIES, judge_texts
from load_model import load_model
from ngrams import bigram_nats, unigram_nats
from prune import Pruning
from prune import main as prune
from sampling import Sampling, draw, texts
from train import run_command, train

ROWS = 64  # of held-out text that everything is measured on


@dataclass
class Settings:
    """What run.py takes."""

    out: Path = HERE / "out"
    data: str = "auto"
    n_iters: int = 3500  # steps of the model that is sampled and pruned
    loss_iters: int = 200  # steps of the four models that losses are compared by
    count: int = 16  # texts to draw
    seed: int = 0
    short: bool = False

    def __post_init__(self) -> None:
        if self.short:
            self.out = self.out / "short"
            self.n_iters, self.loss_iters, self.count = 20, 4, 2


class Parts:
    """The parts, each of which returns its figures."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = settings.out / "train"
        self.length, self.draws = (32, 2) if settings.short else (128, 16)
        self.rows = 8 if settings.short else ROWS

    def config(self, folder: Path, steps: int, *more: str) -> Any:
        small = ("model.hidden_size=64", "model.n_blocks=2", "model.n_heads=2") if self.settings.short else ()
        return read_config(
            [
                f"outdir={folder}",
                *(f"data.{part}={self.settings.data}" for part in ("train", "valid")),
                *(f"{key}={steps}" for key in ("training.n_iters", "training.snapshot_freq")),
                f"model.length={self.length}",
                f"data.held_out={self.rows}",
                f"optim.warmup={min(100, steps // 2)}",
                f"seed={self.settings.seed}",
                *small,
                *more,
            ]
        )

    def train(self) -> dict[str, Any]:
        """Trains the model that the other parts use."""
        return read_result(train(self.config(self.folder, self.settings.n_iters)))

    def losses(self) -> dict[str, Any]:
        """Trains a model by each of the four losses, as long, and measures the bound of all of them the same."""
        found = {}
        for kind in LOSSES:
            more = (f"training.loss_type={kind}", "training.snapshot_sampling=false")
            folder = train(self.config(self.settings.out / "losses" / kind, self.settings.loss_iters, *more))
            found[kind] = {key: read_result(folder)[key] for key in ("steps", "nats", "standard_error", "perplexity")}
        return found

    def evaluate(self) -> dict[str, Any]:
        """Measures the model by every loss, and the n-gram models of the same tokens."""
        model, tokenizer = load_model(self.folder)
        data, count = run_texts(self.folder, tokenizer), len(tokenizer)
        rows = data.held_out
        found: dict[str, Any] = {
            "tokens": rows.numel(),
            "unigram": unigram_nats(data.train, rows, count),
            "bigram": bigram_nats(data.train, rows, count),
        }
        for kind in ("k_DCE", "lambda_DCE", "t_DSE", "t_DCE"):
            nats, error = measure(model, rows, kind, self.draws, 16, self.settings.seed)
            found[kind] = {"nats": nats, "standard_error": error, "perplexity": math.exp(nats)}
        return found

    def sample(self) -> dict[str, Any]:
        """Draws texts, free and between given parts, and judges them if a model of stories is at hand."""
        drawing = {"model_path": str(self.folder), "length": self.length, "steps": 2 * self.length}
        shared = {**drawing, "seed": self.settings.seed}
        free, _ = draw(Sampling(**shared, batch_size=self.settings.count))
        given, _ = draw(Sampling(**shared, batch_size=2), "Once ", " end.")
        path = self.folder / "samples" / "free.txt"
        path.write_text(("\n" + "=" * 80 + "\n").join(free) + "\n", "utf-8")
        print(*free[:3], *given, sep="\n" + "-" * 80 + "\n")
        found: dict[str, Any] = {"free": free[:3], "given": given}
        if STORIES.is_dir() and self.settings.data == "auto":
            _, tokenizer = load_model(self.folder)
            real = texts(tokenizer, run_texts(self.folder, tokenizer).held_out[: self.settings.count])
            found["judged"] = {"drawn": judge_texts(free, str(STORIES)), "real": judge_texts(real, str(STORIES))}
        return found

    def calls(self) -> dict[str, Any]:
        """Counts evaluations against the formula."""
        model, _ = load_model(self.folder)
        return count_calls(model, self.length, (64, 256, 1024), 64 if self.settings.short else 1000)

    def prune(self) -> dict[str, Any]:
        """Prunes, fine-tunes and times the model."""
        short: dict[str, Any] = {"nsamples": 16, "steps": 3, "draws": 2, "sampling_steps": 16, "rounds": 1}
        sizes = short if self.settings.short else {}
        return prune(Pruning(self.folder, seed=self.settings.seed, **sizes))


def read_result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "result.json").read_text("utf-8"))
    return found


def main(settings: Settings) -> dict[str, Any]:
    """Runs all parts and returns the figures of all."""
    parts = Parts(settings)
    todo: list[Callable[[], Any]] = [parts.train, parts.losses, parts.evaluate, parts.sample, parts.calls, parts.prune]
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "seconds": {}}
    for part in todo:
        name = part.__name__
        print(f"\n{name}")
        start = time.monotonic()
        result[name] = part()
        result["seconds"][name] = round(time.monotonic() - start, 1)
        if name in ("losses", "evaluate", "calls"):
            print(json.dumps(result[name], indent=1))
    path = settings.out / "result.json"
    path.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(f"\nThe figures are in {path}, and the model in {parts.folder / 'model'}")
    return result


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Settings, description=__doc__)))
