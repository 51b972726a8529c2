// The sweep of a task down its key rows, whatever its operands are held as: what a worker does at each step, in which
// order, and what of the work is the same for all workers.
#pragma once
#include "prefetch.h"
#include "scratch.h"

namespace {

// How far the sweep of a task has come. Each stage covers the rows up to a bound that only grows.
template <class C>
struct Sweep {
    const TaskGeometry<C>& at;
    index_t key_row, key_end;  // the key row of this step; the end of the strip's key rows
    index_t queries_loaded;
    index_t queries_completed, queries_complete;  // done already; after this step: those that see no further key row
    index_t keys_completed, keys_complete;        // the same; backward only: those that no further query row sees
    index_t oldest_query;                         // the first that may still see the key rows to be completed

    explicit Sweep(const TaskGeometry<C>& at)
        : at(at),
          key_row(at.down.start(at.first_row())),
          key_end(at.down.end(at.end_row() - 1)),
          queries_loaded(at.first_row()),
          queries_completed(at.first_row()),
          queries_complete(at.first_row()),
          keys_completed(key_row),
          keys_complete(key_row),
          oldest_query(at.first_row()) {}

    bool next_query_sees_key_row() const {
        return queries_loaded < at.end_row() && at.down.start(queries_loaded) <= key_row;
    }
    // Once the query rows that see key_row are loaded: what this step completes.
    void plan_completions() {
        while (queries_complete < queries_loaded && at.down.end(queries_complete) - 1 == key_row) ++queries_complete;
        if (!at.plan.backward) return;
        keys_complete = queries_complete == at.end_row() ? key_row + 1 : at.down.start(queries_complete);
    }
};

// One thread's work on a task. E is what tensors hold, C what sums are held in, Memory the worker's buffers. A worker
// derives from this and has
//   load_query_row(at, row), load_key_row(at, row)  from the caller's tensors
//   multiply(at, row, begin, end, with_bias)        a key row with the query rows [begin, end)
//   complete_query_row(at, row)                     whose last key row has been multiplied
//   complete_key_row(at, row, begin, end, seams)    gradients of a key row that query rows [begin, end) see
template <class E, class C, class Memory, class Worker>
struct SweepWorker : Memory {
    static constexpr index_t L = lanes<C>;
    using Memory::plan;
    using Memory::weights;
    const nat_na2d_call& call;
    index_t bias_head = -1, bias_map_rows = -1, bias_map_cols = -1;  // what `bias` was expanded for
    Prefetch<E> prefetch;

    SweepWorker(const Plan<C>& plan, Arena& arena) : Memory(plan, arena), call(plan.call), prefetch(plan.dim) {}

    Worker& self() { return static_cast<Worker&>(*this); }

    // One key row against the query rows [begin, end): lanes are query columns. Queries and keys have `depth` operands,
    // with room for `depth_padded`.
    template <class O>
    void products(const TaskGeometry<C>& at, const O* queries, const O* keys, index_t depth, index_t depth_padded,
                  C scale, bool with_bias, C* out, index_t key_row, index_t begin, index_t end) {
        Dots<C, O> tile;
        tile.depth = depth;
        tile.scale = scale;
        if (plan.single_row) single_row_products(at, queries, keys, depth_padded, with_bias, out, tile);
        else row_products(at, queries, keys, depth_padded, with_bias, out, key_row, begin, end, tile);
    }

    template <class O>
    void single_row_products(const TaskGeometry<C>& at, const O* queries, const O* keys, index_t depth_padded,
                             bool with_bias, C* out, Dots<C, O>& tile) {
        // The bias of consecutive keys is evenly spaced: with bands, only within a row of the map.
        const bool bands = at.map_is_window();
        const BiasBands<C> in_bands{at, this->bias, this->mirror};
        const BiasPairs<C> in_pairs{at, this->bias, this->mirror};
        const index_t runs = bands ? at.map_rows : 1, run_keys = at.across.kernel / runs;
        tile.bias_step = bands ? in_bands.step() : plan.cols_padded;
        tile.key_step = depth_padded;
        tile.key_depth_step = 1;
        const Cut cut(ceil_div(at.across.length, L), kDotRows);
        for (index_t part = 0; part < cut.parts; ++part) {
            const index_t block = cut.begin(part), n = cut.begin(part + 1) - block;
            for (index_t i = 0; i < n; ++i) {
                tile.query[i] = queries + (block + i) * depth_padded * L;
                tile.out[i] = weights(out, 0, block + i);
            }
            tile.key = keys;
            for (index_t run = 0; run < runs; ++run) {
                const C* const vectors = bands ? in_bands.band(run, 0) : in_pairs.vectors(0, 0);
                for (index_t i = 0; i < n; ++i) tile.bias[i] = with_bias ? vectors + (block + i) * L : nullptr;
                prefetch.fetch();
                dots<Keys::Splat>(tile, n, run_keys);
                tile.key += run_keys * depth_padded;
                for (index_t i = 0; i < n; ++i) tile.out[i] += run_keys * L;
            }
        }
    }

    template <class O>
    void row_products(const TaskGeometry<C>& at, const O* queries, const O* keys, index_t depth_padded, bool with_bias,
                      C* out, index_t key_row, index_t begin, index_t end, Dots<C, O>& tile) {
        const Axis& across = at.across;
        const BiasByOffset<C> by_offset{at, this->bias};
        tile.bias_step = plan.cols_padded;
        tile.key_step = 1;
        tile.key_depth_step = this->transposed_cols;
        for (index_t j = 0; j < across.length; j += L) {
            const auto& block = this->block_keys[j / L];
            tile.from = block.from;
            tile.key = keys + block.start;
            const Cut cut(end - begin, kDotRows);
            for (index_t part = 0; part < cut.parts; ++part) {
                const index_t first = begin + cut.begin(part), n = begin + cut.begin(part + 1) - first;
                for (index_t i = 0; i < n; ++i) {
                    const index_t row = first + i, key = (key_row - at.down.start(row)) * across.kernel;
                    tile.query[i] = queries + (this->query_slot[row] * plan.cols_padded + j) * depth_padded;
                    tile.out[i] = weights(out, row, j / L) + key * L;
                    tile.bias[i] = with_bias ? by_offset.of_rows(row, key_row) + j : nullptr;
                }
                prefetch.fetch();
                if (block.shifted) dots<Keys::Shifted>(tile, n, across.kernel);
                else dots<Keys::Permuted>(tile, n, across.kernel);
            }
        }
    }

    // Calls run(begin, end) for pieces of [begin, end) that fit a tile and do not straddle a multiple of `unit`.
    template <class Run>
    void tiles(index_t begin, index_t end, index_t unit, Run run) const {
        const index_t limit = min(kBlendMax, plan.kernel_cols + 1);
        while (begin < end) {
            const index_t stop = min(end, (begin / unit + 1) * unit);
            const Cut cut(stop - begin, limit);
            for (index_t part = 0; part < cut.parts; ++part) run(begin + cut.begin(part), begin + cut.begin(part + 1));
            begin = stop;
        }
    }

    // The queries of a row that see keys [key, key_end), as pieces that lie in one block of weights each; returns their
    // number.
    index_t pieces_that_see(const Axis& across, index_t key, index_t key_end, index_t block_step) {
        const index_t inner = across.length - across.right, last_start = across.length - across.kernel;
        index_t count = 0;
        // Queries [from, to), of which `origin` sees `key` in column `column` of its window.
        const auto add = [&](index_t from, index_t to, index_t origin, index_t column, bool band) {
            while (from < to) {
                const index_t block = from / L, stop = min(to, (block + 1) * L);
                this->pieces[count++] = {origin * plan.dim_padded,
                                         block * block_step + column * L + origin - block * L,
                                         {band ? 1 - L : 1, L, from - origin, stop - origin, band}};
                from = stop;
            }
        };
        if (key < across.kernel) add(0, across.left, 0, key, false);
        const index_t first = key - across.kernel / 2;  // leftmost query whose unshifted window holds the key
        const index_t end = first + across.kernel + key_end - key - 1;
        add(max(first, across.left), min(end, inner), first, across.kernel - 1, true);
        if (key >= last_start) add(inner, across.length, inner, key - last_start, false);
        return count;
    }

    // out[query] = scale * sum of what segments of its window's key rows give: lanes are head_dim.
    template <class O>
    void gather_segments(const TaskGeometry<C>& at, const Segment<O>* segments, index_t count, Reach& reach,
                         index_t block_step, const C* scale, index_t scale_step) {
        const Axis& across = at.across;
        Blend<O> tile{segments, count, 0, 0, across.kernel, plan.dim_padded};
        const auto run = [&](index_t begin, index_t end, bool band) {
            reach = {L, band ? 1 - L : 1, 0, across.kernel + (band ? end - begin - 1 : 0), band};
            tile.row = across.start(begin) * plan.dim_padded;
            tile.weight = begin / L * block_step + begin % L;
            prefetch.fetch();
            blend(tile, end - begin, scale + begin * scale_step, this->out + begin * plan.dim_padded);
        };
        const index_t inner = across.length - across.right;
        tiles(0, across.left, L, [&](index_t begin, index_t end) { run(begin, end, false); });
        tiles(across.left, inner, L, [&](index_t begin, index_t end) { run(begin, end, true); });
        tiles(inner, across.length, L, [&](index_t begin, index_t end) { run(begin, end, false); });
    }

    // Calls run(key, key_end) for tiles of a row of keys. A tile sees all of a border's queries or none, so none may
    // straddle the edge of a border's window.
    template <class Run>
    void scatter_tiles(const Axis& across, const Run& run) {
        const index_t last_start = across.length - across.kernel;
        const index_t a = min(across.kernel, last_start), b = min(max(across.kernel, last_start), across.length);
        tiles(0, a, across.length, run);
        tiles(a, b, across.length, run);
        tiles(b, across.length, across.length, run);
    }

    // Unnormalised probabilities and gradients of probabilities become probabilities and gradients of logits.
    void differentiate_softmax(const TaskGeometry<C>& at, index_t row, index_t j, vec<C> inverse) {
        C* const p = weights(this->logits, row, j / L);
        C* const dp = weights(this->grad_logits, row, j / L);
        softmax_backward(p, dp, at.window(), inverse);
        if (!call.grad_rpb) return;
        visit_bias(at, this->grad_bias, this->mirror, [&](const auto& grad_bias) { grad_bias.add(row, j, dp); });
    }

    // `out` is a key row's gradient, or this strip's share of it.
    void write_gradient(const TaskGeometry<C>& at, const nat_tensor& grad, index_t row, C* share) {
        if (share) memcpy(share, this->out, at.across.length * plan.dim_padded * sizeof(C));
        else at.template store_row<E>(grad, row, this->out);
    }

    // What this step will write, and what the next one, of this task or the next, will read.
    void plan_prefetch(const Sweep<C>& sweep, index_t task) {
        prefetch.clear();
        if (!plan.exceeds_cache) return;
        const auto& at = sweep.at;
        for (index_t row = sweep.queries_completed; row < sweep.queries_complete; ++row)
            prefetch.add_row(at, plan.backward ? call.grad_query : call.out, row);
        for (index_t row = sweep.keys_completed; row < sweep.keys_complete; ++row) {
            prefetch.add_row(at, call.grad_key, row);
            prefetch.add_row(at, call.grad_value, row);
        }
        if (sweep.key_row + 1 < sweep.key_end) {
            const index_t begin = sweep.queries_loaded;
            return prefetch_reads(at, sweep.key_row + 1, begin, min(begin + 1, at.end_row()));
        }
        if (task + 1 == plan.tasks) return;
        const TaskGeometry<C> next(plan, task + 1);
        const index_t begin = next.first_row();
        index_t end = begin;
        while (end < next.end_row() && next.down.start(end) == next.down.start(begin)) ++end;
        if (end > begin) prefetch_reads(next, next.down.start(begin), begin, end);
    }
    void prefetch_reads(const TaskGeometry<C>& at, index_t key_row, index_t begin, index_t end) {
        prefetch.add_row(at, call.key, key_row);
        prefetch.add_row(at, call.value, key_row);
        for (index_t row = begin; row < end; ++row) {
            prefetch.add_row(at, call.query, row);
            if (plan.backward) prefetch.add_row(at, call.grad_out, row);
        }
    }

    void step(Sweep<C>& sweep, index_t task, bool with_bias, C* seams) {
        const auto& at = sweep.at;
        const index_t row = sweep.key_row;
        for (; sweep.next_query_sees_key_row(); ++sweep.queries_loaded) self().load_query_row(at, sweep.queries_loaded);
        self().load_key_row(at, row);
        sweep.plan_completions();
        plan_prefetch(sweep, task);

        const index_t begin = sweep.queries_completed, end = sweep.queries_loaded;
        self().multiply(at, row, begin, end, with_bias);
        for (index_t& query = sweep.queries_completed; query < sweep.queries_complete; ++query)
            self().complete_query_row(at, query);
        for (index_t& key = sweep.keys_completed; key < sweep.keys_complete; ++key) {
            index_t& oldest = sweep.oldest_query;
            while (at.down.end(oldest) <= key) ++oldest;
            index_t query_end = oldest;
            while (query_end < sweep.queries_completed && at.down.start(query_end) <= key) ++query_end;
            self().complete_key_row(at, key, oldest, query_end, seams);
        }
    }

    void sweep(index_t task, C* seams, C* grad_rpb) {
        const TaskGeometry<C> at(plan, task);
        if (grad_rpb) grad_rpb += task * plan.rpb_size();
        if (at.first_row() == at.end_row()) {
            if (grad_rpb) memset(grad_rpb, 0, plan.rpb_size() * sizeof(C));
            return;
        }
        const bool masked = plan.single_row && !at.map_is_window();
        const bool with_bias = call.rpb || masked;
        if (with_bias) expand_bias(at);
        this->find_block_keys(at.across);
        for (Sweep<C> sweep(at); sweep.key_row < sweep.key_end; ++sweep.key_row) step(sweep, task, with_bias, seams);
        if (!grad_rpb) return;
        visit_bias(at, this->grad_bias, this->mirror, [&](const auto& grad_bias) { grad_bias.reduce(grad_rpb); });
    }

    void expand_bias(const TaskGeometry<C>& at) {
        if (bias_head == at.head && bias_map_rows == at.map_rows && bias_map_cols == at.map_cols) return;
        const C* const rpb = call.rpb ? (const C*)call.rpb + at.head * plan.rpb_size() : nullptr;
        visit_bias(at, this->bias, this->mirror, [&](const auto& bias) { bias.expand(rpb); });
        bias_head = at.head, bias_map_rows = at.map_rows, bias_map_cols = at.map_cols;
    }
};

}  // namespace
