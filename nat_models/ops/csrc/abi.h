// The C ABI of the neighborhood attention kernel: plain C types, so one build serves every torch and every Python.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
#define NAT_EXPORT extern "C" __attribute__((visibility("default")))
extern "C" {
#endif

// [B, H, W, heads, head_dim]; strides in elements for all axes but the last, which is contiguous.
typedef struct {
    void* data;
    int64_t stride[4];
} nat_tensor;

enum nat_dtype { NAT_FLOAT32, NAT_FLOAT64, NAT_BFLOAT16, NAT_FLOAT16 };
enum nat_status { NAT_OK, NAT_NO_MEMORY, NAT_BAD_DTYPE, NAT_BAD_CALL };

// Kernels are odd and >= 1, dilations >= 1, kernel * dilation within the map, and data aligned to its type; a call that
// is not so returns NAT_BAD_CALL and touches no tensor, like one without elements, which returns NAT_OK. Only that
// strides stay within memory is the caller's word.
// rpb and grad_rpb are [heads, 2*Kh-1, 2*Kw-1], contiguous, float64 for float64, otherwise float32; either may be null.
// The forward reads query, key, value, rpb and writes out; the backward reads those and grad_out, and writes grad_*.
typedef struct {
    nat_tensor query, key, value, out, grad_out, grad_query, grad_key, grad_value;
    const void* rpb;
    void* grad_rpb;
    int64_t batch, height, width, heads, head_dim;
    int64_t kernel[2], dilation[2];
    int64_t dtype;
    double scale;
} nat_na2d_call;

// torch_parallel_for of torch/csrc/stable/c/shim.h: splits [begin, end) over torch's own threads.
typedef void (*nat_range_function)(int64_t begin, int64_t end, void* context);
typedef int32_t (*nat_parallel_for)(int64_t begin, int64_t end, int64_t grain, nat_range_function body, void* context);
typedef int32_t (*nat_num_threads)(uint32_t* count);  // torch_get_num_threads, of the same header

int32_t nat_na2d_forward(const nat_na2d_call* call);
int32_t nat_na2d_backward(const nat_na2d_call* call);

// Null (the default) runs everything on the calling thread.
void nat_set_threads(nat_parallel_for run, nat_num_threads count);

// Null or "" picks the best instruction set of this CPU. Returns 0, or 1 for an unknown one, 2 for one this CPU lacks.
int32_t nat_select_isa(const char* name);
const char* nat_isa(void);

// Functions of torch's C shim (torch/csrc/inductor/aoti_torch/c/shim.h) that the registered operator calls, by their
// names without aoti_torch_. All return 0 for success but the constants. A tensor is an opaque pointer there. This is
// their only list: the loader asks nat_torch_function for the names, in this order, and looks them up.
#define NAT_TORCH_FUNCTIONS(F)                                                                                       \
    F(library_init_impl, (const char* ns, const char* key, const char* file, uint32_t line, void** library))         \
    F(library_impl, (void* library, const char* name, void (*kernel)(uint64_t* stack, uint64_t, uint64_t)))          \
    F(get_dim, (void* tensor, int64_t* dim))                                                                         \
    F(get_sizes, (void* tensor, int64_t** sizes))                                                                    \
    F(get_strides, (void* tensor, int64_t** strides))                                                                \
    F(get_dtype, (void* tensor, int32_t* dtype))                                                                     \
    F(get_data_ptr, (void* tensor, void** data))                                                                     \
    F(empty_strided, (int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device_type, \
                      int32_t device_index, void** tensor))                                                          \
    F(delete_tensor_object, (void* tensor))                                                                          \
    F(device_type_cpu, (void))                                                                                       \
    F(dtype_float32, (void))                                                                                         \
    F(dtype_float64, (void))                                                                                         \
    F(dtype_bfloat16, (void))                                                                                        \
    F(dtype_float16, (void))

#define NAT_MEMBER(name, parameters) int32_t(*name) parameters;
typedef struct {
    NAT_TORCH_FUNCTIONS(NAT_MEMBER)
} nat_torch;
#undef NAT_MEMBER

// Full name of the index-th function of nat_torch; null after the last.
const char* nat_torch_function(int64_t index);

// Makes this library the CPU kernel of torch.ops.nat_models.na2d_qkvpacked_inference, so that no Python runs on the way
// to it. Once for a process; later calls do nothing. Returns 0, or what torch returned.
int32_t nat_register(const nat_torch* torch);

// sizeof of the structs: a loader written for another layout finds out before it corrupts memory.
int64_t nat_call_size(void);
int64_t nat_torch_size(void);

#ifdef __cplusplus
}
#endif
