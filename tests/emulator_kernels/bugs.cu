// One bug per kernel: test_emulator.py demands that each is found, whatever the schedule.
#include "mma.cuh"

using namespace ptx;

// --- Shared memory: races ----------------------------------------------------------------------------------------------

extern "C" __global__ void missing_barrier(float* out) {
    __shared__ float values[64];
    values[threadIdx.x] = float(threadIdx.x);
    out[threadIdx.x] = values[(threadIdx.x + 1) % 64];
}

extern "C" __global__ void missing_syncwarp(float* out) {
    __shared__ float values[32];
    values[threadIdx.x] = float(threadIdx.x);
    __shfl_sync(0xffffffffu, 0, 0);  // a meeting, but it orders no memory
    out[threadIdx.x] = values[(threadIdx.x + 1) % 32];
}

/// The second round's writes may come before the first round's reads.
extern "C" __global__ void buffer_reuse(float* out) {
    __shared__ float values[64];
    float sum = 0;
    for (int round = 0; round < 3; ++round) {
        values[threadIdx.x] = float(threadIdx.x + round);
        __syncthreads();
        sum += values[(threadIdx.x + 33) % 64];
    }
    out[threadIdx.x] = sum;
}

/// The copy for the next round goes to the buffer that slower threads still read: a second barrier is missing.
extern "C" __global__ void double_buffer_overrun(const float* x, float* out) {
    __shared__ __align__(16) float buffer[2][256];
    int t = threadIdx.x;  // 64 threads, 16 bytes each
    float sum = 0;
    cp_async_16(shared_address(&buffer[0][4 * t]), x + 4 * t);
    cp_async_commit();
    for (int round = 0; round < 4; ++round) {
        cp_async_16(shared_address(&buffer[(round + 1) % 2][4 * t]), x + (round + 1) * 256 + 4 * t);
        cp_async_commit();
        cp_async_wait<1>();
        __syncthreads();
        sum += buffer[round % 2][255 - 4 * t];
    }
    out[t] = sum;
}

extern "C" __global__ void atomic_and_plain(unsigned* out) {
    __shared__ unsigned count;
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    atomicAdd(&count, 1u);
    out[threadIdx.x] = count;
}

extern "C" __global__ void byte_neighbours_race(unsigned char* out) {
    __shared__ unsigned char bytes[64];
    bytes[threadIdx.x] = 1;                             // fine: a byte each
    if (threadIdx.x == 5) bytes[6] = 2;                 // not fine
    __syncthreads();
    out[threadIdx.x] = bytes[threadIdx.x];
}

/// Warps 0 and 1 meet at a barrier of their own; warp 2 reads what they wrote without having been there.
extern "C" __global__ void named_barrier_too_small(float* out) {
    __shared__ float values[64];
    if (threadIdx.x < 64) {
        values[threadIdx.x] = 1.0f;
        barrier_sync(1, 64);
        out[threadIdx.x] = values[63 - threadIdx.x];
    } else {
        out[threadIdx.x] = values[threadIdx.x - 64];
    }
}

// --- Shared memory: what was never written -----------------------------------------------------------------------------

extern "C" __global__ void unwritten_slot(float* out) {
    __shared__ float values[64];
    if (threadIdx.x != 17) values[threadIdx.x] = 1.0f;
    __syncthreads();
    out[threadIdx.x] = values[63 - threadIdx.x];
}

extern "C" __global__ void unwritten_dynamic_byte(unsigned char* out) {
    extern __shared__ unsigned char bytes[];
    bytes[threadIdx.x] = 7;
    __syncthreads();
    out[threadIdx.x] = bytes[threadIdx.x + 1];  // the last thread reads byte 64 of 80
}

// --- cp.async ------------------------------------------------------------------------------------------------------------

__device__ void two_copies(const float* x, float* buffer) {
    for (int half = 0; half < 2; ++half) {
        cp_async_16(shared_address(buffer + half * 256 + 4 * threadIdx.x), x + half * 256 + 4 * threadIdx.x);
        cp_async_commit();
    }
}

/// wait_group 1 leaves the second copy in flight.
extern "C" __global__ void weak_wait_group(const float* x, float* out) {
    __shared__ __align__(16) float buffer[512];
    two_copies(x, buffer);
    cp_async_wait<1>();
    __syncthreads();
    out[threadIdx.x] = buffer[256 + 4 * threadIdx.x];
}

/// A thread's wait covers its own copies only.
extern "C" __global__ void wait_without_barrier(const float* x, float* out) {
    __shared__ __align__(16) float buffer[512];
    two_copies(x, buffer);
    cp_async_wait<0>();
    out[threadIdx.x] = buffer[511 - 4 * threadIdx.x];
}

/// Two tiles through one stage: the second is fetched without waiting until the first has been read.
extern "C" __global__ void stage_not_emptied(const int* x, int* out) {
    __shared__ __align__(16) int stage[32];
    __shared__ __align__(8) unsigned long long full[2];
    if (threadIdx.x < 2) mbarrier_init(shared_address(&full[threadIdx.x]), 1);
    __syncthreads();
    int sum = 0;
    for (int tile = 0; tile < 2; ++tile) {
        if (threadIdx.x == 0) {
            mbarrier_arrive_expect(shared_address(&full[tile]), sizeof stage);
            bulk_copy(shared_address(stage), x + tile * 32, sizeof stage, shared_address(&full[tile]));
        }
        mbarrier_wait(shared_address(&full[tile]), 0);
        sum += stage[31 - threadIdx.x];
    }
    out[threadIdx.x] = sum;
}

/// The mbarrier counts the copy, but nobody waits for it.
extern "C" __global__ void stage_not_awaited(const int* x, int* out) {
    __shared__ __align__(16) int stage[32];
    __shared__ __align__(8) unsigned long long full;
    if (threadIdx.x == 0) {
        mbarrier_init(shared_address(&full), 1);
        mbarrier_arrive_expect(shared_address(&full), sizeof stage);
        bulk_copy(shared_address(stage), x, sizeof stage, shared_address(&full));
    }
    __syncthreads();
    out[threadIdx.x] = stage[31 - threadIdx.x];
}

// --- Bounds --------------------------------------------------------------------------------------------------------------

extern "C" __global__ void beyond_static(float* out) {
    __shared__ float values[60];
    float* pointer = values;  // or the compiler checks the index itself
    pointer[threadIdx.x] = 1.0f;
    __syncthreads();
    out[threadIdx.x] = values[threadIdx.x % 60];
}

/// Within the whole array, but not within its row.
extern "C" __global__ void beyond_inner_array(float* out) {
    __shared__ float rows[2][8];
    rows[0][threadIdx.x] = rows[1][threadIdx.x] = 1.0f;
    __syncthreads();
    out[threadIdx.x] = rows[0][threadIdx.x + 1];
}

/// Both arrays have a size at which nothing need lie between them.
extern "C" __global__ void into_the_neighbour(float* out) {
    __shared__ float first[64], second[64];
    float *one = first, *two = second;
    one[threadIdx.x] = two[threadIdx.x] = 1.0f;
    __syncthreads();
    out[threadIdx.x] = one[threadIdx.x + 1] + two[threadIdx.x + 1];
}

extern "C" __global__ void beyond_dynamic(float* out) {
    extern __shared__ float dynamic_values[];
    dynamic_values[threadIdx.x + 1] = 1.0f;
    __syncthreads();
    out[threadIdx.x] = dynamic_values[threadIdx.x + 1];
}

extern "C" __global__ void beyond_global(const float* x, float* out) { out[threadIdx.x] = x[threadIdx.x + 1]; }
extern "C" __global__ void before_global(const float* x, float* out) { out[int(threadIdx.x) - 1] = x[threadIdx.x]; }
extern "C" __global__ void write_to_const(const float* x, float* out) { const_cast<float*>(x)[threadIdx.x] = out[threadIdx.x]; }
extern "C" __global__ void misaligned(const float* x, float* out) {
    const float4* wide = reinterpret_cast<const float4*>(x + 1);
    float4 four = wide[threadIdx.x / 8];
    out[threadIdx.x] = four.x + four.y;
}
extern "C" __global__ void wild_pointer(float* out) { out[(1ll << 44) + threadIdx.x] = 1.0f; }

// --- Global memory: races --------------------------------------------------------------------------------------------------

extern "C" __global__ void threads_share_an_element(int* out) { out[threadIdx.x / 2] = int(threadIdx.x); }
extern "C" __global__ void blocks_share_an_element(int* out) { out[blockIdx.x / 2 * 64 + threadIdx.x] = int(blockIdx.x); }
extern "C" __global__ void block_reads_another(int* out) {
    int seen = out[(blockIdx.x + 1) % gridDim.x * 64 + threadIdx.x];
    out[blockIdx.x * 64 + threadIdx.x] = seen + 1;
}
/// Without __threadfence, the counter says nothing about the parts.
extern "C" __global__ void last_block_unfenced(float* parts, unsigned* finished, float* total) {
    if (threadIdx.x != 0) return;
    parts[blockIdx.x] = 1.0f;
    if (atomicAdd(finished, 1u) != gridDim.x - 1) return;
    float all = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) all += parts[b];
    *total = all;
}

// --- Divergence, deadlock, no end --------------------------------------------------------------------------------------------

extern "C" __global__ void skipped_barrier(float* out) {
    if (threadIdx.x == 40) return;
    __syncthreads();
    out[threadIdx.x] = 1.0f;
}

extern "C" __global__ void divergent_barrier(float* out) {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        out[threadIdx.x] = 1.0f;
        __syncthreads();
    }
}

extern "C" __global__ void divergent_shuffle(int* out) {
    int value = int(threadIdx.x);
    if (threadIdx.x % 32 < 16) {
        value = __shfl_sync(0xffffffffu, value, 3);
    } else {
        value = __shfl_sync(0xffffffffu, value, 20);
    }
    out[threadIdx.x] = value;
}

extern "C" __global__ void shuffle_outside_its_mask(int* out) {
    out[threadIdx.x] = __shfl_sync(0x0000ffffu, int(threadIdx.x), 0);
}

extern "C" __global__ void shuffle_with_the_dead(int* out) {
    if (threadIdx.x % 32 == 31) return;
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, int(threadIdx.x), 1);
}

extern "C" __global__ void barrier_of_too_many(int* out) {
    barrier_sync(2, 96);  // there are 64 threads
    out[threadIdx.x] = 1;
}

extern "C" __global__ void endless_spin(unsigned* out) {
    while (atomicAdd(out, 0u) == 0) {
    }
}

extern "C" __global__ void endless_loop(volatile unsigned* out) {
    while (*out == 0) {
    }
}

extern "C" __global__ void endless_barriers(unsigned* out) {
    for (;;) __syncthreads();
    out[threadIdx.x] = 1;
}

extern "C" __global__ void failed_assertion(int* out) {
    assert(out == nullptr);
    out[threadIdx.x] = 1;
}

extern "C" __global__ void full_stack(int* out) {
    volatile char large[1 << 20];
    for (int i = (1 << 20) - 1; i >= 0; i -= 512) large[i] = char(i);
    out[threadIdx.x] = large[5 * 512 + 511];
}
