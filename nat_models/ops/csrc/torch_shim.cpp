// torch.ops.nat_models.na2d_qkvpacked_inference on a CPU, registered through torch's C shim.
#include <stdint.h>
#include <string.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "abi.h"

namespace {

nat_torch torch;

void check(int32_t status) {
    if (status) throw std::runtime_error("na2d_qkvpacked_inference: status " + std::to_string(status) + " from torch");
}

// A tensor that the stack handed over and this owns.
struct Tensor {
    void* handle;
    int64_t dim, *size, *stride;
    void* data;

    explicit Tensor(uint64_t value) : handle(reinterpret_cast<void*>(value)) {
        check(torch.get_dim(handle, &dim));
        check(torch.get_sizes(handle, &size));
        check(torch.get_strides(handle, &stride));
        check(torch.get_data_ptr(handle, &data));
    }
    Tensor(const Tensor&) = delete;
    Tensor& operator=(const Tensor&) = delete;
    ~Tensor() { torch.delete_tensor_object(handle); }

    int32_t dtype() const {
        int32_t dtype;
        check(torch.get_dtype(handle, &dtype));
        return dtype;
    }
    bool contiguous() const {
        int64_t expected = 1;
        for (int64_t i = dim - 1; i >= 0; expected *= size[i--]) {
            if (size[i] != 1 && stride[i] != expected) return false;
        }
        return true;
    }
};

int64_t dtype_of(const Tensor& tensor, int64_t& bytes) {
    const int32_t dtype = tensor.dtype();
    bytes = dtype == torch.dtype_float32() ? 4 : dtype == torch.dtype_float64() ? 8 : 2;
    if (bytes == 4) return NAT_FLOAT32;
    if (bytes == 8) return NAT_FLOAT64;
    if (dtype == torch.dtype_bfloat16()) return NAT_BFLOAT16;
    if (dtype == torch.dtype_float16()) return NAT_FLOAT16;
    throw std::runtime_error("na2d_qkvpacked_inference: qkv must be float32, float64, bfloat16 or float16");
}

// (Tensor qkv [B, H, W, 3, heads, head_dim], Tensor rpb, int kernel_height, kernel_width, dilation_height,
// dilation_width, float scale) -> Tensor [B, H, W, heads, head_dim]; the result takes the place of the first argument.
void na2d_qkvpacked_inference(uint64_t* stack, uint64_t, uint64_t) {
    const Tensor qkv(stack[0]), rpb(stack[1]);
    nat_na2d_call call = {};
    for (int i = 0; i < 2; ++i) {
        call.kernel[i] = static_cast<int64_t>(stack[2 + i]);
        call.dilation[i] = static_cast<int64_t>(stack[4 + i]);
    }
    memcpy(&call.scale, &stack[6], sizeof call.scale);

    int64_t bytes;
    call.dtype = dtype_of(qkv, bytes);
    const int32_t rpb_dtype = call.dtype == NAT_FLOAT64 ? torch.dtype_float64() : torch.dtype_float32();
    // The package checks shapes before it calls; whoever calls the operator itself may not have.
    bool fits = true;
    for (int i = 0; i < 2; ++i) fits = fits && call.kernel[i] >= 3 && call.kernel[i] % 2 && call.dilation[i] >= 1;
    fits = fits && qkv.dim == 6 && qkv.size[3] == 3 && (qkv.size[5] == 1 || qkv.stride[5] == 1) && rpb.dim == 3 &&
           rpb.dtype() == rpb_dtype && rpb.contiguous() && rpb.size[0] == qkv.size[4] &&
           rpb.size[1] == 2 * call.kernel[0] - 1 && rpb.size[2] == 2 * call.kernel[1] - 1;
    // A quotient, because the product of any two numbers may overflow.
    for (int i = 0; i < 2; ++i) fits = fits && call.kernel[i] <= qkv.size[1 + i] / call.dilation[i];
    if (!fits) throw std::runtime_error("na2d_qkvpacked_inference: arguments that nat_models.na2d would not pass");

    call.batch = qkv.size[0];
    call.height = qkv.size[1];
    call.width = qkv.size[2];
    call.heads = qkv.size[4];
    call.head_dim = qkv.size[5];
    nat_tensor* views[] = {&call.query, &call.key, &call.value};
    for (int i = 0; i < 3; ++i) {
        views[i]->data = static_cast<char*>(qkv.data) + i * qkv.stride[3] * bytes;
        memcpy(views[i]->stride, qkv.stride, 3 * sizeof(int64_t));
        views[i]->stride[3] = qkv.stride[4];
    }
    call.rpb = rpb.data;

    const int64_t size[] = {call.batch, call.height, call.width, call.heads, call.head_dim};
    int64_t stride[5] = {0, 0, 0, 0, 1};
    for (int i = 3; i >= 0; --i) stride[i] = stride[i + 1] * (size[i + 1] ? size[i + 1] : 1);
    void* out;
    check(torch.empty_strided(5, size, stride, qkv.dtype(), torch.device_type_cpu(), 0, &out));
    stack[0] = reinterpret_cast<uint64_t>(out);
    memcpy(call.out.stride, stride, sizeof call.out.stride);
    check(torch.get_data_ptr(out, &call.out.data));
    const bool empty = size[0] == 0 || size[3] == 0 || size[4] == 0;
    const int32_t status = empty ? 0 : nat_na2d_forward(&call);
    if (status) {
        torch.delete_tensor_object(out);
        throw std::runtime_error(status == NAT_NO_MEMORY ? "na2d: no memory for scratch" : "na2d: the kernel failed");
    }
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
