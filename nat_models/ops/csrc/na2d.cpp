// Neighborhood attention, forward and backward, for one instruction set (compiled once for each).
//
// A task is a strip of query rows of one head of one image. It sweeps down the key rows. Each is transposed once and
// multiplied with every query row that attends to it. A query row whose last key row has passed is completed: softmax,
// then values. In the backward, a key row whose last query row has passed gets its gradient. Logits live in a ring of a
// few query rows. Tasks follow from the sizes alone and partial sums are added in a fixed order, so the result does not
// depend on the number of threads.
#include "isa.h"
#include "paired.h"
#include "tokens.h"

namespace {

template <class Body>
bool parallel(nat_parallel_for run, index_t count, const Body& body) {
    const auto trampoline = [](int64_t begin, int64_t end, void* context) { (*(const Body*)context)(begin, end); };
    if (run && count > 1) return run(0, count, 1, trampoline, (void*)&body) == 0;
    if (count > 0) body(0, count);
    return true;
}

// E is what tensors hold, C what sums are held in.
template <class E, class C, class Worker>
int32_t na2d(const nat_na2d_call& call, bool backward, nat_parallel_for run, index_t threads) {
    const Plan<C> plan(call, backward, threads);
    if (SweepBuffers<C>::elements(plan) > kMaxElements) return NAT_NO_MEMORY;
    Arena size;
    typename Worker::Buffers(plan, size);

    const index_t units = plan.tasks / plan.strips, boundaries = backward ? plan.strips - 1 : 0;
    const index_t seams_count = units * boundaries * Seam<C>::size(plan);
    const index_t rpb_count = backward && call.grad_rpb ? plan.tasks * plan.rpb_size() : 0;
    C* const seams = (C*)malloc((seams_count + rpb_count + 1) * sizeof(C));
    if (!seams) return NAT_NO_MEMORY;
    C* const grad_rpb = rpb_count ? seams + seams_count : nullptr;  // one for each task

    bool starved = false;
    bool ran = parallel(run, plan.tasks, [&](int64_t begin, int64_t end) {
        static thread_local ThreadMemory memory;
        if (!memory.reserve(size.used + 64)) {
            __atomic_store_n(&starved, true, __ATOMIC_RELAXED);
            return;
        }
        Arena arena{((uintptr_t)memory.data + 63) / 64 * 64, 0};
        Worker worker(plan, arena);
        for (int64_t task = begin; task < end; ++task) worker.sweep(task, seams, grad_rpb);
    });
    if (boundaries && !starved)
        ran &= parallel(run, units * boundaries, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) merge_seam<E>(plan, seams, i / boundaries, i % boundaries);
        });
    if (backward && call.grad_rpb) sum_grad_rpb(plan, grad_rpb);
    free(seams);
    return starved || !ran ? NAT_NO_MEMORY : NAT_OK;
}

}  // namespace

int32_t NAT_ENTRY(const nat_na2d_call* call, int32_t backward, nat_parallel_for run, int64_t threads) {
#if defined(__AVX512BF16__)
    // The rest is that of AVX-512.
    if (call->dtype != NAT_BFLOAT16) return nat_na2d_avx512(call, backward, run, threads);
    return na2d<bfloat16, float, PairWorker>(*call, backward, run, threads);
#else
    switch (call->dtype) {
        case NAT_FLOAT32: return na2d<float, float, TokenWorker<float> >(*call, backward, run, threads);
        case NAT_FLOAT64: return na2d<double, double, TokenWorker<double> >(*call, backward, run, threads);
        case NAT_BFLOAT16: return na2d<bfloat16, float, TokenWorker<bfloat16> >(*call, backward, run, threads);
        case NAT_FLOAT16: return na2d<float16, float, TokenWorker<float16> >(*call, backward, run, threads);
    }
    return NAT_BAD_DTYPE;
#endif
}
