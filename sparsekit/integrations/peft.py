"""LoRA adapters for pruned and compressed layers that keep their zeros: https://arxiv.org/abs/2106.09685."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .._layers import input_dim
from ..masks import masked_parameters
from ..nn import Compressed, CompressedConv2d, CompressedLinear
from ..nn.common import oriented
from ..nn.layer_weight import dense_weight, is_sparse, kept_entries, store_weight

Model = TypeVar("Model", bound=nn.Module)
INITIAL = (True, False, "gaussian", "orthogonal")  # the initializations that do not change the weight of the layer


class _Pruned(type):
    """The metaclass of ``PrunedLayer``: PEFT calls ``isinstance`` to find the layers for which it makes an adapter."""

    def __instancecheck__(cls, layer: Any) -> bool:
        if isinstance(layer, Compressed):
            return True
        return isinstance(layer, nn.Module) and bool(masked_parameters(layer))


class PrunedLayer(metaclass=_Pruned):
    """A class whose instances are all compressed layers and all modules that have a stored mask."""


def lora_config(config: LoraConfig | None = None, /, **arguments: Any) -> LoraConfig:
    """Returns a ``LoraConfig`` with which PEFT accepts pruned and compressed layers, and keeps their zeros.

    The adapter of such a layer is ``mask * (B @ A)``: it learns only entries that the mask keeps, so merging leaves the
    zeros and does not change the output of the model::

        model = get_peft_model(model, lora_config(r=8, target_modules=["q_proj", "v_proj"]))
        ...
        model = model.merge_and_unload()

    The masked product is dense: a call costs about as much as one more dense layer, so merge before you serve. It is
    computed again in the backward pass, so that no dense copy of a weight is kept. Other layers get PEFT's own
    adapters. A saved adapter does not store that it is masked; load it with
    ``PeftModel.from_pretrained(model, folder, config=lora_config(LoraConfig.from_pretrained(folder)))``.

    Args:
        config: is changed and returned; None makes a new one of ``arguments``.
        **arguments: arguments of ``LoraConfig``. ``init_lora_weights`` must not change the weight
            of the layer (True, False, ``"gaussian"`` or ``"orthogonal"``); DoRA and the other variants of LoRA
            are rejected for such a layer.

    Raises:
        TypeError: ``config`` is not a ``LoraConfig``, or there are ``arguments`` as well.
        ValueError: raised later, when PEFT makes the adapters: a target with a stored mask is no linear layer or
            convolution, such as experts, and an adapter would fill its zeros.
    """
    if config is None:
        config = LoraConfig(**arguments)
    elif arguments or not isinstance(config, LoraConfig):
        raise TypeError(f"lora_config takes a LoraConfig or its arguments, got {config!r} and {arguments!r}")
    config._register_custom_module({PrunedLayer: _adapter})  # type: ignore[dict-item]
    return config


def keep_zeros_(model: Model) -> Model:
    """Makes the LoRA adapters of a model keep the zeros of pruned and compressed layers; returns the model.

    It is meant for a model that got its adapters without ``lora_config``, or that was pruned or compressed after it got
    them. The adapters are masked from then on, as ``lora_config`` describes. What they have learned for dropped weights
    has no effect any more, so call this before training. ``merge_and_unload()`` then keeps the zeros.

    Raises:
        ValueError: the adapter of such a layer is merged already, or is not plain LoRA (DoRA, another method); nothing
            is changed then.
    """
    found: list[Any] = []
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or not isinstance(layer.get_base_layer(), PrunedLayer):
            continue
        if isinstance(layer, _MaskedAdapter):
            continue
        if type(layer) not in MASKED or getattr(layer, "lora_variant", None):
            kind = type(layer).__name__
            raise ValueError(f"{name}: its adapter is a {kind} that is no plain LoRA, which would fill the zeros")
        if layer.merged:
            raise ValueError(f"{name}: its adapter is merged already: call unmerge_adapter() first")
        found.append(layer)
    for layer in found:
        layer.__class__ = MASKED[type(layer)]
    return model


def merge_lora(model: Any) -> nn.Module:
    """Merges the LoRA adapters of a PEFT model into its layers, pruned and compressed ones too, and returns the model.

    This is ``keep_zeros_(model).merge_and_unload()``: zeros stay, and compressed layers stay compressed. An adapter
    that was trained without a mask (with a plain ``LoraConfig``) loses what it has learned for dropped weights.

    Raises:
        TypeError: ``model`` is not a PEFT model.
        ValueError: for the reasons of ``keep_zeros_``; or an adapter makes a weight NaN or infinite, or has a bias
            while its layer has none. Nothing is merged then.
    """
    if not callable(getattr(model, "merge_and_unload", None)):
        raise TypeError(f"model must be a PEFT model with LoRA adapters, got {type(model).__name__}")
    keep_zeros_(model)
    for name, layer in model.named_modules():
        if isinstance(layer, _MaskedAdapter):
            layer.check_merge(name)
    merged: nn.Module = model.merge_and_unload()
    return merged


class _MaskedAdapter(nn.Module):
    """A mixin for PEFT's adapters, which multiplies ``B @ A`` by the mask of the layer, if it has one."""

    base_layer: Any
    lora_A: Any
    lora_B: Any
    lora_bias: dict[str, bool]
    lora_dropout: Any
    scaling: dict[str, float]
    merged_adapters: list[str]
    merged: bool
    disable_adapters: bool
    active_adapters: list[str]
    get_base_layer: Callable[[], Any]
    _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]

    @property
    def lora_variants(self) -> dict[Any, Any]:
        return {(): None}  # plain LoRA alone, so that PEFT rejects all variants

    def _get_in_out_features(self, module: nn.Module) -> Any:
        if isinstance(module, CompressedLinear):
            return module.in_features, module.out_features
        return super()._get_in_out_features(module)  # type: ignore[misc]

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **arguments: Any) -> None:
        if config.init_lora_weights not in INITIAL:
            raise ValueError(
                f"init_lora_weights must be one of {INITIAL} beside a pruned layer, whose weight others change, "
                f"got {config.init_lora_weights!r}"
            )
        super().update_layer(adapter_name, r, lora_alpha, config=config, **arguments)  # type: ignore[misc]
        base = self.get_base_layer()
        if isinstance(base, Compressed):
            base.frozen = False  # PEFT freezes the parameters of all layers; only the adapter is trained

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Returns the matrix that merging adds to the weight of the layer, in the weight's shape."""
        delta: Tensor = super().get_delta_weight(adapter)  # type: ignore[misc]
        mask = kept_entries(self.get_base_layer())
        return delta if mask is None else delta.masked_fill(~mask, 0)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError("adapter_names is not supported beside pruned layers: set_adapter chooses one for all")
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(input, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                given = self._cast_input_dtype(input, self.lora_A[adapter].weight.dtype)
                if torch.is_grad_enabled():
                    # Computed again in the backward pass: the masked products of all layers would fill as much memory
                    # as a dense copy of the model.
                    result = result + checkpoint(self._product, given, adapter, use_reentrant=False)
                else:
                    result = result + self._product(given, adapter)
        return result.to(dtype)

    def _product(self, x: Tensor, adapter: str) -> Tensor:
        first, second = self.lora_A[adapter], self.lora_B[adapter]
        x = self.lora_dropout[adapter](x)
        if not is_sparse(self.get_base_layer()):
            return second(first(x)) * self.scaling[adapter]
        bias = second.bias * self.scaling[adapter] if self.lora_bias[adapter] else None
        return self._multiply(x, self.get_delta_weight(adapter), bias)

    def _multiply(self, x: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for adapter in check_adapters_to_merge(self, adapter_names):  # type: ignore[arg-type]
            if adapter in self.lora_A:
                self._add(adapter, 1)
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        while self.merged_adapters:
            if self.merged_adapters[-1] in self.lora_A:
                self._add(self.merged_adapters[-1], -1)
            self.merged_adapters.pop()

    @torch.no_grad()
    def check_merge(self, name: str) -> None:
        """Raises the error that ``merge`` would raise, with the name of the layer, without merging."""
        weight = None
        try:
            for adapter in check_adapters_to_merge(self):  # type: ignore[arg-type]
                if adapter in self.lora_A:
                    weight = self._sum(adapter, 1, weight)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def _sum(self, adapter: str, sign: int, weight: Tensor | None = None) -> Tensor:
        """Returns the layer's weight, or the given one, with the adapter added or subtracted."""
        base = self.get_base_layer()
        if self.lora_bias[adapter] and base.bias is None:
            raise ValueError(f"the adapter {adapter!r} has a bias (lora_bias), and the layer has none to add it to")
        weight = dense_weight(base) if weight is None else weight
        with torch.autocast(weight.device.type, enabled=False):
            merged = weight + sign * self.get_delta_weight(adapter).to(weight.dtype)
        if not torch.isfinite(merged).all():
            raise ValueError(f"the adapter {adapter!r} makes a weight NaN or infinite: it was not merged")
        return merged

    @torch.inference_mode(False)
    @torch.no_grad()
    def _add(self, adapter: str, sign: int) -> None:
        """Adds the adapter to the layer, or subtracts it."""
        base, second, merged = self.get_base_layer(), self.lora_B[adapter], self._sum(adapter, sign)
        if isinstance(base, CompressedLinear):
            store_weight(base, merged)
        else:
            base.weight.copy_(merged)
        if self.lora_bias[adapter]:
            base.bias.add_(second.bias, alpha=sign * self.scaling[adapter])


class MaskedLoraLinear(_MaskedAdapter, lora.Linear):  # type: ignore[misc, unused-ignore]
    """A LoRA adapter of a linear layer, which keeps the layer's zeros."""

    def _multiply(self, x: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, oriented(delta, self.fan_in_fan_out), bias)


class MaskedLoraConv2d(_MaskedAdapter, lora.Conv2d):  # type: ignore[misc, unused-ignore]
    """A LoRA adapter of a convolution, which keeps the layer's zeros."""

    def _multiply(self, x: Tensor, delta: Tensor, bias: Tensor | None) -> Tensor:
        return self.get_base_layer()._conv_forward(x, delta, bias)


MASKED: dict[type[BaseTunerLayer], type[_MaskedAdapter]] = {
    lora.Linear: MaskedLoraLinear,
    lora.Conv2d: MaskedLoraConv2d,
}


def _adapter(target: nn.Module, adapter_name: str, *, config: LoraConfig, **arguments: Any) -> _MaskedAdapter:
    """Makes the adapter of a pruned or compressed layer for PEFT."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    is_layer = isinstance(base, Compressed) or input_dim(base) is not None
    if not is_layer or arguments.get("parameter_name") is not None:
        raise ValueError(
            f"{arguments.get('target_name') or type(base).__name__} has a stored mask, and an adapter beside it would "
            "fill the zeros: only Linear, Conv2d and Conv1D layers keep them"
        )
    if isinstance(base, CompressedConv2d):
        raise ValueError(
            f"{arguments.get('target_name') or type(base).__name__} is a compressed convolution, which has no "
            "adapter: call sparsekit.decompress_(model) first"
        )
    if isinstance(base, nn.Conv2d):
        return MaskedLoraConv2d(target, adapter_name, config=config, **arguments)
    adapter = MaskedLoraLinear(target, adapter_name, config=config, **arguments)
    adapter.fan_in_fan_out = base.transposed if isinstance(base, Compressed) else input_dim(base) == 0
    return adapter
