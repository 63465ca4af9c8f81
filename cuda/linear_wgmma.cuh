// Matrix products for many tokens on Hopper's wgmma: out = x · weightᵀ in tiles of 128 tokens × 256 or 128 rows n.
//
//   Y[t, n] = Σ_k X[t, k] W[n, k]     bf16, wgmma m64nNk16: activations A, weights B, both from shared memory
//
// Activations in FP4, expanded in the order of A's registers, have a kernel of their own, linear_fp4_wgmma.cuh.
//
// A block is two warpgroups, each with 64 tokens and all n of the tile; all threads copy and dequantise. Activations
// and 16-bit weights come by cp.async through kWgmmaStages stages of 64 k, packed weights as in linear_fp4_tile.cuh
// into three buffers in turn. In shared memory a row of 64 k is 128 bytes, its 16-byte pieces XORed with row % 8: the
// 128-byte swizzle of wgmma's descriptors and what tile_place does.
//
// A step: its operands have come (cp.async wait, proxy fence, barrier); its products are issued; while they run, copies
// of step s + 2 start and step s + 1's weights are dequantised; then the products of step s − 1 are waited for. So the
// tensor core always has the next step's products waiting, and what step s overwrites was last read by step s − 2,
// which every thread saw finished before the barrier. Slices end with a wait for all products.
//
// Order of sums: the tensor core's over all K where the tile has 256 n (128 accumulators a thread leave no room), as in
// any bf16 GEMM; over slice_k with 128 n, slices added in fp32. It depends on K and the entry point alone. By the
// emulator's model of the tensor core, which truncates, K = 14336 of normal numbers costs 2.4e-5 of max |Y| the first
// way, 3e-6 the second.
//
// Grid: x token blocks, y row blocks. Shared memory (launch_linear.py: plan_wgmma): stages · (16 KB + 128 bytes a row n
// of 16-bit weights), or 3 · 128 bytes a row n dequantised; results pass through the same memory. M, N any; K a
// multiple of 8.
//
// Limits, ESTIMATED and not measured. Clocks of an SM for a step, by what may bound it: tensor cores, 2048 products a
// clock, sparse ones twice that; shared memory, 128 bytes a clock, of which wgmma takes what it reads of A there and
// all of B for each warpgroup and product; instructions, those of sm_90a's machine code issued by two warps for each
// scheduler; L2, all that a block reads at 30 bytes a clock, what H100s are said to give an SM when all read.
//
//                                             tensor   shared   issue     L2     cuBLAS at
//                                              cores   memory                    its peak
//     bf16, 256 n                               1024     1024     280   1640       1024
//     w4a16, 256 n                              1024     1024     910    840       1024
//     linear_fp4_wgmma.cuh, 128 n: one path      512      384     420    700        512
//                                  two paths    1024      640     440   1250        512
//                                  sparse, dense 768      640     450   1000        512
//
// cuBLAS reaches about .8 of the peak on an H200. So w4a16 meets .9 of it at 1430 clocks a step and SharQ .5 at 1280:
// both possible, if latencies cost less than 400 and 300. bf16 does not look so: it reads 48 KB a step, and .9 is 1430
// there too; blocks of a cluster would have to share what they read. What hardware must show: all of that, and that two
// warpgroups without a producer warp hide their latencies. ptxas must not serialise wgmma (it says so,
// test_cuda_compile.py looks).
#pragma once

#include "linear_tile.cuh"

#if PTX_SM90A

constexpr int kWgmmaStages = 4, kWgmmaTokens = 128, kWgmmaThreads = 256;

__device__ __forceinline__ void warpgroup_product(float (&c)[64], uint64_t a, uint64_t b, bool add) {
    ptx::wgmma_m64n128k16_bf16(c, a, b, add);
}
__device__ __forceinline__ void warpgroup_product(float (&c)[128], uint64_t a, uint64_t b, bool add) {
    ptx::wgmma_m64n256k16_bf16(c, a, b, add);
}

// Rows of 128 bytes from `start` on, as copy_tile and dequantisers leave them.
__device__ __forceinline__ uint64_t tile_descriptor(u32 start) {
    return ptx::matrix_descriptor(start, 0, 8 * kTileRowBytes, ptx::Swizzle::bytes_128);
}

// To the totals of a tile of 128 n: a slice's sums, which end with the 64 k from k on.
template <class WeightTile>
__device__ __forceinline__ void add_slice(const WeightTile& weight, int first_n, int k, const float (&sums)[64],
                                          float (&totals)[64]) {
#pragma unroll
    for (int part = 0; part < 4; ++part) {  // 32 n
        const float scale = WeightTile::kScaled ? weight.scale(first_n + 32 * part + lane_of_warp(), k) : 1;
#pragma unroll
        for (int n = 0; n < 8; ++n) {  // of the lane
            const float of_n = slice_scale<WeightTile::kScaled>(scale, n);
            const int e = 16 * part + n / 2 * 4 + n % 2;
            totals[e] = __fmaf_rn(sums[e], of_n, totals[e]);
            totals[e + 2] = __fmaf_rn(sums[e + 2], of_n, totals[e + 2]);
        }
    }
}

// Through shared memory, so that neighbouring threads write neighbouring n.
template <int kN>
__device__ __forceinline__ void store_results(const float (&results)[kN / 2], u8* shared, const Epilogue& epilogue,
                                              int first_token, int first_n, int M) {
    constexpr int kStride = kN + kResultPadding;
    float* rows = reinterpret_cast<float*>(shared);
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kN / 2; ++e) {
        const int token = 16 * warp_of_block() + (lane_of_warp() >> 2) + 8 * (e >> 1 & 1);
        rows[token * kStride + 8 * (e / 4) + 2 * (lane_of_warp() & 3) + (e & 1)] = results[e];
    }
    __syncthreads();
    const int tokens = min(kWgmmaTokens, M - first_token);
    for (int i = threadIdx.x; i < tokens * kN; i += kWgmmaThreads) {
        const int token = i / kN, n = i % kN;
        if (first_n + n < epilogue.N) epilogue.store(first_token + token, first_n + n, rows[token * kStride + n]);
    }
}

// WeightTile: as in tile_linear, of kN rows.
template <int kN, class WeightTile>
__device__ __forceinline__ void wgmma_linear(const WeightTile& weight, const TileInput& input, const Epilogue& epilogue,
                                             int slice_k) {
    constexpr bool kSlices = kN == 128;
    constexpr int kInputBytes = kWgmmaTokens * kTileRowBytes, kWeightBytes = kN * kTileRowBytes;
    constexpr int kStageBytes = kInputBytes + (WeightTile::kCopied ? kWeightBytes : 0);
    extern __shared__ __align__(1024) u8 shared[];
    u8* dequantised = shared + kWgmmaStages * kStageBytes;
    const u32 shared_address = ptx::shared_address(shared), dequantised_address = ptx::shared_address(dequantised);
    const int first_token = blockIdx.x * kWgmmaTokens, first_n = blockIdx.y * kN;
    const int steps = ceil_div(input.K, kTileK);

    const auto copy = [&](int step) {
        if (step < steps) {
            const u32 to = shared_address + step % kWgmmaStages * kStageBytes;
            const int k = step * kTileK;
            input.template copy<kWgmmaTokens, kWgmmaThreads, false, false>(to, first_token, k);
            weight.template copy<kWgmmaThreads>(to + kInputBytes, first_n, k);
        }
        ptx::cp_async_commit();
    };
#pragma unroll
    for (int step = 0; step < kWgmmaStages - 2; ++step) copy(step);
    typename WeightTile::Dequantiser dequantiser(weight, first_n);
    if (!WeightTile::kCopied) dequantiser.fill(dequantised, 0);

    float sums[kN / 2], totals[kSlices ? kN / 2 : 1];
#pragma unroll
    for (int e = 0; e < kN / 2; ++e) sums[e] = 0.0f;
#pragma unroll
    for (int e = 0; e < (kSlices ? kN / 2 : 1); ++e) totals[e] = 0.0f;

    for (int begin = 0, end; begin < steps; begin = end) {
        end = kSlices ? min(begin + weight.flush_k(slice_k) / kTileK, steps) : steps;
        for (int step = begin; step < end; ++step) {
            ptx::cp_async_wait<kWgmmaStages - 3>();
            ptx::fence_async_proxy();
            __syncthreads();
            const u32 stage = shared_address + step % kWgmmaStages * kStageBytes;
            const u32 x = stage + threadIdx.x / 128 * (kInputBytes / 2);
            const u32 w = WeightTile::kCopied ? stage + kInputBytes : dequantised_address + step % 3 * kWeightBytes;
            ptx::wgmma_fence();
#pragma unroll
            for (int k = 0; k < kTileK / 16; ++k)
                warpgroup_product(sums, tile_descriptor(x + 32 * k), tile_descriptor(w + 32 * k),
                                  k > 0 || step > begin);
            ptx::wgmma_commit();
            copy(step + kWgmmaStages - 2);
            if (!WeightTile::kCopied && step + 1 < steps)
                dequantiser.fill(dequantised + (step + 1) % 3 * kWeightBytes, step + 1);
            ptx::wgmma_wait<1>();
        }
        ptx::wgmma_wait<0>();
        if constexpr (kSlices) add_slice(weight, first_n, (end - 1) * kTileK, sums, totals);
    }
    ptx::cp_async_wait_all();
    if constexpr (kSlices) store_results<kN>(totals, shared, epilogue, first_token, first_n, input.M);
    else store_results<kN>(sums, shared, epilogue, first_token, first_n, input.M);
}

#endif
