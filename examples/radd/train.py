"""Trains a model of masked tokens, in one process or many, and goes on where it was killed.

    python examples/radd/train.py outdir=out/train                                   # tiny_radd on bytes of stories
    python examples/radd/train.py model=small_radd training.loss_type=t_DCE noise.type=loglinear
    python examples/radd/train.py data.train=FILE data.valid=FILE tokenizer=gpt2 model.length=256
    torchrun --nproc_per_node 8 examples/radd/train.py model=small_radd parallel=fsdp2 ...

Settings are written key=value, by their published names; --help lists them. The folder holds what every run has
(config.json, metrics.jsonl, status.json, log.txt, state/, result.json), at the end the averaged weights in model/, for
``RADD.from_pretrained``, and what readers of published runs expect: checkpoints/, checkpoints-meta/, samples/iter_*/,
logs and .hydra/config.yaml.
"""

import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from checkpoints import write_checkpoint, write_layout
from config import of_run, read_config
from data import Texts, load_texts
from load_model import load_tokenizer
from omegaconf import DictConfig, OmegaConf
from parallel import processes
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from tqdm import tqdm
from trainer import Trainer, new_model

from sparsekit.diffusion import DiffusionSampler, evaluate_bound
from sparsekit.runs import Run


def train(config: DictConfig) -> Path:
    """Trains, and returns the folder of the run."""
    with processes(config.device) as (rank, ranks):
        return train_here(config, rank, ranks)


def train_here(config: DictConfig, rank: int, ranks: int) -> Path:
    tokenizer = load_tokenizer(config.tokenizer)
    data, training = config.data, config.training
    texts = load_texts(data.train, data.valid, tokenizer, config.model.length, data.held_out, data.cache_dir)
    steps, in_epoch = training.n_iters, len(texts.train) // training.batch_size
    if not in_epoch or training.batch_size % ranks:
        raise ValueError(
            f"training.batch_size must be at most the {len(texts.train)} rows of data.train and a multiple of the "
            f"{ranks} processes, got {training.batch_size}"
        )
    with Run.open(config.outdir, of_run(config), steps=steps) as run:
        if run.result is not None:
            return run.folder
        trainer = Trainer(config, len(tokenizer), rank, ranks)
        run.restore(**trainer.parts())
        if rank == 0:
            write_layout(run.folder, config)
        batches = run.batches(len(texts.train), training.batch_size, epochs=-(-steps // in_epoch), seed=config.seed)
        todo = islice(batches, steps - run.step)
        for indices in tqdm(todo, "train", steps, initial=run.step, disable=True if rank else None, leave=False):
            trainer.step(texts.train[indices], run)
            if run.step % training.eval_freq == 0:
                run.record(bound=bound(trainer, texts).nats)
            if run.step % training.snapshot_freq == 0 or run.step == steps:
                snapshot(run, trainer, tokenizer)
            if run.step % training.snapshot_freq_for_preemption == 0 or run.step == steps:
                run.save()
        finish(run, trainer, texts, tokenizer)
        return run.folder


def bound(trainer: Trainer, texts: Texts) -> Any:
    """Measures the exact bound of the averaged weights on the held-out rows."""
    sizes = trainer.config.eval
    rows, model = texts.held_out[: trainer.config.data.held_out], trainer.average.module
    return evaluate_bound(
        model, rows, model.mask_token, draws=sizes.draws, batch_size=sizes.batch_size, device=trainer.device
    )


def snapshot(run: Run, trainer: Trainer, tokenizer: Any) -> None:
    """Writes a checkpoint, and samples of every process, or with FSDP2, which all processes draw together, of one."""
    write_checkpoint(run.folder, trainer, run.step)
    config = trainer.config
    if not config.training.snapshot_sampling:
        return
    count, model = config.sampling.count, trainer.average.module
    together = config.parallel == "fsdp2" and trainer.ranks > 1
    first = config.seed + (0 if together else trainer.rank * count)
    start = torch.full((count, config.model.length), model.mask_token, device=trainer.device)
    sampler = DiffusionSampler(config.sampling.steps, noise=trainer.noise, method=config.sampling.predictor)
    found = sampler.sample(model, start, model.mask_token, range(first, first + count))
    if not together or trainer.rank == 0:
        path = run.folder / "samples" / f"iter_{run.step}" / f"sample_{trainer.rank}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(("\n" + "=" * 80 + "\n").join(tokenizer.batch_decode(found.tokens)) + "\n", "utf-8")


def finish(run: Run, trainer: Trainer, texts: Texts, tokenizer: Any) -> None:
    """Writes the averaged weights with the tokenizer, and the result."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(trainer.average.module, options=whole)
    measured = bound(trainer, texts)
    if trainer.rank == 0:
        model = new_model(trainer.config, len(tokenizer))
        model.load_state_dict(weights)
        model.save_pretrained(run.folder / "model")
        tokenizer.save_pretrained(run.folder / "model")
    run.finish(
        {
            "steps": run.step,
            "tokens": run.step * trainer.config.training.batch_size * trainer.config.model.length,
            "weights": sum(each.numel() for each in weights.values()),
            "nats": measured.nats,
            "standard_error": measured.standard_error,
            "perplexity": measured.perplexity,
        }
    )


def run_command(main: Callable[[], Any]) -> None:
    """Runs a command; errors of the user become one sentence."""
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__, OmegaConf.to_yaml(read_config([each for each in sys.argv[1:] if "=" in each])), sep="\n")
        return
    print(f"the run is in {train(read_config(sys.argv[1:]))}")


if __name__ == "__main__":
    run_command(main)
