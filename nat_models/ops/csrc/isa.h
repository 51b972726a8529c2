// The instruction sets one library carries. NAT_ENTRY names the one being compiled; the build defines it.
#pragma once
#include "abi.h"

typedef int32_t nat_entry(const nat_na2d_call* call, int32_t backward, nat_parallel_for run, int64_t threads);

nat_entry nat_na2d_baseline;
#ifdef NAT_X86
nat_entry nat_na2d_avx2;
nat_entry nat_na2d_avx512;
#ifdef NAT_X86_BF16  // the compiler knows it
nat_entry nat_na2d_avx512_bf16;
#endif
#endif

// nat_na2d_forward on given threads, not on those of nat_set_threads.
int32_t nat_na2d_forward_on(const nat_na2d_call* call, nat_parallel_for run, int64_t threads);
