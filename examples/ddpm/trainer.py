"""One step of training: what is drawn for it, the loss, the update, and the average of the weights."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from config import Config, device_of
from data import Images
from launch import parallel
from model import Eps, load_unet, new_unet
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparsekit.diffusion import drop_labels
from sparsekit.probes import GradProbe, param_grad_norms
from sparsekit.runs import Run


class Trainer:
    """A UNet, the average of its weights, its optimizer and its learning rate, in one process or many.

    What a step draws depends on the seed and its number alone. With any number of processes the batch and all draws are
    therefore the same, and so is the update, but for rounding.
    """

    def __init__(self, config: Config, images: Images, steps: int) -> None:
        self.config, self.device, self.diffusion = config, device_of(config.device), config.diffusion()
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        torch.manual_seed(config.seed)
        self.unet = new_unet(config, images).to(self.device)
        if config.training_load_weight:
            self.unet.load_state_dict(load_unet(config.training_load_weight).state_dict())
        self.average = AveragedModel(self.unet, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        self.model = Eps(parallel(self.unet, self.average.module, config, self.ranks))
        fused = self.device.type in ("cpu", "cuda")
        rate = config.lr * config.multiplier
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), rate, weight_decay=1e-4, fused=fused)
        self.schedule = warm_up_and_cosine(self.optimizer, steps, config.multiplier)
        self.unet.train()
        torch.manual_seed(config.seed + self.rank)  # dropout differs between processes

    def parts(self) -> dict[str, object]:
        """Returns all that has a state."""
        return {"model": self.unet, "ema": self.average, "optimizer": self.optimizer, "schedule": self.schedule}

    def probe(self, run: Run) -> AbstractContextManager[GradProbe | None]:
        """Returns a probe of the gradients of what each residual block gives, or None within if none is asked for."""
        every = self.config.probe_every
        if not every:
            return nullcontext()
        return GradProbe(self.unet, is_residual_block, every=every, run=run, timesteps=self.config.T)

    def step(self, x: Tensor, labels: Tensor, run: Run, probe: GradProbe | None = None) -> None:
        """Makes a step of a run on this process's part of a batch, and records it."""
        t, noise, kept = (
            each[self.rank :: self.ranks].to(self.device) for each in draw(self.config, run.step, x.shape[1:])
        )
        given = labels.to(self.device) * kept if self.config.conditional else None
        if probe is not None:
            probe.at(t)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            loss = self.diffusion.loss(self.model, x.to(self.device), given, t=t, noise=noise)
        self.optimizer.zero_grad()
        loss.backward()
        if probe is not None and run.step % self.config.probe_every == 0:
            param_grad_norms(self.unet, run=run)
        norm = nn.utils.clip_grad_norm_(self.unet.parameters(), self.config.grad_clip)
        rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        self.average.update_parameters(self.unet)
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2 gives this process's part
        run.record(loss=mean(loss), grad_norm=whole.item(), lr=rate)


def is_residual_block(name: str, module: nn.Module) -> bool:
    return type(module).__name__ == "ResnetBlock2D"


def warm_up_and_cosine(optimizer: torch.optim.Optimizer, steps: int, multiplier: float) -> LRScheduler:
    """Returns the published schedule, step by step: a tenth of all steps up from the rate by ``multiplier``, then down.

    The rate of the optimizer is the highest one. The published one counts epochs, and divides by zero below 10.
    """
    warm = max(1, steps // 10)
    up = LinearLR(optimizer, 1 / multiplier, 1.0, warm)
    down = CosineAnnealingLR(optimizer, max(1, steps - warm))
    return SequentialLR(optimizer, [up, down], [warm])


def draw(config: Config, number: int, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
    """Draws the timesteps, the noise, and 1 or 0 for each label that is kept or dropped, for a whole batch."""
    start = torch.Generator().manual_seed(config.seed)
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=start)) + number)
    t = torch.randint(config.T, (config.batch_size,), generator=generator)
    noise = torch.randn(config.batch_size, *shape, generator=generator)
    return t, noise, drop_labels(torch.ones_like(t), config.label_dropout, generator)


def mean(loss: Tensor) -> float:
    """Returns the mean over all processes."""
    total = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return total.item()
