"""The kinds of layers: layers of one kind take equally long, so one measurement serves them all."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import _timing
from .._layers import is_transposed
from ..masks import remove_mask, set_mask
from ..nn.compressed_conv import strides_of
from ..ops import nm_prune
from ..ops.layouts import device_name
from .measure import Measure
from .sites import LayerSite
from .sizes import Images, Size, extent
from .tiers import TierShares

if TYPE_CHECKING:
    from .candidates import Candidate


@dataclass(frozen=True)
class Kind:
    """All that the time of a layer depends on besides the machine.

    Args:
        device_name: the model of the CPU or GPU.
        shape: ``(out_features, in_features)``, or that of a convolution's weight.
        dtype: of the weight.
        bias: whether the layer has one.
        transposed: whether its weight is ``[in_features, out_features]``.
        candidates: the names of the forms that are measured.
        patterns: those of the zeros that they leave out.
        layout_size: the size that layouts are chosen for, the largest: its layout is as fast as any for fewer tokens.
        size: the tokens or images that are measured.
        evict_cache: whether weights are timed from memory instead of from the cache.
        graphs: whether the layer will run under CUDA graphs.
        keep_dense: whether a dense copy beside a sparse weight is measured as well.
        trained: whether the layer is being trained, so that what is for inference only is not measured.
        tiers: the shares of its tiers, if it may become tiered.
        geometry: stride, padding and dilation of a convolution, and the strides of its weight.
    """

    device_name: str
    shape: tuple[int, ...]
    dtype: str
    bias: bool
    transposed: bool
    candidates: tuple[str, ...]
    patterns: tuple[str, ...]
    layout_size: Size
    size: Size
    evict_cache: bool
    graphs: bool
    keep_dense: bool
    trained: bool
    tiers: TierShares | None
    geometry: tuple[Any, ...] | None


def kinds_of(
    site: LayerSite, candidates: Sequence["Candidate"], measure: Measure, *, evict_cache: bool, keep_dense: bool
) -> list[Kind]:
    """Returns the kinds to measure for one layer: one for each size of its inputs, none without candidates."""
    if not candidates:
        return []
    layer, device = site.layer, site.layer.weight.device
    patterns = tuple(dict.fromkeys(candidate.pattern for candidate in candidates if candidate.pattern))
    kind = partial(
        Kind,
        device_name=device_name(device),
        shape=site.shape,
        dtype=str(layer.weight.dtype),
        bias=layer.bias is not None,
        transposed=is_transposed(layer),
        candidates=tuple(candidate.name for candidate in candidates),
        patterns=patterns,
        layout_size=max(site.calls, default=0, key=extent),
        evict_cache=evict_cache,
        graphs=measure.graphs and _timing.is_gpu(device),
        keep_dense=keep_dense,
        trained=layer.training and layer.weight.requires_grad,
        tiers=TierShares.of(layer).rounded() if "tiers" in patterns else None,
        geometry=_geometry(layer) if isinstance(layer, nn.Conv2d) else None,
    )
    return [kind(size=size) for size in sorted(site.calls)]


def _geometry(conv: nn.Conv2d) -> tuple[Any, ...]:
    return conv.stride, conv.padding, conv.dilation, strides_of(conv)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the rows and columns of a weight as ``[outputs, inputs]``; of a convolution every tap is a row."""
    outputs, inputs, *kernel = shape
    return outputs * math.prod(kernel), inputs


def random_layer(kind: Kind, layer: nn.Module) -> tuple[nn.Module, Tensor]:
    """Returns a layer of a kind with a random weight, in eval mode, and a random input for it.

    Args:
        kind: what the layer is like.
        layer: any layer of this kind, whose class, dtype and device are taken.
    """
    device, dtype = layer.get_parameter("weight").device, layer.get_parameter("weight").dtype
    generator = torch.Generator(device).manual_seed(0)  # the caller's random state is not ours to move
    randn: Callable[..., Tensor] = partial(torch.randn, generator=generator, dtype=torch.float32, device=device)
    outputs, inputs, *kernel = kind.shape
    rows, cols = matrix_shape(kind.shape)
    weight = randn(rows, cols).div_((inputs * math.prod(kernel)) ** 0.5).to(dtype)
    if kind.tiers is not None:
        weight = kind.tiers.prune(weight, generator)
    elif "2:4" in kind.patterns:
        weight = nm_prune(weight, 2, 4)[0]
    if kind.geometry is not None:
        weight = weight.view(outputs, *kernel, inputs).permute(0, 3, 1, 2)
        weight = torch.empty_strided(weight.shape, kind.geometry[-1], dtype=dtype, device=device).copy_(weight)
    tensors: dict[str, Any] = {
        "weight": weight.t().contiguous() if kind.transposed else weight,
        "bias": randn(outputs).to(dtype) if kind.bias else None,
    }
    plain = copy.copy(layer)
    plain._parameters = {
        name: None if tensor is None else nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()
    }
    plain._buffers, plain._non_persistent_buffers_set = {}, set()
    remove_mask(plain)
    plain.training = False
    if kind.tiers is not None:
        set_mask(plain, tensors["weight"] != 0, kind.tiers.info(0 if kind.transposed else 1))
    if isinstance(kind.size, Images):
        count, height, width, last = kind.size
        x = randn(count, inputs, height, width)
        return plain, x.to(dtype, memory_format=torch.channels_last if last else torch.contiguous_format)
    return plain, randn(kind.size, inputs).to(dtype)
