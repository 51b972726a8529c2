// torch.ops.nat_models.na2d_qkvpacked_inference on a CPU, registered through torch's C shim.
#include <stdint.h>
#include <string.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "packed.h"

namespace {

nat_torch torch;

[[noreturn]] void refuse(const std::string& why) { throw std::runtime_error("na2d_qkvpacked_inference: " + why); }

void check(int32_t status) {
    if (status) refuse("status " + std::to_string(status) + " from torch");
}

// A tensor that this owns until it is released.
struct Tensor {
    void* handle;
    int64_t dim = 0, *size = nullptr, *stride = nullptr;
    void* data = nullptr;
    int32_t dtype = 0;

    explicit Tensor(void* handle) : handle(handle) {}
    Tensor(const Tensor&) = delete;
    Tensor& operator=(const Tensor&) = delete;
    ~Tensor() {
        if (handle) torch.delete_tensor_object(handle);
    }

    void read() {
        check(torch.get_dim(handle, &dim));
        check(torch.get_sizes(handle, &size));
        check(torch.get_strides(handle, &stride));
        check(torch.get_data_ptr(handle, &data));
        check(torch.get_dtype(handle, &dtype));
    }
    void* release() {
        void* const released = handle;
        handle = nullptr;
        return released;
    }
    // Of a tensor with elements: its sizes multiply to no more than its memory holds, where strides say so.
    bool contiguous() const {
        int64_t expected = 1;
        for (int64_t i = dim - 1; i >= 0; expected *= size[i--]) {
            if (size[i] != 1 && stride[i] != expected) return false;
        }
        return true;
    }
    Shape shape() const { return {dim, size}; }
};

bool find_dtype(const Tensor& tensor, nat_na2d_call& call, int64_t& bytes) {
    const struct {
        int32_t dtype;
        nat_dtype ours;
        int64_t bytes;
    } known[] = {{torch.dtype_float32(), NAT_FLOAT32, 4},
                 {torch.dtype_float64(), NAT_FLOAT64, 8},
                 {torch.dtype_bfloat16(), NAT_BFLOAT16, 2},
                 {torch.dtype_float16(), NAT_FLOAT16, 2}};
    for (const auto& candidate : known) {
        if (candidate.dtype != tensor.dtype) continue;
        call.dtype = candidate.ours;
        bytes = candidate.bytes;
        return true;
    }
    return false;
}

// Fills the call's sizes and dtype. Returns the rule that the arguments break, null if none. The package has checked
// them before it calls; whoever calls the operator itself has not. All tensors are dense ones of a CPU here: others
// have another dispatch key.
const char* fill(nat_na2d_call& call, const Tensor& qkv, const Tensor& rpb, int64_t& bytes) {
    if (const char* rule = fill_sizes(call, qkv.shape())) return rule;
    if (!find_dtype(qkv, call, bytes)) return "qkv must be float32, float64, bfloat16 or float16";
    if (const char* rule = broken_rule(call)) return rule;
    const bool widened = call.dtype == NAT_BFLOAT16 && rpb.dtype == qkv.dtype;
    if (!widened && rpb.dtype != (call.dtype == NAT_FLOAT64 ? torch.dtype_float64() : torch.dtype_float32()))
        return "rpb must be float64 where qkv is, and float32 otherwise, or bfloat16 where qkv is";
    if (const char* rule = broken_rpb_rule(call, rpb.shape())) return rule;
    if (is_empty(call)) return nullptr;
    if (!rpb.contiguous()) return "rpb must be contiguous";
    return call.head_dim == 1 || qkv.stride[5] == 1 ? nullptr : "the last axis of qkv must be dense";
}

// rpb as the kernel reads it: bfloat16 widened, in `memory`.
const void* wide_rpb(const Tensor& rpb, std::vector<float>& memory) {
    if (rpb.dtype != torch.dtype_bfloat16() || !rpb.data) return rpb.data;
    memory.resize(rpb.size[0] * rpb.size[1] * rpb.size[2]);
    for (size_t i = 0; i < memory.size(); ++i) {
        uint16_t half;  // at any address
        memcpy(&half, static_cast<const char*>(rpb.data) + i * sizeof half, sizeof half);
        const uint32_t bits = uint32_t(half) << 16;
        memcpy(&memory[i], &bits, sizeof bits);
    }
    return memory.data();
}

// Contiguous, of the call's sizes.
void* new_output(const nat_na2d_call& call, int32_t dtype) {
    const int64_t size[] = {call.batch, call.height, call.width, call.heads, call.head_dim};
    int64_t stride[5];
    if (!contiguous_strides(size, 5, stride)) refuse("the strides of the output overflow");
    void* out;
    check(torch.empty_strided(5, size, stride, dtype, torch.device_type_cpu(), 0, &out));
    return out;
}

// (Tensor qkv [B, H, W, 3, heads, head_dim], Tensor rpb, int kernel_height, kernel_width, dilation_height,
// dilation_width, float scale) -> Tensor [B, H, W, heads, head_dim]; the result takes the place of the first argument.
//
// torch hands over the two handles and never frees them, whether this returns or throws; after a throw it does not look
// at the stack. So both are owned before anything can throw, and the stack gets the result when nothing can any more.
void na2d_qkvpacked_inference(uint64_t* stack, uint64_t, uint64_t) {
    Tensor qkv(reinterpret_cast<void*>(stack[0])), rpb(reinterpret_cast<void*>(stack[1]));
    qkv.read();
    rpb.read();
    nat_na2d_call call = {};
    for (int i = 0; i < 2; ++i) {
        call.kernel[i] = static_cast<int64_t>(stack[2 + i]);
        call.dilation[i] = static_cast<int64_t>(stack[4 + i]);
    }
    memcpy(&call.scale, &stack[6], sizeof call.scale);
    const auto values = [&] {
        return ", got qkv " + qkv.shape().text() + ", rpb " + rpb.shape().text() + ", " + window_text(call);
    };
    int64_t bytes = 0;
    if (const char* rule = fill(call, qkv, rpb, bytes)) refuse(rule + values());

    Tensor out(new_output(call, qkv.dtype));
    if (!is_empty(call)) {
        out.read();
        point_at(call, qkv.data, qkv.stride, bytes);
        std::vector<float> memory;
        call.rpb = wide_rpb(rpb, memory);
        call.out.data = out.data;
        memcpy(call.out.stride, out.stride, sizeof call.out.stride);
        const int32_t status = nat_na2d_forward(&call);
        if (status == NAT_NO_MEMORY) refuse("no memory for scratch" + values());
        if (status) refuse("the data of qkv and rpb must be there, and aligned" + values());
    }
    stack[0] = reinterpret_cast<uint64_t>(out.release());
}

}  // namespace

NAT_EXPORT const char* nat_torch_function(int64_t index) {
#define NAT_NAME(name, parameters) "aoti_torch_" #name,
    static const char* const names[] = {NAT_TORCH_FUNCTIONS(NAT_NAME)};
#undef NAT_NAME
    const int64_t count = sizeof names / sizeof *names;
    return index >= 0 && index < count ? names[index] : nullptr;
}

NAT_EXPORT int64_t nat_torch_size(void) { return sizeof(nat_torch); }

NAT_EXPORT int32_t nat_register(const nat_torch* functions) {
    static std::atomic<bool> done{false};
    if (done.exchange(true)) return 0;
    torch = *functions;
    void* library = nullptr;  // never freed: that would take the kernel back
    const int32_t status = torch.library_init_impl("nat_models", "CPU", "torch_shim.cpp", __LINE__, &library);
    return status ? status : torch.library_impl(library, "na2d_qkvpacked_inference", na2d_qkvpacked_inference);
}
