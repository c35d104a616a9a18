"""The structure of a checkpoint, which lists the layers that are compressed or pruned, and its form in JSON."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from .._json import parse_json
from ..masks import MaskInfo, check_masks, get_mask_bits, get_mask_info, masked_parameters
from ..nn import (
    ArrangedConv2d24,
    ArrangedLinear24,
    Conv2d24,
    Int8Linear,
    Linear24,
    Nf4Linear,
    PrepackedConv2d,
    PrepackedLinear,
    QuantizedLinear24,
    TieredLinear,
)
from ..nn.compressed import weight_shape
from ..nn.quantized24 import Inputs
from ..ops import Packed24, PackedConv24, QuantizedWeight24, TieredWeight
from ..ops._define import DTYPES
from ..ops.arranged24 import LAYOUTS, Layout
from ..ops.int8_linear import PackedInt8
from ..ops.nf4 import Nf4Weight
from ..ops.quant24 import check_kind
from .fields import MAX_COUNT, field, parse_images, parse_mask, parse_tiers

VERSION = 1
PARTS = {  # the tensors that are stored
    "linear24": ("values", "bitmask"),
    "conv24": ("values", "bitmask"),
    "tiered": ("tiers", "dense", "values", "bitmask", "topk", "positions"),
    "quantized24": ("values", "scales", "bitmask"),
    "int8": ("values", "scales"),
    "nf4": ("codes", "absmax"),
}
KINDS = (*PARTS, "prepacked", "prepacked_conv", "dense")
CONVOLUTIONS = ("conv24", "prepacked_conv")
LOSSY = ("quantized24", "int8", "nf4")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


@dataclass(frozen=True)
class Rounding:
    """How a lossy layer stores its weight, and rounds its inputs; an ``Int8Linear`` has only the dtype.

    The ``group`` of an ``Nf4Linear`` is its block.
    """

    dtype: torch.dtype
    quant_type: str = "int8"
    group: int = 64
    inputs: Inputs = "int8"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "dtype": str(self.dtype).removeprefix("torch.")}

    @staticmethod
    def parse(where: str, data: Any) -> "Rounding":
        data = field(where, data, "rounding", dict)
        dtype, inputs = (field(where, data, key, str) for key in ("dtype", "inputs"))
        quant_type: str = field(where, data, "quant_type", str)
        group: int = field(where, data, "group", int)
        try:
            check_kind(quant_type, group)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if dtype not in _DTYPES or inputs not in get_args(Inputs):
            raise ValueError(f"{where} has weights of {dtype!r} and inputs of {inputs!r}, which nothing stores")
        return Rounding(_DTYPES[dtype], quant_type, group, inputs)


@dataclass(frozen=True)
class LayerRecord:
    """The description of a layer that is compressed or pruned.

    The name of the layer is that of the module; if its parameter has another name than ``weight``, as in experts, it is
    the name of the parameter.
    """

    kind: str
    shape: tuple[int, ...]
    transposed: bool = False
    tokens: int = 1
    mask: MaskInfo | None = None
    block: tuple[int, int] = (0, 0)  # block and k of a tiered layer
    k: int = 0
    parameter: str = "weight"
    rounding: Rounding | None = None  # of a lossy layer
    layout: Layout | None = None  # of an arranged 2:4 layer; its tensors are those of one that is not arranged
    images: tuple[int, int, int] | None = None  # of a prepacked convolution

    @staticmethod
    def of(module: nn.Module) -> "LayerRecord | None":
        """Returns the record of a compressed module; None for any other module."""
        mask = get_mask_info(module)
        if isinstance(module, Linear24):
            layout = module.layout if isinstance(module, ArrangedLinear24) else None
            return LayerRecord("linear24", weight_shape(module), module.transposed, mask=mask, layout=layout)
        if isinstance(module, Conv2d24):
            layout = "row pairs" if isinstance(module, ArrangedConv2d24) else None
            return LayerRecord("conv24", weight_shape(module), mask=mask, layout=layout)
        if isinstance(module, PrepackedConv2d):
            return LayerRecord("prepacked_conv", weight_shape(module), mask=mask, images=module.images)
        if isinstance(module, TieredLinear):
            shape = weight_shape(module)
            return LayerRecord("tiered", shape, module.transposed, mask=mask, block=module.block, k=module.k)
        if isinstance(module, PrepackedLinear):
            return LayerRecord("prepacked", weight_shape(module), module.transposed, module.tokens, mask)
        if isinstance(module, QuantizedLinear24):
            rounding = Rounding(module.dtype, module.quant_type, module.group, module.inputs)
            return LayerRecord("quantized24", weight_shape(module), module.transposed, mask=mask, rounding=rounding)
        if isinstance(module, Nf4Linear):
            rounding = Rounding(module.dtype, "nf4", module.block, "float")
            return LayerRecord("nf4", weight_shape(module), module.transposed, mask=mask, rounding=rounding)
        if isinstance(module, Int8Linear):
            rounding = Rounding(module.dtype)
            return LayerRecord("int8", weight_shape(module), module.transposed, mask=mask, rounding=rounding)
        return None

    def module_name(self, name: str) -> str:
        """Returns the name of the module of a layer, given the name of the layer."""
        return name if self.parameter == "weight" else name.removesuffix(self.parameter).removesuffix(".")

    def weight_name(self, name: str) -> str:
        """Returns the name of the weight of a layer in a state dict."""
        return join(self.module_name(name), self.parameter)

    def mask_name(self, name: str) -> str:
        """Returns the name of the mask of a layer in a file."""
        return f"{self.weight_name(name)}_mask"

    @property
    def matrix(self) -> tuple[int, int]:
        """The rows and columns of a compressed layer's weight as ``[outputs, inputs]``."""
        rows, cols = self.shape
        return (cols, rows) if self.transposed else (rows, cols)

    @property
    def grid(self) -> tuple[int, int]:
        """The rows and columns of blocks of a tiered layer."""
        (rows, cols), (block_rows, block_cols) = self.matrix, self.block
        return -(-rows // block_rows), -(-cols // block_cols)

    def to_json(self) -> dict[str, Any]:
        mask = self.mask and {"pattern": str(self.mask.pattern), "axis": self.mask.axis}
        tiers = {"block": list(self.block), "k": self.k} if self.kind == "tiered" else {}
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "transposed": self.transposed,
            "tokens": self.tokens,
            "mask": mask,
            **({} if self.parameter == "weight" else {"parameter": self.parameter}),
            **tiers,
            **({"rounding": self.rounding.to_json()} if self.rounding else {}),
            **({"layout": self.layout} if self.layout else {}),
            **({"images": list(self.images)} if self.images else {}),
        }

    @staticmethod
    def parse(name: str, data: Any) -> "LayerRecord":
        where = f"layer {name!r}"
        kind = field(where, data, "kind", str)
        if kind not in KINDS:
            raise ValueError(f"{where} is {kind!r}, known are {', '.join(map(repr, KINDS))}")
        shape = tuple(field(where, data, "shape", list))
        parameter = field(where, data, "parameter", str) if "parameter" in data else "weight"
        if (
            not all(type(size) is int and size >= 0 for size in shape)
            or len(shape) < (2 if parameter == "weight" else 1)
            or (kind != "dense" and len(shape) != (4 if kind in CONVOLUTIONS else 2))
        ):
            raise ValueError(f"{where} has the shape {list(shape)}")
        tokens = field(where, data, "tokens", int)
        if not 0 < tokens <= MAX_COUNT:
            raise ValueError(f"{where} has {tokens} tokens, 1 to {MAX_COUNT} are allowed")
        mask = data.get("mask")
        info = None if mask is None else parse_mask(f"the mask of {where}", mask, shape)
        block, k = parse_tiers(where, data) if kind == "tiered" else ((0, 0), 0)
        if parameter != "weight" and (kind != "dense" or (name != parameter and not name.endswith(f".{parameter}"))):
            raise ValueError(f"{where} has the weight {parameter!r}, and is not dense and called like it")
        transposed = field(where, data, "transposed", bool)
        rounding = Rounding.parse(where, data) if kind in LOSSY else None
        layout: Any = field(where, data, "layout", str) if "layout" in data else None
        known = {"linear24": LAYOUTS, "conv24": ("row pairs",)}.get(kind, ())
        if layout is not None and layout not in known:
            allowed = " or ".join(map(repr, known)) or "none"
            raise ValueError(f"{where} is {kind!r} in the layout {layout!r}, allowed is {allowed}")
        images = parse_images(where, data) if kind == "prepacked_conv" else None
        return LayerRecord(kind, shape, transposed, tokens, info, block, k, parameter, rounding, layout, images)

    def convolution24(self, name: str, tensors: Mapping[str, Tensor]) -> PackedConv24:
        """Returns the packed weight of a 2:4 convolution."""
        values, bitmask = self.parts(name, tensors)
        outputs, inputs, height, width = self.shape
        return PackedConv24(values, bitmask, (outputs, inputs, height, width))

    def tiered(self, name: str, tensors: Mapping[str, Tensor]) -> TieredWeight:
        """Returns the packed weight of a tiered layer."""
        tiers, dense, values, bitmask, topk, positions = self.parts(name, tensors)
        return TieredWeight.from_parts(tiers, dense, values, bitmask, topk, positions, self.matrix)

    def quantized(self, name: str, tensors: Mapping[str, Tensor]) -> QuantizedWeight24:
        """Returns the packed weight of a quantized 2:4 layer."""
        assert self.rounding is not None
        values, scales, bitmask = self.parts(name, tensors)
        kind = self.rounding.quant_type, self.rounding.group, self.rounding.dtype
        return QuantizedWeight24(values, scales, bitmask, self.matrix, *kind)

    def nf4(self, name: str, tensors: Mapping[str, Tensor]) -> Nf4Weight:
        """Returns the packed weight of an nf4 layer."""
        assert self.rounding is not None
        codes, absmax = self.parts(name, tensors)
        return Nf4Weight(codes, absmax, self.matrix, self.rounding.group, self.rounding.dtype)

    def parts(self, name: str, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Returns the tensors in which a packed weight is stored."""
        return [tensors[join(name, part)] for part in PARTS[self.kind]]

    def densify(self, name: str, tensors: dict[str, Tensor]) -> "LayerRecord":
        """Replaces the packed tensors of the layer by its dense weight, and returns the record of the dense layer."""
        if self.kind == "linear24":
            values, bitmask = self.parts(name, tensors)
            weight = Packed24(values, bitmask, self.matrix).to_dense()
        elif self.kind == "conv24":
            weight = self.convolution24(name, tensors).to_dense()
        elif self.kind == "tiered":
            weight = self.tiered(name, tensors).to_dense()
        elif self.kind == "quantized24":
            weight = self.quantized(name, tensors).to_dense()
        elif self.kind == "nf4":
            weight = self.nf4(name, tensors).to_dense()
        elif self.rounding is not None:
            weight = PackedInt8(*self.parts(name, tensors)).to_dense().to(self.rounding.dtype)
        else:
            return LayerRecord("dense", self.shape, mask=self.mask, parameter=self.parameter)
        for part in PARTS[self.kind]:
            del tensors[join(name, part)]
        tensors[join(name, "weight")] = weight.t().contiguous() if self.transposed else weight
        return LayerRecord("dense", self.shape, mask=self.mask)


def collect_records(model: nn.Module) -> Iterator[tuple[str, LayerRecord, Tensor | None]]:
    """Yields every compressed or pruned layer of a model: its name, its record, and its bit-packed mask.

    Raises:
        ValueError: a mask does not fit its weight any more.
    """
    check_masks(model)
    for name, module in model.named_modules(remove_duplicate=False):
        if layer := LayerRecord.of(module):
            yield name, layer, get_mask_bits(module)
            continue
        for parameter in masked_parameters(module):
            shape = tuple(module.get_parameter(parameter).shape)
            layer = LayerRecord("dense", shape, mask=get_mask_info(module, parameter), parameter=parameter)
            yield name if parameter == "weight" else join(name, parameter), layer, get_mask_bits(module, parameter)


def dump_structure(layers: Mapping[str, LayerRecord], shared: Mapping[str, str]) -> str:
    """Returns the structure as JSON."""
    entries = {name: layer.to_json() for name, layer in layers.items()}
    return json.dumps({"version": VERSION, "layers": entries, "shared": shared})


def parse_structure(structure: str) -> tuple[dict[str, LayerRecord], dict[str, str]]:
    """Returns the layers of a structure by name, and for every other name of a shared tensor the name that is stored.

    Raises:
        ValueError: the text is not one that ``dump_structure`` wrote.
    """
    try:
        root = parse_json(structure)
    except ValueError as error:
        raise ValueError(f"its structure is not JSON ({error})") from error
    version = field("the structure", root, "version", int)
    if version != VERSION:
        raise ValueError(f"it has version {version} of the format, this sparsekit reads version {VERSION}")
    shared = field("the structure", root, "shared", dict)
    if not all(isinstance(name, str) for name in shared.values()):
        raise ValueError("'shared' must map names to names")
    layers = field("the structure", root, "layers", dict)
    return {name: LayerRecord.parse(name, data) for name, data in layers.items()}, shared


def parts_of(layer: LayerRecord) -> tuple[str, ...]:
    """Returns the names of the tensors in which a layer stores its weight."""
    return PARTS.get(layer.kind, ("weight",))


def join(layer: str, part: str) -> str:
    """Returns the name of a layer's tensor in the state dict."""
    return f"{layer}.{part}" if layer else part
