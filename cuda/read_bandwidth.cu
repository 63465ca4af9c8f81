// read_bandwidth: the XOR of a buffer's words, which is how fast memory can be read: benchmarks' ceiling.
//
//   out[0] ^= x[0] ^ x[1] ^ ... ^ x[4 n - 1]
//   x [n] of 16 bytes; out [1] uint32, zero before
//
// Grid: any number of blocks of any multiple of 32 threads; threads take 16 bytes in turns, eight of them under way at
// once. No shared memory. Moves 16 n bytes in. Reference: np.bitwise_xor.reduce.
#include "common.cuh"

constexpr int kUnderWay = 8;

extern "C" __global__ void __launch_bounds__(512) read_bandwidth(const uint4* x, i64 n, unsigned* out) {
    const i64 threads = static_cast<i64>(gridDim.x) * blockDim.x;
    unsigned sum = 0;
    for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += kUnderWay * threads) {
        uint4 v[kUnderWay];
#pragma unroll
        for (int j = 0; j < kUnderWay; ++j)
            v[j] = i + j * threads < n ? x[i + j * threads] : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int j = 0; j < kUnderWay; ++j) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    for (int offset = 16; offset; offset /= 2) sum ^= __shfl_xor_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % 32 == 0) atomicXor(out, sum);
}
