// Chooses the SIMD level at run time; a test can force one.
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "kernels.h"

namespace sparsekit {
namespace {

// The SIMD levels that this machine can run, the best last.
const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> levels = [] {
    std::vector<const Kernels*> found{&kernels_scalar};
#if defined(__x86_64__)
    for (const Kernels* table : {&kernels_avx2, &kernels_avx2_vnni, &kernels_avx512, &kernels_avx512_vnni,
                                 &kernels_avx512_bf16})
      if (has_all(table->features, has_feature)) found.push_back(table);
#elif defined(__aarch64__)
    found.push_back(&kernels_neon);
#endif
    return found;
  }();
  return levels;
}

std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> table{available().back()};
  return table;
}

std::string simd_levels() {
  std::string names;
  for (const Kernels* table : available()) names += (names.empty() ? "" : " ") + std::string(table->simd_level);
  return names;
}

// Forces the SIMD level of this name, unless it is empty; returns the name of the level in use.
std::string simd_level(std::string name) {
  if (!name.empty()) {
    const Kernels* wanted = nullptr;
    for (const Kernels* table : available())
      if (name == table->simd_level) wanted = table;
    if (!wanted) throw std::invalid_argument("no SIMD level " + name + " on this machine; it has " + simd_levels());
    active().store(wanted);
  }
  return active().load()->simd_level;
}

}  // namespace

const Kernels& kernels() { return *active().load(std::memory_order_relaxed); }

}  // namespace sparsekit

STABLE_TORCH_LIBRARY_FRAGMENT(sparsekit, m) {
  m.def("_simd_levels() -> str");
  m.def("_simd_level(str force) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(sparsekit, CompositeExplicitAutograd, m) {
  m.impl("_simd_levels", TORCH_BOX(&sparsekit::simd_levels));
  m.impl("_simd_level", TORCH_BOX(&sparsekit::simd_level));
}
