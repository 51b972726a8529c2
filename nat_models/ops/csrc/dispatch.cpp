// Picks the instruction set and forwards the C ABI to it.
#include <string.h>

#include "checks.h"
#include "isa.h"

namespace {

struct Isa {
    const char* name;
    nat_entry* entry;
    bool (*supported)();
};

#ifdef NAT_X86
bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Best first.
const Isa kIsas[] = {
#ifdef NAT_X86
#ifdef NAT_X86_BF16
    {"avx512_bf16", nat_na2d_avx512_bf16, [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }},
#endif
    {"avx512", nat_na2d_avx512, has_avx512},
    {"avx2", nat_na2d_avx2, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"baseline", nat_na2d_baseline, [] { return true; }},
};

const Isa* chosen = nullptr;
nat_parallel_for run_parallel = nullptr;
nat_num_threads count_threads = nullptr;

const Isa& isa() {
    if (!chosen) nat_select_isa(nullptr);
    return *chosen;
}

// Whether a pointer leads to elements of a size; null only where it may be.
bool leads_to(const void* data, uintptr_t bytes, bool may_be_null = false) {
    return (data || may_be_null) && (uintptr_t)data % bytes == 0;
}

bool data_is_there(const nat_na2d_call& call, bool backward) {
    const uintptr_t wide = call.dtype == NAT_FLOAT64 ? 8 : 4;
    const uintptr_t bytes = call.dtype == NAT_BFLOAT16 || call.dtype == NAT_FLOAT16 ? 2 : wide;
    const nat_tensor* const tensors[] = {&call.query, &call.key, &call.value, backward ? &call.grad_out : &call.out};
    const nat_tensor* const gradients[] = {&call.grad_query, &call.grad_key, &call.grad_value};
    bool good = leads_to(call.rpb, wide, true) && leads_to(call.grad_rpb, wide, true);
    for (const nat_tensor* t : tensors) good = good && leads_to(t->data, bytes);
    if (backward)
        for (const nat_tensor* t : gradients) good = good && leads_to(t->data, bytes);
    return good;
}

int32_t run_on(const nat_na2d_call* call, bool backward, nat_parallel_for run, int64_t threads) {
    if (broken_rule(*call)) return NAT_BAD_CALL;
    if (is_empty(*call)) return NAT_OK;
    if (!data_is_there(*call, backward)) return NAT_BAD_CALL;
    return isa().entry(call, backward, run, threads);
}

int32_t run(const nat_na2d_call* call, bool backward) {
    uint32_t threads = 1;
    if (run_parallel && count_threads && count_threads(&threads) != 0) threads = 1;
    return run_on(call, backward, run_parallel, threads);
}

}  // namespace

NAT_EXPORT int32_t nat_select_isa(const char* name) {
#ifdef NAT_X86
    __builtin_cpu_init();
#endif
    for (const Isa& candidate : kIsas) {
        const bool any = !name || !*name;
        if (!any && strcmp(name, candidate.name) != 0) continue;
        if (!candidate.supported()) {
            if (any) continue;
            return 2;
        }
        chosen = &candidate;
        return 0;
    }
    return 1;
}
NAT_EXPORT const char* nat_isa(void) { return isa().name; }
NAT_EXPORT void nat_set_threads(nat_parallel_for run, nat_num_threads count) {
    run_parallel = run;
    count_threads = count;
}
NAT_EXPORT int64_t nat_call_size(void) { return sizeof(nat_na2d_call); }
NAT_EXPORT int32_t nat_na2d_forward(const nat_na2d_call* call) { return run(call, false); }
NAT_EXPORT int32_t nat_na2d_backward(const nat_na2d_call* call) { return run(call, true); }

int32_t nat_na2d_forward_on(const nat_na2d_call* call, nat_parallel_for run, int64_t threads) {
    return run_on(call, false, run, threads);
}
