// The part of ONNX Runtime's C API that ort_shim.cpp uses, declared here so that the kernel builds without its headers.
//
// The facts are those of onnxruntime_c_api.h and of the table in onnxruntime_c_api.cc. Both promise that OrtApi only
// grows at its end: a function's place in it, counted in pointers, is the same in every version that has it. An
// OrtCustomOp says in `version` how much of it there is; a newer ONNX Runtime reads no further.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <cstring>

extern "C" {

struct OrtApi;     // a table of functions; NAT_ORT_FUNCTIONS says where those are that are used here
struct OrtStatus;  // null for success
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtTensorTypeAndShapeInfo;
struct OrtShapeInferContext;

struct OrtApiBase {
    const OrtApi* (*GetApi)(uint32_t version);  // null where this ONNX Runtime is older
    const char* (*GetVersionString)();
};

struct OrtCustomOp {
    uint32_t version;
    void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
    const char* (*GetName)(const OrtCustomOp*);
    const char* (*GetExecutionProviderType)(const OrtCustomOp*);  // returns null for the CPU
    int (*GetInputType)(const OrtCustomOp*, size_t index);
    size_t (*GetInputTypeCount)(const OrtCustomOp*);
    int (*GetOutputType)(const OrtCustomOp*, size_t index);
    size_t (*GetOutputTypeCount)(const OrtCustomOp*);
    void (*KernelCompute)(void* kernel, OrtKernelContext*);
    void (*KernelDestroy)(void* kernel);
    int (*GetInputCharacteristic)(const OrtCustomOp*, size_t index);
    int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
    int (*GetInputMemoryType)(const OrtCustomOp*, size_t index);
    int (*GetVariadicInputMinArity)(const OrtCustomOp*);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
    // From version 16 on; where they are, they take the place of those without a status.
    OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
    OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
    // From version 17 on; null where the defaults will do.
    OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
    int (*GetStartVersion)(const OrtCustomOp*);
    int (*GetEndVersion)(const OrtCustomOp*);
};

}  // extern "C"

enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };  // OrtErrorCode
enum { ORT_TENSOR_OF_FLOAT = 1 };                 // ONNXTensorElementDataType
enum { ORT_REQUIRED = 0, ORT_OPTIONAL = 1 };      // OrtCustomOpInputOutputCharacteristic
enum { ORT_DEFAULT_MEMORY = 0 };                  // OrtMemType
constexpr uint32_t kOrtApiVersion = 17;           // the first with KernelContext_ParallelFor: ONNX Runtime 1.17
constexpr uint32_t kFirstOrtApiVersion = 1;

// Place in OrtApi, name, type of the result, parameters.
#define NAT_ORT_FUNCTIONS(F)                                                                                           \
    F(0, CreateStatus, OrtStatus*, (int code, const char* message))                                                    \
    F(26, CreateCustomOpDomain, OrtStatus*, (const char* name, OrtCustomOpDomain** domain))                            \
    F(27, CustomOpDomain_Add, OrtStatus*, (OrtCustomOpDomain * domain, const OrtCustomOp* op))                         \
    F(28, AddCustomOpDomain, OrtStatus*, (OrtSessionOptions * options, OrtCustomOpDomain * domain))                    \
    F(51, GetTensorMutableData, OrtStatus*, (OrtValue * value, void** data))                                           \
    F(61, GetDimensionsCount, OrtStatus*, (const OrtTensorTypeAndShapeInfo* info, size_t* count))                      \
    F(62, GetDimensions, OrtStatus*, (const OrtTensorTypeAndShapeInfo* info, int64_t* sizes, size_t count))            \
    F(65, GetTensorTypeAndShape, OrtStatus*, (const OrtValue* value, OrtTensorTypeAndShapeInfo** info))                \
    F(85, KernelInfoGetAttribute_float, OrtStatus*, (const OrtKernelInfo* info, const char* name, float* value))       \
    F(88, KernelContext_GetInputCount, OrtStatus*, (const OrtKernelContext* context, size_t* count))                   \
    F(90, KernelContext_GetInput, OrtStatus*, (const OrtKernelContext* context, size_t index, const OrtValue** value)) \
    F(91, KernelContext_GetOutput, OrtStatus*,                                                                         \
      (OrtKernelContext * context, size_t index, const int64_t* sizes, size_t count, OrtValue** value))                \
    F(93, ReleaseStatus, void, (OrtStatus * status))                                                                   \
    F(99, ReleaseTensorTypeAndShapeInfo, void, (OrtTensorTypeAndShapeInfo * info))                                     \
    F(163, KernelInfoGetAttributeArray_int64, OrtStatus*,                                                              \
      (const OrtKernelInfo* info, const char* name, int64_t* values, size_t* count))                                   \
    F(274, KernelContext_ParallelFor, OrtStatus*,                                                                      \
      (const OrtKernelContext* context, void (*body)(void* user, size_t index), size_t total, size_t batches,          \
       void* user))

// The functions above, looked up in an OrtApi.
struct Ort {
#define NAT_MEMBER(place, name, result, parameters) result(*name) parameters;
    NAT_ORT_FUNCTIONS(NAT_MEMBER)
#undef NAT_MEMBER

    explicit Ort(const OrtApi* api) {
        const auto* const table = reinterpret_cast<const char*>(api);
#define NAT_LOOK_UP(place, name, result, parameters) memcpy(&name, table + place * sizeof(void*), sizeof name);
        NAT_ORT_FUNCTIONS(NAT_LOOK_UP)
#undef NAT_LOOK_UP
    }
};
