// The kernel, forward and backward, against a plain loop in double, without Python or torch: for machines that have
// neither, such as an emulator. Arguments: instruction set ("" is the best), and a file for the results as doubles.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "abi.h"

namespace {

struct Case {
    int64_t batch, height, width, heads, head_dim, kernel[2], dilation[2];
};
const Case kGrid[] = {
    // primes, maps as large as their window or hardly larger, strips, ragged groups, odd head_dims
    {1, 7, 7, 2, 32, {7, 7}, {1, 1}},
    {2, 7, 8, 3, 20, {7, 7}, {1, 1}},
    {1, 3, 3, 2, 9, {3, 3}, {1, 1}},
    {1, 11, 9, 2, 8, {3, 3}, {1, 1}},
    {2, 13, 7, 1, 32, {7, 7}, {1, 1}},
    {1, 6, 39, 2, 8, {3, 13}, {2, 3}},
    {1, 14, 15, 2, 8, {7, 7}, {2, 2}},
    {1, 31, 37, 2, 16, {7, 7}, {1, 1}},
    {1, 29, 56, 1, 24, {5, 7}, {1, 1}},
    {1, 16, 17, 1, 1, {5, 5}, {1, 1}},
    // a window of one row or column
    {1, 17, 20, 2, 8, {1, 5}, {1, 2}},
    {2, 19, 3, 1, 12, {7, 1}, {2, 1}},
    {1, 1, 45, 2, 16, {1, 7}, {1, 1}},
};
struct Type {
    nat_dtype dtype;
    const char* name;
    size_t bytes;
    double tolerance;  // relative to the largest value; low precision rounds each result once
};
const Type kTypes[] = {
    {NAT_FLOAT32, "float32", 4, 2e-6},
    {NAT_FLOAT64, "float64", 8, 1e-12},
    {NAT_BFLOAT16, "bfloat16", 2, 4e-3},
    {NAT_FLOAT16, "float16", 2, 5e-4},
};

double get(const Type& type, const void* data, int64_t i) {
    if (type.dtype == NAT_FLOAT64) return ((const double*)data)[i];
    if (type.dtype == NAT_FLOAT32) return ((const float*)data)[i];
    const uint16_t raw = ((const uint16_t*)data)[i];
    const bool brain = type.dtype == NAT_BFLOAT16;
    const int bits = brain ? 7 : 10, bias = brain ? 127 : 15;
    const int exponent = (raw & 0x7fff) >> bits, fraction = raw & ((1 << bits) - 1);
    const double x =
        exponent ? ldexp((1 << bits) + fraction, exponent - bias - bits) : ldexp(fraction, 1 - bias - bits);
    return raw & 0x8000 ? -x : x;
}
// Fills with numbers of both signs up to 2, of as many bits as the type holds exactly.
void fill(const Type& type, void* data, int64_t count, uint64_t& state) {
    for (int64_t i = 0; i < count; ++i) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        const uint32_t random = uint32_t(state >> 40);
        const double x = (int(random & 255) - 128) / 64.;
        if (type.dtype == NAT_FLOAT64) ((double*)data)[i] = x + ldexp(double(random), -30);
        else if (type.dtype == NAT_FLOAT32) ((float*)data)[i] = float(x);
        else {
            const uint16_t exponent = (type.dtype == NAT_BFLOAT16 ? 127 - 4 : 15 - 4) + (random >> 8) % 5;
            const int bits = type.dtype == NAT_BFLOAT16 ? 7 : 10;
            ((uint16_t*)data)[i] = uint16_t((random & 1) << 15 | exponent << bits | (random >> 11 & ((1 << bits) - 1)));
        }
    }
}

// [B, H, W, heads, head_dim] in memory of its own, heads first or last.
struct Tensor {
    std::vector<char> memory;
    nat_tensor view;
    Tensor(const Case& c, const Type& type, bool heads_first)
        : memory(c.batch * c.height * c.width * c.heads * c.head_dim * type.bytes) {
        const int64_t token = heads_first ? c.head_dim : c.heads * c.head_dim;
        view = {memory.data(),
                {c.height * c.width * c.heads * c.head_dim, c.width * token, token,
                 heads_first ? c.height * c.width * c.head_dim : c.head_dim}};
    }
    int64_t at(int64_t b, int64_t i, int64_t j, int64_t h) const {
        return b * view.stride[0] + i * view.stride[1] + j * view.stride[2] + h * view.stride[3];
    }
};

// First key of a query's window, of the keys that its dilation group has.
int64_t window_start(int64_t i, int64_t length, int64_t kernel, int64_t dilation) {
    const int64_t group = i % dilation, count = (length - group + dilation - 1) / dilation;
    int64_t start = i / dilation - kernel / 2;
    if (start > count - kernel) start = count - kernel;
    if (start < 0) start = 0;
    return start * dilation + group;
}

// Where the operands of products are bfloat16, what is computed between two products is rounded for the second:
// probabilities, of which the output is divided by the sum of the rounded ones, and gradients of logits. Each by half a
// unit in the last of 8 bits at most, and so is a result.
constexpr double kHalfUlp = 1. / 256;
constexpr int kRoundings[] = {2, 1, 1, 1};  // of a result itself: the sum that the output is divided by counts too

enum { kOut, kGradQuery, kGradKey, kGradValue, kGradRpb, kResults };
const char* const kNames[] = {"output", "grad_query", "grad_key", "grad_value", "grad_rpb"};

struct Run {
    const Case& c;
    const Type& type;
    bool with_rpb;
    int64_t tokens, rpb_size;
    Tensor query, key, value, grad_out, out, grad_query, grad_key, grad_value;
    std::vector<double> rpb, grad_rpb;  // memory for float too
    std::vector<double> expected[kResults];
    std::vector<double> rounded[kResults];  // sums of the magnitudes of the products that have a rounded factor

    Run(const Case& c, const Type& type, bool with_rpb, bool heads_first, uint64_t seed)
        : c(c),
          type(type),
          with_rpb(with_rpb),
          tokens(c.batch * c.height * c.width * c.heads),
          rpb_size(c.heads * (2 * c.kernel[0] - 1) * (2 * c.kernel[1] - 1)),
          query(c, type, heads_first),
          key(c, type, false),
          value(c, type, heads_first),
          grad_out(c, type, false),
          out(c, type, heads_first),
          grad_query(c, type, false),
          grad_key(c, type, heads_first),
          grad_value(c, type, false),
          rpb(rpb_size),
          grad_rpb(rpb_size) {
        for (Tensor* t : {&query, &key, &value, &grad_out}) fill(type, t->memory.data(), tokens * c.head_dim, seed);
        fill(rpb_type(), rpb.data(), rpb_size, seed);
        for (int r = 0; r < kResults; ++r) {
            expected[r].resize(r == kGradRpb ? rpb_size : tokens * c.head_dim);
            rounded[r].resize(expected[r].size());
        }
    }
    const Type& rpb_type() const { return kTypes[type.dtype == NAT_FLOAT64 ? 1 : 0]; }

    bool run() {
        nat_na2d_call call = {};
        call.query = query.view, call.key = key.view, call.value = value.view, call.out = out.view;
        call.grad_out = grad_out.view, call.grad_query = grad_query.view;
        call.grad_key = grad_key.view, call.grad_value = grad_value.view;
        if (with_rpb) call.rpb = rpb.data(), call.grad_rpb = grad_rpb.data();
        call.batch = c.batch, call.height = c.height, call.width = c.width, call.heads = c.heads;
        call.head_dim = c.head_dim, call.dtype = type.dtype, call.scale = scale();
        for (int i = 0; i < 2; ++i) call.kernel[i] = c.kernel[i], call.dilation[i] = c.dilation[i];
        return nat_na2d_forward(&call) == NAT_OK && nat_na2d_backward(&call) == NAT_OK;
    }
    double scale() const { return 1 / sqrt(double(c.head_dim)); }

    void attend(int64_t b, int64_t h, int64_t i, int64_t j) {
        const int64_t row = window_start(i, c.height, c.kernel[0], c.dilation[0]);
        const int64_t col = window_start(j, c.width, c.kernel[1], c.dilation[1]), keys = c.kernel[0] * c.kernel[1];
        const auto read = [&](const Tensor& t, int64_t at) { return get(type, t.memory.data(), at); };
        std::vector<double> p(keys), dp(keys);
        std::vector<int64_t> key_at(keys), value_at(keys), grad_key_at(keys), grad_value_at(keys), rpb_at(keys);
        const int64_t q = query.at(b, i, j, h), go = grad_out.at(b, i, j, h);
        double top = -INFINITY, sum = 0, mean = 0;
        for (int64_t k = 0; k < keys; ++k) {
            const int64_t y = row + k / c.kernel[1] * c.dilation[0], x = col + k % c.kernel[1] * c.dilation[1];
            key_at[k] = key.at(b, y, x, h), value_at[k] = value.at(b, y, x, h);
            grad_key_at[k] = grad_key.at(b, y, x, h), grad_value_at[k] = grad_value.at(b, y, x, h);
            rpb_at[k] =
                (h * (2 * c.kernel[0] - 1) + (y - i) / c.dilation[0] + c.kernel[0] - 1) * (2 * c.kernel[1] - 1) +
                (x - j) / c.dilation[1] + c.kernel[1] - 1;
            for (int64_t n = 0; n < c.head_dim; ++n) {
                p[k] += scale() * read(query, q + n) * read(key, key_at[k] + n);
                dp[k] += read(grad_out, go + n) * read(value, value_at[k] + n);
            }
            if (with_rpb) p[k] += get(rpb_type(), rpb.data(), rpb_at[k]);
            top = fmax(top, p[k]);
        }
        for (double& x : p) sum += x = exp(x - top);
        for (int64_t k = 0; k < keys; ++k) p[k] /= sum, mean += p[k] * dp[k];
        for (int64_t k = 0; k < keys; ++k) {
            const double grad = p[k] * (dp[k] - mean);
            if (with_rpb) expected[kGradRpb][rpb_at[k]] += grad;
            const auto add = [&](int result, int64_t at, double product) {
                expected[result][at] += product;
                rounded[result][at] += fabs(product);
            };
            for (int64_t n = 0; n < c.head_dim; ++n) {
                add(kOut, out.at(b, i, j, h) + n, p[k] * read(value, value_at[k] + n));
                add(kGradQuery, grad_query.at(b, i, j, h) + n, scale() * grad * read(key, key_at[k] + n));
                add(kGradKey, grad_key_at[k] + n, scale() * grad * read(query, q + n));
                add(kGradValue, grad_value_at[k] + n, p[k] * read(grad_out, go + n));
            }
        }
    }
    void expect() {
        for (int64_t b = 0; b < c.batch; ++b)
            for (int64_t h = 0; h < c.heads; ++h)
                for (int64_t i = 0; i < c.height; ++i)
                    for (int64_t j = 0; j < c.width; ++j) attend(b, h, i, j);
    }

    bool compare(FILE* file) const {
        const void* const actual[] = {out.memory.data(), grad_query.memory.data(), grad_key.memory.data(),
                                      grad_value.memory.data(), grad_rpb.data()};
        bool right = true;
        const bool pairs = type.dtype == NAT_BFLOAT16 && !strcmp(nat_isa(), "avx512_bf16");
        for (int r = 0; r < (with_rpb ? kResults : kGradRpb); ++r) {
            double error = 0, largest = 0;
            const bool rounds = pairs && r != kGradRpb;
            const double tolerance = rounds ? kTypes[0].tolerance : type.tolerance;
            for (size_t i = 0; i < expected[r].size(); ++i) {
                const double x = get(r == kGradRpb ? rpb_type() : type, actual[r], i), wanted = expected[r][i];
                if (file) fwrite(&x, sizeof x, 1, file);
                const double allowed = rounds ? kHalfUlp * (rounded[r][i] + kRoundings[r] * fabs(wanted)) : 0;
                error = x == x ? fmax(error, fabs(x - wanted) - allowed) : INFINITY;
                largest = fmax(largest, rounds ? rounded[r][i] : fabs(wanted));
            }
            if (error <= tolerance * largest) continue;
            right = false;
            printf("[%d, %d, %d, %d, %d] kernel %dx%d dilation %dx%d %s rpb %d %s: %.2e > %.0e\n", int(c.batch),
                   int(c.height), int(c.width), int(c.heads), int(c.head_dim), int(c.kernel[0]), int(c.kernel[1]),
                   int(c.dilation[0]), int(c.dilation[1]), type.name, with_rpb, kNames[r], error / largest, tolerance);
        }
        return right;
    }
};

}  // namespace

int main(int argc, char** argv) {
    const int32_t status = nat_select_isa(argc > 1 ? argv[1] : "");
    if (status) return status == 2 ? 77 : 1;
    FILE* const file = argc > 2 ? fopen(argv[2], "wb") : nullptr;
    int cases = 0, failures = 0;
    for (const Case& c : kGrid)
        for (const Type& type : kTypes) {
            Run run(c, type, cases % 3 != 0, cases % 2 != 0, cases + 1);
            ++cases;
            run.expect();
            if (!run.run() || !run.compare(file)) ++failures;
        }
    if (file) fclose(file);
    printf("%s: %d cases, %d failures\n", nat_isa(), cases, failures);
    return failures > 0;
}
