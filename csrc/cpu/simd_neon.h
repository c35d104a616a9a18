// Vectors of magnitude keys at NEON: 4 keys of 32 bits or 8 of 16, and which of them to keep as lanes of ones.
#pragma once

#include "elements.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

// Entries per step: one vector of mask bytes.
constexpr int kStep = 16;

struct Keys32 {
  static constexpr int kLanes = 4;
  int32x4_t lanes;
};
struct Keys16 {
  static constexpr int kLanes = 8;
  int16x8_t lanes;
};
struct Keep32 {
  uint32x4_t lanes;
};
struct Keep16 {
  uint16x8_t lanes;
};
struct Keep8 {
  uint8x16_t lanes;
};

inline int32x4_t load(const void* from) { return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(from))); }
inline uint8x16_t load_bytes(const void* from) { return vld1q_u8(static_cast<const uint8_t*>(from)); }

// There are no streaming stores.
inline void store(void* to, uint8x16_t lanes, bool) { vst1q_u8(static_cast<uint8_t*>(to), lanes); }
inline void store(void* to, int32x4_t lanes, bool) { store(to, vreinterpretq_u8_s32(lanes), false); }

inline float32x4_t load_floats(const float* from) { return vld1q_f32(from); }
inline float32x4_t load_floats(const F16* from) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(from))));
}
inline float32x4_t load_floats(const BF16* from) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(from)), 16));
}

inline Keys32 magnitude_keys(float32x4_t score) {
  const int32x4_t bits = vandq_s32(vreinterpretq_s32_f32(score), vdupq_n_s32(0x7fffffff));
  return {vminq_s32(bits, vdupq_n_s32(kNanKey<float>))};
}
inline Keys32 magnitude_keys(const float* score) { return magnitude_keys(load_floats(score)); }
template <class T>
Keys16 magnitude_keys(const T* score) {
  const int16x8_t bits = vandq_s16(vreinterpretq_s16_s32(load(score)), vdupq_n_s16(0x7fff));
  return {vminq_s16(bits, vdupq_n_s16(kNanKey<T>))};
}
template <class T>
Keys32 magnitude_keys(const T* weight, const float* scale) {
  return magnitude_keys(vmulq_f32(load_floats(weight), vld1q_f32(scale)));
}

// Lane i of a group of M takes lane (i + R) % M.
template <int M, int R>
Keys32 rotate(Keys32 key) {
  return {vextq_s32(key.lanes, key.lanes, R)};
}
template <int M, int R>
Keys16 rotate(Keys16 key) {
  const uint8x16_t bytes = vreinterpretq_u8_s16(key.lanes), from = load_bytes(rotation_bytes<16, R>.data());
  return {vreinterpretq_s16_u8(vqtbl1q_u8(bytes, from))};
}

// Subtracts one from the lanes that a rotation by R fills from a lower index of their group.
template <int M, int R>
Keys32 minus_wrapped(Keys32 key) {
  return {vsubq_s32(key.lanes, load(wrapped<int32_t, 4, M, R>.data()))};
}
template <int M, int R>
Keys16 minus_wrapped(Keys16 key) {
  return {vsubq_s16(key.lanes, vreinterpretq_s16_s32(load(wrapped<int16_t, 8, M, R>.data())))};
}

// Adds one to `count` where a > b.
inline Keys32 count_greater(Keys32 count, Keys32 a, Keys32 b) {
  return {vsubq_s32(count.lanes, vreinterpretq_s32_u32(vcgtq_s32(a.lanes, b.lanes)))};
}
inline Keys16 count_greater(Keys16 count, Keys16 a, Keys16 b) {
  return {vsubq_s16(count.lanes, vreinterpretq_s16_u16(vcgtq_s16(a.lanes, b.lanes)))};
}
inline Keep32 less(Keys32 count, int n) { return {vcltq_s32(count.lanes, vdupq_n_s32(n))}; }
inline Keep16 less(Keys16 count, int n) { return {vcltq_s16(count.lanes, vdupq_n_s16(static_cast<int16_t>(n)))}; }

// Joins two vectors of lanes to one whose lanes have half the width.
inline Keep16 join(Keep32 low, Keep32 high) { return {vcombine_u16(vmovn_u32(low.lanes), vmovn_u32(high.lanes))}; }
inline Keep8 join(Keep16 low, Keep16 high) { return {vcombine_u8(vmovn_u16(low.lanes), vmovn_u16(high.lanes))}; }

inline uint32_t bits_of(Keep8 keep) {
  const uint8x16_t bit = vandq_u8(keep.lanes, vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201)));
  return vaddv_u8(vget_low_u8(bit)) | static_cast<uint32_t>(vaddv_u8(vget_high_u8(bit))) << 8;
}
inline void store_mask(bool* to, Keep8 keep, bool) { store(to, vandq_u8(keep.lanes, vdupq_n_u8(1)), false); }
inline void store_kept(void* to, const void* from, Keep32 keep, bool) {
  store(to, vandq_u8(load_bytes(from), vreinterpretq_u8_u32(keep.lanes)), false);
}
inline void store_kept(void* to, const void* from, Keep16 keep, bool) {
  store(to, vandq_u8(load_bytes(from), vreinterpretq_u8_u16(keep.lanes)), false);
}

// The lanes to keep of the entries from i on, as many as a vector of T holds, from bits.
template <class T, int i>
auto keep_bits(uint64_t bits) {
  if constexpr (sizeof(T) == 4) {
    static constexpr uint32_t kBit[4] = {1, 2, 4, 8};
    return Keep32{vtstq_u32(vdupq_n_u32(static_cast<uint32_t>(bits >> i)), vld1q_u32(kBit))};
  } else {
    static constexpr uint16_t kBit[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    return Keep16{vtstq_u16(vdupq_n_u16(static_cast<uint16_t>(bits >> i)), vld1q_u16(kBit))};
  }
}

// Stores 64 bits as bytes.
inline void store_mask64(bool* to, uint64_t bits, bool) {
  const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
  for (int i = 0; i < 64; i += 16) {
    const uint8x16_t byte = vcombine_u8(vdup_n_u8(static_cast<uint8_t>(bits >> i)),
                                        vdup_n_u8(static_cast<uint8_t>(bits >> (i + 8))));
    store_mask(to + i, Keep8{vtstq_u8(byte, bit)}, false);
  }
}

// The magnitudes, times the scale.
template <bool kScaled, class T>
float32x4_t magnitudes(const T* weight, const float* scale) {
  const float32x4_t score = vabsq_f32(load_floats(weight));
  if constexpr (kScaled) return vmulq_f32(score, vld1q_f32(scale));
  return score;
}

// Adds the scores of the lanes to keep to `total`.
inline void add_kept(float32x4_t score, Keep32 keep, float* total) {
  score = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(score), keep.lanes));
  vst1q_f32(total, vaddq_f32(vld1q_f32(total), score));
}

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
