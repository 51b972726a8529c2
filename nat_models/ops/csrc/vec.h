// Vectors of the instruction set this file is compiled for, written with compiler vector extensions.
// Everything lives in an unnamed namespace: two objects built for different CPUs must never share a merged inline function.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define NAT_VECTOR_BYTES 64
#define NAT_VECTOR_REGISTERS 32
#elif defined(__AVX2__)
#define NAT_VECTOR_BYTES 32
#define NAT_VECTOR_REGISTERS 16
#else
#define NAT_VECTOR_BYTES 16
#if defined(__aarch64__)
#define NAT_VECTOR_REGISTERS 32
#else
#define NAT_VECTOR_REGISTERS 16
#endif
#endif

#define NAT_INLINE inline __attribute__((always_inline))
#define NAT_LAMBDA_INLINE __attribute__((always_inline))

namespace {

using index_t = ptrdiff_t;

template <class C>
struct Vector;
template <>
struct Vector<float> {
    typedef float type __attribute__((vector_size(NAT_VECTOR_BYTES)));
    typedef float loose __attribute__((vector_size(NAT_VECTOR_BYTES), aligned(4), may_alias));
    typedef uint32_t bits __attribute__((vector_size(NAT_VECTOR_BYTES)));
};
template <>
struct Vector<double> {
    typedef double type __attribute__((vector_size(NAT_VECTOR_BYTES)));
    typedef double loose __attribute__((vector_size(NAT_VECTOR_BYTES), aligned(8), may_alias));
    typedef uint64_t bits __attribute__((vector_size(NAT_VECTOR_BYTES)));
};

template <class C>
using vec = typename Vector<C>::type;
template <class C>
using bits = typename Vector<C>::bits;
template <class C>
constexpr index_t lanes = NAT_VECTOR_BYTES / sizeof(C);

template <class C>
NAT_INLINE vec<C> load(const C* p) {
    return *(const typename Vector<C>::loose*)p;
}
template <class C>
NAT_INLINE void store(C* p, vec<C> x) {
    *(typename Vector<C>::loose*)p = x;
}
template <class C>
NAT_INLINE vec<C> splat(C x) {
    return x - vec<C>{};  // minus: 0 + x is an addition the compiler must keep, for it turns -0 into 0
}
template <class V>
NAT_INLINE V maximum(V a, V b) {
    return a > b ? a : b;
}
template <class C>
NAT_INLINE C sum_lanes(vec<C> x) {
    // A tree, not a chain: fewer dependent additions and a smaller error.
    for (index_t half = lanes<C> / 2; half; half /= 2)
        for (index_t i = 0; i < half; ++i) x[i] += x[i + half];
    return x[0];
}

template <class C>
NAT_INLINE vec<C> permute(vec<C> x, bits<C> from) {
#if defined(__clang__)
    vec<C> y;
    for (index_t i = 0; i < lanes<C>; ++i) y[i] = x[from[i]];
    return y;
#else
    return __builtin_shuffle(x, from);
#endif
}

template <class C>
NAT_INLINE bits<C> lane_numbers() {
    bits<C> lane;
    for (index_t l = 0; l < lanes<C>; ++l) lane[l] = l;
    return lane;
}

// One round of the perfect-shuffle network; log2(lanes) rounds transpose a square of lanes x lanes.
template <class C>
NAT_INLINE void transpose(vec<C> (&x)[lanes<C>]) {
    constexpr index_t n = lanes<C>;
    bits<C> low, high;
    for (index_t i = 0; i < n; ++i) {
        low[i] = i / 2 + (i % 2) * n;
        high[i] = low[i] + n / 2;
    }
#pragma GCC unroll 4
    for (index_t round = 1; round < n; round *= 2) {
        vec<C> y[n];
#pragma GCC unroll 16
        for (index_t i = 0; i < n / 2; ++i) {
            y[2 * i] = __builtin_shuffle(x[i], x[i + n / 2], low);
            y[2 * i + 1] = __builtin_shuffle(x[i], x[i + n / 2], high);
        }
#pragma GCC unroll 16
        for (index_t i = 0; i < n; ++i) x[i] = y[i];
    }
}

// 2**t for t <= about 0, to about an ulp. What is smaller than the clamp becomes the clamp: harmless in a softmax, whose
// largest term is 1, and products with it stay clear of subnormal numbers, which would be slow.
NAT_INLINE vec<float> exp2_nonpositive(vec<float> t) {
    t = maximum(splat(-100.f), t);
    const vec<float> magic = splat(0x1.8p23f);  // adding it leaves round(t) in the low bits
    const vec<float> shifted = t + magic;
    const vec<float> f = t - (shifted - magic);
    vec<float> p = splat(1.32647e-3f);  // minimax on [-1/2, 1/2], relative error 9e-8
    p = p * f + 9.67151e-3f;
    p = p * f + 5.550734e-2f;
    p = p * f + 2.4022242e-1f;
    p = p * f + 6.9314698e-1f;
    p = p * f + 1.f;
    return (vec<float>)((bits<float>)p + ((bits<float>)shifted << 23));
}

NAT_INLINE vec<double> exp2_nonpositive(vec<double> t) {
    t = maximum(splat(-900.), t);
    const vec<double> magic = splat(0x1.8p52);
    const vec<double> shifted = t + magic;
    const vec<double> f = (t - (shifted - magic)) * 0.693147180559945309417;
    vec<double> p = splat(1.0 / 6227020800);  // Taylor: |f| <= ln(2)/2, so 13 terms reach 1e-18
    const double inverse[] = {1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320, 1. / 5040,
                              1. / 720,       1. / 120,      1. / 24,      1. / 6,      1. / 2,     1.,
                              1.};
    for (double c : inverse) p = p * f + c;
    return (vec<double>)((bits<double>)p + ((bits<double>)shifted << 52));
}

// Storage types. Low precision is widened on load and rounded to nearest even on store; the arithmetic never sees it.
struct bfloat16 {
    uint16_t raw;
};
struct float16 {
    uint16_t raw;
};
typedef uint16_t halves __attribute__((vector_size(NAT_VECTOR_BYTES / 2)));
typedef uint16_t loose_halves __attribute__((vector_size(NAT_VECTOR_BYTES / 2), aligned(2), may_alias));

template <class E>
struct Compute {
    using type = float;
};
template <>
struct Compute<double> {
    using type = double;
};

NAT_INLINE bits<float> widen_halves(const void* p) {
    return __builtin_convertvector((halves) * (const loose_halves*)p, bits<float>);
}
NAT_INLINE void narrow_halves(void* p, bits<float> x) { *(loose_halves*)p = __builtin_convertvector(x, halves); }

NAT_INLINE vec<float> widen(const float* p) { return load(p); }
NAT_INLINE vec<double> widen(const double* p) { return load(p); }
NAT_INLINE vec<float> widen(const bfloat16* p) { return (vec<float>)(widen_halves(p) << 16); }
NAT_INLINE vec<float> widen(const float16* p) {
    const bits<float> h = widen_halves(p);
    const bits<float> magnitude = h & 0x7fff;
    // The product rescales the exponent and normalises subnormals; infinities and NaNs get theirs by hand.
    bits<float> x = (bits<float>)((vec<float>)(magnitude << 13) * 0x1p112f);
    x = magnitude >= 0x7c00 ? x | 0x7f800000 : x;
    return (vec<float>)(x | (h & 0x8000) << 16);
}

NAT_INLINE void narrow(float* p, vec<float> x) { store(p, x); }
NAT_INLINE void narrow(double* p, vec<double> x) { store(p, x); }
NAT_INLINE void narrow(bfloat16* p, vec<float> x) {
    const bits<float> b = (bits<float>)x;
    const bits<float> rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
    narrow_halves(p, x != x ? (b >> 16 | 0x40) : rounded);
}
NAT_INLINE void narrow(float16* p, vec<float> x) {
    const bits<float> b = (bits<float>)x, magnitude = b & 0x7fffffff, sign = b >> 16 & 0x8000;
    const bits<float> normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13;
    // Adding 0.5 aligns a number below 2**-14 to float16's subnormal spacing, rounding in hardware.
    const bits<float> tiny = (bits<float>)((vec<float>)magnitude + 0.5f) - (126u << 23);
    bits<float> h = magnitude < (113u << 23) ? tiny : normal;
    h = magnitude >= 0x477ff000 ? bits<float>{} + 0x7c00 : h;  // 65520 and above round to infinity
    h = magnitude > 0x7f800000 ? bits<float>{} + 0x7e00 : h;
    narrow_halves(p, h | sign);
}

// The first `count` elements, the rest zero.
template <class E>
__attribute__((noinline)) vec<typename Compute<E>::type> widen_some(const E* p, index_t count) {
    E tail[lanes<typename Compute<E>::type>] = {};
    for (index_t i = 0; i < count; ++i) tail[i] = p[i];
    return widen(tail);
}

// Tokens of `dim` elements from rows padded to whole vectors, to memory `step` apart.
template <class E, class C>
void store_tokens(const C* from, index_t padded, index_t count, index_t dim, index_t step, E* to) {
    constexpr index_t L = lanes<C>;
    const index_t whole = dim / L * L;
    for (index_t n = 0; n < count; ++n, from += padded, to += step) {
        for (index_t i = 0; i < whole; i += L) narrow(to + i, load(from + i));
        if (whole < dim) {
            E tail[L];
            narrow(tail, load(from + whole));
            for (index_t i = whole; i < dim; ++i) to[i] = tail[i - whole];
        }
    }
}

}  // namespace
