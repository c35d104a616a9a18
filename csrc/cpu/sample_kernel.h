// Random N:M masks, drawn from logits, and the step of their logits, with one group in each lane.
// sparsekit/ops/sample.py defines every sum and its order.
#pragma once

#include "counter_random.h"
#include "elements.h"
#include "lanes.h"

namespace sparsekit::SPARSEKIT_LEVEL {
namespace {

constexpr int kMaxM = 32;

// As many groups as there are lanes. M is the size of a group, or 0 if it is known at run time only.
template <int M>
struct SampleGroups {
  template <class T>
  using Entries = T[M ? M : kMaxM];

  Entries<DrawnFloats> logits;
  Entries<DrawnInts> kept;  // -1 or 0, as comparisons give it
  uint64_t first;           // the number of the first group in the tensor
  int size;                 // of a group

  int m() const { return M ? M : size; }

  // Calls body(i, words) with the random words of entry i of all groups.
  template <class Body>
  void with_words(uint64_t seed, uint64_t offset, Body body) const {
    const int counters = (m() + 3) / 4;
    DrawnWords words[4];
    for (int block = 0; block < counters; ++block) {
      random_words(first * counters + block, counters, seed, offset, words);
      for (int i = 4 * block; i < std::min(4 * block + 4, m()); ++i) body(i, words[i % 4]);
    }
  }

  void noisy(uint64_t seed, uint64_t offset, Entries<DrawnFloats>& keys) const {
    with_words(seed, offset, [&](int i, DrawnWords words) {
      const DrawnFloats key = logits[i] + exact_gumbel(words);
      keys[i] = key == key ? key : DrawnFloats{} - std::numeric_limits<float>::infinity();
    });
  }

  // How many of the entries that `counted` marks rank before each entry.
  void rank(const Entries<DrawnFloats>& keys, const Entries<DrawnInts>& counted, Entries<DrawnInts>& before) const {
    for (int i = 0; i < m(); ++i) before[i] = DrawnInts{};
    for (int i = 0; i < m(); ++i)
      for (int j = i + 1; j < m(); ++j) {
        const DrawnInts later = keys[j] > keys[i];
        before[i] -= later & counted[j];
        before[j] -= ~later & counted[i];
      }
  }

  void draw(int n, uint64_t seed, uint64_t offset) {
    Entries<DrawnFloats> keys;
    Entries<DrawnInts> all, before;
    for (int i = 0; i < m(); ++i) all[i] = DrawnInts{} - 1;
    noisy(seed, offset, keys);
    rank(keys, all, before);
    for (int i = 0; i < m(); ++i) kept[i] = before[i] < n;
  }

  void weigh(Entries<DrawnFloats>& weights) const {
    DrawnFloats largest = DrawnFloats{} + std::numeric_limits<float>::lowest();
    for (int i = 0; i < m(); ++i)  // a NaN is the largest
      largest = (largest >= logits[i]) | (largest != largest) ? largest : logits[i];
    for (int i = 0; i < m(); ++i) {
      const DrawnFloats below = logits[i] - largest;
      weights[i] = exact_exp(below >= -28.0f ? below : DrawnFloats{} - 28.0f);
    }
  }

  // Sums each group from its first entry to its last, without entry `left_out`.
  DrawnFloats sum(const Entries<DrawnFloats>& parts, int left_out = -1) const {
    DrawnFloats total = left_out == 0 ? DrawnFloats{} : parts[0];
    for (int i = 1; i < m(); ++i)
      if (i != left_out) total += parts[i];
    return total;
  }

  void shares_of_two(const Entries<DrawnFloats>& weights, Entries<DrawnFloats>& shares) const {
    Entries<DrawnFloats> rest, of_kept, after;
    for (int i = 0; i < m(); ++i) {
      rest[i] = sum(weights, i);
      of_kept[i] = kept[i] ? rest[i] : DrawnFloats{};
    }
    const DrawnFloats both = sum(of_kept), first = 1.0f / sum(weights);
    for (int i = 0; i < m(); ++i) after[i] = kept[i] ? sum(of_kept, i) / (both * rest[i]) : DrawnFloats{};
    for (int k = 0; k < m(); ++k) {
      shares[k] = first;
      for (int i = 0; i < m(); ++i)
        if (i != k) shares[k] += after[i];
    }
  }

  void shares_in_order(const Entries<DrawnFloats>& weights, Entries<DrawnFloats>& shares, int n, uint64_t seed,
                       uint64_t offset) const {
    Entries<DrawnFloats> keys, left;
    Entries<DrawnInts> before;
    noisy(seed, offset, keys);
    rank(keys, kept, before);
    for (int k = 0; k < m(); ++k) {
      left[k] = weights[k];
      shares[k] = DrawnFloats{};
    }
    for (int turn = 0; turn < n; ++turn) {
      const DrawnFloats share = 1.0f / sum(left);
      for (int k = 0; k < m(); ++k) {
        const DrawnInts drawn = kept[k] & (before[k] <= turn);
        shares[k] += kept[k] & (before[k] < turn) ? DrawnFloats{} : share;
        left[k] = drawn ? DrawnFloats{} : weights[k];
      }
    }
  }

  void step(float size, int n, uint64_t seed, uint64_t offset) {
    Entries<DrawnFloats> weights, shares;
    weigh(weights);
    if (n == 2)
      shares_of_two(weights, shares);
    else
      shares_in_order(weights, shares, n, seed, offset);
    for (int i = 0; i < m(); ++i) {
      const DrawnFloats one = kept[i] ? DrawnFloats{} + 1.0f : DrawnFloats{};
      logits[i] -= size * (one - weights[i] * shares[i]);
    }
  }

  // Rounds to bfloat16, up with the probability of what is cut off.
  void round_at_random(uint64_t seed, uint64_t offset) {
    with_words(seed, offset ^ uint64_t{1} << 63, [&](int i, DrawnWords words) {
      const DrawnWords bits = DrawnWords(logits[i]), most = DrawnWords{} + 0x7F800000;
      logits[i] = DrawnFloats(((bits & most) == most ? bits : bits + (words & 0xFFFF)) & 0xFFFF0000);
    });
  }
};

// Whole groups one after the other, at most as many as there are lanes.
template <int M, class T>
void sample_groups(const SampleArgs& a, SampleGroups<M>& groups, T* logits, bool* kept) {
  const int m = groups.m();
  for (int i = 0; i < m; ++i)
    for (int lane = 0; lane < kDrawn; ++lane) groups.logits[i][lane] = to_float(logits[lane * m + i]);
  if (a.drawn) {
    for (int i = 0; i < m; ++i)
      for (int lane = 0; lane < kDrawn; ++lane) groups.kept[i][lane] = -int32_t{kept[lane * m + i]};
    groups.step(a.step, a.n, a.seed, a.offset - 1);
    if constexpr (sizeof(T) == 2) groups.round_at_random(a.seed, a.offset);
    for (int lane = 0; lane < kDrawn; ++lane)
      for (int i = 0; i < m; ++i) logits[lane * m + i] = from_float<T>(groups.logits[i][lane]);
  }
  groups.draw(a.n, a.seed, a.offset);
  for (int lane = 0; lane < kDrawn; ++lane)
    for (int i = 0; i < m; ++i) kept[lane * m + i] = groups.kept[i][lane] != 0;
}

template <int M, class T>
void sample_piece(const SampleArgs& a, int64_t row, int64_t begin, int64_t end) {
  const int64_t m = a.m, full = std::max(begin, std::min(end, a.cols / m * m)), bytes = row * ((a.cols + 7) / 8) + begin / 8;
  T* logits = static_cast<T*>(a.logits) + row * a.stride;
  bool kept[kSampleWidth];
  if (a.drawn)
    for (int64_t i = 0; i < full - begin; ++i) kept[i] = a.drawn[bytes + i / 8] >> i % 8 & 1;
  SampleGroups<M> groups;
  groups.size = a.m;
  groups.first = row * (a.cols / m) + begin / m;
  int64_t col = begin;
  for (; col + kDrawn * m <= full; col += kDrawn * m, groups.first += kDrawn)
    sample_groups<M>(a, groups, logits + col, kept + (col - begin));
  if (col < full) {  // fewer groups than lanes
    T few[kDrawn * kMaxM] = {};
    bool few_kept[kDrawn * kMaxM] = {};
    std::copy(logits + col, logits + full, few);
    std::copy(kept + (col - begin), kept + (full - begin), few_kept);
    sample_groups<M>(a, groups, few, few_kept);
    if (a.drawn) std::copy_n(few, full - col, logits + col);
    std::copy_n(few_kept, full - col, kept + (col - begin));
  }
  std::fill(kept + (full - begin), kept + (end - begin), true);  // the tail
  pack_bits(kept, a.bits + bytes, end - begin);
}

void sample(const SampleArgs& a, int64_t begin, int64_t end) {
  const int64_t pieces = (a.cols + a.width - 1) / a.width;
  for (int64_t piece = begin; piece < end; ++piece) {
    const int64_t row = piece / pieces, start = piece % pieces * a.width, stop = std::min(start + a.width, a.cols);
    const auto run = [&]<class T>(T*) {
      if (a.m == 4)
        sample_piece<4, T>(a, row, start, stop);
      else
        sample_piece<0, T>(a, row, start, stop);
    };
    if (a.dtype == DType::F32)
      run(static_cast<float*>(nullptr));
    else
      run(static_cast<BF16*>(nullptr));
  }
}

}  // namespace
}  // namespace sparsekit::SPARSEKIT_LEVEL
