"""Absorbing diffusion of tokens as a scheduler of diffusers."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from ..diffusion import DiffusionSampler, GeometricNoise, LogLinearNoise, Noise
from ..diffusion._row_random import row_seeds, row_uniforms
from ..diffusion.token_choice import choose_tokens


class AbsorbingScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc, unused-ignore]
    """A scheduler that unmasks tokens step by step: those that ``DiffusionSampler`` draws from the same seeds.

    In a step in which no token is unmasked, the model need not be called::

        scheduler.set_timesteps(64)
        for t in scheduler.timesteps:
            if scheduler.asked(t, tokens, seeds).any():
                tokens = scheduler.step(model(tokens), t, tokens, seeds).prev_sample

    ``DiffusionSampler`` evaluates less: only the rows that change, and of these only the masked positions to predict.

    Args:
        mask_token_id: the number of the mask token.
        noise: the schedule, ``"loglinear"`` or ``"geometric"``.
        eps: of log-linear noise.
        sigma_min: of geometric noise, as is ``sigma_max``.
        method: as in ``DiffusionSampler``, as are ``last_t``, ``top_k`` and ``top_p``.

    Raises:
        ValueError: an option is out of range.
    """

    order = 1
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        mask_token_id: int,
        noise: Literal["loglinear", "geometric"] = "loglinear",
        eps: float = 1e-3,
        sigma_min: float = 1e-4,
        sigma_max: float = 20.0,
        method: Literal["tweedie", "euler"] = "tweedie",
        last_t: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> None:
        if noise not in ("loglinear", "geometric"):
            raise ValueError(f"noise must be loglinear or geometric, got {noise!r}")
        self._mask_token = mask_token_id
        self._noise: Noise = LogLinearNoise(eps) if noise == "loglinear" else GeometricNoise(sigma_min, sigma_max)
        self.set_timesteps(1)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Spreads the steps evenly from time 1; ``timesteps`` are where they begin, float64 ``[steps]``."""
        config: Any = self.config
        self._sampler = DiffusionSampler(
            num_inference_steps,
            self._noise,
            config.method,
            config.last_t,
            top_k=config.top_k,
            top_p=config.top_p,
        )
        ends = torch.linspace(1, config.last_t, num_inference_steps + 1, dtype=torch.float64, device=device or "cpu")
        self.timesteps = ends[:-1]

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float | None = None) -> Tensor:
        """Returns the sample as it is: the model sees tokens."""
        return sample

    def asked(self, timestep: Tensor | float, sample: Tensor, seeds: Sequence[int]) -> Tensor:
        """Returns the masked positions that a step fills, bool like ``sample``.

        Arguments and errors are those of ``step``.
        """
        return self._plan(timestep, sample, seeds)[0]

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        seeds: Sequence[int],
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """Returns the rows after a step, with all tokens that it or a step before it is to unmask.

        Args:
            model_output: ``[rows, length, vocabulary]``, logits or log probabilities; that of the mask token, if there
                is one, counts for nothing.
            timestep: one of ``timesteps``.
            sample: int64 ``[rows, length]``, with the mask token at masked positions.
            seeds: what each row is drawn from, one integer for each, the same in all steps.
            return_dict: whether to return an object with ``prev_sample``; else a tuple.

        Raises:
            ValueError: an argument is out of range.
        """
        asked, uniforms = self._plan(timestep, sample, seeds)
        logits = model_output[asked].double()
        mask = self._mask_token
        logits[:, mask : mask + 1] = -torch.inf
        chosen = choose_tokens(logits.log_softmax(-1), uniforms[asked], self._sampler.top_k, self._sampler.top_p)
        prev_sample = sample.masked_scatter(asked, chosen)
        return SchedulerOutput(prev_sample) if return_dict else (prev_sample,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Returns rows with masked tokens, as a model is trained on.

        Args:
            original_samples: int64 ``[rows, length]``.
            noise: uniform numbers from 0 to 1, like ``original_samples``.
            timesteps: the time of each row, from 0 to 1, ``[rows]``.
        """
        masked = noise < self._noise.mask_probability(timesteps.to(noise.device))[:, None]
        return original_samples.masked_fill(masked.to(original_samples.device), self._mask_token)

    def _plan(self, timestep: Tensor | float, sample: Tensor, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns the positions to fill, and the numbers by which their tokens are chosen."""
        step = (self.timesteps == timestep).nonzero()
        if len(step) != 1:
            raise ValueError(f"timestep must be one of timesteps, got {float(timestep)}")
        if len(seeds) != len(sample):
            raise ValueError(f"seeds must be one for each row, got {len(seeds)} for {len(sample)} rows")
        uniforms = row_uniforms(row_seeds(seeds, sample.device), sample.shape[1])
        due = self._sampler._times(uniforms[..., 0]) <= int(step)
        return due & (sample == self._mask_token), uniforms[..., 1]

    def __len__(self) -> int:
        return len(self.timesteps)
