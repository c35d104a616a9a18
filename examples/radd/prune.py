"""Makes the blocks of a trained model 2:4, fine-tunes them, and measures the bound and the speed of sampling.

python examples/radd/prune.py --model_path examples/radd/out/train
"""

import copy
import json
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import tyro
from config import device_of
from cost import time_samplers
from data import Texts, run_texts
from load_model import load_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm
from train import run_command

import sparsekit as sk
from sparsekit.diffusion import Bound, evaluate_bound, k_dce_loss, masked_batches
from sparsekit.masks import get_mask
from sparsekit.models import RADD
from sparsekit.runs import Run


@dataclass
class Pruning:
    """What prune.py takes."""

    model_path: Path = Path(__file__).parent / "out" / "train"  # the folder of a run of train.py
    out: Path | None = None  # None is prune/ in it
    nsamples: int = 256  # rows to calibrate on
    steps: int = 300  # of fine-tuning; 0 leaves it out
    batch_size: int = 16
    lr: float = 5e-4
    draws: int = 8
    sampling_steps: int = 256
    rounds: int = 3  # draws that are timed, the best of which counts
    published: bool = False  # also times a pass of small_radd: weights do not change what it takes
    seed: int = 0
    device: str = "auto"


class Pruner:
    """A trained model, and the texts to calibrate on, to learn from, and to measure on."""

    def __init__(self, settings: Pruning) -> None:
        self.settings, self.device = settings, device_of(settings.device)
        self.dense, tokenizer = load_model(settings.model_path, self.device)
        self.texts: Texts = run_texts(settings.model_path, tokenizer)
        self.length = self.texts.train.shape[1]
        if not 1 <= settings.batch_size <= len(self.texts.train):
            rows = len(self.texts.train)
            raise ValueError(f"--batch_size must be from 1 to the {rows} rows of the text, got {settings.batch_size}")
        self.samples = self.texts.train[: settings.nsamples].to(self.device)

    def bound(self, model: RADD) -> Bound:
        rows = self.texts.held_out.to(self.device)
        return evaluate_bound(model, rows, model.mask_token, draws=self.settings.draws)

    def pruned(self, calibration: list[tuple[Tensor, Tensor]]) -> RADD:
        """Returns a copy whose blocks are 2:4 by SparseGPT, calibrated on batches."""
        model = copy.deepcopy(self.dense)
        sk.prune_(model, sk.SparseGPT("2:4"), calibration, where=in_blocks)
        return model

    def calibrations(self) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Returns batches of the same rows with all mask ratios, and of plain text."""
        plain = [(rows, torch.ones_like(rows, dtype=torch.bool)) for rows in self.samples.split(16)]
        return {"all mask ratios": masked_batches(self.samples, self.dense.mask_token), "plain text": plain}

    def finetune(self, model: RADD, name: str) -> None:
        """Trains the weights that the masks keep, in a run that goes on where it was killed."""
        settings, folder = self.settings, self.out / name
        known = {key: getattr(settings, key) for key in ("nsamples", "steps", "batch_size", "lr", "seed")}
        with Run.open(folder, {"model": name, "of": str(settings.model_path), **known}, steps=settings.steps) as run:
            path = folder / "model.safetensors"
            if run.result is not None:
                sk.load(model, path)
                return
            optimizer = torch.optim.AdamW(model.parameters(), settings.lr, weight_decay=0.0)
            schedule = CosineAnnealingLR(optimizer, settings.steps)
            pruned = folder / "pruned.safetensors"  # masks, too, are those that the run began with
            if pruned.exists():
                sk.load(model, pruned)
            else:
                sk.save(model, pruned)
            torch.manual_seed(settings.seed)  # dropout
            run.restore(model=model, optimizer=optimizer, schedule=schedule)
            rows = self.texts.train
            epochs = -(-settings.steps // (len(rows) // settings.batch_size))
            todo = run.batches(len(rows), settings.batch_size, epochs=epochs, seed=settings.seed)
            model.train()
            masked = any(get_mask(module) is not None for module in model.modules())
            with sk.keep_masks(model, optimizer) if masked else nullcontext():
                todo = islice(todo, settings.steps - run.step)
                for indices in tqdm(
                    todo, f"fine-tune {name}", settings.steps, initial=run.step, leave=False, disable=None
                ):
                    tokens = rows[indices].to(self.device)
                    generator = torch.Generator().manual_seed(settings.seed + run.step)
                    loss = k_dce_loss(model, tokens, model.mask_token, generator=generator).mean()
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    run.record(nats=loss.item() / tokens.shape[1])
                    if run.step % 100 == 0:
                        run.save()
            model.eval()
            sk.save(model, path)
            run.finish({})

    @property
    def out(self) -> Path:
        return self.settings.out or self.settings.model_path / "prune"


def compressed(model: RADD, *batches: tuple[Tensor, Tensor]) -> RADD:
    """Returns a copy whose layers have the fastest form for these batches."""
    faster = copy.deepcopy(model)
    sk.compress_(faster, list(batches), where=in_blocks)
    return faster


def sampling_batch(model: RADD, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Returns what sampling evaluates when it is about to fill one position of each row."""
    tokens = torch.full((rows, length), model.mask_token, device=next(model.parameters()).device)
    asked = torch.zeros_like(tokens, dtype=torch.bool)
    asked[:, 0] = True
    return tokens, asked


def time_published(length: int = 256) -> dict[str, float]:
    """Returns the milliseconds of a pass of small_radd, as sampling calls it for one row."""
    dense = RADD.small().eval()
    pruned = copy.deepcopy(dense)
    sk.prune_(pruned, sk.Magnitude("2:4"), where=in_blocks)
    batch = sampling_batch(dense, 1, length)
    models = {"dense": dense, "best dense": compressed(dense, batch), "2:4": compressed(pruned, batch)}
    timed = sk.evaluate.measure_latency(models, lambda *_: batch, ((1, length),), runs=30, budget=20.0)
    return {each.model: 1000 * each.p50 for each in timed}


def in_blocks(name: str, module: nn.Module) -> bool:
    return name.startswith("blocks.")


def row(found: Bound, dense: Bound) -> dict[str, float]:
    """Returns the bound, and how much larger it is than the dense one on the same masks."""
    more = sk.evaluate.paired_difference(found.row_nats, dense.row_nats)
    length = found.tokens / len(found.row_nats)
    return {
        "nats": found.nats,
        "standard_error": found.standard_error,
        "more_than_dense": more.mean / length,
        "low": more.interval[0] / length,
        "high": more.interval[1] / length,
        "ratio": found.nats / dense.nats,
    }


def main(settings: Pruning) -> dict[str, Any]:
    """Measures, prints, writes and returns all figures."""
    pruner = Pruner(settings)
    dense = pruner.bound(pruner.dense)
    models = {name: pruner.pruned(batches) for name, batches in pruner.calibrations().items()}
    bounds = {"dense": row(dense, dense)} | {name: row(pruner.bound(each), dense) for name, each in models.items()}
    sparse = models["all mask ratios"]
    if settings.steps:
        tuned_dense = copy.deepcopy(pruner.dense)
        for name, model in (("dense, fine-tuned", tuned_dense), ("2:4, fine-tuned", sparse)):
            pruner.finetune(model, name)
            bounds[name] = row(pruner.bound(model), dense)
    batches = [sampling_batch(pruner.dense, rows, pruner.length) for rows in (1, 16)]
    timed = {
        "dense": pruner.dense,
        "best dense": compressed(pruner.dense, *batches),
        "2:4": compressed(sparse, *batches),
    }
    speed = time_samplers(timed, pruner.length, settings.sampling_steps, (1, 16), settings.rounds)
    result: dict[str, Any] = {"bounds": bounds, "sampling": speed}
    if settings.published:
        result["published"] = time_published()
    pruner.out.mkdir(parents=True, exist_ok=True)
    (pruner.out / "pruning.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    show(result)
    return result


def show(result: dict[str, Any]) -> None:
    for name, found in result["bounds"].items():
        print(
            f"{name:20} {found['nats']:.4f} +- {found['standard_error']:.4f} nats, {found['ratio']:.3f} of dense, "
            f"{found['more_than_dense']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"
        )
    for found in result["sampling"]:
        print(
            f"batch {found['batch']:2}, {found['steps']} steps, {found['sampler']:20} {found['seconds']:7.2f} s, "
            f"{found['evaluations']} evaluations of rows"
        )
    for name, took in result.get("published", {}).items():
        print(f"a pass of small_radd, 256 tokens, {name}: {took:.1f} ms")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Pruning, description=__doc__)))
