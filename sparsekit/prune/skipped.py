"""The parameters that are never pruned although they are large enough, for a report that covers the whole model."""

from collections.abc import Collection, Iterator

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from .._layers import input_dim, is_stack, unsupported_reason
from ..masks import Pattern
from ..nn import Compressed
from .report import Skipped

ONLY = "only Linear and Conv2d layers, transformers' Conv1D and experts are pruned"


def never_pruned(name: str, module: nn.Module, pattern: Pattern, layers: Collection[str]) -> Iterator[Skipped]:
    """Yields the module's own parameters that have at least two dimensions and one group and are not in ``layers``."""
    if isinstance(module, Compressed):
        yield Skipped(name, unsupported_reason(module) or "")
    # What a ParametrizationList computes is listed below, with the module that uses it.
    if isinstance(module, Compressed | ParametrizationList):
        return
    for key, parameter in module._parameters.items():
        if parameter is None or key in layers or "bias" in key:
            continue
        if is_lazy(parameter):
            if not isinstance(module, nn.modules.batchnorm._NormBase):
                yield Skipped(_shown(name, key), unsupported_reason(module, key) or "")
        elif parameter.dim() >= 2 and max(parameter.shape) >= (pattern.m or 1):
            yield Skipped(_shown(name, key), _reason(module, parameter))
    for key in getattr(module, "parametrizations", ()):
        if key not in layers and input_dim(module) is None:
            yield Skipped(_shown(name, key), unsupported_reason(module, key) or "")


def _shown(name: str, key: str) -> str:
    return name if key == "weight" and name else f"{name}.{key}".lstrip(".")


def _reason(module: nn.Module, parameter: nn.Parameter) -> str:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "it is an embedding"
    if is_stack(parameter) and len(parameter) > 1 and not isinstance(module, nn.modules.conv._ConvNd | nn.Bilinear):
        return f"it belongs to a {type(module).__name__}, and no batch has shown that it is the matrices of experts"
    return f"it belongs to a {type(module).__name__}, and {ONLY}"
