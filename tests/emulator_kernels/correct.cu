// Correct kernels, one for each thing the emulator must let pass: test_emulator.py compares their results with NumPy
// under several schedules and demands that the checking build finds nothing.
#include <cuda_bf16.h>

#include "mma.cuh"

using namespace ptx;

// --- Block reduction: shuffles, static shared memory, a template -----------------------------------------------------

template <class T>
__device__ T block_sum(T value) {
    __shared__ T partial[32];
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    T total = 0;
    for (int warp = 0; warp < int(blockDim.x) / 32; ++warp) total += partial[warp];
    __syncthreads();  // before the next call writes partial again
    return total;
}

template <class T>
__device__ void row_sums(const T* x, T* sums, int K) {
    T sum = 0;
    for (int k = threadIdx.x; k < K; k += blockDim.x) sum += x[(long long)blockIdx.x * K + k];
    sum = block_sum(sum);
    T twice = block_sum(sum);  // the second call reuses the buffer
    if (threadIdx.x == 0) sums[blockIdx.x] = twice / T(blockDim.x);
}
extern "C" __global__ void __launch_bounds__(256) row_sums_i32(const int* x, int* sums, int K) { row_sums(x, sums, K); }
extern "C" __global__ void row_sums_f64(const double* x, double* sums, int K) { row_sums(x, sums, K); }

// --- Tile through two buffers filled by cp.async ---------------------------------------------------------------------

/// out[i] = sum over tiles of x[tile·256 + (i + 1) % 256]: every thread reads what another thread's copy brought.
extern "C" __global__ void double_buffer(const float* x, float* out, int tiles) {
    __shared__ __align__(16) float buffer[2][256];
    int t = threadIdx.x;  // 64 threads, 16 bytes each
    auto fetch = [&](int tile) {
        if (tile < tiles) cp_async_16(shared_address(&buffer[tile % 2][4 * t]), x + tile * 256 + 4 * t);
        cp_async_commit();
    };
    float sums[4] = {};
    fetch(0);
    for (int tile = 0; tile < tiles; ++tile) {
        fetch(tile + 1);
        cp_async_wait<1>();
        __syncthreads();
        for (int j = 0; j < 4; ++j) sums[j] += buffer[tile % 2][(4 * t + j + 1) % 256];
        __syncthreads();
    }
    for (int j = 0; j < 4; ++j) out[4 * t + j] = sums[j];
}

// --- Atomics ---------------------------------------------------------------------------------------------------------

extern "C" __global__ void histogram(const unsigned char* x, unsigned* counts, int n) {
    __shared__ unsigned local[256];
    for (int i = threadIdx.x; i < 256; i += blockDim.x) local[i] = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) atomicAdd(&local[x[i]], 1u);
    __syncthreads();
    for (int i = threadIdx.x; i < 256; i += blockDim.x) atomicAdd(&counts[i], local[i]);
}

/// The last block to finish adds up all blocks' parts: fence, then a counter.
extern "C" __global__ void last_block_sum(const float* x, float* parts, unsigned* finished, float* total) {
    __shared__ bool last;
    float sum = block_sum(x[blockIdx.x * blockDim.x + threadIdx.x]);
    if (threadIdx.x == 0) {
        parts[blockIdx.x] = sum;
        __threadfence();
        last = atomicAdd(finished, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (last && threadIdx.x == 0) {
        float all = 0;
        for (unsigned b = 0; b < gridDim.x; ++b) all += parts[b];
        *total = all;
    }
}

/// A lock that all threads spin on; what it guards is plain memory.
extern "C" __global__ void spin_lock(int* count) {
    __shared__ int lock, guarded;
    if (threadIdx.x == 0) lock = guarded = 0;
    __syncthreads();
    while (atomicCAS(&lock, 0, 1) != 0) {
    }
    guarded += 1;
    __threadfence_block();
    atomicExch(&lock, 0);
    __syncthreads();
    if (threadIdx.x == 0) *count = guarded;
}

// --- Dynamic shared memory, blocks of two dimensions -----------------------------------------------------------------

extern "C" __global__ void transpose(const __nv_bfloat16* x, __nv_bfloat16* out, int rows, int columns) {
    extern __shared__ __align__(16) __nv_bfloat16 tile[];  // [blockDim.y][blockDim.x + 1]
    int column = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y * blockDim.y + threadIdx.y;
    int pitch = blockDim.x + 1;
    if (row < rows && column < columns) tile[threadIdx.y * pitch + threadIdx.x] = x[row * columns + column];
    __syncthreads();
    if (row < rows && column < columns) out[column * rows + row] = tile[threadIdx.y * pitch + threadIdx.x];
}

// --- Warps: votes, matches, a partial warp, halves that part -----------------------------------------------------------

/// out[lane] holds eight results; test_emulator.py states each.
extern "C" __global__ void warp_functions(const int* x, int* out) {
    int lane = threadIdx.x, all;
    int value = x[lane];
    unsigned full = 0xffffffffu;
    out[lane * 8 + 0] = int(__ballot_sync(full, value & 1));
    out[lane * 8 + 1] = int(__match_any_sync(full, value % 3));
    out[lane * 8 + 2] = __reduce_add_sync(full, value) + __reduce_max_sync(full, value);
    out[lane * 8 + 3] = __shfl_up_sync(full, value, 3, 8);
    out[lane * 8 + 4] = __shfl_down_sync(full, value, 5);
    out[lane * 8 + 5] = __shfl_sync(full, value, 9, 4);
    __match_all_sync(full, value / 1000, &all);
    out[lane * 8 + 6] = all * 4 + __any_sync(full, value == 7) * 2 + __all_sync(full, value >= 0);
    unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
    if (lane < 16) {
        for (int d = 8; d > 0; d /= 2) value += __shfl_xor_sync(half, value, d);
    } else {
        for (int d = 8; d > 0; d /= 2) value = max(value, __shfl_xor_sync(half, value, d));
    }
    out[lane * 8 + 7] = value;
}

/// Lanes hand values on through shared memory with __syncwarp alone; 40 threads, so the second warp has eight lanes.
extern "C" __global__ void warp_exchange(const int* x, int* out) {
    __shared__ int slots[64];
    int lane = threadIdx.x % 32, first = threadIdx.x - lane, lanes = min(32, int(blockDim.x) - first);
    int value = x[threadIdx.x];
    for (int step = 0; step < 3; ++step) {
        slots[threadIdx.x] = value;
        __syncwarp();
        value = slots[first + (lane + 1) % lanes] + step;
        __syncwarp();
    }
    out[threadIdx.x] = value;
}

extern "C" __global__ void counted_barriers(const int* x, int* out) {
    int odd = __syncthreads_count(x[threadIdx.x] & 1);
    int all = __syncthreads_and(x[threadIdx.x] >= 0), any = __syncthreads_or(x[threadIdx.x] == 5);
    out[threadIdx.x] = odd * 4 + all * 2 + any;
}

// --- A producer warp and a consumer warp, by named barriers ------------------------------------------------------------

extern "C" __global__ void producer_consumer(const int* x, int* out, int rounds) {
    __shared__ int slot[2][32];
    int lane = threadIdx.x % 32;
    if (threadIdx.x < 32) {
        for (int round = 0; round < rounds; ++round) {
            if (round >= 2) barrier_sync(3 + round % 2, 64);  // the consumer has emptied it
            slot[round % 2][lane] = x[round * 32 + lane];
            barrier_arrive(1 + round % 2, 64);
        }
    } else {
        for (int round = 0; round < rounds; ++round) {
            barrier_sync(1 + round % 2, 64);
            out[round * 32 + lane] = slot[round % 2][31 - lane];
            if (round + 2 < rounds) barrier_arrive(3 + round % 2, 64);
        }
    }
}

// --- A pipeline of bulk copies and mbarriers -----------------------------------------------------------------------------

/// out[lane] = sum over tiles of x[tile·32 + 31 - lane]: warp 0 fetches through two stages, warp 1 consumes.
extern "C" __global__ void bulk_pipeline(const int* x, int* out, int tiles) {
    __shared__ __align__(16) int stage[2][32];
    __shared__ __align__(8) unsigned long long full[2], empty[2];
    int lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; ++i) {
            mbarrier_init(shared_address(&full[i]), 1);
            mbarrier_init(shared_address(&empty[i]), 32);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int tile = 0; tile < tiles; ++tile) {
            int i = tile % 2, round = tile / 2;
            if (round > 0) mbarrier_wait(shared_address(&empty[i]), (round - 1) & 1);
            mbarrier_arrive_expect(shared_address(&full[i]), sizeof stage[i]);
            bulk_copy(shared_address(stage[i]), x + tile * 32, sizeof stage[i], shared_address(&full[i]));
        }
    } else if (threadIdx.x >= 32) {
        int sum = 0;
        for (int tile = 0; tile < tiles; ++tile) {
            int i = tile % 2, round = tile / 2;
            mbarrier_wait(shared_address(&full[i]), round & 1);
            sum += stage[i][31 - lane];
            mbarrier_arrive(shared_address(&empty[i]));
        }
        out[lane] = sum;
    }
}

// --- Intrinsics ---------------------------------------------------------------------------------------------------------

template <class T>
__device__ void fused_multiply_add(const T* a, const T* b, const T* c, T* out) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = __hfma(a[i], b[i], c[i]);
}
extern "C" __global__ void fma_bf16(const __nv_bfloat16* a, const __nv_bfloat16* b, const __nv_bfloat16* c, __nv_bfloat16* out) {
    fused_multiply_add(a, b, c, out);
}
extern "C" __global__ void fma_f16(const __half* a, const __half* b, const __half* c, __half* out) {
    fused_multiply_add(a, b, c, out);
}

/// out[thread] holds ten results; test_emulator.py states each.
extern "C" __global__ void integer_intrinsics(const unsigned* x, const float* f, unsigned* out) {
    unsigned a = x[2 * threadIdx.x], b = x[2 * threadIdx.x + 1];
    unsigned* mine = out + 10 * threadIdx.x;
    mine[0] = __byte_perm(a, b, 0x7a14);
    mine[1] = __brev(a);
    mine[2] = __funnelshift_l(a, b, threadIdx.x);
    mine[3] = __funnelshift_r(a, b, threadIdx.x);
    mine[4] = unsigned(__dp4a(int(a), int(b), -3));
    mine[5] = unsigned(__clz(int(a >> threadIdx.x)));
    mine[6] = unsigned(__ffs(int(a << threadIdx.x)));
    mine[7] = __umulhi(a, b);
    mine[8] = unsigned(__float2int_rn(f[threadIdx.x]));
    mine[9] = __float2uint_rn(f[threadIdx.x]);
}

// --- Shapes of arguments -----------------------------------------------------------------------------------------------

extern "C" __global__ void every_kind(const float* absent, double* out, signed char a, unsigned short b, long long c,
                                      float d, double e, bool f) {
    if (absent == nullptr) *out = double(a) + b + double(c) + double(d) + e + f;
}

extern "C" __global__ void strided_rows(const float* x, float* out, int K, long long stride) {
    for (int k = threadIdx.x; k < K; k += blockDim.x) out[blockIdx.x * K + k] = x[blockIdx.x * stride + k];
}
