// Prefetching of what a later step of the sweep reads and writes. The tokens of a head lie a stride apart that defeats
// the hardware's own prefetch.
#pragma once
#include "geometry.h"

namespace {

// Rows of tokens, most urgent first; fetch(), called between tiles, asks for a few at a time, because issuing all
// prefetches at once would stall on them.
template <class E>
struct Prefetch {
    struct Run {
        const E* from;
        index_t step, tokens;
    };
    static constexpr index_t kMaxRuns = 64;  // rows beyond this are not prefetched
    static constexpr index_t kTokensPerFetch = 16;
    static constexpr index_t kCacheLine = 64 / sizeof(E);
    Run runs[kMaxRuns];
    index_t first = 0, count = 0;
    index_t dim;

    explicit Prefetch(index_t dim) : dim(dim) {}

    template <class C>
    void add_row(const TaskGeometry<C>& at, const nat_tensor& t, index_t row) {
        const index_t lines = at.plan.single_row ? at.map_rows : 1;
        for (index_t i = 0; i < lines && count < kMaxRuns; ++i)
            runs[count++] = {at.template token<const E>(t, row + i), at.col_step(t), at.map_cols};
    }
    void fetch() {
        for (index_t n = 0; n < kTokensPerFetch && first < count; ++n) {
            Run& run = runs[first];
            for (index_t i = 0; i < dim; i += kCacheLine) __builtin_prefetch(run.from + i, 0, 2);
            run.from += run.step;
            if (--run.tokens == 0) ++first;
        }
    }
    void clear() { first = count = 0; }
};

}  // namespace
