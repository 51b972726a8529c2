// What tensors hold: float, double, or a half-precision type that is widened on load and rounded to nearest even on
// store. Arithmetic never sees half precision.
#pragma once
#include "simd.h"

namespace {

struct bfloat16 {
    uint16_t raw;
};
struct float16 {
    uint16_t raw;
};
typedef uint16_t halves __attribute__((vector_size(NAT_VECTOR_BYTES / 2)));
typedef uint16_t loose_halves __attribute__((vector_size(NAT_VECTOR_BYTES / 2), aligned(2), may_alias));

// The type that a tensor's elements are computed with.
template <class E>
struct Compute {
    using type = float;
};
template <>
struct Compute<double> {
    using type = double;
};

NAT_INLINE bits<float> widen_halves(const void* p) {
#if defined(__AVX512F__)  // GCC 12 makes two halves of it
    return (bits<float>)_mm512_maskz_cvtepu16_epi32(kAllLanes, _mm256_loadu_si256((const __m256i*)p));
#else
    return __builtin_convertvector((halves) * (const loose_halves*)p, bits<float>);
#endif
}
NAT_INLINE void narrow_halves(void* p, bits<float> x) { *(loose_halves*)p = __builtin_convertvector(x, halves); }

NAT_INLINE vec<float> widen(const float* p) { return load(p); }
NAT_INLINE vec<double> widen(const double* p) { return load(p); }
NAT_INLINE vec<float> widen(const bfloat16* p) { return (vec<float>)(widen_halves(p) << 16); }
NAT_INLINE vec<float> widen(const float16* p) {
#if defined(__AVX512F__)
    return (vec<float>)_mm512_maskz_cvtph_ps(kAllLanes, _mm256_loadu_si256((const __m256i*)p));
#else
    const bits<float> h = widen_halves(p);
    const bits<float> magnitude = h & 0x7fff;
    // The product rescales the exponent and normalises subnormals; infinities and NaNs get theirs by hand.
    bits<float> x = (bits<float>)((vec<float>)(magnitude << 13) * 0x1p112f);
    x = magnitude >= 0x7c00 ? x | 0x7f800000 : x;
    return (vec<float>)(x | (h & 0x8000) << 16);
#endif
}

NAT_INLINE void narrow(float* p, vec<float> x) { store(p, x); }
NAT_INLINE void narrow(double* p, vec<double> x) { store(p, x); }
NAT_INLINE void narrow(bfloat16* p, vec<float> x) {
#if defined(__AVX512BF16__)  // subnormal numbers become zeros
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
    const bits<float> b = (bits<float>)x;
    const bits<float> rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
    narrow_halves(p, x != x ? (b >> 16 | 0x40) : rounded);
#endif
}
NAT_INLINE void narrow(float16* p, vec<float> x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i*)p,
                        _mm512_maskz_cvtps_ph(kAllLanes, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    const bits<float> b = (bits<float>)x, magnitude = b & 0x7fffffff, sign = b >> 16 & 0x8000;
    const bits<float> normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    // Adding 0.5 aligns a number below 2**-14 to float16's subnormal spacing, rounding in hardware.
    const bits<float> tiny = (bits<float>)((vec<float>)magnitude + 0.5f) - (126u << 23);
    bits<float> h = magnitude < (113u << 23) ? tiny : normal;
    h = magnitude >= 0x477ff000 ? bits<float>{} + 0x7c00 : h;  // 65520 and above round to infinity
    h = magnitude > 0x7f800000 ? bits<float>{} + 0x7e00 : h;
    narrow_halves(p, h | sign);
#endif
}

// The first `count` elements, the rest zero. Never reads past them: they may be the last of a tensor.
template <class E>
__attribute__((noinline)) vec<typename Compute<E>::type> widen_some(const E* p, index_t count) {
    E tail[lanes<typename Compute<E>::type>] = {};
    for (index_t i = 0; i < count; ++i) tail[i] = p[i];
    return widen(tail);
}

// Writes `count` tokens of `dim` elements, `step` apart in memory, from rows of `dim_padded` elements (whole vectors).
template <class E, class C>
void store_tokens(const C* from, index_t dim_padded, index_t count, index_t dim, index_t step, E* to) {
    constexpr index_t L = lanes<C>;
    const index_t whole = dim / L * L;
    for (index_t n = 0; n < count; ++n, from += dim_padded, to += step) {
        for (index_t i = 0; i < whole; i += L) narrow(to + i, load(from + i));
        if (whole < dim) {
            E tail[L];
            narrow(tail, load(from + whole));
            for (index_t i = whole; i < dim; ++i) to[i] = tail[i - whole];
        }
    }
}

}  // namespace
