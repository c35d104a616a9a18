"""Gaussian diffusion: the noise schedule, the training loss, guidance by labels, and sampling.

A model is any function ``(x, t, labels) -> eps`` that predicts the noise in ``x``: ``lambda x, t, labels: unet(x, t,
labels).sample`` for diffusers' ``UNet2DModel``. Labels count from 1, and 0 stands for no label. For an average of the
weights there is ``torch.optim.swa_utils.AveragedModel``.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

EpsModel: TypeAlias = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Sampler: TypeAlias = Literal["ancestral", "ddpm", "ddim", "dpm-solver++"]
Variance: TypeAlias = Literal["fixed_large", "fixed_small"]


@dataclass(frozen=True)
class GaussianDiffusion:
    """The process that turns images into noise in many small steps, with a linear schedule of their variances.

    ``x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) eps``, where ``a_t``, called alpha bar, is the product of ``1 - beta`` up to
    step ``t``, which counts from 0. Source: Ho et al., 2020, https://arxiv.org/abs/2006.11239.

    Args:
        steps: the number of steps; 1000 as in the paper.
        beta_start: the variance of the first step; 1e-4 as in the paper.
        beta_end: the variance of the last step. With 0.02 and 1000 steps, as in the paper, 4e-5 of the image's variance
            is left at the end; fewer steps need a larger one.

    Raises:
        ValueError: a value is out of range.
    """

    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"steps must be an integer of at least 1, got {self.steps!r}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"betas must rise within 0 and 1, got {self.beta_start} to {self.beta_end}")

    @cached_property
    def betas(self) -> Tensor:
        """The variances of the steps, float64 ``[steps]`` on the CPU."""
        with torch.inference_mode(False):  # a table made in inference mode could not be used in training
            return torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=torch.float64, device="cpu")

    @cached_property
    def alpha_bars(self) -> Tensor:
        """The shares of the image's variance that are left after each step, float64 ``[steps]`` on the CPU."""
        with torch.inference_mode(False):
            return (1 - self.betas).cumprod(0)

    def q_sample(self, x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Returns images with noise.

        Args:
            x: images ``[batch, ...]``, scaled to about [-1, 1].
            t: the step of each image, int64 ``[batch]``.
            noise: standard normal, like ``x``.
        """

        def factors(table: Tensor) -> Tensor:
            dtype = torch.promote_types(x.dtype, torch.float32)
            return table.to(device=x.device, dtype=dtype)[t].view(-1, *[1] * (x.dim() - 1))

        return (factors(self.alpha_bars.sqrt()) * x + factors((1 - self.alpha_bars).sqrt()) * noise).to(x.dtype)

    def loss(
        self,
        model: EpsModel,
        x: Tensor,
        labels: Tensor | None = None,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Computes the squared error of the predicted noise, the mean over all elements.

        Being a mean, it has the same gradients in one process as in several that each take a part of equal size of the
        batch, and whose gradients are averaged.

        Args:
            model: predicts the noise.
            x: images ``[batch, ...]``, scaled to about [-1, 1].
            labels: what the model gets as labels; see ``drop_labels``.
            t: the step of each image, int64 ``[batch]``; None draws each of them uniformly.
            noise: like ``x``; None draws it from the standard normal distribution.
            generator: what is drawn from, on any device; None is the global random state.
        """
        device = x.device if generator is None else generator.device
        if t is None:
            t = torch.randint(self.steps, x.shape[:1], generator=generator, device=device, dtype=torch.int64)
        if noise is None:
            noise = torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype)
        t, noise = t.to(x.device), noise.to(x.device)
        return F.mse_loss(model(self.q_sample(x, t, noise), t, labels).to(noise.dtype), noise)

    def ancestral_step(
        self, x: Tensor, eps: Tensor, t: int, noise: Tensor, variance: Variance = "fixed_large"
    ) -> Tensor:
        """Returns a sample one step nearer to an image.

        Args:
            x: the sample at step ``t``.
            eps: the noise that is predicted in it.
            t: the step, the same for all samples.
            noise: standard normal, like ``x``; at step 0 none is added.
            variance: that of the added noise: beta (``"fixed_large"``, right for data of variance 1), or that of the
                posterior given the image (``"fixed_small"``, right for a single image).
        """
        beta, bar = float(self.betas[t]), float(self.alpha_bars[t])
        mean = (x - beta / (1 - bar) ** 0.5 * eps) / (1 - beta) ** 0.5
        if t == 0:
            return mean
        added = beta if variance == "fixed_large" else beta * (1 - float(self.alpha_bars[t - 1])) / (1 - bar)
        return mean + added**0.5 * noise

    @torch.no_grad()
    def sample(
        self,
        model: EpsModel,
        shape: Sequence[int],
        labels: Tensor | None = None,
        *,
        sampler: Sampler = "dpm-solver++",
        steps: int | None = None,
        variance: Variance = "fixed_large",
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    ) -> Tensor:
        """Draws images, clipped to [-1, 1] at the end.

        Args:
            model: predicts the noise, in evaluation mode; see ``guided``.
            shape: ``[batch, channels, height, width]``.
            labels: what the model gets as labels, int64 ``[batch]``.
            sampler: ``"ancestral"`` is the original one, which takes all steps, with tables in float64. The others are
                diffusers' ``DDPMScheduler``, ``DDIMScheduler`` and ``DPMSolverMultistepScheduler``; with DDIM some 50
                steps are enough, with DPM-Solver++ 10 to 20.
            steps: the number of steps, spread evenly from the last one; None takes all. With DDIM, a number that does
                not divide that of all leaves noise, more if it is large, because diffusers rounds the distance down.
            variance: of ``"ancestral"`` and ``"ddpm"``; see ``ancestral_step``.
            generator: what is drawn from, on any device; None is the global random state.
            device: where the samples are.
            progress: wraps the steps, such as tqdm.

        Raises:
            ValueError: an argument is out of range.
            ImportError: diffusers is not installed, and the sampler is not ``"ancestral"``.
        """
        if variance not in get_args(Variance):
            raise ValueError(f"variance must be one of {', '.join(get_args(Variance))}, got {variance!r}")
        steps = self.steps if steps is None else steps
        if not (steps == self.steps if sampler == "ancestral" else 1 <= steps <= self.steps):
            allowed = f"{'' if sampler == 'ancestral' else '1 to '}{self.steps}"
            raise ValueError(f"steps of the sampler {sampler!r} must be {allowed}, got {steps}")

        def normal() -> Tensor:
            drawn_on = device if generator is None else generator.device
            return torch.randn(*shape, generator=generator, device=drawn_on, dtype=torch.float32).to(device)

        x = normal()
        scheduler = None if sampler == "ancestral" else self._scheduler(sampler, steps, variance)
        drawing = {"generator": generator} if sampler in ("ddpm", "ddim") else {}
        for t in progress(range(self.steps)[::-1] if scheduler is None else scheduler.timesteps.tolist()):
            eps = model(x, torch.full((len(x),), t, dtype=torch.int64, device=device), labels).to(x.dtype)
            if scheduler is None:
                x = self.ancestral_step(x, eps, t, normal(), variance)
            else:
                with torch.device("cpu"):  # where the scheduler has its tables, whatever the default device is
                    x = scheduler.step(eps, t, x, **drawing).prev_sample
        return x.clamp(-1, 1)

    def _scheduler(self, sampler: Sampler, steps: int, variance: Variance) -> Any:
        try:
            from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
        except ImportError as error:
            raise ImportError(
                f"the sampler {sampler!r} needs diffusers: pip install 'sparsekit-kernels[systems]'"
            ) from error
        common = {
            "num_train_timesteps": self.steps,
            "trained_betas": self.betas.tolist(),
            "timestep_spacing": "trailing",  # begins at the last step, where x is nearest to pure noise
        }
        kinds: dict[str, Any] = {
            "ddpm": (DDPMScheduler, {"variance_type": variance, "clip_sample": False}),
            "ddim": (DDIMScheduler, {"clip_sample": False}),
            "dpm-solver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
        }
        if sampler not in kinds:
            raise ValueError(f"sampler must be one of {', '.join(get_args(Sampler))}, got {sampler!r}")
        kind, own = kinds[sampler]
        with torch.device("cpu"), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the DPM-Solver's, of how NumPy 2 takes a tensor
            scheduler = kind(**common, **own)
            scheduler.set_timesteps(steps)
            timesteps = scheduler.timesteps[:steps]  # rounding errors may give one more, at -1
            if sampler == "dpm-solver++":  # it has tables by timestep
                scheduler.set_timesteps(timesteps=timesteps.tolist())
            else:
                scheduler.timesteps = timesteps
        return scheduler


def drop_labels(labels: Tensor, rate: float, generator: torch.Generator | None = None) -> Tensor:
    """Returns labels of which each is replaced by 0, no label, at a rate, independently of the others.

    Trained on these, one model predicts the noise with and without labels, which ``guided`` needs.

    Args:
        labels: int64 ``[batch]``, from 1.
        rate: the share that is dropped; 0.1 is usual.
        generator: what is drawn from, on any device; None is the global random state.

    Raises:
        ValueError: the rate is not from 0 to 1.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be from 0 to 1, got {rate}")
    device = labels.device if generator is None else generator.device
    drawn = torch.rand(labels.shape, generator=generator, device=device, dtype=torch.float32)
    return labels.masked_fill((drawn < rate).to(labels.device), 0)


def guided(model: EpsModel, w: float) -> EpsModel:
    """Returns a model of the noise that follows its labels more closely: ``(1 + w) eps_labels - w eps_none``.

    Both come from one pass over a doubled batch. ``w = 0`` is the model itself; what others call the guidance scale is
    ``1 + w``. Source: Ho and Salimans, 2022, https://arxiv.org/abs/2207.12598.
    """
    if w == 0:
        return model

    def eps(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        if labels is None:
            raise ValueError("guidance needs labels, got None")
        both = model(torch.cat((x, x)), torch.cat((t, t)), torch.cat((labels, torch.zeros_like(labels))))
        with_labels, without = both.chunk(2)
        return (1 + w) * with_labels - w * without

    return eps
