"""Checkpoints in the layout of the published training, which its readers and ``RADD.from_published`` load."""

import os
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
from trainer import Trainer

PUBLISHED = {
    "embedding.weight": "vocab_embed.embedding",
    "qkv.": "attn_qkv.",
    "out.": "attn_out.",
    "up.": "mlp.0.",
    "down.": "mlp.2.",
    "norm.": "output_layer.norm_final.",
    "head.": "output_layer.linear.",
}


def published_name(name: str) -> str:
    """Returns what the published code calls a weight."""
    head, block, rest = (
        name.rpartition(f"blocks.{name.split('.')[1]}.") if name.startswith("blocks.") else ("", "", name)
    )
    for ours, theirs in PUBLISHED.items():
        if rest.startswith(ours):
            return head + block + theirs + rest.removeprefix(ours)
    return name


def write_checkpoint(folder: Path, trainer: Trainer, step: int) -> None:
    """Writes ``checkpoints/checkpoint_STEP.pth`` and the same as ``checkpoints-meta/checkpoint.pth``.

    All processes call it. Our own runs go on from ``state/``, which also has the random states and the place in the
    data. The state of the optimizer has the names of our weights.
    """
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, optimizer = get_state_dict(trainer.model, trainer.optimizer, options=whole)
    ema = get_model_state_dict(trainer.average.module, options=whole)
    if trainer.rank:
        return
    stored = {
        "model": renamed(model),
        "ema": {
            "decay": trainer.config.training.ema,
            "num_updates": step,
            "shadow_params": [ema[name] for name, _ in trainer.model.named_parameters()],
        },
        "optimizer": optimizer,
        "step": step,
    }
    for path in (folder / "checkpoints" / f"checkpoint_{step}.pth", folder / "checkpoints-meta" / "checkpoint.pth"):
        path.parent.mkdir(exist_ok=True)
        torch.save(stored, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {published_name(name): tensor for name, tensor in state.items()}


def write_layout(folder: Path, config: DictConfig) -> None:
    """Writes ``.hydra/config.yaml`` and the link ``logs`` to the log, as readers of published runs expect them."""
    hydra = folder / ".hydra" / "config.yaml"
    hydra.parent.mkdir(exist_ok=True)
    values: Any = OmegaConf.create({**OmegaConf.to_container(config), "work_dir": str(folder.resolve())})
    OmegaConf.save(values, hydra)
    if not os.path.lexists(folder / "logs"):
        (folder / "logs").symlink_to("log.txt")
