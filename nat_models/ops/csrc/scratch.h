// The memory of a thread: what a sweep keeps between steps, cut out of one allocation that outlives the call.
#pragma once
#include <stdlib.h>

#include "bias.h"
#include "checks.h"
#include "microkernels.h"

namespace {

// Hands out pieces of one allocation; with no base it only measures.
struct Arena {
    uintptr_t base = 0;
    size_t used = 0;
    template <class T>
    T* take(index_t count) {
        T* piece = (T*)(base + used);
        used += (count * sizeof(T) + 63) / 64 * 64;
        return piece;
    }
};

// Kept between calls: fresh pages would cost a fault each, every call.
struct ThreadMemory {
    void* data = nullptr;
    size_t size = 0;
    ~ThreadMemory() { free(data); }
    bool reserve(size_t bytes) {
        if (bytes <= size) return true;
        free(data);
        data = malloc(bytes);
        size = data ? bytes : 0;
        return data;
    }
};

// What every worker has. Logits are [block][keys][L], with blocks of L query columns, so that a tile works on
// contiguous memory.
template <class C>
struct SweepBuffers {
    static constexpr index_t L = lanes<C>;
    const Plan<C>& plan;
    index_t transposed_cols;
    C *logits, *grad_logits, *bias, *grad_bias, *mirror;
    C *out, *inverse, *ones, *scales;
    struct Piece {  // of scatter: a Segment relative to the query row it is in
        index_t token, weight;
        Reach reach;
    };
    Piece* pieces;
    index_t max_segments;
    struct BlockKeys {  // where the windows of a block of L query columns start
        bits<C> from;   // each lane's, counted from `start`
        index_t start;
        bool shifted;  // one step for each lane
    };
    BlockKeys* block_keys;
    index_t *query_slot, *key_slot;  // row % ring_rows and row % kernel_rows, without a division at each use

    // About as many as the largest pieces have, as a number that cannot overflow: the logits of a large window can.
    static double elements(const Plan<C>& plan) {
        const double keys = double(plan.kernel_rows) * double(plan.kernel_cols), cols = double(plan.cols_padded);
        const double logits = keys * cols * double(plan.ring_rows), bias = 2 * keys * cols;
        return logits + bias + double(plan.row_size) * double(plan.ring_rows + plan.kernel_rows);
    }

    SweepBuffers(const Plan<C>& plan, Arena& arena) : plan(plan), transposed_cols(plan.cols_padded + 2 * L) {
        const index_t logits_size = plan.kernel_rows * plan.kernel_cols * plan.cols_padded * plan.ring_rows;
        const bool grad = plan.backward;
        logits = arena.take<C>(logits_size);
        bias = arena.take<C>(bias_table_size(plan));
        mirror = arena.take<C>(bias_mirror_size(plan));
        out = arena.take<C>(plan.row_size);
        inverse = arena.take<C>(plan.cols_padded);
        ones = arena.take<C>(kBlendMax);
        scales = arena.take<C>(kBlendMax);
        const index_t max_pieces = 2 * (plan.kernel_cols / L + 2) + (plan.kernel_cols + kBlendMax) / L + 2;
        pieces = arena.take<Piece>(max_pieces);
        max_segments = max(plan.kernel_rows, max_pieces * plan.ring_rows);
        block_keys = arena.take<BlockKeys>(plan.cols_padded / L);
        query_slot = arena.take<index_t>(plan.rows);
        key_slot = arena.take<index_t>(plan.rows);
        grad_logits = arena.take<C>(grad ? logits_size : 0);
        grad_bias = arena.take<C>(grad ? bias_table_size(plan) : 0);
        if (arena.base) initialise();
    }

    void initialise() {
        for (index_t i = 0; i < plan.rows; ++i) query_slot[i] = i % plan.ring_rows, key_slot[i] = i % plan.kernel_rows;
        for (int i = 0; i < kBlendMax; ++i) ones[i] = 1, scales[i] = C(plan.call.scale);
        clear(bias, bias_table_size(plan));
        if (plan.backward) clear(grad_bias, bias_table_size(plan));
    }
    template <class T>
    static void clear(T* p, index_t count) {
        memset(p, 0, count * sizeof(T));
    }

    void find_block_keys(const Axis& across) {
        for (index_t j = 0; j < across.length; j += L) {
            BlockKeys& keys = block_keys[j / L];
            const index_t last = min(j + L, across.length) - 1;
            keys.start = across.start(j);
            keys.shifted = across.start(last) - keys.start == last - j;
            for (index_t l = 0; l < L; ++l) keys.from[l] = across.start(min(j + l, last)) - keys.start;
        }
    }

    C* weights(C* ring, index_t row, index_t block) const {
        return ring + (query_slot[row] * plan.cols_padded + block * L) * plan.kernel_rows * plan.kernel_cols;
    }
};

}  // namespace
