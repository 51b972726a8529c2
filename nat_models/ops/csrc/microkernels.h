// The two register-blocked products everything is made of, and the softmax between them. O is the type of the operands:
// C, or a pair, which stands for two neighbours of what is summed over.
//   dots:  lanes are queries.  logits[query row r][key n] += q[r][i] * k[n][i] over the head_dim i (QK^T, dO V^T).
//   blend: lanes are head_dim. acc[t] += weight[source][t] * source row (PV, dS K, dS^T Q, P^T dO).
#pragma once
#include "pairs.h"

namespace {

// Accumulators of a tile, with room left for operands in the register file.
constexpr int kDotRows = NAT_VECTOR_REGISTERS == 32 ? 4 : 3;
constexpr int kDotKeys = NAT_VECTOR_REGISTERS == 32 ? 7 : 4;
constexpr int kBlendMax = NAT_VECTOR_REGISTERS == 32 ? 8 : 6;

// Parts a run of n is cut into so that none exceeds `limit` and none is much smaller than the others.
struct Cut {
    index_t parts, n;
    Cut(index_t n, index_t limit) : parts((n + limit - 1) / limit), n(n) {}
    index_t begin(index_t part) const { return part * n / parts; }
};

// How the lanes of a tile find their key.
enum class Keys {
    Splat,    // all lanes share it: the key is a token row
    Shifted,  // lane l takes the l-th from here on, head_dim-major: the inside of a map
    Permuted  // lane l takes the from[l]-th: borders, where windows are shifted inward
};

template <class C, class O = C>
struct Dots {
    const O* query[kDotRows];  // [depth] vectors, one run per row of the tile
    const C* bias[kDotRows];   // [keys] vectors bias_step apart; all null for none
    C* out[kDotRows];          // [keys] vectors
    const O* key;
    C scale;  // of products of pairs, before the bias; other queries are scaled already
    index_t bias_step, depth;
    index_t key_step, key_depth_step;  // between keys, between elements of a key
    bits<C> from;
};

template <class C, class O, int R, int N, Keys Mode>
void dots_tile(const Dots<C, O>& a, index_t first) {
    constexpr index_t L = lanes<C>;
    constexpr bool kScaled = std::is_same<C, O>::value;
    // Accumulators, a query vector for each row, a key and a permutation can be more than there are registers. GCC
    // takes a query from memory then; clang must be made to, else it spills accumulators.
    constexpr bool kReloadQuery = kClang && Mode == Keys::Permuted && R * N + R + 2 > NAT_VECTOR_REGISTERS;
    vec<C> acc[R][N];
    NAT_UNROLL(8)
    for (int r = 0; r < R; ++r) {
        NAT_UNROLL(8)
        for (int n = 0; n < N; ++n)
            acc[r][n] = kScaled && a.bias[0] ? load(a.bias[r] + (first + n) * a.bias_step) : vec<C>{};
    }
    const O* key = a.key + first * a.key_step;
    const bits<C> from = a.from;
    for (index_t i = 0; i < a.depth; ++i, key += a.key_depth_step) {
        vec<O> query[R];
        NAT_UNROLL(8)
        for (int r = 0; r < R; ++r) query[r] = load(a.query[r] + i * L);
        NAT_UNROLL(8)
        for (int n = 0; n < N; ++n) {
            const O* p = key + n * a.key_step;
            const vec<O> k = Mode == Keys::Splat     ? splat(*p)
                             : Mode == Keys::Shifted ? load(p)
                                                     : permute<O>(load(p), from);
            if (kReloadQuery) query[R - 1] = load_again(a.query[R - 1] + i * L);
            NAT_UNROLL(8)
            for (int r = 0; r < R; ++r) acc[r][n] = multiply_add(acc[r][n], query[r], k);
        }
    }
    NAT_UNROLL(8)
    for (int r = 0; r < R; ++r) {
        C* out = a.out[r] + first * L;
        NAT_UNROLL(8)
        for (int n = 0; n < N; ++n) {
            if (!kScaled) {
                acc[r][n] *= a.scale;
                if (a.bias[0]) acc[r][n] += load(a.bias[r] + (first + n) * a.bias_step);
            }
            store(out + n * L, acc[r][n]);
        }
    }
}

// All `keys` keys for `rows` <= kDotRows rows.
template <Keys Mode, class C, class O>
void dots(const Dots<C, O>& a, index_t rows, index_t keys) {
    using Tile = void (*)(const Dots<C, O>&, index_t);
#define NAT_TILE(r, n) dots_tile<C, O, (r < kDotRows ? r : kDotRows), (n < kDotKeys ? n : kDotKeys), Mode>
#define NAT_ROW(r) \
    NAT_TILE(r, 1), NAT_TILE(r, 2), NAT_TILE(r, 3), NAT_TILE(r, 4), NAT_TILE(r, 5), NAT_TILE(r, 6), NAT_TILE(r, 7)
    static constexpr Tile tiles[4][7] = {{NAT_ROW(1)}, {NAT_ROW(2)}, {NAT_ROW(3)}, {NAT_ROW(4)}};
#undef NAT_ROW
#undef NAT_TILE
    const Cut cut(keys, kDotKeys);
    for (index_t part = 0; part < cut.parts; ++part) {
        const index_t first = cut.begin(part), n = cut.begin(part + 1) - first;
        tiles[rows - 1][n - 1](a, first);
    }
}

// Which sources [begin, end) reach which accumulators: in a band, source s reaches t when 0 <= s - t < width; otherwise
// every source reaches every t. The weight for (s, t) lies at weight[s * source_step + t * target_step].
struct Reach {
    index_t source_step, target_step, begin, end;
    bool band;
};
template <class O>
struct Segment {
    const O* row;  // source 0, `dim_padded` elements per source
    const O* weight;
    const Reach* reach;
};

template <class C, class O, int T, int N>
NAT_INLINE void blend_source(vec<C> (&acc)[T][N], const O* row, const O* weight, const Reach& s, index_t i,
                             index_t dim_padded, int first, int last) {
    vec<O> x[N];
    NAT_UNROLL(4)
    for (int n = 0; n < N; ++n) x[n] = load(row + i * dim_padded + n * lanes<C>);
    const O* w = weight + i * s.source_step;
    NAT_UNROLL(8)
    for (int t = 0; t < T; ++t)
        if (t >= first && t <= last) {
            const vec<O> p = splat(w[t * s.target_step]);
            NAT_UNROLL(4)
            for (int n = 0; n < N; ++n) acc[t][n] = multiply_add(acc[t][n], p, x[n]);
        }
}

// What a tile sums: segments whose rows and weights start `row` and `weight` elements further on.
template <class O>
struct Blend {
    const Segment<O>* segments;
    index_t count, row, weight, width, dim_padded;
};

// out[t] = scale[t] * sum over segments; T <= width + 1, so that a band is a triangle, full columns, a triangle.
template <class C, class O, int T, int N>
void blend_tile(const Blend<O>& a, index_t column, const C* scale, C* out) {
    const index_t dim_padded = a.dim_padded, width = a.width;
    vec<C> acc[T][N] = {};
    for (index_t k = 0; k < a.count; ++k) {
        const O* const row = a.segments[k].row + a.row + column;
        const O* const weight = a.segments[k].weight + a.weight;
        const Reach s = *a.segments[k].reach;
        const auto add = [&](index_t i, int first, int last) NAT_LAMBDA_INLINE {
            blend_source<C, O, T, N>(acc, row, weight, s, i, dim_padded, first, last);
        };
        if (!s.band) {
            for (index_t i = s.begin; i < s.end; ++i) add(i, 0, T - 1);
            continue;
        }
        NAT_UNROLL(8)
        for (int i = 0; i < T - 1; ++i)
            if (i >= s.begin && i < s.end) add(i, 0, i);
        const index_t stop = width < s.end ? width : s.end;
        for (index_t i = s.begin > T - 1 ? s.begin : T - 1; i < stop; ++i) add(i, 0, T - 1);
        NAT_UNROLL(8)
        for (int i = 0; i < T - 1; ++i)
            if (width + i >= s.begin && width + i < s.end) add(width + i, i + 1, T - 1);
    }
    NAT_UNROLL(8)
    for (int t = 0; t < T; ++t) {
        NAT_UNROLL(4)
        for (int n = 0; n < N; ++n) store(out + t * dim_padded + n * lanes<C>, acc[t][n] * scale[t]);
    }
}

// One tile of `targets` <= kBlendMax output rows, all of head_dim: two vectors at a time, then one.
template <class C, class O>
void blend(const Blend<O>& a, index_t targets, const C* scale, C* out) {
    using Tile = void (*)(const Blend<O>&, index_t, const C*, C*);
#define NAT_TILE(t, n) blend_tile<C, O, (t < kBlendMax ? t : kBlendMax), n>
#define NAT_ROW(n)                                                                                                  \
    NAT_TILE(1, n), NAT_TILE(2, n), NAT_TILE(3, n), NAT_TILE(4, n), NAT_TILE(5, n), NAT_TILE(6, n), NAT_TILE(7, n), \
        NAT_TILE(8, n)
    static constexpr Tile tiles[2][8] = {{NAT_ROW(1)}, {NAT_ROW(2)}};
#undef NAT_ROW
#undef NAT_TILE
    for (index_t i = 0; i < a.dim_padded;) {
        const index_t n = a.dim_padded - i >= 2 * lanes<C> ? 2 : 1;
        tiles[n - 1][targets - 1](a, i, scale, out + i);
        i += n * lanes<C>;
    }
}

template <class C>
constexpr C kLog2E = C(1.44269504088896340736);

// Of each lane, over the [keys] vectors.
template <class C>
NAT_INLINE vec<C> largest(const C* logits, index_t keys) {
    constexpr index_t L = lanes<C>;
    vec<C> tops[4];  // four chains: one would wait for its own latency
    for (vec<C>& top : tops) top = load(logits);
    index_t rest = 0;
    for (; rest + 4 <= keys; rest += 4)
        for (index_t i = 0; i < 4; ++i) tops[i] = maximum(tops[i], load(logits + (rest + i) * L));
    for (; rest < keys; ++rest) tops[0] = maximum(tops[0], load(logits + rest * L));
    return maximum(maximum(tops[0], tops[1]), maximum(tops[2], tops[3]));
}

// In place: logits, [keys] vectors, become exp(logit - max); returns 1 / sum.
template <class C>
vec<C> softmax(C* logits, index_t keys) {
    constexpr index_t L = lanes<C>;
    const vec<C> top = largest(logits, keys) * kLog2E<C>;
    vec<C> sum = {};
    for (index_t k = 0; k < keys; ++k) {
        const vec<C> p = exp2_nonpositive(load(logits + k * L) * kLog2E<C> - top);
        store(logits + k * L, p);
        sum += p;
    }
    return C(1) / sum;
}

// p: unnormalised probabilities in, probabilities out; dp: d loss / d probability in, d loss / d logit out.
template <class C>
void softmax_backward(C* p, C* dp, index_t keys, vec<C> inverse) {
    constexpr index_t L = lanes<C>;
    vec<C> sums[4] = {};  // chains, as in `largest`
    index_t rest = 0;
    for (; rest + 4 <= keys; rest += 4)
        for (index_t i = 0; i < 4; ++i) sums[i] += load(p + (rest + i) * L) * load(dp + (rest + i) * L);
    for (; rest < keys; ++rest) sums[0] += load(p + rest * L) * load(dp + rest * L);
    const vec<C> delta = ((sums[0] + sums[1]) + (sums[2] + sums[3])) * inverse;
    for (index_t k = 0; k < keys; ++k) {
        const vec<C> normal = load(p + k * L) * inverse;
        store(p + k * L, normal);
        store(dp + k * L, normal * (load(dp + k * L) - delta));
    }
}

}  // namespace
