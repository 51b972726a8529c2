// Neighborhood attention, forward and backward, for one instruction set (compiled once for each).
//
// A task is a strip of query rows of one head of one image. It walks down the key rows: each is transposed once and
// multiplied with every query row that attends to it; a query row whose last key row has passed is finished (softmax,
// values); in the backward, a key row whose last query row has passed gets its gradient. Logits live in a ring of a few
// query rows. Tasks follow from the sizes alone and partial sums meet in a fixed order, so that the result does not
// depend on the number of threads.
#include <stdlib.h>

#include "isa.h"
#include "tiles.h"

namespace {

index_t least(index_t a, index_t b) { return a < b ? a : b; }
index_t most(index_t a, index_t b) { return a > b ? a : b; }
index_t ceil_div(index_t a, index_t b) { return (a + b - 1) / b; }

// One axis of a dilation group. Windows are shifted inward at the borders, so the first `left` positions share one
// window, the last `right` another, and those between step along.
struct Axis {
    index_t length, kernel, left, right;
    Axis(index_t length, index_t kernel)
        : length(length),
          kernel(kernel),
          left(length == kernel ? length : kernel / 2 + 1),
          right(length == kernel ? 0 : kernel / 2 + 1) {}
    index_t start(index_t i) const { return most(0, least(i - kernel / 2, length - kernel)); }
};

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

// What all tasks of a call share. Sizes are those of the largest dilation group; rows and cols as the tiles see them.
template <class C>
struct Plan {
    static constexpr index_t L = lanes<C>;
    const nat_na2d_call& call;
    bool backward, flat;
    index_t groups, map_rows, map_cols, rows, cols, kernel_rows, kernel_cols, strips, strip_rows, tasks;
    index_t dim, padded, wide, ring, line, bias_size, halo_size;
    bool cold;  // tensors exceed the caches near a core: worth asking for ahead of their use

    Plan(const nat_na2d_call& call, bool backward, index_t threads) : call(call), backward(backward) {
        groups = call.dilation[0] * call.dilation[1];
        rows = map_rows = ceil_div(call.height, call.dilation[0]);
        cols = map_cols = ceil_div(call.width, call.dilation[1]);
        // A map hardly larger than its window is taken as one row of rows * cols tokens that all attend to all: no lane is
        // wasted on a narrow row, and the few keys outside a window are masked by the bias.
        flat = rows * cols * 3 <= call.kernel[0] * call.kernel[1] * 4 && rows * cols <= 256;
        kernel_rows = flat ? 1 : call.kernel[0];
        if (flat) cols *= rows, rows = 1;
        kernel_cols = flat ? cols : call.kernel[1];
        dim = call.head_dim;
        padded = ceil_div(dim, L) * L;
        // An odd number of vectors: a power of two would map a column of the logits onto a few sets of the cache.
        wide = (ceil_div(cols, L) | 1) * L;
        line = wide * padded;
        const index_t units = call.heads * call.batch * groups;
        strips = count_strips(units, threads);
        strip_rows = ceil_div(rows, strips);
        cold = rows * cols * units * dim * (backward ? 7 : 4) > (index_t(4) << 20) / (index_t)sizeof(C);
        tasks = units * strips;
        // Query rows alive at once. Forward: those that see one key row; only maps lower than 2K have key rows seen from
        // both borders. Backward: a key row waits for the last query row that sees it, while more query rows start.
        const index_t seen = flat || rows > 2 * kernel_rows ? kernel_rows + kernel_rows / 2 : 2 * kernel_rows - 1;
        ring = least(strip_rows, backward ? 3 * kernel_rows - 2 : seen);
        bias_size = (2 * kernel_rows - 1) * kernel_cols * wide + L;  // + L: Bias writes whole vectors
        halo_size = kernel_rows * cols * padded;
    }
    // Strips of 2K-2 rows or more, so that a key row meets at most two of them (see Halo).
    index_t count_strips(index_t units, index_t threads) const {
        const index_t limit = most(1, rows / (2 * kernel_rows - 2 + flat));
        // The order of the backward's sums depends on them: not on the number of threads then.
        if (backward) return least(ceil_div(16, most(units, 1)), limit);
        // The last thread should finish soon; a key row that two strips read costs about a fifth of a query row.
        index_t best = 1, best_cost = PTRDIFF_MAX;
        for (index_t n = 1; n <= least(limit, threads); ++n) {
            const index_t cost = ceil_div(units * n, threads) * (5 * ceil_div(rows, n) + (n > 1) * (kernel_rows - 1));
            if (cost < best_cost) best = n, best_cost = cost;
        }
        return best;
    }
    index_t rpb_rows() const { return 2 * call.kernel[0] - 1; }
    index_t rpb_cols() const { return 2 * call.kernel[1] - 1; }
    index_t rpb_size() const { return rpb_rows() * rpb_cols(); }
};

// Gradients of key rows that two strips share: for each boundary between strips, what the strip above and the strip below add.
template <class C>
struct Halo {
    C* part[2][2];  // [above, below][key, value], each [kernel_rows][cols][padded]
    Halo(const Plan<C>& plan, C* base, index_t unit, index_t boundary) {
        base += (unit * (plan.strips - 1) + boundary) * 4 * plan.halo_size;
        for (int i = 0; i < 4; ++i) part[i / 2][i % 2] = base + i * plan.halo_size;
    }
};

// Where a task, or the halo above it, lies: its head, image, dilation group and query rows.
template <class C>
struct Place {
    const Plan<C>& plan;
    index_t unit, strip, head, image, group_row, group_col, map_rows, map_cols;
    Axis down, across;  // as the tiles see them: a flat map is one row

    Place(const Plan<C>& plan, index_t unit, index_t strip)
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
        down = plan.flat ? Axis(1, 1) : Axis(map_rows, plan.kernel_rows);
        across = plan.flat ? Axis(map_rows * map_cols, map_rows * map_cols) : Axis(map_cols, plan.kernel_cols);
    }
    static constexpr index_t L = lanes<C>;
    index_t first() const { return least(strip * plan.strip_rows, down.length); }
    index_t last() const { return least((strip + 1) * plan.strip_rows, down.length); }

    template <class E>
    E* token(const nat_tensor& t, index_t row) const {
        const auto& call = plan.call;
        return (E*)t.data + image * t.stride[0] + (group_row + row * call.dilation[0]) * t.stride[1] +
               group_col * t.stride[2] + head * t.stride[3];
    }
    // Reads a row of tokens, padded with zeros to whole vectors and with anything to whole blocks of columns, into either or both of
    // rows [columns][padded] and transposed, where element i of column j is at i * depth_step + j / L * block_step + j % L.
    template <class E>
    void load_row(const nat_tensor& t, index_t row, C scale, C* rows, C* transposed, index_t depth_step = 0,
                  index_t block_step = 0) const {
        const index_t step = t.stride[2] * plan.call.dilation[1], down = t.stride[1] * plan.call.dilation[0];
        const index_t dim = plan.dim, padded = plan.padded, cols = across.length;
        const E* p = token<const E>(t, row);
        index_t col = 0;
        for (index_t j = 0; j < cols; j += L) {
            const E* from[L];
            for (index_t l = 0; l < L; ++l) {
                from[l] = p;
                if (j + l + 1 >= cols) continue;  // lanes beyond the map repeat its last token: finite, and ignored later
                p += step;
                if (plan.flat && ++col == map_cols) col = 0, p += down - map_cols * step;
            }
            for (index_t i = 0; i < padded; i += L) {
                vec<C> x[L];
                if (i + L <= dim) {
#pragma GCC unroll 16
                    for (index_t l = 0; l < L; ++l) x[l] = widen(from[l] + i) * scale;
                } else {
                    for (index_t l = 0; l < L; ++l) x[l] = widen_some(from[l] + i, dim - i) * scale;
                }
                if (rows) {
#pragma GCC unroll 16
                    for (index_t l = 0; l < L; ++l) store(rows + (j + l) * padded + i, x[l]);
                }
                if (!transposed) continue;
                transpose<C>(x);
                C* to = transposed + j / L * block_step + i * depth_step;
#pragma GCC unroll 16
                for (index_t l = 0; l < L; ++l, to += depth_step) store(to, x[l]);
            }
        }
    }
    template <class E>
    void store_row(const nat_tensor& t, index_t row, const C* from) const {
        const index_t step = t.stride[2] * plan.call.dilation[1];
        const index_t lines = plan.flat ? map_rows : 1;
        for (index_t i = 0; i < lines; ++i)
            store_tokens(from + i * map_cols * plan.padded, plan.padded, map_cols, plan.dim, step, token<E>(t, row + i));
    }
};

// The bias of every lane, and back: rpb [2Kh-1, 2Kw-1] <-> table [row offset][key column][query column].
template <class C>
struct Bias {
    static constexpr index_t L = lanes<C>;
    const Place<C>& at;
    const Plan<C>& plan;
    C* table;
    C* mirror;  // flat maps: rpb rows reversed, where the queries of a row read one run of neighbours

    // A map as large as its window needs less than a table of all pairs. For one key column, the values that the queries
    // of all rows take lie in one run, which a key row further down starts a row earlier: a band a key column.
    bool exact() const { return plan.flat && at.map_rows == plan.call.kernel[0] && at.map_cols == plan.call.kernel[1]; }
    index_t band_size() const { return plan.rpb_rows() * at.map_cols + L; }
    C* band(index_t key_row, index_t key_col) const {
        return table + key_col * band_size() + (at.map_rows - 1 - key_row) * at.map_cols;
    }

    index_t mirror_cols() const { return 2 * plan.map_cols + L; }
    C* row(index_t offset, index_t key) const { return table + (offset * at.across.kernel + key) * plan.wide; }
    index_t column(index_t query, index_t key) const { return at.across.start(query) - query + key + at.across.kernel - 1; }
    // The run of mirror that queries (query_row, 0...) take for key (key_row, key_col).
    C* run(index_t query_row, index_t key_row, index_t key_col) const {
        return mirror + (key_row - query_row + at.map_rows - 1) * mirror_cols() + plan.map_cols - key_col;
    }
    index_t shift_rows() const { return at.map_rows - plan.call.kernel[0]; }  // offsets a window never sees, above and below
    index_t mirror_rows() const { return 2 * at.map_rows - 1; }
    C* mirror_at(index_t r, index_t c) const {  // rpb [r, c]
        return mirror + (r + shift_rows()) * mirror_cols() + plan.map_cols + plan.call.kernel[1] - 1 - c;
    }

    void expand(const C* rpb) const {
        const index_t stop = ceil_div(at.across.length, L) * L;
        if (!plan.flat) {
            const Axis& axis = at.across;
            for (index_t r = 0; r < plan.rpb_rows(); ++r, rpb += plan.rpb_cols())
                for (index_t k = 0; k < axis.kernel; ++k) {
                    C* to = row(r, k);
                    const C inner = rpb[k + axis.kernel / 2];
                    for (index_t j = 0; j < stop; j += L) store(to + j, splat(inner));
                    for (index_t j = 0; j < axis.left; ++j) to[j] = rpb[column(j, k)];
                    for (index_t j = axis.length - axis.right; j < axis.length; ++j) to[j] = rpb[column(j, k)];
                }
            return;
        }
        if (exact()) {
            for (index_t i = 0; i < plan.rpb_rows(); ++i) {  // from the last row of rpb up
                const C* const from = rpb + (plan.rpb_rows() - 1 - i) * plan.rpb_cols();
                for (index_t c = 0; c < plan.rpb_cols(); ++c) mirror[c] = from[plan.rpb_cols() - 1 - c];
                for (index_t c = 0; c < at.map_cols; ++c)
                    for (index_t j = 0; j < at.map_cols; j += L)  // what runs over is overwritten by the next row
                        store(table + c * band_size() + i * at.map_cols + j, load(mirror + at.map_cols - 1 - c + j));
            }
            return;
        }
        const Axis down(at.map_rows, plan.call.kernel[0]), across(at.map_cols, plan.call.kernel[1]);
        memset(mirror, 0, mirror_rows() * mirror_cols() * sizeof(C));
        if (rpb)
            for (index_t r = 0; r < plan.rpb_rows(); ++r)
                for (index_t c = 0; c < plan.rpb_cols(); ++c) *mirror_at(r, c) = rpb[r * plan.rpb_cols() + c];
        for (index_t r = 0; r < down.length; ++r)
            for (index_t c = 0; c < across.length; ++c) {
                C* to = row(0, r * across.length + c);
                for (index_t i = 0; i < down.length; ++i) {
                    const C* from = run(i, r, c);
                    // Whole vectors: what runs over is overwritten by the next row or lies beyond the map.
                    for (index_t j = 0; j < across.length; j += L) store(to + i * across.length + j, load(from + j));
                    if (down.length == down.kernel && across.length == across.kernel) continue;
                    for (index_t j = 0; j < across.length; ++j)
                        if (r < down.start(i) || r >= down.start(i) + down.kernel || c < across.start(j) ||
                            c >= across.start(j) + across.kernel)
                            to[i * across.length + j] = C(-1e30);
                }
            }
    }

    // Sums a table of gradients into rpb; clears the table.
    void reduce(C* rpb) const {
        const Axis& axis = at.across;
        if (!plan.flat) {
            const index_t stop = ceil_div(axis.length, L) * L;
            for (index_t r = 0; r < plan.rpb_rows(); ++r, rpb += plan.rpb_cols()) {
                memset(rpb, 0, plan.rpb_cols() * sizeof(C));
                for (index_t k = 0; k < axis.kernel; ++k) {
                    C* from = row(r, k);
                    for (index_t j = axis.length; j < stop; ++j) from[j] = 0;
                    for (index_t j = 0; j < axis.left; ++j) rpb[column(j, k)] += from[j], from[j] = 0;
                    for (index_t j = axis.length - axis.right; j < axis.length; ++j) rpb[column(j, k)] += from[j], from[j] = 0;
                    vec<C> inner = {};
                    for (index_t j = 0; j < stop; j += L) inner += load(from + j), store(from + j, vec<C>{});
                    rpb[k + axis.kernel / 2] += sum_lanes<C>(inner);
                }
            }
            return;
        }
        if (exact()) {
            memset(rpb, 0, plan.rpb_size() * sizeof(C));
            for (index_t c = 0; c < at.map_cols; ++c)
                for (index_t i = 0; i < plan.rpb_rows(); ++i) {
                    const C* const from = table + c * band_size() + i * at.map_cols;
                    C* const to = rpb + (plan.rpb_rows() - 1 - i) * plan.rpb_cols() + c + at.map_cols - 1;
                    for (index_t j = 0; j < at.map_cols; ++j) to[-j] += from[j];
                }
            memset(table, 0, at.map_cols * band_size() * sizeof(C));
            return;
        }
        memset(mirror, 0, mirror_rows() * mirror_cols() * sizeof(C));
        const bits<C> lane = lane_numbers<C>();
        for (index_t r = 0; r < at.map_rows; ++r)
            for (index_t c = 0; c < at.map_cols; ++c) {
                C* from = row(0, r * at.map_cols + c);
                for (index_t i = 0; i < at.map_rows; ++i)
                    for (index_t j = 0; j < at.map_cols; j += L) {
                        const auto mine = lane < bits<C>{} + decltype(lane[0] + 0)(at.map_cols - j);
                        const vec<C> x = load(from + i * at.map_cols + j);
                        C* to = run(i, r, c) + j;
                        store(to, load(to) + (vec<C>)((bits<C>)x & (bits<C>)mine));
                    }
                memset(from, 0, plan.wide * sizeof(C));
            }
        for (index_t r = 0; r < plan.rpb_rows(); ++r)
            for (index_t c = 0; c < plan.rpb_cols(); ++c) rpb[r * plan.rpb_cols() + c] = *mirror_at(r, c);
    }
};

// Rows of tokens that will be touched soon, most urgent first. Their stride defeats the hardware's own prefetch, so the
// work in between asks for them, a few tokens at a time: all at once, it would wait for what it asked for.
template <class E>
struct Soon {
    struct Run {
        const E* from;
        index_t step, tokens;
    };
    static constexpr index_t kMost = 64;  // what exceeds it goes without
    static constexpr index_t kTokens = 16;
    Run runs[kMost];
    index_t first = 0, count = 0;
    index_t dim;

    template <class C>
    void row(const Place<C>& at, const nat_tensor& t, index_t row) {
        const index_t step = t.stride[2] * at.plan.call.dilation[1];
        for (index_t i = 0; i < (at.plan.flat ? at.map_rows : 1) && count < kMost; ++i)
            runs[count++] = {at.template token<const E>(t, row + i), step, at.map_cols};
    }
    void fetch() {
        for (index_t n = 0; n < kTokens && first < count; ++n) {
            Run& run = runs[first];
            for (index_t i = 0; i < dim; i += 64 / sizeof(E)) __builtin_prefetch(run.from + i, 0, 2);
            run.from += run.step;
            if (--run.tokens == 0) ++first;
        }
    }
    void clear() { first = count = 0; }
};

// One thread's scratch, and the work of a task in it. E is what tensors hold, C what is computed with.
template <class E, class C>
struct Worker {
    static constexpr index_t L = lanes<C>;
    const Plan<C>& plan;
    index_t transposed_wide;
    // Token rows are [wide][padded]; transposed queries [block][padded][L] and logits [block][keys][L], blocks of L query
    // columns, so that a tile works on contiguous memory; transposed keys [padded][transposed_wide].
    C *query, *key, *value, *grad_out;
    C *query_t, *grad_out_t, *key_t, *value_t;
    C *logits, *grad_logits, *bias, *grad_bias, *mirror;
    C *out, *inverse, *ones, *scales;
    struct Piece {  // of scatter: a Segment relative to the query row it is in
        index_t token, weight;
        Reach reach;
    };
    Piece* pieces;
    Segment<C>* segments;
    index_t *query_slot, *key_slot;  // row % ring, without a division at each use
    index_t bias_head = -1, bias_rows = -1, bias_cols = -1;
    Soon<E> soon;

    Worker(const Plan<C>& plan, Arena& arena) : plan(plan), transposed_wide(plan.wide + 2 * L) {
        soon.dim = plan.dim;
        const index_t line = plan.line, keys = plan.kernel_rows * plan.kernel_cols;
        const bool grad = plan.backward;
        query = arena.take<C>(line * (grad ? plan.ring : 1));
        query_t = arena.take<C>(line * plan.ring);
        key = arena.take<C>(line * plan.kernel_rows);
        value = arena.take<C>(line * plan.kernel_rows);
        key_t = arena.take<C>(transposed_wide * plan.padded);
        value_t = arena.take<C>(grad ? transposed_wide * plan.padded : 0);
        logits = arena.take<C>(keys * plan.wide * plan.ring);
        bias = arena.take<C>(plan.bias_size);
        mirror = arena.take<C>(plan.flat ? 2 * plan.map_rows * (2 * plan.map_cols + L) : 0);
        out = arena.take<C>(line);
        inverse = arena.take<C>(plan.wide);
        ones = arena.take<C>(kBlendMax);
        scales = arena.take<C>(kBlendMax);
        const index_t most_pieces = 2 * (plan.kernel_cols / L + 2) + (plan.kernel_cols + kBlendMax) / L + 2;
        pieces = arena.take<Piece>(most_pieces);
        segments = arena.take<Segment<C>>(most(plan.kernel_rows, most_pieces * plan.ring));
        query_slot = arena.take<index_t>(plan.rows);
        key_slot = arena.take<index_t>(plan.rows);
        if (grad) {
            grad_out = arena.take<C>(line * plan.ring);
            grad_out_t = arena.take<C>(line * plan.ring);
            grad_logits = arena.take<C>(keys * plan.wide * plan.ring);
            grad_bias = arena.take<C>(plan.bias_size);
        }
        if (!arena.base) return;
        for (index_t i = 0; i < plan.rows; ++i) query_slot[i] = i % plan.ring, key_slot[i] = i % plan.kernel_rows;
        memset(key_t, 0, transposed_wide * plan.padded * sizeof(C));
        if (grad) memset(value_t, 0, transposed_wide * plan.padded * sizeof(C));
        memset(bias, 0, plan.bias_size * sizeof(C));
        for (int i = 0; i < kBlendMax; ++i) ones[i] = 1, scales[i] = C(plan.call.scale);
        if (grad) memset(grad_bias, 0, plan.bias_size * sizeof(C));
    }

    C* query_line(C* ring, index_t row) const { return ring + query_slot[row] * plan.line; }
    C* key_line(C* ring, index_t row) const { return ring + key_slot[row] * plan.line; }
    C* weights(C* ring, index_t row, index_t block) const {
        return ring + (query_slot[row] * plan.wide + block * L) * plan.kernel_rows * plan.kernel_cols;
    }

    // One key row against the query rows [begin, end): lanes are query columns.
    void products(const Place<C>& at, C* queries_t, const C* keys, bool with_bias, C* out, index_t key_row,
                  index_t begin, index_t end) {
        const Axis& across = at.across;
        const index_t blocks = ceil_div(across.length, L);
        Dots<C> tile;
        tile.depth = plan.dim;
        tile.bias_step = plan.wide;
        const auto aim = [&](int slot, index_t row, index_t block) {
            tile.query[slot] = query_line(queries_t, row) + block * plan.padded * L;
            tile.out[slot] = weights(out, row, block) + (key_row - at.down.start(row)) * across.kernel * L;
            tile.bias[slot] = nullptr;
            if (with_bias) tile.bias[slot] = bias + (key_row - row + at.down.kernel - 1) * across.kernel * plan.wide + block * L;
        };
        if (plan.flat) {
            const Bias<C> table{at, plan, bias, mirror};
            const bool exact = table.exact();
            const index_t lines = exact ? at.map_rows : 1, count = across.kernel / lines;
            tile.key_step = plan.padded;
            tile.key_depth_step = 1;
            if (exact) tile.bias_step = table.band_size();
            const Cut cut(blocks, kDotRows);
            for (index_t part = 0; part < cut.parts; ++part) {
                const index_t from = cut.begin(part), n = cut.begin(part + 1) - from;
                for (index_t i = 0; i < n; ++i) aim(i, 0, from + i);
                tile.key = keys;
                for (index_t line = 0; line < lines; ++line) {
                    if (exact && with_bias)
                        for (index_t i = 0; i < n; ++i) tile.bias[i] = table.band(line, 0) + (from + i) * L;
                    soon.fetch();
                    dots<Keys::Splat>(tile, n, count);
                    tile.key += count * plan.padded;
                    for (index_t i = 0; i < n; ++i) tile.out[i] += count * L;
                }
            }
            return;
        }
        for (index_t block = 0; block < blocks; ++block) {
            const index_t j0 = block * L, j1 = least(j0 + L, across.length), start = across.start(j0);
            const bool shifted = across.start(j1 - 1) - start == j1 - 1 - j0;
            for (index_t l = 0; l < L; ++l) tile.from[l] = across.start(least(j0 + l, j1 - 1)) - start;
            tile.key = keys + start;
            tile.key_step = 1;
            tile.key_depth_step = transposed_wide;
            const Cut cut(end - begin, kDotRows);
            for (index_t part = 0; part < cut.parts; ++part) {
                const index_t row = begin + cut.begin(part), n = begin + cut.begin(part + 1) - row;
                for (index_t i = 0; i < n; ++i) aim(i, row + i, block);
                soon.fetch();
                if (shifted) dots<Keys::Shifted>(tile, n, across.kernel);
                else dots<Keys::Permuted>(tile, n, across.kernel);
            }
        }
    }

    // Calls run(begin, end) for pieces of [begin, end) that fit a tile and do not straddle a multiple of `unit`.
    template <class Run>
    void tiles(index_t begin, index_t end, index_t unit, Run run) const {
        const index_t limit = least(kBlendMax, plan.kernel_cols + 1);
        while (begin < end) {
            const index_t stop = least(end, (begin / unit + 1) * unit);
            const Cut cut(stop - begin, limit);
            for (index_t part = 0; part < cut.parts; ++part) run(begin + cut.begin(part), begin + cut.begin(part + 1));
            begin = stop;
        }
    }

    // out[query] = scale * sum of its window's token rows, weighted: lanes are head_dim.
    void gather(const Place<C>& at, index_t row, C* weight_ring, C* token_ring, const C* scale, index_t scale_step) {
        const Axis& across = at.across;
        const C* const weight = weights(weight_ring, row, 0);
        Reach reach;
        for (index_t k = 0; k < at.down.kernel; ++k)
            segments[k] = {key_line(token_ring, at.down.start(row) + k), weight + k * across.kernel * L, &reach};
        Blend<C> tile{segments, at.down.kernel, 0, 0, across.kernel, plan.padded};
        const index_t block_step = plan.kernel_rows * plan.kernel_cols * L;
        const auto run = [&](index_t begin, index_t end, bool band) {
            reach = {L, band ? 1 - L : 1, 0, across.kernel + (band ? end - begin - 1 : 0), band};
            tile.row = across.start(begin) * plan.padded;
            tile.weight = begin / L * block_step + begin % L;
            soon.fetch();
            blend(tile, end - begin, scale + begin * scale_step, out + begin * plan.padded);
        };
        const index_t inner = across.length - across.right;
        tiles(0, across.left, L, [&](index_t a, index_t b) { run(a, b, false); });
        tiles(across.left, inner, L, [&](index_t a, index_t b) { run(a, b, true); });
        tiles(inner, across.length, L, [&](index_t a, index_t b) { run(a, b, false); });
    }

    // out[key] = sum of the query rows [begin, end) that attend to it, weighted: the transpose of gather.
    void scatter(const Place<C>& at, index_t key_row, index_t begin, index_t end, C* weight_ring, C* token_ring) {
        const Axis& across = at.across;
        const index_t inner = across.length - across.right, last_start = across.length - across.kernel;
        const index_t block_step = plan.kernel_rows * plan.kernel_cols * L;
        const auto run = [&](index_t c0, index_t c1) {
            // Queries [from, to), of which `origin` sees key c0 in column `column` of its window; one piece a block.
            index_t count = 0;
            const auto add = [&](index_t from, index_t to, index_t origin, index_t column, bool band) {
                while (from < to) {
                    const index_t block = from / L, stop = least(to, (block + 1) * L);
                    pieces[count++] = {origin * plan.padded, block * block_step + column * L + origin - block * L,
                                       {band ? 1 - L : 1, L, from - origin, stop - origin, band}};
                    from = stop;
                }
            };
            if (c0 < across.kernel) add(0, across.left, 0, c0, false);
            const index_t first = c0 - across.kernel / 2;  // leftmost query whose unshifted window holds c0
            add(most(first, across.left), least(first + across.kernel + c1 - c0 - 1, inner), first, across.kernel - 1, true);
            if (c0 >= last_start) add(inner, across.length, inner, c0 - last_start, false);

            Segment<C>* segment = segments;
            for (index_t row = begin; row < end; ++row) {
                const C* const tokens = query_line(token_ring, row);
                const C* const weight = weights(weight_ring, row, 0) + (key_row - at.down.start(row)) * across.kernel * L;
                for (index_t i = 0; i < count; ++i)
                    *segment++ = {tokens + pieces[i].token, weight + pieces[i].weight, &pieces[i].reach};
            }
            const Blend<C> tile{segments, segment - segments, 0, 0, across.kernel, plan.padded};
            soon.fetch();
            blend(tile, c1 - c0, ones, out + c0 * plan.padded);
        };
        // A tile sees all of a border's queries or none, so none may straddle the edge of a border's window.
        const index_t a = least(across.kernel, last_start), b = least(most(across.kernel, last_start), across.length);
        tiles(0, a, across.length, run);
        tiles(a, b, across.length, run);
        tiles(b, across.length, across.length, run);
    }

    void finish_query_row(const Place<C>& at, index_t row) {
        const auto& call = plan.call;
        const index_t keys = at.down.kernel * at.across.kernel;
        for (index_t j = 0; j < at.across.length; j += L) {
            C* p = weights(logits, row, j / L);
            soon.fetch();
            const vec<C> inv = softmax(p, keys);
            store(inverse + j, inv);
            if (!plan.backward) continue;
            C* dp = weights(grad_logits, row, j / L);
            softmax_backward(p, dp, keys, inv);
            if (!call.grad_rpb) continue;
            const Bias<C> table{at, plan, grad_bias, mirror};
            if (table.exact()) {
                const bits<C> map = lane_numbers<C>() < bits<C>{} + decltype(bits<C>{}[0] + 0)(at.across.length - j);
                for (index_t r = 0; r < at.map_rows; ++r)
                    for (index_t c = 0; c < at.map_cols; ++c, dp += L) {
                        C* const sum = table.band(r, c) + j;
                        store(sum, load(sum) + (vec<C>)((bits<C>)load(dp) & map));
                    }
                continue;
            }
            C* sum = grad_bias + (at.down.start(row) - row + at.down.kernel - 1) * at.across.kernel * plan.wide + j;
            for (index_t k = 0; k < keys; ++k, sum += plan.wide) store(sum, load(sum) + load(dp + k * L));
        }
        if (plan.backward) {
            gather(at, row, grad_logits, key, scales, 0);
            at.template store_row<E>(call.grad_query, row, out);
        } else {
            gather(at, row, logits, value, inverse, 1);
            at.template store_row<E>(call.out, row, out);
        }
    }

    // The gradient of a key row: straight to its place, or to the halo where another strip adds to it.
    void finish_key_row(const Place<C>& at, index_t row, index_t begin, index_t end, C* halo) {
        const auto& call = plan.call;
        for (int i = 0; i < 2; ++i) {
            if (i == 0) scatter(at, row, begin, end, grad_logits, query);
            else scatter(at, row, begin, end, logits, grad_out);
            C* part = nullptr;
            if (at.first() > 0 && row < at.down.start(at.first() - 1) + at.down.kernel)
                part = Halo<C>(plan, halo, at.unit, at.strip - 1).part[1][i] +
                       (row - at.down.start(at.first())) * at.across.length * plan.padded;
            else if (at.last() < at.down.length && row >= at.down.start(at.last()))
                part = Halo<C>(plan, halo, at.unit, at.strip).part[0][i] +
                       (row - at.down.start(at.last())) * at.across.length * plan.padded;
            if (part) memcpy(part, out, at.across.length * plan.padded * sizeof(C));
            else at.template store_row<E>(i == 0 ? call.grad_key : call.grad_value, row, out);
        }
    }

    // What a step of the sweep will write, and what the next one, of this task or the next, will read.
    void expect(const Place<C>& at, index_t task, index_t row, index_t stop, index_t finished, index_t ends, index_t loaded,
                index_t flushed, index_t done) {
        const auto& call = plan.call;
        soon.clear();
        if (!plan.cold) return;
        for (; finished < ends; ++finished) soon.row(at, plan.backward ? call.grad_query : call.out, finished);
        for (; flushed < done; ++flushed) {
            soon.row(at, call.grad_key, flushed);
            soon.row(at, call.grad_value, flushed);
        }
        const auto read = [&](const Place<C>& place, index_t key_row, index_t begin, index_t end) {
            soon.row(place, call.key, key_row);
            soon.row(place, call.value, key_row);
            for (; begin < end; ++begin) {
                soon.row(place, call.query, begin);
                if (plan.backward) soon.row(place, call.grad_out, begin);
            }
        };
        if (row + 1 < stop) return read(at, row + 1, loaded, least(loaded + 1, at.last()));
        if (task + 1 == plan.tasks) return;
        const Place<C> next(plan, (task + 1) / plan.strips, (task + 1) % plan.strips);
        index_t end = next.first();
        while (end < next.last() && next.down.start(end) == next.down.start(next.first())) ++end;
        if (end > next.first()) read(next, next.down.start(next.first()), next.first(), end);
    }

    void run(index_t task, C* halo, C* grad_rpb) {
        const auto& call = plan.call;
        const Place<C> at(plan, task / plan.strips, task % plan.strips);
        if (grad_rpb) grad_rpb += task * plan.rpb_size();
        if (at.first() == at.last()) {
            if (grad_rpb) memset(grad_rpb, 0, plan.rpb_size() * sizeof(C));
            return;
        }
        const bool masked = plan.flat && at.across.length > call.kernel[0] * call.kernel[1];
        const bool with_bias = call.rpb || masked;
        if (with_bias && (bias_head != at.head || bias_rows != at.map_rows || bias_cols != at.map_cols)) {
            const C* rpb = (const C*)call.rpb;
            Bias<C>{at, plan, bias, mirror}.expand(rpb ? rpb + at.head * plan.rpb_size() : nullptr);
            bias_head = at.head, bias_rows = at.map_rows, bias_cols = at.map_cols;
        }
        const Axis& down = at.down;
        index_t loaded = at.first(), oldest = at.first(), finished = at.first();
        index_t flushed = down.start(at.first());
        const index_t stop = down.start(at.last() - 1) + down.kernel;
        for (index_t row = flushed; row < stop; ++row) {
            for (; loaded < at.last() && down.start(loaded) <= row; ++loaded) {
                C* const rows = plan.backward ? query_line(query, loaded) : nullptr;
                at.template load_row<E>(call.query, loaded, C(call.scale), rows, query_line(query_t, loaded), L, plan.padded * L);
                if (plan.backward)
                    at.template load_row<E>(call.grad_out, loaded, 1, query_line(grad_out, loaded),
                                            query_line(grad_out_t, loaded), L, plan.padded * L);
            }
            // Rows where lanes are head_dim or (flat) all lanes share a key; transposed where lanes are queries.
            C* const keys = plan.flat || plan.backward ? key_line(key, row) : nullptr;
            C* const values = plan.flat || !plan.backward ? key_line(value, row) : nullptr;
            C* const keys_t = plan.flat ? nullptr : key_t;
            C* const values_t = plan.flat || !plan.backward ? nullptr : value_t;
            at.template load_row<E>(call.key, row, 1, keys, keys_t, transposed_wide, L);
            at.template load_row<E>(call.value, row, 1, values, values_t, transposed_wide, L);
            // The query rows that see no further key row, and (backward) the key rows that no further query row sees.
            index_t ends = finished;
            while (ends < loaded && down.start(ends) + down.kernel - 1 == row) ++ends;
            const index_t done = !plan.backward ? flushed : ends == at.last() ? row + 1 : down.start(ends);
            expect(at, task, row, stop, finished, ends, loaded, flushed, done);
            products(at, query_t, plan.flat ? keys : keys_t, with_bias, logits, row, finished, loaded);
            if (plan.backward) products(at, grad_out_t, plan.flat ? values : values_t, false, grad_logits, row, finished, loaded);
            for (; finished < ends; ++finished) finish_query_row(at, finished);
            for (; flushed < done; ++flushed) {
                while (down.start(oldest) + down.kernel <= flushed) ++oldest;
                index_t end = oldest;
                while (end < finished && down.start(end) <= flushed) ++end;
                finish_key_row(at, flushed, oldest, end, halo);
            }
        }
        if (grad_rpb) Bias<C>{at, plan, grad_bias, mirror}.reduce(grad_rpb);
    }
};

// Adds up what the strips above and below a boundary contributed to the key rows they share.
template <class E, class C>
void merge_halo(const Plan<C>& plan, C* halo, index_t unit, index_t boundary) {
    const Place<C> at(plan, unit, boundary);
    if (at.last() == at.down.length) return;
    const Halo<C> parts(plan, halo, unit, boundary);
    const index_t line = at.across.length * plan.padded, top = at.down.start(at.last());
    for (int i = 0; i < 2; ++i)
        for (index_t row = top; row < at.down.start(at.last() - 1) + at.down.kernel; ++row) {
            C* above = parts.part[0][i] + (row - top) * line;
            const C* below = parts.part[1][i] + (row - top) * line;
            for (index_t n = 0; n < line; n += lanes<C>) store(above + n, load(above + n) + load(below + n));
            at.template store_row<E>(i == 0 ? plan.call.grad_key : plan.call.grad_value, row, above);
        }
}

// Scratch that a thread keeps between calls: fresh pages would cost a fault each, every call.
struct Scratch {
    void* data = nullptr;
    size_t size = 0;
    ~Scratch() { free(data); }
    bool reserve(size_t bytes) {
        if (bytes <= size) return true;
        free(data);
        data = malloc(bytes);
        size = data ? bytes : 0;
        return data;
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
    Arena size;
    Worker<E, C>(plan, size);

    const index_t units = plan.tasks / plan.strips, boundaries = backward ? plan.strips - 1 : 0;
    const index_t halo_count = units * boundaries * 4 * plan.halo_size;
    const index_t rpb_count = backward && call.grad_rpb ? plan.tasks * plan.rpb_size() : 0;
    C* const halo = (C*)malloc((halo_count + rpb_count + 1) * sizeof(C));
    if (!halo) return NAT_NO_MEMORY;
    C* const grad_rpb = rpb_count ? halo + halo_count : nullptr;

    bool starved = false;
    bool ran = parallel(run, plan.tasks, [&](int64_t begin, int64_t end) {
        static thread_local Scratch scratch;
        if (!scratch.reserve(size.used + 64)) {
            __atomic_store_n(&starved, true, __ATOMIC_RELAXED);
            return;
        }
        Arena arena{((uintptr_t)scratch.data + 63) / 64 * 64, 0};
        Worker<E, C> worker(plan, arena);
        for (int64_t task = begin; task < end; ++task) worker.run(task, halo, grad_rpb);
    });
    if (boundaries && !starved)
        ran &= parallel(run, units * boundaries, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) merge_halo<E, C>(plan, halo, i / boundaries, i % boundaries);
        });
    if (backward && call.grad_rpb) {
        const index_t size = plan.rpb_size();
        memset(call.grad_rpb, 0, call.heads * size * sizeof(C));
        for (index_t task = 0; task < plan.tasks; ++task) {
            C* sum = (C*)call.grad_rpb + task / plan.strips % call.heads * size;
            for (index_t i = 0; i < size; ++i) sum[i] += grad_rpb[task * size + i];
        }
    }
    free(halo);
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
