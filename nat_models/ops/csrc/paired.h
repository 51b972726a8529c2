// The sweep in bfloat16: products of pairs (pairs.h), sums and softmax in float. Only what is multiplied is rounded:
// probabilities, and gradients of logits.
//
// A product pairs neighbours of what it sums over. Over head_dim (QK^T, dO V^T) a token's memory has them already. Over
// keys (PV, dS K) and queries (P^T dO, dS^T Q) a token row is zipped with the one above it; a window of an odd number
// of rows ends with a pair whose first half has the weight zero: a row of that window or, of a single one, that row
// once more, so that what is not a number goes no further than elsewhere. In a map that is taken as a single row, a
// token is zipped with the next.
#pragma once
#include "sweep.h"

#if defined(__AVX512BF16__)

namespace {

// Rows of tokens are [cols_padded][depth_padded] pairs, transposed queries [block][depth_padded][L], transposed keys
// [depth][transposed_cols]; zipped rows are [cols_padded][dim_padded], weights [block][window_pairs][L].
struct PairBuffers : SweepBuffers<float> {
    index_t depth, depth_padded;  // pairs of a token, and rounded up to whole vectors
    index_t pair_rows;            // of a window
    index_t window_pairs;         // that a query multiplies with its window's keys
    pair *query_transposed, *grad_out_transposed, *key_rows, *value_rows;
    pair *query_zipped, *grad_out_zipped, *key_zipped, *value_zipped;
    pair *last_query, *last_grad_out, *last_key, *last_value;  // token rows, to be zipped with the next
    pair *probabilities, *gradients;                           // weights, [query row] of a ring in the backward
    pair* lone_row;                                            // a row of queries, zipped with itself
    pair* row_weights;  // of one row: of a query row's keys or, [pair of query rows], of a key row's queries
    Segment<pair>* segments;

    PairBuffers(const Plan<float>& plan, Arena& arena) : SweepBuffers<float>(plan, arena) {
        depth = ceil_div(plan.dim, 2);
        depth_padded = ceil_div(depth, L) * L;
        pair_rows = ceil_div(plan.kernel_rows, 2);
        window_pairs = plan.single_row ? ceil_div(plan.kernel_cols, 2) : pair_rows * plan.kernel_cols;
        const index_t tokens = plan.cols_padded * depth_padded, weights = plan.cols_padded * window_pairs;
        const index_t keys = plan.single_row ? tokens : transposed_cols * depth_padded;
        const index_t ring = plan.backward ? plan.ring_rows : 0, one = plan.backward ? 1 : 0;
        query_transposed = arena.take<pair>(plan.ring_rows * tokens);
        grad_out_transposed = arena.take<pair>(ring * tokens);
        key_rows = arena.take<pair>(keys);
        value_rows = arena.take<pair>(one * keys);
        key_zipped = arena.take<pair>(one * plan.kernel_rows * plan.row_size);
        value_zipped = arena.take<pair>((1 - one) * plan.kernel_rows * plan.row_size);
        query_zipped = arena.take<pair>(ring * plan.row_size);
        grad_out_zipped = arena.take<pair>(ring * plan.row_size);
        last_query = arena.take<pair>(one * tokens);
        last_grad_out = arena.take<pair>(one * tokens);
        last_key = arena.take<pair>(one * tokens);
        last_value = arena.take<pair>((1 - one) * tokens);
        lone_row = arena.take<pair>(one * plan.row_size);
        probabilities = arena.take<pair>(max(ring, 1) * weights);
        gradients = arena.take<pair>(ring * weights);
        row_weights = arena.take<pair>(one * max(weights, plan.kernel_rows * plan.kernel_cols * plan.cols_padded));
        segments = arena.take<Segment<pair>>(max_segments);
        if (!arena.base) return;
        clear(key_rows, keys);
        clear(value_rows, one * keys);
    }

    pair* zipped_query_row(pair* ring, index_t row) const { return ring + query_slot[row] * plan.row_size; }
    pair* zipped_key_row(pair* ring, index_t row) const { return ring + key_slot[row] * plan.row_size; }
    pair* transposed_row(pair* ring, index_t row) const {
        return ring + query_slot[row] * plan.cols_padded * depth_padded;
    }
    pair* pair_weights(pair* ring, index_t row, index_t block) const {
        const index_t slot = plan.backward ? query_slot[row] : 0;
        return ring + (slot * plan.cols_padded + block * L) * window_pairs;
    }
};

struct PairWorker : SweepWorker<bfloat16, float, PairBuffers, PairWorker> {
    using Buffers = PairBuffers;
    using Geometry = TaskGeometry<float>;
    using SweepWorker::SweepWorker;

    // Where a row of tokens goes, each null where it is not wanted. `zipped` needs `last`, which becomes this row.
    struct RowTargets {
        pair *rows, *transposed, *zipped, *last;
        index_t depth_step, block_step;
        bool alone;  // there is no last row, or no window has both: this one is zipped with itself
    };

    void load_row(const Geometry& at, const nat_tensor& t, index_t row, const RowTargets& to) const {
        at.each_block<bfloat16>(t, row, [&](const bfloat16* const(&from)[L], index_t j) NAT_LAMBDA_INLINE {
            const index_t tokens = min(L, at.across.length - j);
            for (index_t i = 0; i < depth_padded; i += L) {
                const index_t count = plan.dim - 2 * i;
                if (to.transposed)
                    transpose_block(from, i, count, to.transposed + j / L * to.block_step, to.depth_step);
                if (to.rows) copy_block(from, i, count, tokens, to.rows + j * depth_padded + i);
                if (!to.zipped) continue;
                if (plan.single_row) zip_neighbours(from, i, count, tokens, to.zipped + j / 2 * plan.dim_padded);
                else zip_with_last(from, i, count, tokens, to, j);
            }
        });
    }
    NAT_INLINE void transpose_block(const bfloat16* const (&from)[L], index_t i, index_t count, pair* to,
                                    index_t depth_step) const {
        vec<pair> x[L];
        NAT_UNROLL(16)
        for (index_t l = 0; l < L; ++l) x[l] = load_pairs(from[l] + 2 * i, count);
        transpose<pair>(x);
        to += i * depth_step;
        NAT_UNROLL(16)
        for (index_t l = 0; l < L; ++l, to += depth_step)
            if (i + l < depth) store(to, x[l]);
    }
    NAT_INLINE void copy_block(const bfloat16* const (&from)[L], index_t i, index_t count, index_t tokens,
                               pair* to) const {
        for (index_t l = 0; l < tokens; ++l, to += depth_padded) store(to, load_pairs(from[l] + 2 * i, count));
    }
    NAT_INLINE void zip_with_last(const bfloat16* const (&from)[L], index_t i, index_t count, index_t tokens,
                                  const RowTargets& to, index_t j) const {
        pair *last = to.last + j * depth_padded + i, *zipped = to.zipped + j * plan.dim_padded;
        if (to.alone) copy_block(from, i, count, tokens, last);
        for (index_t l = 0; l < tokens; ++l, last += depth_padded, zipped += plan.dim_padded) {
            const vec<pair> token = load_pairs(from[l] + 2 * i, count);
            zip(load(last), token, zipped, i);
            store(last, token);
        }
    }
    NAT_INLINE void zip_neighbours(const bfloat16* const (&from)[L], index_t i, index_t count, index_t tokens,
                                   pair* zipped) const {
        for (index_t l = 0; l < tokens; l += 2, zipped += plan.dim_padded) {
            const vec<pair> next = l + 1 < tokens ? load_pairs(from[l + 1] + 2 * i, count) : vec<pair>{};
            zip(load_pairs(from[l] + 2 * i, count), next, zipped, i);
        }
    }
    NAT_INLINE void zip(vec<pair> first, vec<pair> second, pair* to, index_t i) const {
        store(to + 2 * i, zip_low(first, second));
        if (2 * i + L < plan.dim_padded) store(to + 2 * i + L, zip_high(first, second));
    }

    void load_query_row(const Geometry& at, index_t row) {
        const auto load = [&](const nat_tensor& t, pair* transposed, pair* zipped, pair* last) {
            load_row(at, t, row,
                     {nullptr, transposed_row(transposed, row), plan.backward ? zipped_query_row(zipped, row) : nullptr,
                      last, L, depth_padded * L, plan.kernel_rows == 1 || row == at.first_row()});
        };
        load(call.query, query_transposed, query_zipped, last_query);
        if (plan.backward) load(call.grad_out, grad_out_transposed, grad_out_zipped, last_grad_out);
    }

    void load_key_row(const Geometry& at, index_t row) {
        const auto load = [&](const nat_tensor& t, pair* rows, pair* zipped, pair* last) {
            pair* const transposed = plan.single_row ? nullptr : rows;
            load_row(at, t, row,
                     {plan.single_row ? rows : nullptr, transposed, zipped, last, transposed_cols, L,
                      plan.kernel_rows == 1 || row == at.down.start(at.first_row())});
        };
        load(call.key, key_rows, plan.backward ? zipped_key_row(key_zipped, row) : nullptr, last_key);
        if (plan.backward) load(call.value, value_rows, nullptr, nullptr);
        else load(call.value, nullptr, zipped_key_row(value_zipped, row), last_value);
    }

    void multiply(const Geometry& at, index_t row, index_t begin, index_t end, bool with_bias) {
        products(at, query_transposed, key_rows, depth, depth_padded, float(call.scale), with_bias, logits, row, begin,
                 end);
        if (plan.backward)
            products(at, grad_out_transposed, value_rows, depth, depth_padded, 1.f, false, grad_logits, row, begin,
                     end);
    }

    // Calls visit(pair, first, second) for the pairs of a query's keys: which keys of its window these are, -1 for
    // none.
    template <class Visit>
    NAT_INLINE void each_pair(const Geometry& at, const Visit& visit) const {
        const index_t cols = at.across.kernel, keys = at.window();
        if (plan.single_row) {
            for (index_t k = 0; k + 1 < keys; k += 2) visit(k / 2, k, k + 1);
            if (keys % 2) visit(keys / 2, keys - 1, -1);
            return;
        }
        const index_t whole = plan.kernel_rows / 2 * cols;
        index_t n = 0;
        for (index_t k = 0; n < whole; k += cols)
            for (const index_t end = n + cols; n < end; ++n, ++k) visit(n, k, k + cols);
        if (plan.kernel_rows % 2)
            for (index_t k = keys - cols; k < keys; ++k, ++n) visit(n, -1, k);
    }

    // Logits of a block of queries become weights exp(logit - max) in `out`; returns 1 / their sum. The sum is that of
    // the rounded weights, so that they add up to 1.
    vec<float> softmax_pairs(const Geometry& at, const float* logits, pair* out) const {
        const vec<float> top = largest(logits, at.window()) * kLog2E<float>;
        vec<float> sum = {};
        const auto weight = [&](index_t k) NAT_LAMBDA_INLINE {
            return k < 0 ? vec<float>{} : exp2_nonpositive(load(logits + k * L) * kLog2E<float> - top);
        };
        each_pair(at, [&](index_t n, index_t first, index_t second) NAT_LAMBDA_INLINE {
            const vec<pair> p = pack(weight(first), weight(second));
            sum = add_pairs(sum, p);
            store(out + n * L, p);
        });
        return 1.f / sum;
    }

    // `numbers` of a block of queries, [key], rounded to weights: by query in `pairs`, and by key in `lanes`.
    void round_weights(const Geometry& at, const float* numbers, pair* pairs, pair* lanes) const {
        const auto number = [&](index_t k) NAT_LAMBDA_INLINE { return k < 0 ? vec<float>{} : load(numbers + k * L); };
        each_pair(at, [&](index_t n, index_t first, index_t second) NAT_LAMBDA_INLINE {
            const vec<pair> x = concatenate(number(first), number(second));
            if (pairs) store(pairs + n * L, zip_halves(x));
            if (lanes) store(lanes + n * L, x);
        });
    }

    void complete_query_row(const Geometry& at, index_t row) {
        const bool single = plan.single_row;
        for (index_t j = 0; j < at.across.length; j += L) {
            float* const block = weights(logits, row, j / L);
            pair* const p = pair_weights(probabilities, row, j / L);
            prefetch.fetch();
            if (!plan.backward) {
                store(inverse + j, softmax_pairs(at, block, p));
                continue;
            }
            differentiate_softmax(at, row, j, softmax(block, at.window()));
            const float* const gradient = weights(grad_logits, row, j / L);
            pair* const g = pair_weights(gradients, row, j / L);
            round_weights(at, block, single ? nullptr : p, single ? p : nullptr);
            round_weights(at, gradient, single ? row_weights + j * window_pairs : g, single ? g : nullptr);
        }
        if (plan.backward) {
            gather(at, row, single ? row_weights : pair_weights(gradients, row, 0), key_zipped, scales, 0);
            at.store_row<bfloat16>(call.grad_query, row, out);
        } else {
            gather(at, row, probabilities, value_zipped, inverse, 1);
            at.store_row<bfloat16>(call.out, row, out);
        }
    }

    // out[query] = scale * sum of its window's tokens, weighted.
    void gather(const Geometry& at, index_t row, const pair* weight, pair* token_ring, const float* scale,
                index_t scale_step) {
        Reach reach;
        if (plan.single_row) {
            const Segment<pair> tokens{token_ring, weight, &reach};
            Blend<pair> tile{&tokens, 1, 0, 0, 0, plan.dim_padded};
            reach = {L, 1, 0, ceil_div(at.across.length, 2), false};
            tiles(0, at.across.length, L, [&](index_t begin, index_t end) {
                tile.weight = begin / L * window_pairs * L + begin % L;
                prefetch.fetch();
                blend(tile, end - begin, scale + begin * scale_step, out + begin * plan.dim_padded);
            });
            return;
        }
        for (index_t p = 0; p < pair_rows; ++p)
            segments[p] = {zipped_key_row(token_ring, at.down.start(row) + min(2 * p + 1, at.down.kernel - 1)),
                           weight + p * at.across.kernel * L, &reach};
        gather_segments(at, segments, pair_rows, reach, window_pairs * L, scale, scale_step);
    }

    // out[key] = scale * sum of the query rows [begin, end) that attend to it, weighted: the transpose of gather.
    void scatter(const Geometry& at, index_t key_row, index_t begin, index_t end, pair* weight_ring, pair* token_ring,
                 const pair* last, const float* scale) {
        const Axis& across = at.across;
        if (plan.single_row) return scatter_single_row(at, weight_ring, token_ring, scale);
        const index_t step = plan.kernel_cols * plan.cols_padded, rows = end - begin;
        for (index_t n = 0; n < ceil_div(rows, 2); ++n)
            pair_query_rows(at, key_row, begin + 2 * n, min(begin + 2 * n + 1, end - 1), weight_ring,
                            row_weights + n * step);
        // A single query row is the first of the strip, which was zipped with itself, or the one that was read last.
        const bool lone = rows == 1 && begin != at.first_row();
        if (lone) zip_with_itself(last, across.length);
        scatter_tiles(across, [&](index_t key, index_t key_end) {
            const index_t count = pieces_that_see(across, key, key_end, plan.kernel_cols * L);
            Segment<pair>* segment = segments;
            for (index_t n = 0; n < ceil_div(rows, 2); ++n) {
                const pair* const tokens =
                    lone ? lone_row : zipped_query_row(token_ring, min(begin + 2 * n + 1, end - 1));
                for (index_t i = 0; i < count; ++i)
                    *segment++ = {tokens + pieces[i].token, row_weights + n * step + pieces[i].weight,
                                  &pieces[i].reach};
            }
            const Blend<pair> tile{segments, segment - segments, 0, 0, across.kernel, plan.dim_padded};
            prefetch.fetch();
            blend(tile, key_end - key, scale, out + key * plan.dim_padded);
        });
    }

    void zip_with_itself(const pair* tokens, index_t count) const {
        for (index_t n = 0; n < count; ++n)
            for (index_t i = 0; i < depth_padded; i += L) {
                const vec<pair> token = load(tokens + n * depth_padded + i);
                zip(token, token, lone_row + n * plan.dim_padded, i);
            }
    }

    // Weights of a key row, [block][key column of the window][L], of two query rows; of one, which stands second.
    void pair_query_rows(const Geometry& at, index_t key_row, index_t first, index_t second, pair* weight_ring,
                         pair* to) const {
        struct Place {
            const pair* weights;
            bool second;
        };
        const auto place = [&](index_t query_row) {
            const index_t n = key_row - at.down.start(query_row);
            return Place{pair_weights(weight_ring, query_row, 0) + n / 2 * plan.kernel_cols * L,
                         n % 2 == 1 || n == at.down.kernel - 1};
        };
        Place a = place(first), b = place(second);
        const bool alone = first == second;
        for (index_t j = 0; j < at.across.length; j += L) {
            for (index_t k = 0; k < plan.kernel_cols * L; k += L, to += L) {
                const vec<pair> x = alone ? vec<pair>{} : load(a.weights + k);
                store(to, pick(x, a.second, load(b.weights + k), b.second));
            }
            a.weights += window_pairs * L, b.weights += window_pairs * L;
        }
    }

    void scatter_single_row(const Geometry& at, pair* weight_ring, pair* token_ring, const float* scale) {
        constexpr index_t kBlockPairs = L / 2;
        const index_t length = at.across.length, blocks = ceil_div(length, L);
        const Reach whole{1, kBlockPairs, 0, kBlockPairs, false};
        const Reach rest{1, kBlockPairs, 0, ceil_div(length - (blocks - 1) * L, 2), false};
        for (index_t n = 0; n < blocks; ++n)
            segments[n] = {token_ring + n * kBlockPairs * plan.dim_padded, weight_ring + n * window_pairs * L,
                           n + 1 < blocks ? &whole : &rest};
        Blend<pair> tile{segments, blocks, 0, 0, 0, plan.dim_padded};
        tiles(0, length, length, [&](index_t key, index_t key_end) {
            tile.weight = key * kBlockPairs;
            prefetch.fetch();
            blend(tile, key_end - key, scale, out + key * plan.dim_padded);
        });
    }

    // The gradients of a key row that query rows [begin, end) of this strip see.
    void complete_key_row(const Geometry& at, index_t row, index_t begin, index_t end, float* seams) {
        const auto share = share_of_row(at, seams, row);
        scatter(at, row, begin, end, gradients, query_zipped, last_query, scales);
        write_gradient(at, call.grad_key, row, share.key);
        scatter(at, row, begin, end, probabilities, grad_out_zipped, last_grad_out, ones);
        write_gradient(at, call.grad_value, row, share.value);
    }
};

}  // namespace

#endif
