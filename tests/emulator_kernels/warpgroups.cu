// Pipelines of warpgroup products, sums[t][e] += A · B_round over the rounds, and what can be wrong with them.
// Reference: test_emulator_wgmma.py, in whose comments the flaws are explained.
//
// A is 64 × 16 and each B 16 × 64, as images of shared memory in 8 × 8 blocks. A warpgroup of 128 threads; while round
// r's product runs, the next B goes to another of three buffers, which round r − 2 read last.
#include "mma.cuh"

#if PTX_SM90A

namespace {

constexpr int kBytes = 2048;  // of A, and of a B

enum class Flaw {
    none,
    two_buffers,
    weak_wait,
    no_commit,
    late_wait,
    no_barrier,
    no_proxy_fence,
    early_proxy_fence,
    sums_read,
    sums_written,
    no_wgmma_fence,
    sums_changed,
};

__device__ uint64_t descriptor(const unsigned char* start) {
    return ptx::matrix_descriptor(ptx::shared_address(start), 128, 256, ptx::Swizzle::none);
}

// 16 bytes a thread.
__device__ void put(unsigned char* to, const unsigned char* from, bool by_copy) {
    to += 16 * threadIdx.x, from += 16 * threadIdx.x;
    if (by_copy) ptx::cp_async_16(ptx::shared_address(to), from);
    else *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
}

template <Flaw flaw, bool copies>
__device__ void pipeline(const unsigned char* a, const unsigned char* b, int rounds, float* sums) {
    __shared__ __align__(128) unsigned char held[kBytes], buffers[3][kBytes];
    constexpr int kBuffers = flaw == Flaw::two_buffers ? 2 : 3;
    put(held, a, false);
    put(buffers[0], b, copies);
    float c[32] = {};
    for (int round = 0; round < rounds; ++round) {
        if (flaw == Flaw::early_proxy_fence) ptx::fence_async_proxy();
        if (copies) ptx::cp_async_wait_all();
        if (flaw != Flaw::no_proxy_fence && flaw != Flaw::early_proxy_fence) ptx::fence_async_proxy();
        if (flaw != Flaw::no_barrier || round == 0) __syncthreads();
        if (flaw == Flaw::sums_changed) ptx::wgmma_fence();
        if (flaw == Flaw::sums_changed && round == 2) ptx::wgmma_wait<0>(), c[5] *= 2;
        if (flaw != Flaw::no_wgmma_fence && flaw != Flaw::sums_changed) ptx::wgmma_fence();
        ptx::wgmma_m64n64k16_bf16(c, descriptor(held), descriptor(buffers[round % kBuffers]), true);
        if (flaw != Flaw::no_commit) ptx::wgmma_commit();
        if (flaw == Flaw::sums_read && round == 2 && c[7] > 1e30f) break;
        if (flaw == Flaw::sums_written && round == 2) c[7] = 0;
        if (round + 1 < rounds) put(buffers[(round + 1) % kBuffers], b + (round + 1) * kBytes, copies);
        if (flaw == Flaw::weak_wait) ptx::wgmma_wait<2>();
        else if (flaw != Flaw::late_wait) ptx::wgmma_wait<1>();
    }
    ptx::wgmma_wait<0>();
    for (int e = 0; e < 32; ++e) sums[32 * threadIdx.x + e] = c[e];
}

}  // namespace

#define PIPELINE(name, flaw, copies)                                                                                 \
    extern "C" __global__ void name(const unsigned char* a, const unsigned char* b, int rounds, float* sums) {       \
        pipeline<Flaw::flaw, copies>(a, b, rounds, sums);                                                            \
    }
#define FLAW(name) PIPELINE(name, name, false) PIPELINE(name##_copies, name, true)
FLAW(none)
FLAW(two_buffers)
FLAW(weak_wait)
FLAW(no_commit)
FLAW(late_wait)
FLAW(no_barrier)
FLAW(no_proxy_fence)
FLAW(early_proxy_fence)
FLAW(sums_read)
FLAW(sums_written)
FLAW(no_wgmma_fence)
FLAW(sums_changed)

// A fifth warp fills two buffers by bulk copies, which need no proxy fence; one lane of each warp that multiplies says
// when its warp has done with a buffer, `early` before it has waited.
template <bool early>
__device__ void producer(const unsigned char* a, const unsigned char* b, int rounds, float* sums) {
    __shared__ __align__(128) unsigned char held[kBytes], buffers[2][kBytes];
    __shared__ uint64_t full[2], empty[2];
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) {
            ptx::mbarrier_init(ptx::shared_address(&full[i]), 1);
            ptx::mbarrier_init(ptx::shared_address(&empty[i]), 4);
        }
        ptx::fence_mbarrier_init();
    }
    if (threadIdx.x < 128) put(held, a, false), ptx::fence_async_proxy();
    __syncthreads();
    if (threadIdx.x == 128) {
        for (int round = 0; round < rounds; ++round) {
            const uint32_t slot = round % 2, on = ptx::shared_address(&full[slot]);
            ptx::mbarrier_wait(ptx::shared_address(&empty[slot]), round / 2 % 2 ^ 1);
            ptx::mbarrier_arrive_expect(on, kBytes);
            ptx::bulk_copy(ptx::shared_address(buffers[slot]), b + round * kBytes, kBytes, on);
        }
    }
    if (threadIdx.x >= 128) return;
    float c[32] = {};
    for (int round = 0; round < rounds; ++round) {
        const int slot = round % 2;
        ptx::mbarrier_wait(ptx::shared_address(&full[slot]), round / 2 % 2);
        ptx::wgmma_fence();
        ptx::wgmma_m64n64k16_bf16(c, descriptor(held), descriptor(buffers[slot]), true);
        ptx::wgmma_commit();
        if (!early) ptx::wgmma_wait<0>();
        if (threadIdx.x % 32 == 7) ptx::mbarrier_arrive(ptx::shared_address(&empty[slot]));
    }
    ptx::wgmma_wait<0>();
    for (int e = 0; e < 32; ++e) sums[32 * threadIdx.x + e] = c[e];
}
extern "C" __global__ void bulk_pipeline(const unsigned char* a, const unsigned char* b, int rounds, float* sums) {
    producer<false>(a, b, rounds, sums);
}
extern "C" __global__ void released_early(const unsigned char* a, const unsigned char* b, int rounds, float* sums) {
    producer<true>(a, b, rounds, sums);
}

/// Runs any program: program[step][thread] = operation + 16 · (word of B or pending groups).
enum Operation { kNothing, kWrite, kBlock, kWarp, kPair, kProxyFence, kProduct, kWait };

extern "C" __global__ void run_program(const int* program, int steps, float* sums) {
    __shared__ __align__(128) unsigned char a[128], b[128];
    if (threadIdx.x < 32) reinterpret_cast<int*>(a)[threadIdx.x] = reinterpret_cast<int*>(b)[threadIdx.x] = 0;
    ptx::fence_async_proxy();
    __syncthreads();
    // All rows are the same eight, and so are both halves of k: a product reads 128 bytes of each.
    const uint64_t of_a = ptx::matrix_descriptor(ptx::shared_address(a), 0, 0, ptx::Swizzle::none);
    const uint64_t of_b = ptx::matrix_descriptor(ptx::shared_address(b), 0, 0, ptx::Swizzle::none);
    float c[32] = {};
    ptx::wgmma_fence();
    for (int step = 0; step < steps; ++step) {
        const int code = program[step * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)];
        const int value = code / 16;
        switch (code % 16) {
            case kWrite: reinterpret_cast<volatile int*>(b)[value] = 0; break;
            case kBlock: __syncthreads(); break;
            case kWarp: __syncwarp(); break;
            case kPair: ptx::barrier_sync(1 + step % 15, 64); break;
            case kProxyFence: ptx::fence_async_proxy(); break;
            case kProduct:
                ptx::wgmma_m64n64k16_bf16(c, of_a, of_b, true);
                ptx::wgmma_commit();
                break;
            case kWait:
                if (value == 0) ptx::wgmma_wait<0>();
                if (value == 1) ptx::wgmma_wait<1>();
                break;
            default: break;
        }
    }
    ptx::wgmma_wait<0>();
    sums[threadIdx.x] = c[0];
}

#endif
