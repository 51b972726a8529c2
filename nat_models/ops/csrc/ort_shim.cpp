// ONNX Runtime's operator nat_models::na2d on a CPU, in float32: (qkv [B, H, W, 3, heads, head_dim], rpb [heads,
// 2*Kh-1, 2*Kw-1] or nothing) -> [B, H, W, heads, head_dim], with the attributes kernel_size and dilation, two ints
// each, and scale, a float.
#include <stdlib.h>

#include <algorithm>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "isa.h"
#include "ort_api.h"
#include "packed.h"

namespace {

struct Failure {  // thrown; what ONNX Runtime said or will be told
    OrtStatus* status;
};

void check(OrtStatus* status) {
    if (status) throw Failure{status};
}

[[noreturn]] void refuse(const Ort& ort, const std::string& why) {
    throw Failure{ort.CreateStatus(ORT_INVALID_ARGUMENT, ("nat_models::na2d: " + why).c_str())};
}

// Runs body for a caller that knows statuses, not exceptions.
template <class Body>
OrtStatus* status_of(const Ort& ort, const Body& body) noexcept {
    try {
        body();
        return nullptr;
    } catch (const Failure& failure) {
        return failure.status;
    } catch (const std::exception& error) {
        return ort.CreateStatus(ORT_FAIL, error.what());
    }
}

// Work is cut into a few pieces for each thread: threads take them as they get free, and a piece has its own set-up.
constexpr int64_t kPiecesPerThread = 4;

// The C API does not say how many threads a session has: as many as the CPUs, or fewer on request. A forward for too
// many threads cuts a few strips too many and has the same result.
int64_t max_threads() {
    static const int64_t count = std::max(1u, std::thread::hardware_concurrency());
    return count;
}

// The session's threads, while a kernel computes on this thread.
struct Team {
    const Ort& ort;
    const OrtKernelContext* context;
    OrtStatus* status = nullptr;
};
thread_local Team* team;

// A nat_parallel_for.
int32_t run_on_team(int64_t begin, int64_t end, int64_t, nat_range_function body, void* context) {
    struct Work {
        int64_t begin, end, pieces;
        nat_range_function body;
        void* context;
        int64_t bound(int64_t piece) const { return begin + (end - begin) * piece / pieces; }
    } work{begin, end, std::min(end - begin, kPiecesPerThread * max_threads()), body, context};
    const auto run = [](void* user, size_t piece) {
        const Work& work = *static_cast<const Work*>(user);
        work.body(work.bound(piece), work.bound(piece + 1), work.context);
    };
    team->status = team->ort.KernelContext_ParallelFor(team->context, run, work.pieces, 0, &work);
    return team->status ? 1 : 0;
}

// A tensor of the session's.
struct Tensor {
    std::vector<int64_t> size;
    void* data = nullptr;

    Tensor(const Ort& ort, const OrtValue* value) {
        OrtTensorTypeAndShapeInfo* info;
        check(ort.GetTensorTypeAndShape(value, &info));
        size_t dim = 0;
        OrtStatus* status = ort.GetDimensionsCount(info, &dim);
        if (!status) {
            size.resize(dim);
            status = ort.GetDimensions(info, size.data(), dim);
        }
        ort.ReleaseTensorTypeAndShapeInfo(info);
        check(status);
        check(ort.GetTensorMutableData(const_cast<OrtValue*>(value), &data));
    }
    Shape shape() const { return {static_cast<int64_t>(size.size()), size.data()}; }
};

// A node of a session.
class Kernel {
   public:
    Kernel(const Ort& ort, const OrtKernelInfo* info) : ort(ort) {
        read_pair(info, "kernel_size", window.kernel);
        read_pair(info, "dilation", window.dilation);
        float scale;
        if (failed(ort.KernelInfoGetAttribute_float(info, "scale", &scale))) refuse(ort, "scale must be a float");
        window.scale = scale;
        window.dtype = NAT_FLOAT32;
        if (const char* rule = broken_window_rule(window)) refuse(ort, rule + (", got " + window_text(window)));
    }

    void compute(OrtKernelContext* context) const {
        const OrtValue *qkv_value = nullptr, *rpb_value = nullptr;
        check(ort.KernelContext_GetInput(context, 0, &qkv_value));
        size_t inputs = 0;
        check(ort.KernelContext_GetInputCount(context, &inputs));
        if (inputs > 1) check(ort.KernelContext_GetInput(context, 1, &rpb_value));
        if (!qkv_value) refuse(ort, "qkv must be there");
        const Tensor qkv(ort, qkv_value);
        nat_na2d_call call = window;
        const char* rule = fill_sizes(call, qkv.shape());
        if (!rule) rule = broken_rule(call);
        std::string values = ", got qkv " + qkv.shape().text();
        if (rpb_value) {
            const Tensor rpb(ort, rpb_value);
            if (!rule) rule = broken_rpb_rule(call, rpb.shape());
            values += ", rpb " + rpb.shape().text();
            call.rpb = rpb.data;
        }
        values += ", " + window_text(window);
        if (rule) refuse(ort, rule + values);

        const int64_t size[] = {call.batch, call.height, call.width, call.heads, call.head_dim};
        OrtValue* out_value;
        check(ort.KernelContext_GetOutput(context, 0, size, 5, &out_value));
        if (is_empty(call)) return;
        check(ort.GetTensorMutableData(out_value, &call.out.data));
        int64_t stride[6];
        if (!contiguous_strides(size, 5, call.out.stride) || !contiguous_strides(qkv.size.data(), 6, stride))
            refuse(ort, "strides overflow" + values);
        point_at(call, qkv.data, stride, sizeof(float));
        Team here{ort, context};
        team = &here;
        const int32_t status = nat_na2d_forward_on(&call, run_on_team, max_threads());
        team = nullptr;
        check(here.status);
        if (status == NAT_NO_MEMORY) refuse(ort, "no memory for scratch" + values);
        if (status) refuse(ort, "the data of qkv and rpb must be there, and aligned" + values);
    }

    const Ort ort;

   private:
    void read_pair(const OrtKernelInfo* info, const char* name, int64_t* pair) {
        size_t count = 0;
        const auto read = [&](int64_t* to) {
            return !failed(ort.KernelInfoGetAttributeArray_int64(info, name, to, &count)) && count == 2;
        };
        if (!read(nullptr) || !read(pair)) refuse(ort, name + std::string(" must be two ints"));
    }
    // ONNX Runtime's own words do not name the attribute.
    bool failed(OrtStatus* status) const {
        if (status) ort.ReleaseStatus(status);
        return status;
    }

    nat_na2d_call window{};
};

OrtStatus* create_kernel(const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
    const Ort ort(api);
    return status_of(ort, [&] { *kernel = new Kernel(ort, info); });
}
OrtStatus* compute_kernel(void* kernel, OrtKernelContext* context) {
    const Kernel& self = *static_cast<const Kernel*>(kernel);
    return status_of(self.ort, [&] { self.compute(context); });
}

OrtCustomOp make_op() {
    OrtCustomOp op{};
    op.version = kOrtApiVersion;
    op.GetName = [](const OrtCustomOp*) { return "na2d"; };
    op.GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };
    op.GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 2; };
    op.GetInputType = [](const OrtCustomOp*, size_t) -> int { return ORT_TENSOR_OF_FLOAT; };
    op.GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
    op.GetOutputType = [](const OrtCustomOp*, size_t) -> int { return ORT_TENSOR_OF_FLOAT; };
    op.GetInputCharacteristic = [](const OrtCustomOp*, size_t index) -> int {
        return index ? ORT_OPTIONAL : ORT_REQUIRED;
    };
    op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) -> int { return ORT_REQUIRED; };
    op.GetInputMemoryType = [](const OrtCustomOp*, size_t) -> int { return ORT_DEFAULT_MEMORY; };
    op.CreateKernelV2 = create_kernel;
    op.KernelComputeV2 = compute_kernel;
    op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    return op;
}

// The operator's domain, one for each ONNX Runtime of this process. They live as long as it does: sessions hold them.
OrtCustomOpDomain* domain_of(const OrtApi* api, const Ort& ort) {
    static const OrtCustomOp op = make_op();
    static std::mutex mutex;
    static auto& domains = *new std::vector<std::pair<const OrtApi*, OrtCustomOpDomain*>>;
    const std::lock_guard<std::mutex> lock(mutex);
    for (const auto& [of, domain] : domains)
        if (of == api) return domain;
    OrtCustomOpDomain* domain;
    check(ort.CreateCustomOpDomain("nat_models", &domain));
    check(ort.CustomOpDomain_Add(domain, &op));
    domains.emplace_back(api, domain);
    return domain;
}

void select_isa(const Ort& ort) {
    const char* const name = getenv("NAT_MODELS_CPU_ISA");
    const int32_t status = nat_select_isa(name);
    if (status)
        refuse(ort, std::string("NAT_MODELS_CPU_ISA=") + name + (status == 1 ? " is unknown" : " is beyond this CPU"));
}

}  // namespace

// What ONNX Runtime looks for in a library of custom operators.
NAT_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
    const OrtApi* const api = base->GetApi(kOrtApiVersion);
    if (!api) {
        const std::string why =
            std::string("nat_models::na2d needs ONNX Runtime 1.17 or newer, this is ") + base->GetVersionString();
        const auto* const create =
            reinterpret_cast<decltype(Ort::CreateStatus) const*>(base->GetApi(kFirstOrtApiVersion));
        return (*create)(ORT_FAIL, why.c_str());
    }
    const Ort ort(api);
    return status_of(ort, [&] {
        select_isa(ort);
        check(ort.AddCustomOpDomain(options, domain_of(api, ort)));
    });
}
