"""The linear layer on the packed tiered format."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..masks import get_mask, tier_sizes
from ..ops import TieredWeight, linear_tiered, pack_tiered
from ..ops._define import is_jit_tracing
from ..ops._kernels import call_kernel
from ..ops.tiered import block_starts, check_packed, unpack_blocks
from .common import autocast_dtype, carry_mask, oriented
from .compressed_linear import CompressedLinear, weight_of

LINEAR_TIERED = torch.ops.sparsekit.linear_tiered.default
TRAINED, FIXED = ("dense", "values", "topk"), ("tiers", "bitmask", "positions")
PARTS = (*TRAINED, *FIXED, "starts")
Layer = TypeVar("Layer", bound="TieredLinear")


class TieredLinear(CompressedLinear):
    """A linear layer whose weight is stored and multiplied in blocks that are dense, 2:4 or top-k.

    It stores the tensors of a ``TieredWeight``: the Parameters ``dense``, ``values`` and ``topk``, which gradients
    reach; the buffers ``tiers``, ``bitmask`` and ``positions``; and ``starts``, which is computed from ``tiers``. The
    state dict has ``bias`` and all of these but ``starts``; one with other numbers of blocks cannot be loaded. Under
    autocast the layer computes in the dtype in which ``F.linear`` would.

    Args:
        packed: the weight, as ``pack_tiered`` or ``TieredWeight.from_parts`` returns it.
        bias: the bias Parameter, which becomes the layer's without a copy, or None.
        transposed: whether ``.weight`` is ``[in_features, out_features]``, as in ``Linear24``.
        requires_grad: whether the weight is trained.

    Raises:
        TypeError: ``packed`` is not a ``TieredWeight``, or has wrong dtypes.
        ValueError: its shapes do not belong together.
    """

    dense: nn.Parameter
    values: nn.Parameter
    topk: nn.Parameter
    tiers: Tensor
    bitmask: Tensor
    positions: Tensor
    starts: Tensor

    def __init__(
        self,
        packed: TieredWeight,
        bias: nn.Parameter | None = None,
        *,
        transposed: bool = False,
        requires_grad: bool = True,
    ):
        super().__init__()
        check_packed(packed)
        self.out_features, self.in_features = packed.shape
        self.transposed = transposed
        for name in TRAINED:
            self.register_parameter(name, nn.Parameter(getattr(packed, name), requires_grad=requires_grad))
        for name in FIXED:
            self.register_buffer(name, getattr(packed, name))
        self.register_buffer("starts", packed.starts, persistent=False)
        self.register_parameter("bias", bias)

    @classmethod
    @torch.inference_mode(False)  # tensors made in inference mode could be neither trained nor used outside it
    def from_linear(
        cls: type[Layer],
        linear: nn.Linear,
        *,
        k: int | None = None,
        block: tuple[int, int] | None = None,
        transposed: bool = False,
    ) -> Layer:
        """Packs a layer with any weight: each block in the smallest form that holds it.

        It packs the entries that the stored mask keeps, or without one, the non-zeros. The bias is the layer's own
        Parameter, not a copy, and so is the stored mask.

        Args:
            linear: ``nn.Linear``, or a layer with its ``weight`` and ``bias``.
            k: the most entries of a top-k block. None takes it from the stored mask's pattern, or 10 if that has no
                tiers.
            block: rows and columns of a block. None takes them from the pattern, or 16x16 if that has no tiers.
            transposed: whether ``linear.weight`` is ``[in_features, out_features]``; blocks are of its transpose.

        Raises:
            TypeError: the weight is not float32, float16 or bfloat16, or ``linear`` is not a linear layer.
            ValueError: ``pack_tiered`` does not allow such a block or ``k``.
        """
        (weight, trained), mask = weight_of(linear, transposed), get_mask(linear)
        found_block, found_k = tier_sizes(linear)
        packed = pack_tiered(
            weight,
            None if mask is None else oriented(mask, transposed),
            k=found_k if k is None else k,
            block=found_block if block is None else block,
        )
        layer = cls(packed, linear.bias, transposed=transposed, requires_grad=trained)
        carry_mask(linear, layer)
        return layer.train(linear.training)

    @property
    def packed(self) -> TieredWeight:
        """The weight as ``pack_tiered`` returns it, made of the layer's own tensors."""
        return self._pack(*self._parts())

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        return self.packed.block

    @property
    def k(self) -> int:
        """The most entries of a top-k block."""
        return self.topk.shape[1]

    @property
    def trainable(self) -> bool:
        return self.dense.requires_grad

    def _parts(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in PARTS)

    def _unpack(self, *parts: Tensor) -> Tensor:
        return unpack_blocks(self._pack(*parts))

    def _pack(self, *parts: Tensor) -> TieredWeight:
        tensors = dict(zip(PARTS, parts, strict=True))
        return TieredWeight(**tensors, shape=(self.out_features, self.in_features))

    def _multiply_directly(self, input: Tensor) -> Tensor | None:
        parameters, buffers = self._parameters, self._buffers
        return call_kernel(
            LINEAR_TIERED,
            input,
            buffers["tiers"],
            parameters["dense"],
            parameters["values"],
            buffers["bitmask"],
            parameters["topk"],
            buffers["positions"],
            buffers["starts"],
            parameters["bias"],
            self.out_features,
        )

    def _multiply(self, input: Tensor) -> Tensor:
        packed = self.packed
        bias: Tensor | None = self.bias
        if (dtype := autocast_dtype(input)) is not None:
            input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
            packed = packed._replace(**{name: getattr(packed, name).to(dtype) for name in TRAINED})
        if is_jit_tracing():
            return LINEAR_TIERED(input, *packed.tensors, bias, self.out_features)
        return linear_tiered(input, packed, bias)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        starts, assigned = block_starts(self.tiers), local_metadata.get("assign_to_params_buffers", False)
        if any(getattr(self, name).is_meta for name in (*TRAINED, *FIXED)):
            starts = starts.to("meta")  # so that forward rejects a layer that is only loaded in part
        if assigned or starts.device != self.starts.device:
            self.starts = starts
        else:
            self.starts.copy_(starts)  # in the same memory, which a captured CUDA graph reads

    def _check_state(self, given: dict[str, Tensor], assigned: bool) -> None:
        own = self.packed._asdict()
        given = {name: tensor for name, tensor in given.items() if name != "bias"}
        for name, tensor in given.items():
            if tensor.shape != own[name].shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, the layer's {tuple(own[name].shape)}, and only "
                    "sparsekit.load makes room for other blocks"
                )
        new = {name: own[name] for name in (*TRAINED, *FIXED)} | given
        if given and not any(tensor.is_meta for tensor in new.values()):
            device = next(iter(given.values())).device  # the layer's other tensors may be on a GPU already
            TieredWeight.from_parts(
                **{name: tensor.to(device) for name, tensor in new.items()}, shape=self.packed.shape
            )

    def extra_repr(self) -> str:
        packed = self.packed
        forms = zip(("dense", "2:4", "top-k"), (packed.dense, packed.values, packed.topk), strict=True)
        counts = " + ".join(f"{len(part)} {form}" for form, part in forms)
        return (
            f"{super().extra_repr()}, block={packed.block[0]}x{packed.block[1]}, k={self.k}, blocks={counts}, "
            f"bytes={packed.nbytes}"
        )
