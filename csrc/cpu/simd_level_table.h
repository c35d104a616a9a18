// One SIMD level: all kernels, compiled for its target, and the table of them. The file that includes this defines
// SPARSEKIT_LEVEL (the name), SPARSEKIT_FEATURES (of the target), and one of SPARSEKIT_SCALAR, SPARSEKIT_NEON,
// SPARSEKIT_AVX2 and SPARSEKIT_AVX512 for the instructions that may be used, with AVX-512 also SPARSEKIT_AVX512_BF16 if
// there is BF16, and SPARSEKIT_VNNI if there is vpdpbusd.
#include "block_scores_kernel.h"
#include "block_topk_kernel.h"
#include "conv24_kernel.h"
#include "linear24_kernel.h"
#include "linear24q_int8_kernel.h"
#include "linear24q_kernel.h"
#include "linear_tiered_kernel.h"
#include "masked_kernel.h"
#include "nm_kernel.h"
#include "pack24_kernel.h"
#include "prune_pack24_kernel.h"
#include "quantize24_kernel.h"
#include "round_tokens_kernel.h"
#include "sample_kernel.h"
#include "sparsegpt_kernel.h"
#include "tier_prune_kernel.h"
#include "tier_scores_kernel.h"
#include "tile24_kernel.h"
#include "transposable_kernel.h"

namespace sparsekit {

extern constexpr Kernels SPARSEKIT_JOIN(kernels_, SPARSEKIT_LEVEL) = {
    .simd_level = SPARSEKIT_TEXT(SPARSEKIT_LEVEL),
    .features = SPARSEKIT_FEATURES,
    .nm = SPARSEKIT_LEVEL::nm,
    .sample = SPARSEKIT_LEVEL::sample,
    .masked = SPARSEKIT_LEVEL::masked,
    .block_scores = SPARSEKIT_LEVEL::block_scores,
    .block_topk = SPARSEKIT_LEVEL::block_topk,
    .tier_prune = SPARSEKIT_LEVEL::tier_prune,
    .tier_scores = SPARSEKIT_LEVEL::tier_scores,
    .transposable = SPARSEKIT_LEVEL::transposable,
    .pack24 = SPARSEKIT_LEVEL::pack24,
    .prune_pack24 = SPARSEKIT_LEVEL::prune_pack24,
    .unpack24 = SPARSEKIT_LEVEL::unpack24,
    .linear24 = SPARSEKIT_LEVEL::linear24,
    .linear24q = SPARSEKIT_LEVEL::linear24q,
    .linear24q_int8 = SPARSEKIT_LEVEL::linear24q_int8,
    .round_tokens = SPARSEKIT_LEVEL::round_tokens,
    .quantize24 = SPARSEKIT_LEVEL::quantize24,
    .tile24 = SPARSEKIT_LEVEL::tile24,
    .conv2d24 = SPARSEKIT_LEVEL::conv2d24,
    .linear_tiered = SPARSEKIT_LEVEL::linear_tiered,
    .sparsegpt = SPARSEKIT_LEVEL::sparsegpt,
};

}  // namespace sparsekit
