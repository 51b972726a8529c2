// Two bfloat16 in 32 bits, which AVX512-BF16 multiplies with two others and adds to a float, in one instruction and at
// the speed of a float's multiply-add. It takes and gives subnormal numbers as zeros.
#pragma once
#include "half.h"

#if defined(__AVX512BF16__)

namespace {

struct pair {
    uint32_t raw;  // the first in the low half
};
template <>
struct Vector<pair> {
    typedef uint32_t type __attribute__((vector_size(NAT_VECTOR_BYTES)));
    typedef uint32_t loose __attribute__((vector_size(NAT_VECTOR_BYTES), aligned(4), may_alias));
    typedef type bits;
};

NAT_INLINE vec<pair> splat(pair x) { return (vec<pair>)_mm512_set1_epi32((int)x.raw); }
NAT_INLINE vec<float> multiply_add(vec<float> sum, vec<pair> a, vec<pair> b) {
    return (vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

// The first `count` bfloat16 as pairs, the rest zero; reads nothing beyond them.
NAT_INLINE vec<pair> load_pairs(const bfloat16* p, index_t count) {
    constexpr index_t kHalves = 2 * lanes<pair>;
    if (count >= kHalves) return (vec<pair>)_mm512_loadu_si512(p);
    return (vec<pair>)_mm512_maskz_loadu_epi16((__mmask32)((1u << count) - 1), p);
}

// Rounded to nearest even: the lanes of `first`, two in each pair, then those of `second`.
NAT_INLINE vec<pair> concatenate(vec<float> first, vec<float> second) {
    return (vec<pair>)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
// From there to the lanes of `first` in the low halves and those of `second` in the high ones.
NAT_INLINE vec<pair> zip_halves(vec<pair> concatenated) {
    vec<pair> order;
    for (index_t l = 0; l < lanes<pair>; ++l) order[l] = uint32_t(l) | uint32_t(l + lanes<pair>) << 16;
    return (vec<pair>)_mm512_permutexvar_epi16((__m512i)order, (__m512i)concatenated);
}
NAT_INLINE vec<pair> pack(vec<float> first, vec<float> second) { return zip_halves(concatenate(first, second)); }

template <index_t Start>
NAT_INLINE vec<pair> zip(vec<pair> a, vec<pair> b) {
    vec<pair> order;
    for (index_t l = 0; l < lanes<pair>; ++l) order[l] = uint32_t(Start + l) | uint32_t(Start + l + 32) << 16;
    return (vec<pair>)_mm512_permutex2var_epi16((__m512i)a, (__m512i)order, (__m512i)b);
}
// From two rows of 32 bfloat16, pairs of what stands in the same place: of places 0 to 15, and of 16 to 31.
NAT_INLINE vec<pair> zip_low(vec<pair> a, vec<pair> b) { return zip<0>(a, b); }
NAT_INLINE vec<pair> zip_high(vec<pair> a, vec<pair> b) { return zip<lanes<pair>>(a, b); }

// Lanes of two vectors of pairs, a half of each: of `a` the first half or the second, of `b` likewise.
NAT_INLINE vec<pair> pick(vec<pair> a, bool second_of_a, vec<pair> b, bool second_of_b) {
    const vec<pair> low = a >> (second_of_a ? 16 : 0), high = b << (second_of_b ? 0 : 16);
    return (low & 0xffff) | (high & 0xffff0000);
}

// sum + the two numbers of each lane.
NAT_INLINE vec<float> add_pairs(vec<float> sum, vec<pair> x) { return multiply_add(sum, x, splat(pair{0x3f803f80})); }

}  // namespace

#endif
