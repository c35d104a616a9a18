"""Diffusion: how data becomes noise step by step, and how a model of the noise turns it back."""

from .absorbing import k_dce_loss, lambda_dce_loss, t_dce_loss, t_dse_loss
from .blocks import BlockSampler
from .bound import Bound, evaluate_bound
from .confidence import ConfidenceSampler
from .gaussian import GaussianDiffusion, drop_labels, guided
from .masking import masked_batches
from .noise import GeometricNoise, LogLinearNoise, Noise
from .order import ordered_loss
from .token_sampler import TokenSample
from .token_samplers import DiffusionSampler, OrderedSampler

__all__ = [
    "BlockSampler",
    "Bound",
    "ConfidenceSampler",
    "DiffusionSampler",
    "GaussianDiffusion",
    "GeometricNoise",
    "LogLinearNoise",
    "Noise",
    "OrderedSampler",
    "TokenSample",
    "drop_labels",
    "evaluate_bound",
    "guided",
    "k_dce_loss",
    "lambda_dce_loss",
    "masked_batches",
    "ordered_loss",
    "t_dce_loss",
    "t_dse_loss",
]
