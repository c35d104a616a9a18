"""The settings of a training, by the names that the published code gives them, and a few of our own."""

import os
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sparsekit.diffusion import GeometricNoise, LogLinearNoise, Noise

HERE = Path(__file__).parent
DATA = Path(os.environ.get("SPARSEKIT_DATA", ""))
STORIES = DATA / "tinystories" / "tinystories_sample.txt"
LOSSES = ("t_DSE", "t_DCE", "lambda_DCE", "k_DCE")

# Those of the published configuration.
PUBLISHED: dict[str, Any] = {
    "outdir": None,  # the folder of the run; None is a new one, output/DATE/TIME
    "seed": 0,
    "tokenizer": "gpt2",  # an id or a folder, or "bytes"
    "parallel": "ddp",  # in several processes; or fsdp2
    "device": "auto",
    "training": {
        **{"batch_size": 512, "accum": 16, "n_iters": 400_000, "loss_type": "t_DCE", "ema": 0.9999, "dtype": "auto"},
        **{"snapshot_freq": 50_000, "snapshot_freq_for_preemption": 10_000, "log_freq": 50, "eval_freq": 100},
        **{"snapshot_sampling": True},
    },
    "data": {"train": "openwebtext", "valid": "wikitext103", "cache_dir": None, "held_out": 64},
    "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20.0},
    "sampling": {"predictor": "euler", "steps": 1024, "count": 4},
    "eval": {"batch_size": 16, "draws": 4},
    "optim": {
        **{"optimizer": "AdamW", "lr": 3e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
        **{"warmup": 2500, "grad_clip": 1.0, "decay": "constant"},
    },
}
SIZES: dict[str, dict[str, Any]] = {
    "small_radd": {
        "hidden_size": 768,
        "n_blocks": 12,
        "n_heads": 12,
        "length": 1024,
        "dropout": 0.02,
        "init": "published",
    },
    "medium_radd": {
        "hidden_size": 1024,
        "n_blocks": 24,
        "n_heads": 16,
        "length": 1024,
        "dropout": 0.02,
        "init": "published",
    },
    "tiny_radd": {"hidden_size": 128, "n_blocks": 4, "n_heads": 2, "length": 128, "dropout": 0.0, "init": "unit"},
}
# What tiny_radd is trained with: bytes of stories, in minutes on two cores.
TINY: dict[str, Any] = {
    "tokenizer": "bytes",
    "training": {
        **{"batch_size": 16, "accum": 1, "n_iters": 3500, "loss_type": "k_DCE", "ema": 0.995, "eval_freq": 500},
        **{"snapshot_freq": 1000, "snapshot_freq_for_preemption": 100},
    },
    "data": {"train": "auto", "valid": "auto"},
    "sampling": {"steps": 256},
    "optim": {
        **{"lr": 3e-3, "beta2": 0.98, "weight_decay": 0.03, "warmup": 100, "decay": "cosine"},
        "grad_clip": 128.0,  # 1 for each token; the published 1 is for a row, whose loss is a sum, and clips every step
    },
}
# Published keys that are told in another way here.
REPLACED = {
    "ngpus": "torchrun --nproc_per_node says how many processes there are",
    "tokens": "the tokenizer says how many tokens there are",
    "gpt_dir": "generative_perplexity.py --judge names the model that judges samples",
    "hydra.run.dir": "outdir names the folder of the run, and the same one goes on with it",
    "load_dir": "outdir names the folder of the run, and the same one goes on with it",
    "training.weight": "every loss has its standard weight",
    "eval.perplexity": "generative_perplexity.py judges samples",
    "eval.perplexity_batch_size": "generative_perplexity.py judges one sample after the other",
    "model.cond_dim": "the model is not told the time, so that it has no condition",
    "model.name": "model=small_radd, medium_radd or tiny_radd chooses the size",
    "model.type": "the model is always the one without time",
    "model.use_checkpoint": "raise training.accum where memory is short",
    "model.dtype": "training.dtype=bf16 or no says what the model is trained in",
}
FREE = {"outdir", "device", "parallel"}  # what a run does not depend on, as far as its figures go
FREE_TRAINING = {"snapshot_freq", "snapshot_freq_for_preemption", "log_freq", "snapshot_sampling"}


def read_config(arguments: list[str]) -> DictConfig:
    """Reads ``key=value`` arguments over the defaults of the model that ``model=NAME`` chooses.

    Raises:
        ValueError: a key or a value is unknown, or a published key has been replaced.
    """
    for each in arguments:
        key = each.lstrip("+").partition("=")[0]
        if "=" not in each:
            raise ValueError(f"settings are written key=value, such as training.loss_type=t_DCE, got {each}")
        if key in REPLACED:
            raise ValueError(f"{key} is not a setting here: {REPLACED[key]}")
    names = [each.partition("=")[2] for each in arguments if each.startswith("model=")]
    name = names[-1] if names else "tiny_radd"
    if name not in SIZES:
        raise ValueError(f"model must be one of {', '.join(SIZES)}, got {name}")
    parts = [PUBLISHED, TINY if name == "tiny_radd" else {}, {"model": SIZES[name]}]
    config = OmegaConf.merge(*map(OmegaConf.create, parts))
    OmegaConf.set_struct(config, True)
    try:
        config.merge_with(OmegaConf.from_dotlist([each for each in arguments if not each.startswith("model=")]))
    except OmegaConfBaseException as error:
        raise ValueError(
            f"{getattr(error, 'full_key', None) or arguments}: {error.msg or error}".splitlines()[0]
        ) from None
    config.data.train, config.data.valid = resolved(config.data.train), resolved(config.data.valid)
    check(config)
    return config


def resolved(text: str) -> str:
    """Returns the name of a text in place of ``auto``: TinyStories if it is at hand, else Python's documentation."""
    if text != "auto":
        return text
    return str(STORIES) if DATA != Path() and STORIES.is_file() else "builtin"


def check(config: DictConfig) -> None:
    """Checks what would otherwise be found out late.

    Raises:
        ValueError: names the setting.
    """
    allowed = {
        "training.loss_type": LOSSES,
        "noise.type": ("loglinear", "geometric"),
        "sampling.predictor": ("euler", "tweedie"),
        "optim.optimizer": ("AdamW",),
        "optim.decay": ("constant", "cosine"),
        "training.dtype": ("auto", "bf16", "no"),
        "model.init": ("published", "unit"),
        "parallel": ("ddp", "fsdp2"),
    }
    for key, values in allowed.items():
        if (value := OmegaConf.select(config, key)) not in values:
            raise ValueError(f"{key} must be one of {', '.join(values)}, got {value}")
    least = {"training.batch_size": 1, "training.accum": 1, "training.n_iters": 1, "model.length": 2}
    least |= {"eval.batch_size": 1, "eval.draws": 2, "data.held_out": 1, "sampling.steps": 1}
    for key, smallest in least.items():
        value = OmegaConf.select(config, key)
        if not isinstance(value, int) or value < smallest:
            raise ValueError(f"{key} must be a whole number of at least {smallest}, got {value}")


def of_run(config: DictConfig) -> dict[str, Any]:
    """Returns what a run depends on: with other values, its folder does not go on."""
    values: Any = OmegaConf.to_container(config)
    values = {key: value for key, value in values.items() if key not in FREE}
    values["training"] = {key: value for key, value in values["training"].items() if key not in FREE_TRAINING}
    return values


def noise_of(config: DictConfig) -> Noise:
    if config.noise.type == "loglinear":
        return LogLinearNoise()
    return GeometricNoise(config.noise.sigma_min, config.noise.sigma_max)


def device_of(name: str) -> torch.device:
    """Returns a device by name; ``auto`` is the GPU of this process, or without GPUs the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if name == "cuda" else torch.device(name)
