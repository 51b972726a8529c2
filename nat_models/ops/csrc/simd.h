// Vectors of the instruction set this file is compiled for, written with compiler vector extensions.
// Everything lives in an unnamed namespace: objects built for different CPUs must not share a merged inline function.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <utility>  // std::integer_sequence: types only, nothing that could be merged

#if defined(__AVX512F__) || (defined(__clang__) && defined(__AVX2__))
#include <immintrin.h>
#endif

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

// Before a loop of at most n rounds, known when compiled: its arrays of vectors must end up in registers.
#define NAT_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define NAT_UNROLL(n) NAT_PRAGMA(clang loop unroll(full))
#else
#define NAT_UNROLL(n) NAT_PRAGMA(GCC unroll n)
#endif

namespace {

#if defined(__clang__)
constexpr bool kClang = true;
#else
constexpr bool kClang = false;
#endif

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
// A load that the compiler does not merge with another of the same address: it can be an operand of an instruction.
template <class C>
NAT_INLINE vec<C> load_again(const C* p) {
    asm volatile("" : "+r"(p));
    return load(p);
}
template <class C>
NAT_INLINE vec<C> splat(C x) {
    return x - vec<C>{};  // minus: 0 + x is an addition the compiler must keep, for it turns -0 into 0
}
template <class V>
NAT_INLINE V multiply_add(V sum, V a, V b) {
    return sum + a * b;
}
template <class V>
NAT_INLINE V maximum(V a, V b) {
    return a > b ? a : b;
}
#if defined(__AVX512F__)
constexpr __mmask16 kAllLanes = 0xffff;                      // GCC 12 warns of forms without a mask
NAT_INLINE vec<float> maximum(vec<float> a, vec<float> b) {  // of a constant, GCC makes a comparison and a move
    return (vec<float>)_mm512_maskz_max_ps(kAllLanes, (__m512)a, (__m512)b);
}
#endif

// Lane i of the result is lane from[i] of x.
template <class C>
NAT_INLINE vec<C> permute(vec<C> x, bits<C> from) {
#if !defined(__clang__)
    return __builtin_shuffle(x, from);
#else
    // Clang has no builtin for indices known only at run time, and what it makes of a loop goes through memory.
#if defined(__AVX512F__)
    if constexpr (sizeof(C) == 4) return (vec<C>)_mm512_permutexvar_ps((__m512i)from, (__m512)x);
    else return (vec<C>)_mm512_permutexvar_pd((__m512i)from, (__m512d)x);
#elif defined(__AVX2__)
    if constexpr (sizeof(C) == 4) {
        return (vec<C>)_mm256_permutevar8x32_ps((__m256)x, (__m256i)from);
    } else {  // as pairs of 32 bits: AVX2 permutes no doubles by a vector of indices
        const __m256i pairs = (__m256i)((from << 1) | (((from << 1) | 1) << 32));
        return (vec<C>)_mm256_permutevar8x32_ps((__m256)x, pairs);
    }
#else
    vec<C> y;
    for (index_t i = 0; i < lanes<C>; ++i) y[i] = x[from[i]];
    return y;
#endif
#endif
}

template <class C>
NAT_INLINE bits<C> lane_numbers() {
    bits<C> lane;
    for (index_t l = 0; l < lanes<C>; ++l) lane[l] = l;
    return lane;
}

template <class C>
NAT_INLINE C sum_lanes(vec<C> x) {
    // A tree, not a chain: fewer dependent additions and a smaller error.
    NAT_UNROLL(4)
    for (index_t half = lanes<C> / 2; half; half /= 2)
        x += permute<C>(x, lane_numbers<C>() ^ decltype(bits<C>{}[0] + 0)(half));
    return x[0];
}

// a[Start], b[Start], a[Start + 1], b[Start + 1], ... with I = 0, 1, ..., lanes - 1.
template <class C, index_t Start, index_t... I>
NAT_INLINE vec<C> interleave(vec<C> a, vec<C> b, std::integer_sequence<index_t, I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (Start + I / 2 + I % 2 * lanes<C>)...);
#else  // GCC has __builtin_shufflevector from 12 on only
    return __builtin_shuffle(a, b, bits<C>{(Start + I / 2 + I % 2 * lanes<C>)...});
#endif
}

// Transposes a square of lanes x lanes: log2(lanes) rounds of the perfect-shuffle network.
template <class C>
NAT_INLINE void transpose(vec<C> (&x)[lanes<C>]) {
    constexpr index_t n = lanes<C>;
    constexpr std::make_integer_sequence<index_t, n> sequence;
    NAT_UNROLL(4)
    for (int round = 0; 1 << round < n; ++round) {
        vec<C> y[n];
        NAT_UNROLL(16)
        for (index_t i = 0; i < n / 2; ++i) {
            y[2 * i] = interleave<C, 0>(x[i], x[i + n / 2], sequence);
            y[2 * i + 1] = interleave<C, n / 2>(x[i], x[i + n / 2], sequence);
        }
        NAT_UNROLL(16)
        for (index_t i = 0; i < n; ++i) x[i] = y[i];
    }
}

// 2**t for t <= about 0, within 2.3 units of the last place in float and 1.2 in double. What is smaller than the clamp
// becomes the clamp: harmless in a softmax, whose largest term is 1, and products with it stay clear of subnormal
// numbers, which would be slow.
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
    const double inverse[] = {1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320, 1. / 5040, 1. / 720,
                              1. / 120,       1. / 24,       1. / 6,       1. / 2,      1.,         1.};
    for (double c : inverse) p = p * f + c;
    return (vec<double>)((bits<double>)p + ((bits<double>)shifted << 52));
}

}  // namespace
