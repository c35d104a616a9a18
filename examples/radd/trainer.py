"""One step of training: what is masked in it, the loss, the update, and the average of the weights."""

import math
from typing import Any

import torch
import torch.distributed as dist
from config import device_of, noise_of
from omegaconf import DictConfig
from parallel import parallel, set_gradient_sync
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from sparsekit.diffusion import Noise, k_dce_loss, lambda_dce_loss, t_dce_loss, t_dse_loss
from sparsekit.models import RADD
from sparsekit.runs import Run


class Trainer:
    """A model, the average of its weights, its optimizer and its learning rate, in one process or many.

    What a step masks depends on the seed and its number alone. With any number of processes the batch and the masked
    tokens are therefore the same, and so is the update but for rounding, and for dropout.
    """

    def __init__(self, config: DictConfig, tokens: int, rank: int, ranks: int) -> None:
        self.config, self.noise, self.device = config, noise_of(config), device_of(config.device)
        self.rank, self.ranks = rank, ranks
        torch.manual_seed(config.seed)
        self.model = new_model(config, tokens).to(self.device)
        self.average = AveragedModel(self.model, multi_avg_fn=warmed_up_average(config.training.ema))
        self.average.module.eval()
        self.forward: nn.Module = self.model
        if ranks > 1:
            self.forward = parallel(self.model, self.average.module, config.parallel, self.device)
        optim = config.optim
        betas = optim.beta1, optim.beta2
        self.optimizer = torch.optim.AdamW(self.model.parameters(), optim.lr, betas, optim.eps, optim.weight_decay)
        self.schedule = LambdaLR(self.optimizer, self._rate)
        self.model.train()
        torch.manual_seed(config.seed + rank)  # dropout differs between processes

    def parts(self) -> dict[str, Any]:
        """Returns all that has a state."""
        return {"model": self.model, "ema": self.average, "optimizer": self.optimizer, "schedule": self.schedule}

    def step(self, tokens: Tensor, run: Run) -> None:
        """Makes a step of a run on this process's rows of a batch, and records it."""
        config = self.config.training
        drawn = draw(self.config, self.noise, run.step, tokens.shape[1])
        mine = {name: each[self.rank :: self.ranks].to(self.device) for name, each in drawn.items()}
        tokens = tokens.to(self.device)
        chunks = torch.arange(len(tokens), device=self.device).tensor_split(min(config.accum, len(tokens)))
        self.optimizer.zero_grad()
        loss, nats = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for chunk in chunks:
            set_gradient_sync(self.forward, chunk is chunks[-1])
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.in_bf16()):
                losses = self.losses(tokens[chunk], {name: each[chunk] for name, each in mine.items()})
            part = losses.sum() / len(tokens)
            part.backward()
            loss += part.detach()
            nats += part.detach()
            if config.loss_type == "t_DCE":  # which is t_DSE less a constant, and tells less of the model
                nats += self._constant({name: each[chunk] for name, each in mine.items()}) / len(tokens)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.grad_clip)
        rate = self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        self.average.update_parameters(self.model)
        if run.step % config.log_freq == 0 or run.step == 1:
            whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP2 gives this process's part
            length = tokens.shape[1]
            values = {"loss": mean(loss) / length, "nats": mean(nats) / length}
            run.record(**values, grad_norm=whole.item(), lr=rate)

    def losses(self, tokens: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        """Returns the loss of each row, in nats."""
        mask, kind = self.model.mask_token, self.config.training.loss_type
        if kind == "k_DCE":
            return k_dce_loss(self.forward, tokens, mask, **drawn)
        if kind == "lambda_DCE":
            return lambda_dce_loss(self.forward, tokens, mask, **drawn)
        return {"t_DSE": t_dse_loss, "t_DCE": t_dce_loss}[kind](self.forward, tokens, mask, self.noise, **drawn)

    def in_bf16(self) -> bool:
        dtype = self.config.training.dtype
        return dtype == "bf16" or (dtype == "auto" and self.device.type == "cuda" and torch.cuda.is_bf16_supported())

    def _constant(self, drawn: dict[str, Tensor]) -> Tensor:
        t, masked = drawn["t"], drawn["masked"]
        weights = self.noise.loss_weight(t) * self.noise.score_factor(t).log()
        return (weights * masked.sum(1)).sum().to(torch.float32)

    def _rate(self, step: int) -> float:
        optim, steps = self.config.optim, self.config.training.n_iters
        warm = min(1.0, (step + 1) / max(1, optim.warmup))
        return warm if optim.decay == "constant" else warm * max(0.02, (1 + math.cos(math.pi * step / steps)) / 2)


def new_model(config: DictConfig, tokens: int) -> RADD:
    """Returns a model of the size that is asked for, with initial weights as published, or ``"unit"``.

    With unit initial weights, embeddings have variance 1 and layer norms no bias: at small sizes the published ones,
    which are so small that the first block drowns them, take hundreds of steps more until anything is learned.
    """
    sizes = config.model
    model = RADD(tokens, sizes.hidden_size, sizes.n_blocks, sizes.n_heads, sizes.dropout)
    if sizes.init == "unit":
        nn.init.normal_(model.embedding.weight)
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.zeros_(module.bias)
    return model


def warmed_up_average(decay: float) -> Any:
    """Returns the rule of the published average: ``decay``, but no more than ``(1 + n) / (10 + n)`` after n steps."""

    def average(means: list[Tensor], values: list[Tensor], count: Tensor | int) -> None:
        now = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(means, values, 1 - now)

    return average


def draw(config: DictConfig, noise: Noise, number: int, length: int) -> dict[str, Tensor]:
    """Draws what is masked in a step, for a whole batch, as the loss takes it."""
    rows = config.training.batch_size
    start = torch.Generator().manual_seed(config.seed)
    generator = torch.Generator().manual_seed(int(torch.randint(2**62, (), generator=start)) + number)
    row = torch.rand(rows, generator=generator, dtype=torch.float64)
    cell = torch.rand(rows, length, generator=generator, dtype=torch.float64)
    if config.training.loss_type == "k_DCE":
        return {"masked": cell.argsort(1).argsort(1) < (row * length).long()[:, None] + 1}
    if config.training.loss_type == "lambda_DCE":
        probability = (row + torch.arange(rows)) / rows
        return {"probability": probability, "masked": cell < probability[:, None]}
    t = 1e-3 + (1 - 1e-3) * ((row[0] + torch.arange(rows) / rows) % 1)
    return {"t": t, "masked": cell < noise.mask_probability(t)[:, None]}


def mean(value: Tensor) -> float:
    """Returns the mean over all processes."""
    total = value.clone()
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return total.item()
