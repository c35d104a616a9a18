// The forms of a block, numbered as in a tier map.
#pragma once

#include "simd_level_headers.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

enum Tier : uint8_t { kDense, kSparse24, kTopk, kTiers };

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
