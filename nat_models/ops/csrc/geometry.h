// Where a task lies: its windows, its tokens in the caller's tensors, and the seams that it shares with its neighbours.
#pragma once
#include "half.h"
#include "plan.h"

namespace {

// One axis of a dilation group. Windows are shifted inward at the borders, so the first `left` positions share one
// window, the last `right` another, and those between step along.
struct Axis {
    index_t length, kernel, left, right;
    Axis(index_t length, index_t kernel)
        : length(length),
          kernel(kernel),
          left(length == kernel ? length : kernel / 2 + 1),
          right(length == kernel ? 0 : kernel / 2 + 1) {}
    index_t start(index_t i) const { return max(0, min(i - kernel / 2, length - kernel)); }
    index_t end(index_t i) const { return start(i) + kernel; }
    bool sees(index_t i, index_t key) const { return key >= start(i) && key < end(i); }
};

// A task's head, image, dilation group and query rows.
template <class C>
struct TaskGeometry {
    static constexpr index_t L = lanes<C>;
    const Plan<C>& plan;
    index_t unit, strip, head, image, group_row, group_col, map_rows, map_cols;
    Axis down, across;  // as the sweep sees them

    TaskGeometry(const Plan<C>& plan, index_t unit, index_t strip)
        : plan(plan), unit(unit), strip(strip), down(1, 1), across(1, 1) {
        const auto& call = plan.call;
        // Heads innermost: neighbouring tasks read neighbouring memory, which the hardware has prefetched by then.
        head = unit % call.heads;
        image = unit / call.heads / plan.groups;
        const index_t group = unit / call.heads % plan.groups;
        group_row = group / call.dilation[1];
        group_col = group % call.dilation[1];
        map_rows = ceil_div(call.height - group_row, call.dilation[0]);
        map_cols = ceil_div(call.width - group_col, call.dilation[1]);
        down = plan.single_row ? Axis(1, 1) : Axis(map_rows, plan.kernel_rows);
        across = plan.single_row ? Axis(map_rows * map_cols, map_rows * map_cols) : Axis(map_cols, plan.kernel_cols);
    }
    TaskGeometry(const Plan<C>& plan, index_t task) : TaskGeometry(plan, task / plan.strips, task % plan.strips) {}

    index_t first_row() const { return min(strip * plan.strip_rows, down.length); }
    index_t window() const { return down.kernel * across.kernel; }  // keys of a query, as the sweep sees them
    index_t end_row() const { return min((strip + 1) * plan.strip_rows, down.length); }
    bool map_is_window() const { return map_rows == plan.call.kernel[0] && map_cols == plan.call.kernel[1]; }

    // Elements between neighbours of this dilation group.
    index_t row_step(const nat_tensor& t) const { return t.stride[1] * plan.call.dilation[0]; }
    index_t col_step(const nat_tensor& t) const { return t.stride[2] * plan.call.dilation[1]; }

    template <class E>
    E* token(const nat_tensor& t, index_t row) const {
        return (E*)t.data + image * t.stride[0] + group_row * t.stride[1] + row * row_step(t) +
               group_col * t.stride[2] + head * t.stride[3];
    }

    // Where load_row writes: either or both of rows [columns][dim_padded] and transposed, where element i of column j
    // is at i * depth_step + j / L * block_step + j % L.
    struct RowBuffers {
        C *rows, *transposed;
        index_t depth_step, block_step;
    };

    // Reads a row of tokens, padded with zeros to dim_padded and with any finite numbers to whole blocks of L columns.
    template <class E>
    void load_row(const nat_tensor& t, index_t row, C scale, const RowBuffers& to) const {
        each_block<E>(t, row,
                      [&](const E* const(&from)[L], index_t j) NAT_LAMBDA_INLINE { load_block(from, scale, to, j); });
    }

    // Calls body(tokens, column) for each block of L columns of a row.
    template <class E, class Body>
    NAT_INLINE void each_block(const nat_tensor& t, index_t row, const Body& body) const {
        const index_t down_step = row_step(t), step = col_step(t), cols = across.length;
        const E* p = token<const E>(t, row);
        index_t col = 0;
        for (index_t j = 0; j < cols; j += L) {
            const E* from[L];
            for (index_t l = 0; l < L; ++l) {
                from[l] = p;
                if (j + l + 1 >= cols) continue;  // lanes beyond the map repeat its last token
                p += step;
                if (plan.single_row && ++col == map_cols) col = 0, p += down_step - map_cols * step;
            }
            body(from, j);
        }
    }

    template <class E>
    NAT_INLINE void load_block(const E* const (&from)[L], C scale, const RowBuffers& to, index_t j) const {
        const index_t dim = plan.dim, dim_padded = plan.dim_padded;
        for (index_t i = 0; i < dim_padded; i += L) {
            vec<C> x[L];
            if (i + L <= dim) {
                NAT_UNROLL(16)
                for (index_t l = 0; l < L; ++l) x[l] = widen(from[l] + i) * scale;
            } else {
                for (index_t l = 0; l < L; ++l) x[l] = widen_some(from[l] + i, dim - i) * scale;
            }
            if (to.rows) {
                NAT_UNROLL(16)
                for (index_t l = 0; l < L; ++l) store(to.rows + (j + l) * dim_padded + i, x[l]);
            }
            if (!to.transposed) continue;
            transpose<C>(x);
            C* p = to.transposed + j / L * to.block_step + i * to.depth_step;
            NAT_UNROLL(16)
            for (index_t l = 0; l < L; ++l, p += to.depth_step) store(p, x[l]);
        }
    }

    template <class E>
    void store_row(const nat_tensor& t, index_t row, const C* from) const {
        const index_t lines = plan.single_row ? map_rows : 1;
        for (index_t i = 0; i < lines; ++i)
            store_tokens(from + i * map_cols * plan.dim_padded, plan.dim_padded, map_cols, plan.dim, col_step(t),
                         token<E>(t, row + i));
    }
};

// Gradients of the key rows that two strips share: what the strip above a boundary adds to them, and the strip below.
template <class C>
struct Seam {
    struct Share {
        C *key, *value;  // each [kernel_rows][cols][dim_padded]
    };
    Share above, below;

    static index_t size(const Plan<C>& plan) { return 4 * plan.seam_size; }
    Seam(const Plan<C>& plan, C* seams, index_t unit, index_t boundary) {
        const index_t n = plan.seam_size;
        C* const base = seams + (unit * (plan.strips - 1) + boundary) * size(plan);
        above = {base, base + n};
        below = {base + 2 * n, base + 3 * n};
    }
};

// Where a strip leaves its share of a key row's gradients; nulls where no other strip adds to that row.
template <class C>
typename Seam<C>::Share share_of_row(const TaskGeometry<C>& at, C* seams, index_t row) {
    const auto in_share = [&](typename Seam<C>::Share share, index_t boundary_row) {
        const index_t offset = (row - at.down.start(boundary_row)) * at.across.length * at.plan.dim_padded;
        return typename Seam<C>::Share{share.key + offset, share.value + offset};
    };
    const index_t first = at.first_row(), end = at.end_row();
    if (first > 0 && row < at.down.end(first - 1))
        return in_share(Seam<C>(at.plan, seams, at.unit, at.strip - 1).below, first);
    if (end < at.down.length && row >= at.down.start(end))
        return in_share(Seam<C>(at.plan, seams, at.unit, at.strip).above, end);
    return {nullptr, nullptr};
}

// Adds up what the strips above and below a boundary contributed to the key rows that they share.
template <class E, class C>
void merge_seam(const Plan<C>& plan, C* seams, index_t unit, index_t boundary) {
    const TaskGeometry<C> at(plan, unit, boundary);
    const index_t end = at.end_row();
    if (end == at.down.length) return;
    const Seam<C> seam(plan, seams, unit, boundary);
    const index_t size = at.across.length * plan.dim_padded, top = at.down.start(end);
    const auto merge = [&](const nat_tensor& grad, C* above, const C* below) {
        for (index_t row = top; row < at.down.end(end - 1); ++row, above += size, below += size) {
            for (index_t n = 0; n < size; n += lanes<C>) store(above + n, load(above + n) + load(below + n));
            at.template store_row<E>(grad, row, above);
        }
    };
    merge(plan.call.grad_key, seam.above.key, seam.below.key);
    merge(plan.call.grad_value, seam.above.value, seam.below.value);
}

}  // namespace
