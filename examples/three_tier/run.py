"""Prunes a language model by progressive tiers: each block of a weight is dense, 2:4 or top-k, demoted step by step.

    python examples/three_tier/run.py                                # trains and prunes a small model, in minutes
    python examples/three_tier/run.py --model PATH --data FILE       # a Llama-like model, and text for it
    python examples/three_tier/run.py --iteration 3 --model DIR --previous-tier-maps FILE    # one iteration only
    accelerate launch examples/three_tier/run.py ...                 # fine-tunes on several GPUs

It writes the model, tier maps and report of every iteration to ``--out``, and log.tsv, report.json and three_tier.png.
After a kill, the same command goes on with the first iteration that is not finished.
"""

import copy
import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from accelerate import Accelerator
from finetune import FineTune
from model import bytes_tokenizer, load, quiet, save, train_builtin
from show import Run, draw, print_table, write_log
from speed import compress_and_time
from text import Text, read
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import sparsekit as sk
from sparsekit.tiers import (
    IterationReport,
    Step,
    TierMap,
    TierOptions,
    load_tier_maps,
    progressive_tiers,
    read_schedule,
    tier_iteration,
)

HERE = Path(__file__).parent
FREE = ("iteration", "previous_tier_maps", "out", "compare", "seconds")  # settings that may change when a run goes on


@dataclass
class Config:
    model: str = "builtin"  # a folder or a name that transformers loads; builtin trains a small Llama first
    config: Path = HERE / "progressive_config.csv"  # the schedule
    data: str = "builtin"  # builtin (Python's documentation), wikitext2, c4, or a UTF-8 file
    out: Path = HERE / "out"
    iteration: int | None = None  # runs only this one, from the model and the tier maps of the one before
    previous_tier_maps: Path | None = None  # .safetensors, or a .pt of the published pruner
    criterion: Literal["loss", "published"] = "loss"  # which blocks are demoted first
    allocation: Literal["layer", "model"] = "model"  # whether every layer reaches the shares, or the model as a whole
    reconstruct: bool = True  # least squares on the kept weights after each demotion
    block_size: int = 16
    topk_per_block: int = 10
    nsamples: int = 64  # windows to calibrate on
    window: int = 128  # tokens in a window
    held_out: int = 128  # windows to measure perplexity on, which are not in the training text
    rate: float = 2.5e-3  # learning rate; 2e-5 suits models of billions of weights
    batch: int = 16  # windows in an update, on all processes together
    epoch_windows: int | None = 1024  # windows in an epoch; None takes the whole text
    precision: Literal["no", "bf16", "fp16"] = "no"  # of fine-tuning; the weights stay float32
    compare: bool = True  # also prunes at once: to every step's shares, and to the last ones with all fine-tuning
    seconds: float = 2.0  # for which the result is timed at each number of tokens; 0 leaves that out
    seed: int = 0
    short: bool = False  # the same steps with little training, to try the example

    def __post_init__(self) -> None:
        if self.short:
            self.epoch_windows, self.nsamples, self.held_out, self.seconds = 32, 16, 16, 0.2


class Pruner:
    """The two ways of pruning a dense model that are compared: in steps, and at once."""

    def __init__(self, config: Config, model: nn.Module, tokenizer: PreTrainedTokenizerBase, text: Text) -> None:
        self.config, self.model, self.tokenizer, self.text = config, model, tokenizer, text
        device = next(model.parameters()).device
        self.batches = [{"input_ids": batch.to(device)} for batch in text.train[: config.nsamples].split(8)]
        block = (config.block_size, config.block_size)
        self.options = TierOptions(
            criterion=config.criterion,
            allocation=config.allocation,
            reconstruct=config.reconstruct,
            block=block,
            k=config.topk_per_block,
        )

    @torch.no_grad()
    def perplexity(self, model: nn.Module) -> float:
        """Computes the exponential of the mean negative log-likelihood of the held-out windows' tokens.

        The first token of a window does not count.
        """
        batches = self.text.held_out.to(next(model.parameters()).device).split(8)
        total = sum(float(model(input_ids=batch, labels=batch).loss) * len(batch) for batch in batches)
        return math.exp(total / len(self.text.held_out))

    def progressive(
        self, steps: tuple[Step, ...], schedule: tuple[Step, ...], folder: Path, accelerator: Accelerator
    ) -> tuple[nn.Module, dict[str, TierMap], list[IterationReport]]:
        """Prunes a copy in steps, with fine-tuning after each, and writes the result of every iteration to ``folder``.

        Args:
            steps: the steps to take.
            schedule: all steps, by which the learning rate and the fading go.
            folder: gets a folder for every iteration.
            accelerator: as for ``FineTune``.

        Returns:
            The pruned model, its tier maps, and a report for each iteration.
        """
        config, model, before = self.config, copy.deepcopy(self.model), self.config.previous_tier_maps

        def moments(iteration: int) -> Path:
            given = before and iteration == steps[0].iteration - 1
            return (before.parent if given else folder / f"iteration-{iteration}") / "optimizer.pt"

        learn = FineTune(
            self.text.train,
            schedule,
            accelerator,
            rate=config.rate,
            batch=config.batch,
            epoch=config.epoch_windows,
            moments=moments,
            seed=config.seed,
        )

        def finetune(model: nn.Module, step: Step) -> None:
            learn(model, step)
            if accelerator.is_main_process:
                save(model, self.tokenizer, folder / f"iteration-{step.iteration}" / "hf")

        maps, reports = progressive_tiers(
            model,
            steps,
            self.batches,
            finetune,
            tier_maps=before and load_tier_maps(before, block=self.options.block, k=self.options.k),
            folder=folder,
            evaluate=self.perplexity,
            options=replace(self.options, goal=schedule[-1].ratios),
            progress=bar,
        )
        return model, maps, reports

    def one_shot(self, step: Step) -> IterationReport:
        """Prunes a copy to the shares of a step at once, without fine-tuning."""
        model = copy.deepcopy(self.model)
        _, report = tier_iteration(model, step, self.batches, options=self.options, progress=bar)
        return replace(report, metric=self.perplexity(model))


def bar(items):
    return tqdm(items, "prune", leave=False, disable=None)


def main(config: Config) -> None:
    quiet()
    accelerator = Accelerator(mixed_precision=config.precision)
    schedule = read_schedule(config.config)
    steps = chosen(schedule, config)
    config.out.mkdir(parents=True, exist_ok=True)
    with accelerator.main_process_first():
        check_settings(config)
        if config.model == "builtin":
            model, tokenizer, text = builtin(config, accelerator)
        else:
            model, tokenizer = load(config.model, accelerator)
            text = read(config.data, tokenizer, config.window, config.held_out)
    pruner = Pruner(config, model, tokenizer, text)
    dense = pruner.perplexity(model)
    pruned, maps, reports = pruner.progressive(steps, schedule, config.out / "progressive", accelerator)
    runs = [Run("progressive", reports)]
    if config.compare and config.iteration is None:
        runs.append(Run("one-shot", [pruner.one_shot(step) for step in schedule]))
        last = schedule[-1]
        whole = Step(1, last.ratios, 1 - last.ratios.dense, last.ratios.topk, sum(step.epochs for step in schedule))
        *_, reports = pruner.progressive((whole,), (whole,), config.out / "one-shot", accelerator)
        runs.append(
            Run("one-shot, all fine-tuning", [replace(reports[0], step=replace(whole, iteration=len(schedule)))])
        )
    if not accelerator.is_main_process:
        return
    print_table(dense, runs)
    write_log(config.out / "log.tsv", dense, runs)
    draw(config.out / "three_tier.png", dense, runs, maps)
    report = {"dense": dense, "runs": {run.name: [asdict(row) for row in run.reports] for run in runs}}
    if config.seconds > 0:
        compressed, report["speed"] = compress_and_time(
            pruned, pruned.get_input_embeddings().num_embeddings, config.seconds
        )
        sk.save(compressed, config.out / "compressed.safetensors")
    (config.out / "report.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    print(f"\nwritten to {config.out}")


def chosen(schedule: tuple[Step, ...], config: Config) -> tuple[Step, ...]:
    """Returns all steps, or only the one that ``--iteration`` names."""
    if config.iteration is None:
        if config.previous_tier_maps:
            raise ValueError("--previous-tier-maps is for --iteration, which is not given")
        return schedule
    if not 1 <= config.iteration <= len(schedule):
        raise ValueError(f"--iteration must be from 1 to {len(schedule)}, got {config.iteration}")
    if config.iteration > 1 and config.previous_tier_maps is None:
        raise ValueError(f"--iteration {config.iteration} needs --previous-tier-maps, those of the one before")
    return (schedule[config.iteration - 1],)


def check_settings(config: Config) -> None:
    """Rejects a folder in which a run with other settings began, since going on there would mix the two."""
    free = FREE if config.iteration is None else (*FREE, "model")
    settings = {field.name: str(getattr(config, field.name)) for field in fields(config) if field.name not in free}
    path = config.out / "settings.json"
    if path.exists():
        before = json.loads(path.read_text("utf-8"))
        for name, value in settings.items():
            if before.get(name, value) != value:
                option = name.replace("_", "-")
                raise ValueError(
                    f"{config.out} has a run with --{option} {before[name]}, not {value}: use another --out"
                )
    path.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def builtin(config: Config, accelerator: Accelerator) -> tuple[nn.Module, PreTrainedTokenizerBase, Text]:
    """Returns the built-in model and its text; it is trained once, and loaded from the output folder after that."""
    tokenizer = bytes_tokenizer()
    text = read(config.data, tokenizer, config.window, config.held_out)
    folder = config.out / "builtin"
    if not folder.exists():
        save(train_builtin(text, 40 if config.short else 400, config.seed), tokenizer, folder)
    return *load(folder, accelerator), text


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
