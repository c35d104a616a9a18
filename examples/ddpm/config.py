"""The settings: those of the published code by their names, and a few of our own."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

import sparsekit as sk
from sparsekit.diffusion import GaussianDiffusion

Preset = Literal["small", "cifar10-conditional", "cifar10-unconditional"]
# What a preset gives where nothing else is asked for. The two of CIFAR-10 have the published values.
PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        **{"data": "auto", "img_size": 28, "conditional": True, "epoch": 16, "batch_size": 64, "T": 500},
        **{"channel": 16, "channel_mult": (1, 2, 4), "num_res_blocks": 1, "attn": (), "dropout": 0.0},
        **{"lr": 8e-4, "multiplier": 2.5, "beta_T": 0.028, "ema": 0.995},
    },
    "cifar10-conditional": {
        **{"data": "cifar10", "img_size": 32, "conditional": True, "epoch": 70, "batch_size": 80, "T": 500},
        **{"channel": 128, "channel_mult": (1, 2, 2, 2), "num_res_blocks": 2, "attn": (0, 1, 2, 3), "dropout": 0.15},
        **{"lr": 1e-4, "multiplier": 2.5, "beta_T": 0.028, "ema": 0.9999},
    },
    "cifar10-unconditional": {
        **{"data": "cifar10", "img_size": 32, "conditional": False, "epoch": 200, "batch_size": 80, "T": 1000},
        **{"channel": 128, "channel_mult": (1, 2, 3, 4), "num_res_blocks": 2, "attn": (2,), "dropout": 0.15},
        **{"lr": 1e-4, "multiplier": 2.0, "beta_T": 0.02, "ema": 0.9999},
    },
}


@dataclass
class Sampling:
    """What sample.py takes."""

    # The folder of the run; the default is a new one below output/.
    save_dir: Annotated[Path | None, tyro.conf.arg(aliases=["--save-weight-dir"])] = None
    test_load_weight: Path | None = None  # a folder of UNet2DModel.save_pretrained; None takes that of the run
    sampled_dir: Path | None = None  # for the images; None is samples/ in the folder of the run
    sampledNoisyImgName: str = "noise.png"
    sampledImgName: str = "samples.png"
    nrow: int = 10  # images in a row of a picture
    w: float = 1.8  # guidance, (1 + w) eps_label - w eps_none
    sampler: Literal["ancestral", "ddpm", "ddim", "dpm-solver++"] = "dpm-solver++"
    sampling_steps: int = 20  # "ancestral" always takes all T
    count: int = 100  # images to draw
    sampling_batch: int = 250  # images that are drawn together
    precision: Literal["auto", "no", "bf16"] = "auto"  # auto is bf16 where the device multiplies it in hardware
    device: str = "auto"
    seed: int = 0


@dataclass
class Config(Sampling):
    """What train.py takes; None stands for the value of the preset."""

    preset: Preset = "small"
    state: Literal["train", "eval"] = "train"  # eval draws images, as sample.py does
    data: str | None = None  # mnist, fashion_mnist, cifar10, shapes, or a folder of images by class
    held_out: float = 0.2  # the share of the images that is never trained on, where they come without a test set
    conditional: bool | None = None  # whether the model gets labels
    epoch: int | None = None
    batch_size: int | None = None  # images in a step, of all processes together
    T: int | None = None
    channel: int | None = None
    channel_mult: tuple[int, ...] | None = None
    num_res_blocks: int | None = None
    attn: tuple[int, ...] | None = None  # the levels of the UNet that have attention, from 0
    dropout: float | None = None
    lr: float | None = None  # where the warm-up begins
    multiplier: float | None = None  # times lr is the highest learning rate
    beta_1: float = 1e-4
    beta_T: float | None = None
    img_size: int | None = None
    grad_clip: float = 1.0
    label_dropout: float = 0.1
    ema: float | None = None  # decay of the average of the weights, which images are drawn with
    training_load_weight: Path | None = None  # a folder of save_pretrained to begin with
    parallel: Literal["ddp", "fsdp2"] = "ddp"  # in several processes
    spawn: int = 0  # starts so many processes here; else torchrun or accelerate launch does
    num_workers: int = 0  # processes that load images
    save_every: int = 100  # steps between two stored states
    sample_every: int = 4  # epochs between two pictures in samples/; 0 draws none
    probe_every: int = 0  # steps between two records of the gradients; 0 records none
    tracker: Literal["swanlab", "wandb", "tensorboard", "trackio", "none"] = "none"
    project_name: str = "ddpm"
    experiment_name: str | None = None

    def __post_init__(self) -> None:
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.precision == "auto":
            self.precision = "bf16" if multiplies_bf16(device_of(self.device)) else "no"

    def of_run(self) -> dict[str, Any]:
        """Returns what a run depends on: with other values, its folder does not go on."""
        free = {each.name for each in dataclasses.fields(Sampling)} - {"precision", "seed"}
        free |= {"state", "spawn", "num_workers", "save_every", "sample_every", "probe_every"}
        free |= {"tracker", "project_name", "experiment_name"}
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in free}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    def diffusion(self) -> GaussianDiffusion:
        return GaussianDiffusion(self.T, self.beta_1, self.beta_T)


def config_of(run: Path) -> Config:
    """Reads the settings of a run from its folder."""
    path = run / "config.json"
    if not path.exists():
        raise SystemExit(f"{run} is not the folder of a run: name one that train.py made by --save-dir")
    known = json.loads(path.read_text("utf-8"))
    return Config(**{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()})


def device_of(name: str) -> torch.device:
    """Returns a device by name; ``auto`` is the GPU of this process, or without GPUs the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if name == "cuda" else torch.device(name)


def multiplies_bf16(device: torch.device) -> bool:
    return torch.cuda.is_bf16_supported() if device.type == "cuda" else "bf16" in (sk.ops.simd_level() or "")
