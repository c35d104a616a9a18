"""The ops: plain functions on tensors, the same result on every device."""

from ._kernels import SlowKernelsWarning, backends, force_simd, simd_level, simd_levels
from ._kernels import register_kernels as _register_kernels
from .arranged24 import Arranged24, arrange24, arranged_linear24
from .arranged_conv24 import ArrangedConv24, arrange_conv24, arranged_conv2d24
from .bits import pack_bits, unpack_bits
from .blocks import block_scores, block_topk_mask
from .conv24 import PackedConv24, conv2d24, pack_conv24
from .hardware24 import from_hardware24, hardware_multiple, prune_to_hardware24, to_hardware24
from .hardware24_both import prune_both_to_hardware24
from .hardware_linear24 import hardware_linear24
from .layouts import hardware_layouts, pack_hardware24
from .linear24 import linear24
from .linear24q import linear24q
from .linear24q_int8 import linear24q_int8
from .linear_tiered import linear_tiered
from .masked import masked_weight
from .nf4 import Nf4Weight, linear_nf4, quantize_nf4
from .nm import nm_mask, nm_mask_bits, nm_prune, nm_prune_
from .quant24 import QuantizedWeight24, quantize24
from .sample import nm_policy_step_, nm_sample
from .sparse24 import Packed24, pack24, prune_pack24
from .sparsegpt import sparsegpt_columns
from .tier_scores import tier_scores
from .tiered import TieredWeight, pack_tiered
from .tiers import tier_prune
from .tiled24 import TiledWeight24, tile24
from .transposable import transposable_mask24

__all__ = [
    "Arranged24",
    "ArrangedConv24",
    "Nf4Weight",
    "Packed24",
    "PackedConv24",
    "QuantizedWeight24",
    "SlowKernelsWarning",
    "TieredWeight",
    "TiledWeight24",
    "arrange24",
    "arrange_conv24",
    "arranged_conv2d24",
    "arranged_linear24",
    "backends",
    "block_scores",
    "block_topk_mask",
    "conv2d24",
    "force_simd",
    "from_hardware24",
    "hardware_layouts",
    "hardware_linear24",
    "hardware_multiple",
    "linear24",
    "linear24q",
    "linear24q_int8",
    "linear_nf4",
    "linear_tiered",
    "masked_weight",
    "nm_mask",
    "nm_mask_bits",
    "nm_policy_step_",
    "nm_prune",
    "nm_prune_",
    "nm_sample",
    "pack24",
    "pack_bits",
    "pack_conv24",
    "pack_hardware24",
    "pack_tiered",
    "prune_both_to_hardware24",
    "prune_pack24",
    "prune_to_hardware24",
    "quantize24",
    "quantize_nf4",
    "simd_level",
    "simd_levels",
    "sparsegpt_columns",
    "tier_prune",
    "tier_scores",
    "tile24",
    "to_hardware24",
    "transposable_mask24",
    "unpack_bits",
]

_register_kernels()
