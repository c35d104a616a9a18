// Runs every kernel at every level that this machine has. SPARSEKIT_EMULATE: the AVX-512 levels through SIMDe instead
// of the instructions.
#include "check.h"

namespace check {

std::vector<const Kernels*> levels() {
  std::vector<const Kernels*> found{&sparsekit::kernels_plain};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    found.push_back(&sparsekit::kernels_avx2);
#if defined(SPARSEKIT_EMULATE)
  found.push_back(&sparsekit::kernels_avx512);
  found.push_back(&sparsekit::kernels_avx512_bf16);
#else
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    found.push_back(&sparsekit::kernels_avx512);
  if (__builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16"))
    found.push_back(&sparsekit::kernels_avx512_bf16);
#endif
#endif
  return found;
}

}  // namespace check

int main() {
  std::printf("levels:");
  for (const auto* level : check::levels()) std::printf(" %s", level->level);
  std::printf("\n");
  const std::pair<const char*, void (*)()> tests[] = {
      {"nm", test_nm},         {"pack24", test_pack24},           {"prune_pack24", test_prune_pack24},
      {"blocks", test_blocks}, {"tiers", test_tiers},             {"transposable", test_transposable},
      {"linear24", test_linear24}, {"tiered", test_tiered}, {"sparsegpt", test_sparsegpt}};
  for (const auto& [name, test] : tests) {
    const int before = check::failures;
    test();
    std::printf("%s: %s\n", name, check::failures == before ? "ok" : "FAILED");
    std::fflush(stdout);
  }
  return check::failures != 0;
}
