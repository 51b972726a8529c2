// The bias of every lane, and back: rpb [2Kh-1, 2Kw-1] <-> vectors of query columns, one for each key. Three layouts;
// all have expand (from rpb), add (the logits' gradients of a block of queries) and reduce (to rpb's gradient; clears).
#pragma once
#include "geometry.h"

namespace {

// All ones in the first `count` lanes, zeros in the rest.
template <class C>
NAT_INLINE bits<C> first_lanes(index_t count) {
    const bits<C> lane = lane_numbers<C>();
    return (bits<C>)(lane < bits<C>{} + decltype(lane[0] + 0)(count));
}
template <class C>
NAT_INLINE vec<C> keep(vec<C> x, bits<C> mask) {
    return (vec<C>)((bits<C>)x & mask);
}

// Maps of several rows: table [row offset][key column of the window][query column].
template <class C>
struct BiasByOffset {
    static constexpr index_t L = lanes<C>;
    const TaskGeometry<C>& at;
    C* table;

    static index_t size(const Plan<C>& plan) {  // expand writes whole vectors: + L
        return (2 * plan.kernel_rows - 1) * plan.kernel_cols * plan.cols_padded + L;
    }
    C* vectors(index_t offset, index_t key) const {
        return table + (offset * at.across.kernel + key) * at.plan.cols_padded;
    }
    C* of_rows(index_t query_row, index_t key_row) const {
        return vectors(key_row - query_row + at.down.kernel - 1, 0);
    }
    index_t rpb_col(index_t query, index_t key) const {
        return at.across.start(query) - query + key + at.across.kernel - 1;
    }

    void expand(const C* rpb) const {
        const Axis& axis = at.across;
        const index_t stop = ceil_div(axis.length, L) * L;
        for (index_t r = 0; r < at.plan.rpb_rows(); ++r, rpb += at.plan.rpb_cols())
            for (index_t k = 0; k < axis.kernel; ++k) {
                C* to = vectors(r, k);
                const C inner = rpb[k + axis.kernel / 2];
                for (index_t j = 0; j < stop; j += L) store(to + j, splat(inner));
                for (index_t j = 0; j < axis.left; ++j) to[j] = rpb[rpb_col(j, k)];
                for (index_t j = axis.length - axis.right; j < axis.length; ++j) to[j] = rpb[rpb_col(j, k)];
            }
    }
    void add(index_t row, index_t j, const C* grad_logits) const {
        C* sum = of_rows(row, at.down.start(row)) + j;
        const index_t keys = at.down.kernel * at.across.kernel, step = at.plan.cols_padded;
        for (index_t k = 0; k < keys; ++k, sum += step) store(sum, load(sum) + load(grad_logits + k * L));
    }
    void reduce(C* rpb) const {
        const Axis& axis = at.across;
        const index_t stop = ceil_div(axis.length, L) * L;
        for (index_t r = 0; r < at.plan.rpb_rows(); ++r, rpb += at.plan.rpb_cols()) {
            memset(rpb, 0, at.plan.rpb_cols() * sizeof(C));
            for (index_t k = 0; k < axis.kernel; ++k) {
                C* from = vectors(r, k);
                for (index_t j = axis.length; j < stop; ++j) from[j] = 0;
                for (index_t j = 0; j < axis.left; ++j) rpb[rpb_col(j, k)] += from[j], from[j] = 0;
                for (index_t j = axis.length - axis.right; j < axis.length; ++j)
                    rpb[rpb_col(j, k)] += from[j], from[j] = 0;
                vec<C> inner = {};
                for (index_t j = 0; j < stop; j += L) inner += load(from + j), store(from + j, vec<C>{});
                rpb[k + axis.kernel / 2] += sum_lanes<C>(inner);
            }
        }
    }
};

// A single-row map that is exactly its window needs less than a table of all pairs. For one key column, the values that
// the queries of all rows take lie in one run, which starts a row earlier for a key one row further down: a band for
// each key column.
template <class C>
struct BiasBands {
    static constexpr index_t L = lanes<C>;
    const TaskGeometry<C>& at;
    C *table, *mirror;

    static index_t band_size(const Plan<C>& plan, index_t map_cols) { return plan.rpb_rows() * map_cols + L; }
    static index_t size(const Plan<C>& plan) { return plan.map_cols * band_size(plan, plan.map_cols); }
    index_t step() const { return band_size(at.plan, at.map_cols); }  // between neighbours in a row of keys
    C* band(index_t key_row, index_t key_col) const {
        return table + key_col * step() + (at.map_rows - 1 - key_row) * at.map_cols;
    }

    void expand(const C* rpb) const {
        const index_t rows = at.plan.rpb_rows(), cols = at.plan.rpb_cols();
        for (index_t i = 0; i < rows; ++i) {  // from the last row of rpb up
            const C* const from = rpb + (rows - 1 - i) * cols;
            for (index_t c = 0; c < cols; ++c) mirror[c] = from[cols - 1 - c];
            for (index_t c = 0; c < at.map_cols; ++c)
                for (index_t j = 0; j < at.map_cols; j += L)  // what runs over is overwritten by the next row
                    store(table + c * step() + i * at.map_cols + j, load(mirror + at.map_cols - 1 - c + j));
        }
    }
    void add(index_t, index_t j, const C* grad_logits) const {
        const bits<C> map = first_lanes<C>(at.across.length - j);
        const index_t rows = at.map_rows, cols = at.map_cols, step = this->step();
        for (index_t r = 0; r < rows; ++r) {
            C* sum = band(r, 0) + j;
            for (index_t c = 0; c < cols; ++c, sum += step, grad_logits += L)
                store(sum, load(sum) + keep<C>(load(grad_logits), map));
        }
    }
    void reduce(C* rpb) const {
        const index_t rows = at.plan.rpb_rows(), cols = at.plan.rpb_cols();
        memset(rpb, 0, rows * cols * sizeof(C));
        for (index_t c = 0; c < at.map_cols; ++c)
            for (index_t i = 0; i < rows; ++i) {
                const C* const from = table + c * step() + i * at.map_cols;
                C* const to = rpb + (rows - 1 - i) * cols + c + at.map_cols - 1;
                for (index_t j = 0; j < at.map_cols; ++j) to[-j] += from[j];
            }
        memset(table, 0, at.map_cols * step() * sizeof(C));
    }
};

// Other single-row maps: table [key][query], with -1e30 where the key is outside the query's window.
template <class C>
struct BiasPairs {
    static constexpr index_t L = lanes<C>;
    const TaskGeometry<C>& at;
    C* table;
    // rpb with its rows reversed, so that the queries of a row read neighbours, and a margin around it for the offsets
    // that no window has.
    C* mirror;

    static index_t size(const Plan<C>& plan) { return plan.cols * plan.cols_padded + L; }
    static index_t mirror_size(const Plan<C>& plan) { return (2 * plan.map_rows - 1) * mirror_cols(plan); }
    static index_t mirror_cols(const Plan<C>& plan) { return 2 * plan.map_cols + L; }
    size_t mirror_bytes() const { return (2 * at.map_rows - 1) * mirror_cols(at.plan) * sizeof(C); }

    C* vectors(index_t key_row, index_t key_col) const {
        return table + (key_row * at.map_cols + key_col) * at.plan.cols_padded;
    }
    // The run of mirror that queries (query_row, 0...) take for a key.
    C* run(index_t query_row, index_t key_row, index_t key_col) const {
        return mirror + (key_row - query_row + at.map_rows - 1) * mirror_cols(at.plan) + at.plan.map_cols - key_col;
    }
    C& mirrored(index_t r, index_t c) const {  // rpb [r, c]
        const index_t margin = at.map_rows - at.plan.call.kernel[0];
        return mirror[(r + margin) * mirror_cols(at.plan) + at.plan.map_cols + at.plan.call.kernel[1] - 1 - c];
    }

    void expand(const C* rpb) const {  // null: only the mask
        memset(mirror, 0, mirror_bytes());
        if (rpb)
            for (index_t r = 0; r < at.plan.rpb_rows(); ++r)
                for (index_t c = 0; c < at.plan.rpb_cols(); ++c) mirrored(r, c) = rpb[r * at.plan.rpb_cols() + c];
        for (index_t r = 0; r < at.map_rows; ++r)
            for (index_t c = 0; c < at.map_cols; ++c) expand_key(r, c);
    }
    void expand_key(index_t r, index_t c) const {
        const Axis down(at.map_rows, at.plan.call.kernel[0]), across(at.map_cols, at.plan.call.kernel[1]);
        C* to = vectors(r, c);
        for (index_t i = 0; i < down.length; ++i, to += across.length) {
            const C* from = run(i, r, c);
            // Whole vectors: what runs over is overwritten by the next row or lies beyond the map.
            for (index_t j = 0; j < across.length; j += L) store(to + j, load(from + j));
            for (index_t j = 0; j < across.length; ++j)
                if (!down.sees(i, r) || !across.sees(j, c)) to[j] = C(-1e30);
        }
    }
    void add(index_t, index_t j, const C* grad_logits) const {
        C* sum = table + j;
        const index_t keys = at.across.kernel, step = at.plan.cols_padded;
        for (index_t k = 0; k < keys; ++k, sum += step) store(sum, load(sum) + load(grad_logits + k * L));
    }
    void reduce(C* rpb) const {
        memset(mirror, 0, mirror_bytes());
        for (index_t r = 0; r < at.map_rows; ++r)
            for (index_t c = 0; c < at.map_cols; ++c) {
                C* const from = vectors(r, c);
                for (index_t i = 0; i < at.map_rows; ++i)
                    for (index_t j = 0; j < at.map_cols; j += L) {
                        C* const to = run(i, r, c) + j;
                        const vec<C> x = load(from + i * at.map_cols + j);
                        store(to, load(to) + keep<C>(x, first_lanes<C>(at.map_cols - j)));
                    }
                memset(from, 0, at.plan.cols_padded * sizeof(C));
            }
        for (index_t r = 0; r < at.plan.rpb_rows(); ++r)
            for (index_t c = 0; c < at.plan.rpb_cols(); ++c) rpb[r * at.plan.rpb_cols() + c] = mirrored(r, c);
    }
};

// Sizes that serve any task of the plan: its dilation groups may need different layouts.
template <class C>
index_t bias_table_size(const Plan<C>& plan) {
    if (!plan.single_row) return BiasByOffset<C>::size(plan);
    return max(BiasBands<C>::size(plan), BiasPairs<C>::size(plan));
}
template <class C>
index_t bias_mirror_size(const Plan<C>& plan) {
    return plan.single_row ? BiasPairs<C>::mirror_size(plan) + lanes<C> : 0;  // expand reads whole vectors
}

// Calls body with the task's layout of bias.
template <class C, class Body>
NAT_INLINE void visit_bias(const TaskGeometry<C>& at, C* table, C* mirror, const Body& body) {
    if (!at.plan.single_row) body(BiasByOffset<C>{at, table});
    else if (at.map_is_window()) body(BiasBands<C>{at, table, mirror});
    else body(BiasPairs<C>{at, table, mirror});
}

// Adds up the gradients of rpb that the tasks left, [task][rpb_size], in the order of the tasks.
template <class C>
void sum_grad_rpb(const Plan<C>& plan, const C* grad_rpb) {
    const index_t size = plan.rpb_size();
    memset(plan.call.grad_rpb, 0, plan.call.heads * size * sizeof(C));
    for (index_t task = 0; task < plan.tasks; ++task) {
        C* const sum = (C*)plan.call.grad_rpb + task / plan.strips % plan.call.heads * size;
        for (index_t i = 0; i < size; ++i) sum[i] += grad_rpb[task * size + i];
    }
}

}  // namespace
