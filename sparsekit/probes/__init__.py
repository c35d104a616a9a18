"""Looks at gradients: of activations while a model trains, of parameters after a backward pass, and draws them."""

from .draw import draw_gradients
from .grad_probe import GradProbe
from .param_norms import param_grad_norms

__all__ = ["GradProbe", "draw_gradients", "param_grad_norms"]
