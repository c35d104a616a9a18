"""Reads and writes nf4 weights under the names of bitsandbytes, which transformers loads with it.

A weight ``NAME.weight`` is uint8 ``[rows * cols / 2, 1]``; ``NAME.weight.absmax`` has its scales,
``NAME.weight.quant_map`` the 16 levels, and ``NAME.weight.quant_state.bitsandbytes__nf4`` the rest as JSON in bytes.
With double quantization the scales are bytes too, with levels and scales of their own
(https://github.com/bitsandbytes-foundation/bitsandbytes).
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._json import parse_json
from ..nn import Compressed, Nf4Linear
from ..ops._define import DTYPES
from ..ops.nf4 import quantized_rightly
from ..ops.quant24 import NF4_LEVELS
from .fields import field
from .structure import LayerRecord, join

STATE = "weight.quant_state.bitsandbytes__"
NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def to_bitsandbytes(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors of a file, and the ``quantization_config`` of the folder that it is in.

    Raises:
        ValueError: a compressed layer is not nf4, stands for a layer that bitsandbytes does not have, or would be
            computed wrongly by it.
    """
    tensors, left, quantized = dict(state), list[str](), list[str]()
    block = dtype = None
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Nf4Linear):
            _check(name, module)
            block, dtype = module.block, module.dtype
            tensors |= _parts(name, module)
            quantized.append(name)
            del tensors[join(name, "codes")], tensors[join(name, "absmax")]
        elif isinstance(module, Compressed):
            kind = type(module).__name__
            raise ValueError(f"layer {name!r} is a {kind}, and bitsandbytes has nf4 layers alone")
        elif isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            left.append(name)
    if block is None or dtype is None:
        raise ValueError("the model has no nf4 layer: call sparsekit.quantize_ first")
    return tensors, {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": [_pattern(name, quantized) for name in left],
    }


def _pattern(name: str, quantized: list[str]) -> str:
    """Returns the entry for a dense layer in the list of those that transformers leaves alone.

    An entry also matches the ends of names, and what is below a module, so a name that would match a quantized layer is
    written as a regular expression, which matches nothing else.
    """
    matches = any(other.endswith(name) or other.startswith(f"{name}.") for other in quantized)
    return f"^{re.escape(name)}$" if matches else name


def _check(name: str, layer: Nf4Linear) -> None:
    if layer.transposed:
        raise ValueError(f"layer {name!r} stands for a Conv1D, which bitsandbytes stores in another order")
    if not quantized_rightly(layer.out_features, layer.in_features, layer.block):
        raise ValueError(
            f"layer {name!r} has {layer.out_features} outputs, {layer.in_features} inputs and blocks of {layer.block}, "
            "and bitsandbytes on a CPU computes only multiples of 32 outputs and of 64 inputs with blocks of 64 "
            "rightly: quantize with where=sparsekit.quant.fits_bitsandbytes"
        )


def _parts(name: str, layer: Nf4Linear) -> dict[str, Tensor]:
    about = {
        "quant_type": "nf4",
        "blocksize": layer.block,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "shape": [layer.out_features, layer.in_features],
    }
    return {
        join(name, "weight"): layer.codes[:, None],
        join(name, "weight.absmax"): layer.absmax,
        join(name, "weight.quant_map"): torch.tensor(NF4_LEVELS, dtype=torch.float32),
        join(name, f"{STATE}nf4"): torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8),
    }


def holds_bitsandbytes(tensors: Mapping[str, Tensor]) -> bool:
    """Returns whether some of these tensors describe weights of bitsandbytes."""
    return any(STATE in name for name in tensors)


def from_bitsandbytes(tensors: dict[str, Tensor]) -> dict[str, LayerRecord]:
    """Renames the tensors in place to those of ``Nf4Linear``, and returns its layers.

    Scales with double quantization become float32, with the same values.

    Raises:
        ValueError: a weight is not nf4, or its parts do not belong together.
    """
    layers = {}
    for key in [name for name in tensors if STATE in name]:
        prefix, kind = key.split(STATE)
        name = prefix.removesuffix(".")
        parts = {each.removeprefix(f"{prefix}weight"): each for each in tensors if each.startswith(f"{prefix}weight")}
        own = {part.removeprefix("."): tensors.pop(each) for part, each in parts.items()}
        try:
            if kind != "nf4":
                raise ValueError(f"its type is {kind!r}, and only nf4 is read")
            codes, absmax, about = _read(own, own[key.removeprefix(f"{prefix}weight.")])
            rounding = {"quant_type": "nf4", "group": about["blocksize"], "dtype": about["dtype"], "inputs": "float"}
            entry = {"kind": "nf4", "shape": about["shape"], "transposed": False, "tokens": 1, "rounding": rounding}
            layers[name] = LayerRecord.parse(name, entry)
        except (KeyError, IndexError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"the weight {name!r} is none of bitsandbytes: {error}") from error
        tensors[join(name, "codes")], tensors[join(name, "absmax")] = codes, absmax
    return layers


def _read(own: Mapping[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    about: dict[str, Any] = parse_json(bytes(state.tolist()).decode())
    if own["quant_map"].tolist() != torch.tensor(NF4_LEVELS, dtype=torch.float32).tolist():
        raise ValueError("its 16 levels are not those of nf4")
    absmax = own["absmax"]
    if "nested_absmax" in own:
        size = field("its state", about, "nested_blocksize", int)
        levels = own["nested_quant_map"].index_select(0, absmax.flatten().int())
        scales = own["nested_absmax"].repeat_interleave(size)[: len(levels)]
        absmax = levels * scales + field("its state", about, "nested_offset", float)
    if absmax.dtype != torch.float32:
        raise ValueError(
            f"its scales are {absmax.dtype}, as bitsandbytes writes them after a pass on some CPUs, in another order: "
            "save the model again before it has run"
        )
    return own[""].view(torch.uint8).flatten(), absmax, about
