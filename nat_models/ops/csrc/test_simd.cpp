// Unit tests of simd.h, half.h and pairs.h, compiled once for each instruction set. Prints what fails and exits with 1;
// with 77 where the CPU lacks the instruction set. One argument: how sparsely to sample exp2 (emulators are slow).
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "pairs.h"

namespace {

int failures = 0;

// A failing check prints what and where; the first few are enough.
#define CHECK(condition, ...)                                      \
    do {                                                           \
        if (!(condition) && ++failures <= 20) {                    \
            printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            printf(__VA_ARGS__);                                   \
            printf("\n");                                          \
        }                                                          \
    } while (0)

float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

// What a pattern means, from the definition of the format: sign, exponent, fraction.
double value_of(float16 h) {
    const int exponent = h.raw >> 10 & 31, fraction = h.raw & 1023;
    const double magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                             : exponent     ? ldexp(1024 + fraction, exponent - 25)
                                            : ldexp(fraction, -24);
    return h.raw & 0x8000 ? -magnitude : magnitude;
}
double value_of(bfloat16 h) {
    const int exponent = h.raw >> 7 & 255, fraction = h.raw & 127;
    const double magnitude = exponent == 255 ? (fraction ? NAN : INFINITY)
                             : exponent      ? ldexp(128 + fraction, exponent - 134)
                                             : ldexp(fraction, -133);
    return h.raw & 0x8000 ? -magnitude : magnitude;
}
constexpr uint16_t infinity_of(float16) { return 0x7c00; }
constexpr uint16_t infinity_of(bfloat16) { return 0x7f80; }
// The first value of the next exponent: where infinity would be if the format had one more.
double beyond_largest(float16) { return 65536; }
double beyond_largest(bfloat16) { return ldexp(1, 128); }

template <class H>
void test_widen() {
    constexpr index_t L = lanes<float>;
    for (uint32_t raw = 0; raw < 65536; raw += L) {
        H in[L];
        float out[L];
        for (index_t l = 0; l < L; ++l) in[l].raw = raw + l;
        store(out, widen(in));
        for (index_t l = 0; l < L; ++l) {
            const double expected = value_of(in[l]);
            const bool same =
                isnan(expected) ? isnan(out[l]) : out[l] == expected && !signbit(out[l]) == !signbit(expected);
            CHECK(same, "%d bits, pattern %04x: %a, not %a", (int)sizeof(H) * 8, in[l].raw, out[l], expected);
        }
    }
}

#if defined(__AVX512BF16__)
constexpr bool flushes(bfloat16) { return true; }  // subnormal numbers
#else
constexpr bool flushes(bfloat16) { return false; }
#endif
constexpr bool flushes(float16) { return false; }

// Narrows x, in every lane and with both signs, to the magnitude `expected`.
template <class H>
void check_narrow(float x, uint16_t expected) {
    constexpr index_t L = lanes<float>;
    float in[L];
    H out[L];
    if (flushes(H{}) && x < 0x1p-126f) expected = 0;
    for (index_t l = 0; l < L; ++l) in[l] = l % 2 ? -x : x;
    narrow(out, load(in));
    for (index_t l = 0; l < L; ++l) {
        const uint16_t wanted = expected | (l % 2 ? 0x8000 : 0);
        CHECK(out[l].raw == wanted, "%a (%08x) became %04x, not %04x", in[l], bits_of(in[l]), out[l].raw, wanted);
    }
}

// Between every two neighbours: the values themselves, their midpoint (to the even one) and the floats around it.
template <class H>
void test_narrow() {
    const uint16_t infinity = infinity_of(H{});
    for (uint16_t raw = 0; raw < infinity; ++raw) {
        const uint16_t next = raw + 1;
        const double low = value_of(H{raw}), high = next == infinity ? beyond_largest(H{}) : value_of(H{next});
        const float middle = float((low + high) / 2);  // exact: a float has more bits, down to its own subnormals
        check_narrow<H>(float(low), raw);
        check_narrow<H>(middle, raw % 2 ? next : raw);
        check_narrow<H>(nextafterf(middle, 0), raw);
        check_narrow<H>(nextafterf(middle, INFINITY), next);
        check_narrow<H>(nextafterf(float(low), INFINITY), raw);
        if (raw) check_narrow<H>(nextafterf(float(low), 0), raw);
    }
    check_narrow<H>(INFINITY, infinity);
    check_narrow<H>(0x1.fffffep127f, infinity);
    check_narrow<H>(0x1p-149f, 0);
}

template <class H>
void test_narrow_nan() {
    constexpr index_t L = lanes<float>;
    for (uint32_t payload : {0x1u, 0x1fffu, 0x2000u, 0xffffu, 0x10000u, 0x3fffffu, 0x400000u, 0x7fffffu})
        for (uint32_t sign : {0u, 0x80000000u}) {
            float in[L];
            H out[L];
            for (index_t l = 0; l < L; ++l) in[l] = float_of(sign | 0x7f800000 | payload);
            narrow(out, load(in));
            for (index_t l = 0; l < L; ++l)
                CHECK(isnan(value_of(out[l])), "payload %x became %04x", payload, out[l].raw);
        }
}

// Largest error over [from, to] in units of the last place of the exact value.
template <class C>
double exp2_error(double from, double to, index_t samples) {
    constexpr index_t L = lanes<C>;
    const int digits = sizeof(C) == 4 ? 24 : 53;
    double worst = 0;
    for (index_t n = 0; n < samples; n += L) {
        C in[L], out[L];
        for (index_t l = 0; l < L; ++l) in[l] = C(from + (to - from) * (n + l) / (samples + L));
        store(out, exp2_nonpositive(load(in)));
        for (index_t l = 0; l < L; ++l) {
            const long double exact = exp2l(in[l]);
            const long double ulp = ldexpl(1, ilogbl(exact) + 1 - digits);
            worst = fmax(worst, double(fabsl(out[l] - exact) / ulp));
        }
    }
    return worst;
}

template <class C>
void check_exp2(C t, C expected) {
    C out[lanes<C>];
    store(out, exp2_nonpositive(splat(t)));
    for (C x : out) CHECK(x == expected, "exp2(%a) is %a, not %a", double(t), double(x), double(expected));
}

void test_exp2(index_t sparsity) {
    const index_t samples = 4000000 / sparsity;
    // The float polynomial is off by 9e-8, which is 1.5 ulp below a power of two; its last steps round, without FMA
    // twice.
    const double worst_float = fmax(exp2_error<float>(-100, 1, samples), exp2_error<float>(-1, 0, samples / 4));
    const double worst_double = fmax(exp2_error<double>(-900, 1, samples), exp2_error<double>(-1, 0, samples / 4));
    printf("exp2: %.3f ulp (float), %.3f ulp (double)\n", worst_float, worst_double);
    CHECK(worst_float <= 2.3, "%g ulp", worst_float);
    CHECK(worst_double <= 1.2, "%g ulp", worst_double);
    for (int t = 0; t >= -100; --t) check_exp2<float>(t, ldexpf(1, t));
    for (int t = 0; t >= -900; --t) check_exp2<double>(t, ldexp(1, t));
    check_exp2<float>(-1e30f, 0x1p-100f);  // a masked key
    check_exp2<float>(-INFINITY, 0x1p-100f);
    check_exp2<double>(-1e30, 0x1p-900);
    check_exp2<double>(-INFINITY, 0x1p-900);
}

template <class C>
void test_lanes() {
    constexpr index_t L = lanes<C>;
    vec<C> square[L];
    for (index_t i = 0; i < L; ++i)
        for (index_t l = 0; l < L; ++l) square[i][l] = C(i * L + l);
    transpose<C>(square);
    for (index_t i = 0; i < L; ++i)
        for (index_t l = 0; l < L; ++l)
            CHECK(square[i][l] == C(l * L + i), "transpose [%d][%d]: %g", (int)i, (int)l, double(square[i][l]));

    vec<C> powers;  // each lane counts once: no other set of lanes has this sum
    for (index_t l = 0; l < L; ++l) powers[l] = C(1 << l);
    CHECK(sum_lanes<C>(powers) == C((1 << L) - 1), "%g", double(sum_lanes<C>(powers)));

    for (index_t multiplier = 0; multiplier < 2 * L; ++multiplier) {  // all equal, identity, backwards, repeated
        bits<C> from;
        for (index_t l = 0; l < L; ++l) from[l] = (l * multiplier + multiplier / L) % L;
        const vec<C> y = permute<C>(powers, from);
        for (index_t l = 0; l < L; ++l)
            CHECK(y[l] == powers[from[l]], "permute lane %d from %d: %g", (int)l, (int)from[l], double(y[l]));
    }
    for (index_t l = 0; l < L; ++l) CHECK(lane_numbers<C>()[l] == (decltype(lane_numbers<C>()[0] + 0))l, "%d", (int)l);
    CHECK(signbit(splat(C(-0.0))[L - 1]), "splat lost the sign of zero");
    for (index_t l = 0; l < L; ++l) CHECK(maximum(powers, splat(C(3)))[l] == fmax(powers[l], C(3)), "lane %d", (int)l);

    C memory[3 * L] = {};
    store(memory + 1, powers);  // vectors start at any element
    CHECK(memory[0] == 0 && memory[L + 1] == 0, "store touched its neighbours");
    CHECK(load(memory + 1)[0] == 1 && load_again(memory + 1)[L - 1] == C(1 << (L - 1)), "load or store misplaced");
}

// A page that nothing may be read or written after: what runs over its end crashes.
struct Page {
    size_t size = sysconf(_SC_PAGESIZE);
    char* data = (char*)mmap(nullptr, 2 * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    Page() { mprotect(data + size, size, PROT_NONE); }
    ~Page() { munmap(data, 2 * size); }
    template <class E>
    E* last(index_t count) const {
        return (E*)(data + size) - count;
    }
};

template <class C, class E>
C value(E x) {
    if constexpr (sizeof(E) == 2) return C(value_of(x));
    else return x;
}
template <class E>
E small_number(index_t n) {  // exact in every format
    if constexpr (sizeof(E) != 2) return E(n % 127 + 1);
    else {
        using C = typename Compute<E>::type;
        C in[lanes<C>];
        E out[lanes<C>];
        store(in, splat(C(n % 127 + 1)));
        narrow(out, load(in));
        return out[0];
    }
}

template <class E>
void test_tails() {
    using C = typename Compute<E>::type;
    constexpr index_t L = lanes<C>;
    const Page page;
    for (index_t count = 0; count <= L; ++count) {
        E* const p = page.last<E>(count);
        for (index_t i = 0; i < count; ++i) p[i] = small_number<E>(i);
        const vec<C> x = widen_some(p, count);
        for (index_t l = 0; l < L; ++l)
            CHECK(x[l] == (l < count ? C(l % 127 + 1) : C(0)), "widen_some of %d, lane %d: %g", (int)count, (int)l,
                  double(x[l]));
    }
    constexpr index_t kTokens = 3, kGap = 2;
    for (index_t dim = 1; dim <= 2 * L + 1; ++dim) {
        const index_t dim_padded = (dim + L - 1) / L * L, step = dim + kGap;
        C rows[kTokens * 3 * L];
        for (index_t i = 0; i < kTokens * dim_padded; ++i) rows[i] = C(i % 127 + 1);
        const index_t size = kTokens * step - kGap;  // the last token ends the page
        E* const to = page.last<E>(size);
        const E untouched = small_number<E>(126);
        for (index_t i = 0; i < size; ++i) to[i] = untouched;
        store_tokens(rows, dim_padded, kTokens, dim, step, to);
        for (index_t i = 0; i < size; ++i) {
            const index_t token = i / step, element = i % step;
            const C expected = element < dim ? rows[token * dim_padded + element] : C(127);
            CHECK((value<C>(to[i])) == expected, "store_tokens of %d, token %d, element %d: %g", (int)dim, (int)token,
                  (int)element, double(value<C>(to[i])));
        }
    }
}

#if defined(__AVX512BF16__)
// The halves of 16 lanes, by the definition of a pair.
void halves_of(vec<pair> x, bfloat16 (&halves)[2 * lanes<pair>]) {
    for (index_t l = 0; l < lanes<pair>; ++l) halves[2 * l].raw = x[l] & 0xffff, halves[2 * l + 1].raw = x[l] >> 16;
}
// A number for each place, exact in bfloat16: no two of the first 254 are the same.
float numbered(index_t n) { return float(n % 2 ? -1 - n / 2 : 1 + n / 2); }

void test_pairs() {
    constexpr index_t L = lanes<pair>, H = 2 * L;
    bfloat16 a[H], b[H], out[H];
    for (index_t n = 0; n < H; ++n) {
        a[n].raw = bits_of(numbered(n)) >> 16;
        b[n].raw = bits_of(numbered(n + H)) >> 16;
    }
    const vec<pair> x = load_pairs(a, H), y = load_pairs(b, H);
    const auto check = [&](const char* what, vec<pair> z, float (*expected)(index_t)) {
        halves_of(z, out);
        for (index_t n = 0; n < H; ++n)
            CHECK(value_of(out[n]) == expected(n), "%s, half %d: %g, not %g", what, (int)n, value_of(out[n]),
                  expected(n));
    };
    check("load", x, numbered);
    check("splat", splat(pair{0xc0003f80}), [](index_t n) { return n % 2 ? -2.f : 1.f; });
    check("zip_low", zip_low(x, y), [](index_t n) { return numbered(n / 2 + n % 2 * 32); });
    check("zip_high", zip_high(x, y), [](index_t n) { return numbered(16 + n / 2 + n % 2 * 32); });
    vec<float> first, second;
    for (index_t l = 0; l < L; ++l) first[l] = numbered(l), second[l] = numbered(l + L);
    check("concatenate", concatenate(first, second), numbered);
    check("zip_halves", zip_halves(x), [](index_t n) { return numbered(n / 2 + n % 2 * 16); });
    check("pack", pack(first, second), [](index_t n) { return numbered(n / 2 + n % 2 * 16); });
    check("pick", pick(x, false, y, false), [](index_t n) { return numbered(n % 2 ? n - 1 + 32 : n); });
    check("pick", pick(x, false, y, true), [](index_t n) { return numbered(n % 2 ? n + 32 : n); });
    check("pick", pick(x, true, y, false), [](index_t n) { return numbered(n % 2 ? n - 1 + 32 : n + 1); });
    check("pick", pick(x, true, y, true), [](index_t n) { return numbered(n % 2 ? n + 32 : n + 1); });

    const Page page;
    for (index_t count = 1; count <= H; ++count) {
        bfloat16* const p = page.last<bfloat16>(count);
        memcpy(p, a, count * sizeof *p);
        halves_of(load_pairs(p, count), out);
        for (index_t n = 0; n < H; ++n)
            CHECK(value_of(out[n]) == (n < count ? numbered(n) : 0), "load_pairs of %d, half %d: %g", (int)count,
                  (int)n, value_of(out[n]));
    }

    // Small integers: products and sums are exact.
    const vec<float> products = multiply_add(first, x, y), sums = add_pairs(first, x);
    for (index_t l = 0; l < L; ++l) {
        const float low = numbered(2 * l) * numbered(2 * l + H), high = numbered(2 * l + 1) * numbered(2 * l + 1 + H);
        CHECK(products[l] == numbered(l) + low + high, "multiply_add, lane %d: %g", (int)l, products[l]);
        CHECK(sums[l] == numbered(l) + numbered(2 * l) + numbered(2 * l + 1), "add_pairs, lane %d: %g", (int)l,
              sums[l]);
    }
    const float third = 1 / 3.f;
    const vec<float> wide = multiply_add(splat(third), splat(pair{0}), x);
    CHECK(wide[0] == third, "multiply_add rounded its sum to %a", wide[0]);

    // Rounds as narrow does.
    for (uint32_t raw = 0; raw < 0x7f80; ++raw)
        for (uint32_t rest : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
            const float number = float_of(raw << 16 | rest);
            bfloat16 expected[lanes<float>];
            narrow(expected, splat(number));
            halves_of(pack(splat(number), splat(-number)), out);
            CHECK(out[0].raw == expected[0].raw && out[1].raw == (expected[0].raw | 0x8000), "%a became %04x, not %04x",
                  number, out[0].raw, expected[0].raw);
        }
    halves_of(pack(splat(NAN), splat(INFINITY)), out);
    CHECK(isnan(value_of(out[0])) && value_of(out[1]) == INFINITY, "%04x %04x", out[0].raw, out[1].raw);
}
#endif

bool cpu_has_it() {
#if defined(__AVX512BF16__)
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512dq");
#elif defined(__AVX512F__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#elif defined(__AVX2__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    return true;
#endif
}

}  // namespace

int main(int argc, char** argv) {
    if (!cpu_has_it()) return 77;
    test_widen<float16>();
    test_widen<bfloat16>();
    test_narrow<float16>();
    test_narrow<bfloat16>();
    test_narrow_nan<float16>();
    test_narrow_nan<bfloat16>();
    test_exp2(argc > 1 ? atoi(argv[1]) : 1);
    test_lanes<float>();
    test_lanes<double>();
    test_tails<float>();
    test_tails<double>();
    test_tails<float16>();
    test_tails<bfloat16>();
#if defined(__AVX512BF16__)
    test_pairs();
#endif
    printf("%d bytes a vector: %d failures\n", NAT_VECTOR_BYTES, failures);
    return failures > 0;
}
