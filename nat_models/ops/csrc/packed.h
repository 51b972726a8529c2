// What the two shims share: the call of a packed qkv [B, H, W, 3, heads, head_dim] with its rpb, checked and described.
#pragma once
#include <string.h>

#include <string>

#include "checks.h"

namespace {

struct Shape {
    int64_t dim;
    const int64_t* size;

    std::string text() const {
        std::string text = "[";
        for (int64_t i = 0; i < dim; ++i) text += (i ? ", " : "") + std::to_string(size[i]);
        return text + "]";
    }
};

// Fills the call's sizes. Returns the rule that qkv breaks, null if none.
inline const char* fill_sizes(nat_na2d_call& call, const Shape& qkv) {
    if (qkv.dim != 6 || qkv.size[3] != 3) return "qkv must be [B, H, W, 3, num_heads, head_dim]";
    call.batch = qkv.size[0];
    call.height = qkv.size[1];
    call.width = qkv.size[2];
    call.heads = qkv.size[4];
    call.head_dim = qkv.size[5];
    return nullptr;
}

// size == 2 * kernel - 1, without the product.
inline bool is_rpb_size(int64_t size, int64_t kernel) { return size % 2 == 1 && size / 2 == kernel - 1; }

// The rule that the shape of rpb breaks; null if none.
inline const char* broken_rpb_rule(const nat_na2d_call& call, const Shape& rpb) {
    const bool good = rpb.dim == 3 && rpb.size[0] == call.heads && is_rpb_size(rpb.size[1], call.kernel[0]) &&
                      is_rpb_size(rpb.size[2], call.kernel[1]);
    return good ? nullptr : "rpb must be [num_heads, 2*K_h-1, 2*K_w-1]";
}

// Lets query, key and value be the views of qkv, of so many bytes an element. A null, which the kernel refuses, stays
// one.
inline void point_at(nat_na2d_call& call, void* qkv, const int64_t* stride, int64_t bytes) {
    nat_tensor* const views[] = {&call.query, &call.key, &call.value};
    for (int i = 0; i < 3; ++i) {
        views[i]->data = qkv ? static_cast<char*>(qkv) + i * stride[3] * bytes : nullptr;
        memcpy(views[i]->stride, stride, 3 * sizeof(int64_t));
        views[i]->stride[3] = stride[4];
    }
}

// Strides of a contiguous tensor; false where they overflow.
inline bool contiguous_strides(const int64_t* size, int64_t dim, int64_t* stride) {
    int64_t step = 1;
    for (int64_t i = dim - 1; i >= 0; --i) {
        stride[i] = step;
        // Without elements, axes may be of any length.
        if (__builtin_mul_overflow(step, size[i] ? size[i] : 1, &step)) return false;
    }
    return true;
}

inline std::string window_text(const nat_na2d_call& call) {
    const auto pair = [](const int64_t* x) { return std::to_string(x[0]) + ", " + std::to_string(x[1]); };
    return "kernel_size (" + pair(call.kernel) + "), dilation (" + pair(call.dilation) + ")";
}

}  // namespace
