"""The ops: plain functions on tensors, the same result on every device."""

from ._kernels import SlowKernelsWarning as SlowKernelsWarning
from ._kernels import backends as backends
from ._kernels import force_simd as force_simd
from ._kernels import register_kernels as _register_kernels
from ._kernels import simd_level as simd_level
from ._kernels import simd_levels as simd_levels
from .bits import pack_bits as pack_bits
from .bits import unpack_bits as unpack_bits
from .blocks import block_scores as block_scores
from .blocks import block_topk_mask as block_topk_mask
from .hardware24 import from_hardware24 as from_hardware24
from .hardware24 import hardware_multiple as hardware_multiple
from .hardware24 import prune_to_hardware24 as prune_to_hardware24
from .hardware24 import to_hardware24 as to_hardware24
from .hardware24_both import prune_both_to_hardware24 as prune_both_to_hardware24
from .hardware_linear24 import hardware_linear24 as hardware_linear24
from .layouts import hardware_layouts as hardware_layouts
from .layouts import pack_hardware24 as pack_hardware24
from .linear24 import linear24 as linear24
from .linear_tiered import linear_tiered as linear_tiered
from .nm import nm_mask as nm_mask
from .nm import nm_mask_bits as nm_mask_bits
from .nm import nm_prune as nm_prune
from .nm import nm_prune_ as nm_prune_
from .sparse24 import Packed24 as Packed24
from .sparse24 import pack24 as pack24
from .sparse24 import prune_pack24 as prune_pack24
from .sparsegpt import sparsegpt_columns as sparsegpt_columns
from .tier_scores import tier_scores as tier_scores
from .tiered import TieredWeight as TieredWeight
from .tiered import pack_tiered as pack_tiered
from .tiers import tier_prune as tier_prune
from .transposable import transposable_mask24 as transposable_mask24

_register_kernels()
