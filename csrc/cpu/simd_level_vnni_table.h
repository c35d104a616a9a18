// A SIMD level that is another one, SPARSEKIT_BASE, with vpdpbusd: linear24q_int8 alone is compiled again. Included after
// the target region, since this table is filled when the library is loaded, whatever the processor.
namespace sparsekit {

const Kernels SPARSEKIT_JOIN(kernels_, SPARSEKIT_LEVEL) = [] {
  Kernels level = SPARSEKIT_JOIN(kernels_, SPARSEKIT_BASE);  // a constant, so it is there before any initialization
  level.simd_level = SPARSEKIT_TEXT(SPARSEKIT_LEVEL);
  level.features = SPARSEKIT_FEATURES;
  level.linear24q_int8 = SPARSEKIT_LEVEL::linear24q_int8;
  return level;
}();

}  // namespace sparsekit
