// What makes a call safe to compute, whoever calls: sizes, window, and where the data is.
#pragma once
#include "abi.h"

namespace {  // one copy of an inline function may serve objects that were built for different CPUs

// More elements than any address space holds: sizes below it can be multiplied without overflow.
constexpr double kMaxElements = double(int64_t(1) << 48);

// The rule that a call's window breaks on any map; null if none.
inline const char* broken_window_rule(const nat_na2d_call& call) {
    for (int i = 0; i < 2; ++i) {
        if (call.kernel[i] < 1 || call.kernel[i] % 2 == 0) return "kernel_size must be odd and at least 1";
        if (call.dilation[i] < 1) return "dilation must be at least 1";
    }
    return nullptr;
}

// The rule that a call's sizes and window break; null if none.
inline const char* broken_rule(const nat_na2d_call& call) {
    const int64_t sizes[] = {call.batch, call.height, call.width, call.heads, call.head_dim};
    double elements = 1;
    for (const int64_t size : sizes) {
        if (size < 0) return "sizes must not be negative";
        elements *= double(size);
    }
    if (const char* rule = broken_window_rule(call)) return rule;
    const int64_t map[] = {call.height, call.width};
    for (int i = 0; i < 2; ++i) {
        // A quotient, because the product of any two numbers may overflow.
        if (call.kernel[i] > map[i] / call.dilation[i]) return "kernel_size * dilation must fit in the map";
    }
    return elements > kMaxElements ? "the tensors must fit in memory" : nullptr;
}

inline bool is_empty(const nat_na2d_call& call) { return call.batch == 0 || call.heads == 0 || call.head_dim == 0; }

}  // namespace
