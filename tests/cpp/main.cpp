// Runs every kernel at every level that this machine has. SPARSEKIT_EMULATE: AVX-512 and VNNI through SIMDe instead of
// the instructions.
#include "../../csrc/cpu/cpu_features.h"
#include "check.h"

namespace check {

std::vector<const Kernels*> levels(bool vnni) {
  std::vector<const Kernels*> found{&sparsekit::kernels_scalar};
#if defined(__x86_64__)
  const auto add = [&](const Kernels& level, bool emulated) {
    if (emulated || sparsekit::has_all(level.features, sparsekit::has_feature)) found.push_back(&level);
  };
#if defined(SPARSEKIT_EMULATE)
  constexpr bool kEmulated = true;
#else
  constexpr bool kEmulated = false;
#endif
  add(sparsekit::kernels_avx2, false);
  if (vnni) add(sparsekit::kernels_avx2_vnni, kEmulated);
  add(sparsekit::kernels_avx512, kEmulated);
  if (vnni) add(sparsekit::kernels_avx512_vnni, kEmulated);
  add(sparsekit::kernels_avx512_bf16, kEmulated);
#elif defined(__aarch64__)
  found.push_back(&sparsekit::kernels_neon);
#endif
  return found;
}

}  // namespace check

int main() {
  std::printf("levels:");
  for (const auto* level : check::levels(true)) std::printf(" %s", level->simd_level);
  std::printf("\n");
  for (const auto& [name, test] : check::tests()) {
    const int before = check::failures;
    test();
    std::printf("%s: %s\n", name.c_str(), check::failures == before ? "ok" : "FAILED");
    std::fflush(stdout);
  }
  return check::failures != 0 || check::tests().empty();
}
