// What all tasks of a call share: sizes, and into how many tasks the work is cut.
#pragma once
#include "abi.h"
#include "simd.h"

namespace {

// Not std::min and std::max: one copy of an inline function may serve objects that were built for different CPUs.
index_t min(index_t a, index_t b) { return a < b ? a : b; }
index_t max(index_t a, index_t b) { return a > b ? a : b; }
index_t ceil_div(index_t a, index_t b) { return (a + b - 1) / b; }

// A map of up to 4/3 as many tokens as its window is computed as a single row. @SINGLE_ROW@
constexpr index_t kSingleRowNumerator = 4, kSingleRowDenominator = 3;
constexpr index_t kSingleRowMaxTokens = 256;

// @CACHE@
constexpr index_t kCacheBytes = index_t(4) << 20;
constexpr index_t kForwardTensors = 4;   // query, key, value, output
constexpr index_t kBackwardTensors = 7;  // query, key, value, gradient of the output, gradients of query, key, value

// @TASKS@
constexpr index_t kBackwardTasks = 16;

// @COST@
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
    index_t count_strips(index_t units, index_t threads) const {
        const index_t limit = max(1, single_row ? rows : rows / (2 * kernel_rows - 2));
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
