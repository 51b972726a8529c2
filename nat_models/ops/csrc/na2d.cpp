// Neighborhood attention, forward and backward, for one instruction set (compiled once for each).
//
// A task is a strip of query rows of one head of one image. It sweeps down the key rows. Each is transposed once and
// multiplied with every query row that attends to it. A query row whose last key row has passed is completed: softmax,
// then values. In the backward, a key row whose last query row has passed gets its gradient. Logits live in a ring of a
// few query rows. Tasks follow from the sizes alone and partial sums are added in a fixed order, so the result does not
// depend on the number of threads.
#include "isa.h"
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

// One thread's work on a task. E is what tensors hold, C what is computed with.
template <class E, class C>
struct Worker : Buffers<C> {
    static constexpr index_t L = lanes<C>;
    using Buffers<C>::plan;
    using Buffers<C>::query_row;
    using Buffers<C>::weights;
    const nat_na2d_call& call;
    index_t bias_head = -1, bias_map_rows = -1, bias_map_cols = -1;  // what `bias` was expanded for
    Prefetch<E> prefetch;

    Worker(const Plan<C>& plan, Arena& arena) : Buffers<C>(plan, arena), call(plan.call), prefetch(plan.dim) {}

    // One key row against the query rows [begin, end): lanes are query columns.
    void products(const TaskGeometry<C>& at, C* queries, const C* keys, bool with_bias, C* out, index_t key_row,
                  index_t begin, index_t end) {
        if (plan.single_row) single_row_products(at, queries, keys, with_bias, out);
        else row_products(at, queries, keys, with_bias, out, key_row, begin, end);
    }

    void single_row_products(const TaskGeometry<C>& at, const C* queries, const C* keys, bool with_bias, C* out) {
        // The bias of consecutive keys is evenly spaced: with bands, only within a row of the map.
        const bool bands = at.map_is_window();
        const BiasBands<C> in_bands{at, this->bias, this->mirror};
        const BiasPairs<C> in_pairs{at, this->bias, this->mirror};
        const index_t runs = bands ? at.map_rows : 1, run_keys = at.across.kernel / runs;
        Dots<C> tile;
        tile.depth = plan.dim;
        tile.bias_step = bands ? in_bands.step() : plan.cols_padded;
        tile.key_step = plan.dim_padded;
        tile.key_depth_step = 1;
        const Cut cut(ceil_div(at.across.length, L), kDotRows);
        for (index_t part = 0; part < cut.parts; ++part) {
            const index_t block = cut.begin(part), n = cut.begin(part + 1) - block;
            for (index_t i = 0; i < n; ++i) {
                tile.query[i] = queries + (block + i) * plan.dim_padded * L;
                tile.out[i] = weights(out, 0, block + i);
            }
            tile.key = keys;
            for (index_t run = 0; run < runs; ++run) {
                const C* const vectors = bands ? in_bands.band(run, 0) : in_pairs.vectors(0, 0);
                for (index_t i = 0; i < n; ++i) tile.bias[i] = with_bias ? vectors + (block + i) * L : nullptr;
                prefetch.fetch();
                dots<Keys::Splat>(tile, n, run_keys);
                tile.key += run_keys * plan.dim_padded;
                for (index_t i = 0; i < n; ++i) tile.out[i] += run_keys * L;
            }
        }
    }

    void row_products(const TaskGeometry<C>& at, C* queries, const C* keys, bool with_bias, C* out, index_t key_row,
                      index_t begin, index_t end) {
        const Axis& across = at.across;
        const BiasByOffset<C> by_offset{at, this->bias};
        Dots<C> tile;
        tile.depth = plan.dim;
        tile.bias_step = plan.cols_padded;
        tile.key_step = 1;
        tile.key_depth_step = this->transposed_cols;
        for (index_t j = 0; j < across.length; j += L) {
            const index_t last = min(j + L, across.length) - 1, start = across.start(j);
            const bool shifted = across.start(last) - start == last - j;
            for (index_t l = 0; l < L; ++l) tile.from[l] = across.start(min(j + l, last)) - start;
            tile.key = keys + start;
            const Cut cut(end - begin, kDotRows);
            for (index_t part = 0; part < cut.parts; ++part) {
                const index_t first = begin + cut.begin(part), n = begin + cut.begin(part + 1) - first;
                for (index_t i = 0; i < n; ++i) {
                    const index_t row = first + i, key = (key_row - at.down.start(row)) * across.kernel;
                    tile.query[i] = query_row(queries, row) + j * plan.dim_padded;
                    tile.out[i] = weights(out, row, j / L) + key * L;
                    tile.bias[i] = with_bias ? by_offset.of_rows(row, key_row) + j : nullptr;
                }
                prefetch.fetch();
                if (shifted) dots<Keys::Shifted>(tile, n, across.kernel);
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

    // out[query] = scale * sum of its window's token rows, weighted: lanes are head_dim.
    void gather(const TaskGeometry<C>& at, index_t row, C* weight_ring, C* token_ring, const C* scale,
                index_t scale_step) {
        const Axis& across = at.across;
        const C* const weight = weights(weight_ring, row, 0);
        Reach reach;
        for (index_t k = 0; k < at.down.kernel; ++k)
            this->segments[k] = {this->key_row(token_ring, at.down.start(row) + k), weight + k * across.kernel * L,
                                 &reach};
        Blend<C> tile{this->segments, at.down.kernel, 0, 0, across.kernel, plan.dim_padded};
        const index_t block_step = plan.kernel_rows * plan.kernel_cols * L;
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

    // The queries of a row that see keys [key, key_end), as pieces that lie in one block each; returns their number.
    index_t pieces_that_see(const Axis& across, index_t key, index_t key_end) {
        const index_t inner = across.length - across.right, last_start = across.length - across.kernel;
        const index_t block_step = plan.kernel_rows * plan.kernel_cols * L;
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

    // out[key] = sum of the query rows [begin, end) that attend to it, weighted: the transpose of gather.
    void scatter(const TaskGeometry<C>& at, index_t key_row, index_t begin, index_t end, C* weight_ring,
                 C* token_ring) {
        const Axis& across = at.across;
        const auto run = [&](index_t key, index_t key_end) {
            const index_t count = pieces_that_see(across, key, key_end);
            Segment<C>* segment = this->segments;
            for (index_t row = begin; row < end; ++row) {
                const C* const tokens = query_row(token_ring, row);
                const C* const weight =
                    weights(weight_ring, row, 0) + (key_row - at.down.start(row)) * across.kernel * L;
                for (index_t i = 0; i < count; ++i) {
                    const auto& piece = this->pieces[i];
                    *segment++ = {tokens + piece.token, weight + piece.weight, &piece.reach};
                }
            }
            const Blend<C> tile{this->segments, segment - this->segments, 0, 0, across.kernel, plan.dim_padded};
            prefetch.fetch();
            blend(tile, key_end - key, this->ones, this->out + key * plan.dim_padded);
        };
        // A tile sees all of a border's queries or none, so none may straddle the edge of a border's window.
        const index_t last_start = across.length - across.kernel;
        const index_t a = min(across.kernel, last_start), b = min(max(across.kernel, last_start), across.length);
        tiles(0, a, across.length, run);
        tiles(a, b, across.length, run);
        tiles(b, across.length, across.length, run);
    }

    void complete_query_row(const TaskGeometry<C>& at, index_t row) {
        const index_t keys = at.down.kernel * at.across.kernel;
        for (index_t j = 0; j < at.across.length; j += L) {
            C* const p = weights(this->logits, row, j / L);
            prefetch.fetch();
            const vec<C> inverse = softmax(p, keys);
            store(this->inverse + j, inverse);
            if (!plan.backward) continue;
            C* const dp = weights(this->grad_logits, row, j / L);
            softmax_backward(p, dp, keys, inverse);
            if (!call.grad_rpb) continue;
            visit_bias(at, this->grad_bias, this->mirror, [&](const auto& grad_bias) { grad_bias.add(row, j, dp); });
        }
        if (plan.backward) {
            gather(at, row, this->grad_logits, this->key, this->scales, 0);
            at.template store_row<E>(call.grad_query, row, this->out);
        } else {
            gather(at, row, this->logits, this->value, this->inverse, 1);
            at.template store_row<E>(call.out, row, this->out);
        }
    }

    // The gradients of a key row that query rows [begin, end) of this strip see.
    void complete_key_row(const TaskGeometry<C>& at, index_t row, index_t begin, index_t end, C* seams) {
        const auto share = share_of_row(at, seams, row);
        const auto write = [&](const nat_tensor& grad, C* share) {
            if (share) memcpy(share, this->out, at.across.length * plan.dim_padded * sizeof(C));
            else at.template store_row<E>(grad, row, this->out);
        };
        scatter(at, row, begin, end, this->grad_logits, this->query);
        write(call.grad_key, share.key);
        scatter(at, row, begin, end, this->logits, this->grad_out);
        write(call.grad_value, share.value);
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

    void load_query_row(const TaskGeometry<C>& at, index_t row) {
        const index_t block_step = plan.dim_padded * L;
        C* const rows = plan.backward ? query_row(this->query, row) : nullptr;
        at.template load_row<E>(call.query, row, C(call.scale),
                                {rows, query_row(this->query_transposed, row), L, block_step});
        if (!plan.backward) return;
        at.template load_row<E>(
            call.grad_out, row, 1,
            {query_row(this->grad_out, row), query_row(this->grad_out_transposed, row), L, block_step});
    }

    void step(Sweep<C>& sweep, index_t task, bool with_bias, C* seams) {
        const auto& at = sweep.at;
        const index_t row = sweep.key_row;
        for (; sweep.next_query_sees_key_row(); ++sweep.queries_loaded) load_query_row(at, sweep.queries_loaded);
        // Token rows where lanes are head_dim or (single_row) share a key; transposed where lanes are queries.
        C* const keys = plan.single_row || plan.backward ? this->key_row(this->key, row) : nullptr;
        C* const values = plan.single_row || !plan.backward ? this->key_row(this->value, row) : nullptr;
        C* const keys_transposed = plan.single_row ? nullptr : this->key_transposed;
        C* const values_transposed = plan.single_row || !plan.backward ? nullptr : this->value_transposed;
        at.template load_row<E>(call.key, row, 1, {keys, keys_transposed, this->transposed_cols, L});
        at.template load_row<E>(call.value, row, 1, {values, values_transposed, this->transposed_cols, L});
        sweep.plan_completions();
        plan_prefetch(sweep, task);

        const index_t begin = sweep.queries_completed, end = sweep.queries_loaded;
        products(at, this->query_transposed, plan.single_row ? keys : keys_transposed, with_bias, this->logits, row,
                 begin, end);
        if (plan.backward)
            products(at, this->grad_out_transposed, plan.single_row ? values : values_transposed, false,
                     this->grad_logits, row, begin, end);
        for (index_t& query = sweep.queries_completed; query < sweep.queries_complete; ++query)
            complete_query_row(at, query);
        for (index_t& key = sweep.keys_completed; key < sweep.keys_complete; ++key) {
            index_t& oldest = sweep.oldest_query;
            while (at.down.end(oldest) <= key) ++oldest;
            index_t query_end = oldest;
            while (query_end < sweep.queries_completed && at.down.start(query_end) <= key) ++query_end;
            complete_key_row(at, key, oldest, query_end, seams);
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

template <class Body>
bool parallel(nat_parallel_for run, index_t count, const Body& body) {
    const auto trampoline = [](int64_t begin, int64_t end, void* context) { (*(const Body*)context)(begin, end); };
    if (run && count > 1) return run(0, count, 1, trampoline, (void*)&body) == 0;
    if (count > 0) body(0, count);
    return true;
}

template <class E>
int32_t na2d(const nat_na2d_call& call, bool backward, nat_parallel_for run, index_t threads) {
    using C = typename Compute<E>::type;
    const Plan<C> plan(call, backward, threads);
    if (Buffers<C>::elements(plan) > kMaxElements) return NAT_NO_MEMORY;
    Arena size;
    Buffers<C>(plan, size);

    const index_t units = plan.tasks / plan.strips, boundaries = backward ? plan.strips - 1 : 0;
    const index_t seams_count = units * boundaries * Seam<C>::size(plan);
    const index_t rpb_count = backward && call.grad_rpb ? plan.tasks * plan.rpb_size() : 0;
    C* const seams = (C*)malloc((seams_count + rpb_count + 1) * sizeof(C));
    if (!seams) return NAT_NO_MEMORY;
    C* const grad_rpb = rpb_count ? seams + seams_count : nullptr;  // one for each task

    bool starved = false;
    bool ran = parallel(run, plan.tasks, [&](int64_t begin, int64_t end) {
        static thread_local ThreadMemory memory;
        if (!memory.reserve(size.used + 64)) {
            __atomic_store_n(&starved, true, __ATOMIC_RELAXED);
            return;
        }
        Arena arena{((uintptr_t)memory.data + 63) / 64 * 64, 0};
        Worker<E, C> worker(plan, arena);
        for (int64_t task = begin; task < end; ++task) worker.sweep(task, seams, grad_rpb);
    });
    if (boundaries && !starved)
        ran &= parallel(run, units * boundaries, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) merge_seam<E>(plan, seams, i / boundaries, i % boundaries);
        });
    if (backward && call.grad_rpb) sum_grad_rpb(plan, grad_rpb);
    free(seams);
    return starved || !ran ? NAT_NO_MEMORY : NAT_OK;
}

}  // namespace

int32_t NAT_ENTRY(const nat_na2d_call* call, int32_t backward, nat_parallel_for run, int64_t threads) {
    switch (call->dtype) {
        case NAT_FLOAT32: return na2d<float>(*call, backward, run, threads);
        case NAT_FLOAT64: return na2d<double>(*call, backward, run, threads);
        case NAT_BFLOAT16: return na2d<bfloat16>(*call, backward, run, threads);
        case NAT_FLOAT16: return na2d<float16>(*call, backward, run, threads);
    }
    return NAT_BAD_DTYPE;
}
