"""Measures the perplexity of a model of masked tokens on a text.

    python examples/radd/evaluation_modeling.py --model_path examples/radd/out/train
    python examples/radd/evaluation_modeling.py --model_path JingyangOu/radd-t-dce --valid_dataset wikitext103
    torchrun --nproc_per_node 4 examples/radd/evaluation_modeling.py ...

``k_DCE`` is the exact bound by evenly spread draws. The other losses are measured as they are trained: ``t_DSE`` and
``t_DCE`` leave out some times, and their figures are not bounds. ``ar_forward``, ``ar_backward`` and ``ar_random`` take
an evaluation for every token.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from config import device_of
from data import read_rows, run_texts
from load_model import load_model
from parallel import processes
from torch import Tensor
from tqdm import tqdm
from train import run_command

from sparsekit.diffusion import (
    LogLinearNoise,
    evaluate_bound,
    lambda_dce_loss,
    ordered_loss,
    t_dce_loss,
    t_dse_loss,
)
from sparsekit.models import RADD

Kind = Literal["k_DCE", "lambda_DCE", "t_DSE", "t_DCE", "ar_forward", "ar_backward", "ar_random"]


@dataclass
class Evaluation:
    """What evaluation_modeling.py takes."""

    model_path: str = "JingyangOu/radd-lambda-dce"  # the folder of a run, or published weights as a file, folder or id
    # wikitext2, wikitext103, ptb, lambada, lm1b, a UTF-8 file, or for the folder of a run what it holds out
    valid_dataset: str = "held-out"
    length: int = 1024  # of the rows that a text is cut into
    rows: int | None = None  # the first rows of the text; None is all
    monte_carlo_timesteps: int = 16  # draws for each row; the published figures have 1024
    loss_type: Kind = "k_DCE"
    batch_size: int = 16
    seed: int = 0
    work_dir: Path | None = None  # where evaluation.json is written
    cache_dir: str | None = None
    device: str = "auto"


def measure(model: RADD, rows: Tensor, kind: Kind, draws: int, batch_size: int, seed: int) -> tuple[float, float]:
    """Returns the loss in nats by token, and its standard error from what is drawn; NaN for one random order."""
    if kind == "k_DCE":
        bar = lambda batches: tqdm(batches, "evaluate", leave=False, disable=None)  # noqa: E731
        found = evaluate_bound(
            model, rows, model.mask_token, draws=draws, batch_size=batch_size, seed=seed, progress=bar
        )
        return found.nats, found.standard_error
    generator = torch.Generator().manual_seed(seed)
    ordered = kind.startswith("ar_")
    totals = []
    for _ in tqdm(range(1 if ordered else draws), "evaluate", leave=False, disable=None):
        parts = [one_draw(model, part, kind, batch_size, generator) for part in rows.split(batch_size)]
        totals.append(torch.cat(parts).double())
    losses = torch.stack(totals)
    sums = losses.sum(1)  # rows of a draw are not independent: their times are spread evenly
    error = math.nan if kind == "ar_random" else 0.0 if ordered else float(sums.std()) / math.sqrt(len(sums))
    return float(sums.mean()) / rows.numel(), error / rows.numel()


@torch.no_grad()
def one_draw(model: RADD, rows: Tensor, kind: Kind, batch_size: int, generator: torch.Generator) -> Tensor:
    """Returns a loss of each row for masks drawn once."""
    mask, noise = model.mask_token, LogLinearNoise()
    if kind == "lambda_DCE":
        return lambda_dce_loss(model, rows, mask, generator=generator)
    if kind == "t_DSE":
        return t_dse_loss(model, rows, mask, noise, generator=generator)
    if kind == "t_DCE":
        return t_dce_loss(model, rows, mask, noise, generator=generator)
    order: Any = kind.removeprefix("ar_")
    return ordered_loss(model, rows, mask, order, batch_size=batch_size, generator=generator)


def main(settings: Evaluation) -> dict[str, Any]:
    """Measures, prints and returns the figures."""
    with processes(settings.device) as (rank, ranks):
        if ranks > 1 and settings.loss_type != "k_DCE":
            raise ValueError(f"--loss_type {settings.loss_type} is measured in one process; k_DCE in any number")
        device = device_of(settings.device)
        model, tokenizer = load_model(settings.model_path, device)
        if settings.valid_dataset == "held-out":
            rows = run_texts(Path(settings.model_path), tokenizer).held_out[: settings.rows]
        else:
            rows = read_rows(settings.valid_dataset, tokenizer, settings.length, settings.cache_dir)[: settings.rows]
        if not len(rows):
            raise ValueError(f"the text {settings.valid_dataset} has no row of --length {settings.length} tokens")
        nats, error = measure(
            model,
            rows.to(device),
            settings.loss_type,
            settings.monte_carlo_timesteps,
            settings.batch_size,
            settings.seed,
        )
        known_error = None if math.isnan(error) else error
        result = {
            "nats": nats,
            "standard_error": known_error,
            "perplexity": math.exp(nats),
            "tokens": rows.numel(),
        }
        if rank == 0:
            print(
                f"{settings.loss_type} on {rows.numel():,} tokens: {nats:.4f} +- {error:.4f} nats, {math.exp(nats):.3f}"
            )
            if settings.work_dir is not None:
                settings.work_dir.mkdir(parents=True, exist_ok=True)
                known = {
                    name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()
                }
                text = json.dumps({"settings": known, **result}, indent=2)
                (settings.work_dir / "evaluation.json").write_text(text + "\n", "utf-8")
        return result


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Evaluation, description=__doc__)))
