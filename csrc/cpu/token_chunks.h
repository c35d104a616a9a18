// How many tokens the kernels for few of them work on at once.
#pragma once

#include "level_headers.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

#if defined(SPARSEKIT_AVX512)
constexpr int kMaxTokens = 6;
#else
constexpr int kMaxTokens = 4;
#endif

// The tokens in chunks that differ by one at most and fit the registers.
struct TokenChunks {
  int64_t tokens, count;

  explicit TokenChunks(int64_t tokens) : tokens(tokens), count((tokens + kMaxTokens - 1) / kMaxTokens) {}
  int64_t begin(int64_t chunk) const { return tokens * chunk / count; }
  int64_t size(int64_t chunk) const { return begin(chunk + 1) - begin(chunk); }
  int64_t largest() const { return (tokens + count - 1) / count; }
};

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
