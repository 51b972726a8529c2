// What all tasks of a call share: sizes, and into how many tasks the work is cut.
#pragma once
#include "abi.h"
#include "simd.h"

namespace {

// Not std::min and std::max: one copy of an inline function may serve objects that were built for different CPUs.
index_t min(index_t a, index_t b) { return a < b ? a : b; }
index_t max(index_t a, index_t b) { return a > b ? a : b; }
index_t ceil_div(index_t a, index_t b) { return (a + b - 1) / b; }

// A map of up to 4/3 as many tokens as its window is computed as a single row: it wastes no lanes on narrow rows, but
// multiplies every pair. AVX-512, against rows: 7x7 for K = 7 takes 0.58 of the time forward and 0.54 backward, 8x8
// 0.95 and 0.69, 9x9 1.21 and 0.89. More tokens of pairs leave the cache: 19x22 for K = 19 takes 1.09 and 0.95.
constexpr index_t kSingleRowNumerator = 4, kSingleRowDenominator = 3;
constexpr index_t kSingleRowMaxTokens = 256;

// Tensors larger than this are prefetched. On a Zen 5 (1 MiB of L2, 32 MiB of L3), prefetching costs 9 to 11 % while
// they are in the caches, forward up to 9 MiB and backward up to 8; it breaks even at about 10 MiB and saves 35 and 25
// % from 25 MiB on. Half precision counts as what it is computed in: on a Zen 4, bfloat16 tensors of 6.1 MiB take 0.8
// of the time with prefetching, those of 3.1 MiB 1.06.
constexpr index_t kCacheBytes = index_t(10) << 20;
constexpr index_t kForwardTensors = 4;   // query, key, value, output
constexpr index_t kBackwardTensors = 7;  // query, key, value, gradient of the output, gradients of query, key, value

// The backward is cut into strips until there is one task for each of so many threads. With a few heads of one image,
// on one thread, that costs 8 % (56x56 in 4 strips), for the key rows around a boundary are computed by both strips.
constexpr index_t kBackwardTasks = 16;

// The forward's cost of a query row, in key rows read. A boundary makes its two strips read K-1 key rows twice: at
// 56x56, one boundary adds 9 us to 379, three add 22, so such a row costs 1.2 to 1.5 us and a query row 6.8.
constexpr index_t kKeyRowsPerQueryRow = 5;

// Sizes are those of the largest dilation group; rows and cols are as the sweep sees them, map_rows and map_cols as the
// map has them.
template <class C>
struct Plan {
    static constexpr index_t L = lanes<C>;
    const nat_na2d_call& call;
    bool backward;
    bool single_row;  // the map is taken as one row of rows * cols tokens; the bias masks keys outside a window
    index_t groups, map_rows, map_cols, rows, cols, kernel_rows, kernel_cols, strips, strip_rows, tasks;
    index_t dim, dim_padded;  // head_dim, and rounded up to whole vectors
    index_t cols_padded;      // vectors of columns, and room for a last one that is not full
    index_t ring_rows;        // query rows alive at once
    index_t row_size, seam_size;
    bool exceeds_cache;  // worth prefetching

    Plan(const nat_na2d_call& call, bool backward, index_t threads) : call(call), backward(backward) {
        groups = call.dilation[0] * call.dilation[1];
        rows = map_rows = ceil_div(call.height, call.dilation[0]);
        cols = map_cols = ceil_div(call.width, call.dilation[1]);
        const index_t window = call.kernel[0] * call.kernel[1];
        single_row =
            rows * cols * kSingleRowDenominator <= window * kSingleRowNumerator && rows * cols <= kSingleRowMaxTokens;
        if (single_row) cols *= rows, rows = 1;
        kernel_rows = single_row ? 1 : call.kernel[0];
        kernel_cols = single_row ? cols : call.kernel[1];
        dim = call.head_dim;
        dim_padded = ceil_div(dim, L) * L;
        // An odd number of vectors: a power of two would map a column of the logits onto a few sets of the cache.
        cols_padded = (ceil_div(cols, L) | 1) * L;
        row_size = cols_padded * dim_padded;
        seam_size = kernel_rows * cols * dim_padded;
        const index_t units = call.heads * call.batch * groups;
        strips = count_strips(units, threads);
        strip_rows = ceil_div(rows, strips);
        tasks = units * strips;
        exceeds_cache = rows * cols * units * dim * (backward ? kBackwardTensors : kForwardTensors) >
                        kCacheBytes / (index_t)sizeof(C);
        // Forward: the query rows that see one key row; only in maps lower than 2K do the windows of both borders share
        // key rows. Backward: a key row waits for the last query row that sees it, while more query rows start.
        const bool borders_apart = single_row || rows > 2 * kernel_rows;
        const index_t seen_by = borders_apart ? kernel_rows + kernel_rows / 2 : 2 * kernel_rows - 1;
        ring_rows = min(strip_rows, backward ? 3 * kernel_rows - 2 : seen_by);
    }

    // Strips have 2K-2 rows or more, so that at most two of them add to the gradient of a key row (see Seam).
    // Where K = 1 strips share no key row, and may be single rows.
    index_t count_strips(index_t units, index_t threads) const {
        const index_t limit = max(1, single_row ? rows : rows / max(1, 2 * kernel_rows - 2));
        // The order of the backward's sums depends on the strips, so these must not depend on the number of threads.
        if (backward) return min(ceil_div(kBackwardTasks, max(units, 1)), limit);
        // The last thread should finish soon; but the key rows around a boundary are read by two strips.
        index_t best = 1, best_cost = PTRDIFF_MAX;
        for (index_t n = 1; n <= min(limit, threads); ++n) {
            const index_t reread = n > 1 ? kernel_rows - 1 : 0;
            const index_t cost = ceil_div(units * n, threads) * (kKeyRowsPerQueryRow * ceil_div(rows, n) + reread);
            if (cost < best_cost) best = n, best_cost = cost;
        }
        return best;
    }

    index_t rpb_rows() const { return 2 * call.kernel[0] - 1; }
    index_t rpb_cols() const { return 2 * call.kernel[1] - 1; }
    index_t rpb_size() const { return rpb_rows() * rpb_cols(); }
};

}  // namespace
