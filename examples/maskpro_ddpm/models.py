"""The models that masks are learned for: diffusers' pipelines and UNets, those of examples/ddpm, and the MNIST UNet."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ddpm_parts import LOCAL, Eps, Images, config_of, load
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from mnist_unet import MnistUNet
from torch import Tensor

from sparsekit.diffusion import GaussianDiffusion

HUB = "google/ddpm-cifar10-32"
CHECKPOINT = LOCAL / "ckpt_ddpm_mnist" / "ddpm_mnist.pt"
KINDS = {"UNet2DModel": UNet2DModel, "MnistUNet": MnistUNet}
UNet = UNet2DModel | MnistUNet


@dataclass(frozen=True)
class Denoiser:
    """A UNet that predicts noise, the process that adds the noise, and the images that it was trained on.

    Args:
        unet: the model, called as diffusers' ``UNet2DModel`` is.
        diffusion: the noise schedule.
        data: the data set, by a name or folder that examples/ddpm knows.
        held_out: the share of the images that is held out where they come without a test set.
    """

    unet: UNet
    diffusion: GaussianDiffusion
    data: str
    held_out: float = 0.2

    @property
    def shape(self) -> tuple[int, int, int]:
        """The channels, height and width of an image."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    @property
    def classes(self) -> int:
        """How many classes it can be asked for; 0 if it takes no labels."""
        return max((self.unet.config.num_class_embeds or 1) - 1, 0)

    def images(self, dataset: str = "auto") -> Images:
        """Loads its images, or those of another data set."""
        try:
            found = load(self.data if dataset == "auto" else dataset, self.shape[1], self.held_out)
        except OSError as error:  # no such data, no images in it, or no network
            raise SystemExit(f"{error}: name other data by --dataset") from error
        if found.channels != self.shape[0]:
            raise SystemExit(
                f"the model takes images of {self.shape[0]} channels and {found.source} has {found.channels}: "
                "name the data that it was trained on by --dataset"
            )
        return found

    @torch.no_grad()
    def draw(self, unet: UNet, count: int, steps: int, seed: int) -> Tensor:
        """Draws images by a UNet of this kind, the first ones of every class in turn, from noise that the seed chooses.

        Returns:
            Images in [-1, 1] on the CPU.
        """
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % self.classes + 1 if self.classes else None
        where = unet.device
        drawn = self.diffusion.sample(
            Eps(unet.eval()),
            (count, *self.shape),
            None if labels is None else labels.to(where),
            sampler="dpm-solver++",
            steps=steps,
            generator=generator,
            device=where,
        )
        return drawn.cpu()

    def save(self, unet: UNet, folder: Path) -> None:
        """Writes a UNet of this kind with the noise schedule; a UNet2DModel as a pipeline of diffusers."""
        betas = {"beta_start": self.diffusion.beta_start, "beta_end": self.diffusion.beta_end}
        scheduler = DDPMScheduler(num_train_timesteps=self.diffusion.steps, beta_schedule="linear", **betas)
        if isinstance(unet, UNet2DModel):
            DDPMPipeline(unet, scheduler).save_pretrained(folder)
        else:
            unet.save_pretrained(folder / "unet")
            scheduler.save_pretrained(folder / "scheduler")


def load_denoiser(source: str = "auto", device: torch.device | str = "cpu") -> Denoiser:
    """Loads a model.

    Args:
        source: ``"mnist"`` is the trained MNIST UNet of ``SPARSEKIT_DATA``; a folder is that of a pipeline of
            diffusers, of a UNet2DModel, or of a run of examples/ddpm; anything else is a pipeline of the hub.
            ``"auto"`` is ``"mnist"`` where it can be found, else google/ddpm-cifar10-32.
        device: where the UNet goes.
    """
    if source == "auto":
        source = "mnist" if CHECKPOINT.exists() else HUB
    if source == "mnist":
        if not CHECKPOINT.exists():
            raise SystemExit(f"{CHECKPOINT} is missing: set SPARSEKIT_DATA, or name a model by --original_model")
        found = Denoiser(MnistUNet.load_trained(CHECKPOINT), GaussianDiffusion(), "mnist")
    else:
        folder = Path(source)
        found = _from_folder(folder if folder.is_dir() else _downloaded(source))
    found.unet.to(device).eval().requires_grad_(False)
    return found


def _downloaded(name: str) -> Path:
    """Downloads a pipeline from the hub: its weights as safetensors, which need no unpickling."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # of many kinds, where there is no network or no such name
        raise SystemExit(
            f"{name} is neither a folder nor can it be downloaded from the hub: pass --original_model the folder of a "
            "pipeline or of a UNet2DModel, or mnist with SPARSEKIT_DATA set"
        ) from error


def _from_folder(folder: Path) -> Denoiser:
    if (folder / "model" / "config.json").exists():  # the folder of a run of examples/ddpm
        folder = folder / "model"
    config = _read(folder / "model_index.json") or {}
    where = next((each for each in (folder / "unet", folder) if (each / "config.json").exists()), None)
    if where is None:
        kind = config.get("_class_name")
        said = f"holds a {kind}, which has no UNet2DModel" if kind else "has neither unet/config.json nor config.json"
        raise SystemExit(f"{folder} {said}: pass --original_model the folder of a DDPMPipeline or a UNet2DModel")
    kind = _read(where / "config.json").get("_class_name")
    if kind not in KINDS:
        raise SystemExit(
            f"{where} holds a {kind}, and masks are learned here for a UNet2DModel that predicts noise from images "
            "alone: pass --original_model the folder of a DDPMPipeline"
        )
    unet = KINDS[kind].from_pretrained(where, low_cpu_mem_usage=False, use_safetensors=True)
    data = "mnist" if kind == "MnistUNet" else "cifar10" if unet.config.in_channels == 3 else "auto"
    run = folder.parent
    if "beta_T" in (_read(run / "config.json") or {}):
        trained = config_of(run)
        return Denoiser(unet, trained.diffusion(), trained.data, trained.held_out)
    return Denoiser(unet, _diffusion(folder), data)


def _diffusion(folder: Path) -> GaussianDiffusion:
    """Reads the noise schedule of a pipeline; without one it is that of the DDPM paper."""
    paths = (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json")
    config = next((found for path in paths if (found := _read(path)) is not None), None)
    if config is None:
        return GaussianDiffusion()
    scheduler = DDPMScheduler.from_config(config)
    kind = scheduler.config.beta_schedule, scheduler.config.prediction_type
    if kind != ("linear", "epsilon") or scheduler.config.trained_betas is not None:
        raise SystemExit(
            f"the scheduler of {folder} has the betas {kind[0]!r} and predicts {kind[1]!r}: pass --original_model a "
            "model with linear betas that predicts epsilon"
        )
    return GaussianDiffusion(
        scheduler.config.num_train_timesteps, scheduler.config.beta_start, scheduler.config.beta_end
    )


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text("utf-8")) if path.exists() else None
