"""Diffusion: how data becomes noise step by step, and how a model of the noise turns it back."""

from .gaussian import GaussianDiffusion, drop_labels, guided

__all__ = ["GaussianDiffusion", "drop_labels", "guided"]
