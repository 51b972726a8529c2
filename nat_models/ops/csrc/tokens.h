// The sweep with operands of the type that sums have: float and double, and half precision widened when it is read.
#pragma once
#include "sweep.h"

namespace {

// Token rows are [cols_padded][dim_padded], transposed queries [block][dim_padded][L], with blocks as the logits have,
// and transposed keys [dim_padded][transposed_cols].
template <class C>
struct TokenBuffers : SweepBuffers<C> {
    static constexpr index_t L = lanes<C>;
    using SweepBuffers<C>::plan;
    using SweepBuffers<C>::transposed_cols;
    C *query, *key, *value, *grad_out;
    C *query_transposed, *grad_out_transposed, *key_transposed, *value_transposed;
    Segment<C>* segments;

    TokenBuffers(const Plan<C>& plan, Arena& arena) : SweepBuffers<C>(plan, arena) {
        const index_t ring_size = plan.row_size * plan.ring_rows;
        const index_t transposed_size = transposed_cols * plan.dim_padded;
        const bool grad = plan.backward;
        query = arena.take<C>(grad ? ring_size : plan.row_size);
        query_transposed = arena.take<C>(ring_size);
        key = arena.take<C>(plan.row_size * plan.kernel_rows);
        value = arena.take<C>(plan.row_size * plan.kernel_rows);
        key_transposed = arena.take<C>(transposed_size);
        value_transposed = arena.take<C>(grad ? transposed_size : 0);
        segments = arena.take<Segment<C>>(this->max_segments);
        grad_out = arena.take<C>(grad ? ring_size : 0);
        grad_out_transposed = arena.take<C>(grad ? ring_size : 0);
        if (!arena.base) return;
        this->clear(key_transposed, transposed_size);
        if (grad) this->clear(value_transposed, transposed_size);
    }

    C* query_row(C* ring, index_t row) const { return ring + this->query_slot[row] * plan.row_size; }
    C* key_row(C* ring, index_t row) const { return ring + this->key_slot[row] * plan.row_size; }
};

template <class E>
struct TokenWorker
    : SweepWorker<E, typename Compute<E>::type, TokenBuffers<typename Compute<E>::type>, TokenWorker<E>> {
    using C = typename Compute<E>::type;
    using Buffers = TokenBuffers<C>;
    using Base = SweepWorker<E, C, Buffers, TokenWorker>;
    static constexpr index_t L = lanes<C>;
    using Base::Base;
    using Base::call;
    using Base::key_row;
    using Base::plan;
    using Base::query_row;
    using Base::weights;

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

    void load_key_row(const TaskGeometry<C>& at, index_t row) {
        // Token rows where lanes are head_dim or (single_row) share a key; transposed where lanes are queries.
        const bool keys = plan.single_row || plan.backward, values = plan.single_row || !plan.backward;
        at.template load_row<E>(call.key, row, 1,
                                {keys ? key_row(this->key, row) : nullptr,
                                 plan.single_row ? nullptr : this->key_transposed, this->transposed_cols, L});
        at.template load_row<E>(call.value, row, 1,
                                {values ? key_row(this->value, row) : nullptr,
                                 values ? nullptr : this->value_transposed, this->transposed_cols, L});
    }

    void multiply(const TaskGeometry<C>& at, index_t row, index_t begin, index_t end, bool with_bias) {
        const auto product = [&](const C* queries, const C* rows, const C* transposed, bool with_bias, C* out) {
            this->products(at, queries, plan.single_row ? rows : transposed, plan.dim, plan.dim_padded, 1, with_bias,
                           out, row, begin, end);
        };
        product(this->query_transposed, key_row(this->key, row), this->key_transposed, with_bias, this->logits);
        if (plan.backward)
            product(this->grad_out_transposed, key_row(this->value, row), this->value_transposed, false,
                    this->grad_logits);
    }

    // out[query] = scale * sum of its window's token rows, weighted: lanes are head_dim.
    void gather(const TaskGeometry<C>& at, index_t row, C* weight_ring, C* token_ring, const C* scale,
                index_t scale_step) {
        const C* const weight = weights(weight_ring, row, 0);
        Reach reach;
        for (index_t k = 0; k < at.down.kernel; ++k)
            this->segments[k] = {key_row(token_ring, at.down.start(row) + k), weight + k * at.across.kernel * L,
                                 &reach};
        this->gather_segments(at, this->segments, at.down.kernel, reach, plan.kernel_rows * plan.kernel_cols * L, scale,
                              scale_step);
    }

    // out[key] = sum of the query rows [begin, end) that attend to it, weighted: the transpose of gather.
    void scatter(const TaskGeometry<C>& at, index_t key_row, index_t begin, index_t end, C* weight_ring,
                 C* token_ring) {
        const Axis& across = at.across;
        this->scatter_tiles(across, [&](index_t key, index_t key_end) {
            const index_t count = this->pieces_that_see(across, key, key_end, plan.kernel_rows * plan.kernel_cols * L);
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
            this->prefetch.fetch();
            blend(tile, key_end - key, this->ones, this->out + key * plan.dim_padded);
        });
    }

    void complete_query_row(const TaskGeometry<C>& at, index_t row) {
        for (index_t j = 0; j < at.across.length; j += L) {
            C* const p = weights(this->logits, row, j / L);
            this->prefetch.fetch();
            const vec<C> inverse = softmax(p, at.window());
            store(this->inverse + j, inverse);
            if (plan.backward) this->differentiate_softmax(at, row, j, inverse);
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
        scatter(at, row, begin, end, this->grad_logits, this->query);
        this->write_gradient(at, call.grad_key, row, share.key);
        scatter(at, row, begin, end, this->logits, this->grad_out);
        this->write_gradient(at, call.grad_value, row, share.value);
    }
};

}  // namespace
