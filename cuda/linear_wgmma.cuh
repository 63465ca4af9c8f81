// Matrix products for many tokens on Hopper's wgmma: out = x · weightᵀ in tiles of 128 tokens × 256 or 128 rows n.
//
//   Y[t, n] = Σ_paths Σ_k X[t, k] W[n, k]     bf16: activations A, weights B, both from shared memory; m64nNk16, and
//                                             m64n128k32 for a path that is 2:4 sparse
//
// A block is two warpgroups, each with 64 tokens and all n of the tile; all threads copy and dequantise. Activations
// and 16-bit weights come by cp.async through kWgmmaStages stages of 64 k, packed weights as in linear_fp4_tile.cuh
// into three buffers in turn. In shared memory a row of 64 k is 128 bytes (sparse: 64), its 16-byte pieces placed by
// tile_place (half_tile_place): the 128-byte (64-byte) swizzle of wgmma's descriptors. Sparse operands are those of
// linear_tile.cuh; a thread holds its metadata word of 64 k in a register.
//
// A step: its operands have come (cp.async wait, proxy fence, barrier); its products are issued; while they run, copies
// of step s + 2 start and step s + 1's weights are dequantised; then the products of step s − 1 are waited for. So the
// tensor core always has the next step's products waiting, and what step s overwrites was last read by step s − 2,
// which every thread saw finished before the barrier. Slices end with a wait for all products.
//
// Order of sums: the tensor core's over all K where the tile has 256 n (128 accumulators a thread leave no room), as in
// any bf16 GEMM; over slice_k with 128 n, of each 64 k the first path before the second, slices added in fp32. It
// depends on K and the entry point alone. By the emulator's model of the tensor core, which truncates, K = 14336 of
// normal numbers costs 2.4e-5 of max |Y| the first way, 3e-6 the second.
//
// Grid: x token blocks, y row blocks. Shared memory (launch_linear.py: plan_wgmma): stages · (16 KB a path, 8 KB a
// sparse one, and 128 bytes a row n of 16-bit weights), or 3 · 128 bytes a row n dequantised; results pass through the
// same memory. M, N, K any; K of FP4 activations padded to 128, else a multiple of 8.
//
// Limits, ESTIMATED and not measured. Clocks of an SM for a step, by what may bound it: tensor cores, 2048 products a
// clock, sparse ones twice that; shared memory, 128 bytes a clock, of which wgmma takes 2 KB for A and all of B for
// each warpgroup and product; instructions issued, those of sm_90a's machine code by two warps for each scheduler.
//
//                                 tensor cores   shared memory   issue     cuBLAS at its peak
//     bf16, 256 n                     1024            1024         280           1024
//     w4a16, 256 n                    1024            1024         910           1024
//     two paths, 128 n                1024            1152         700            512
//     sparse and dense, 128 n          768            1024         650            512
//
// cuBLAS reaches about .8 of the peak on an H200. So w4a16 meets .9 of it at 1430 clocks a step, SharQ .5 at 1280: both
// possible, if latencies cost less than 400 and 250. SharQ's ceiling is shared memory's: .5 of the peak and not the .67
// of its products, since a sparse wgmma alone takes 128 bytes a clock; 192 n in a tile would make it .57 but need 192
// accumulators a thread, so a warpgroup of its own for dequantising. What else hardware must show: the metadata's order
// (CUTLASS's, not measured). ptxas must not serialise wgmma (it says so, test_cuda_compile.py looks).
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

// Rows of 128 bytes from `start` on, as copy_tile leaves them; rows of 64 bytes.
__device__ __forceinline__ uint64_t tile_descriptor(u32 start) {
    return ptx::matrix_descriptor(start, 0, 8 * kTileRowBytes, ptx::Swizzle::bytes_128);
}
__device__ __forceinline__ uint64_t half_tile_descriptor(u32 start) {
    return ptx::matrix_descriptor(start, 0, 4 * kTileRowBytes, ptx::Swizzle::bytes_64);
}

// WeightTile: as in tile_linear, of kN rows; paths: one, two, or sparse_and_dense.
template <Paths paths, int kN, class WeightTile>
__device__ __forceinline__ void wgmma_linear(const WeightTile& weight, const TileInput& input, const Epilogue& epilogue,
                                             int slice_k) {
    constexpr bool kSlices = kN == 128, kSparse = paths == Paths::sparse_and_dense, kTwo = paths != Paths::one;
    constexpr int kPathBytes = kWgmmaTokens * kTileRowBytes, kFirstBytes = kSparse ? kPathBytes / 2 : kPathBytes;
    constexpr int kInputBytes = kFirstBytes + (kTwo ? kPathBytes : 0);
    constexpr int kWeightBytes = kN * kTileRowBytes;
    constexpr int kStageBytes = kInputBytes + (WeightTile::kCopied ? kWeightBytes : 0);
    extern __shared__ __align__(1024) u8 shared[];
    u8* dequantised = shared + kWgmmaStages * kStageBytes;
    const u32 shared_address = ptx::shared_address(shared), dequantised_address = ptx::shared_address(dequantised);
    const int lane = lane_of_warp(), group = threadIdx.x / 128;
    const int first_token = blockIdx.x * kWgmmaTokens, first_n = blockIdx.y * kN;
    const int steps = ceil_div(input.K, kTileK);
    const auto row_of = [&](int e) { return 8 * (e / 4) + 2 * (lane & 3) + (e & 1); };  // n of a sum, within the tile

    const auto copy = [&](int step) {
        if (step < steps) {
            const u32 to = shared_address + step % kWgmmaStages * kStageBytes;
            const int k = step * kTileK;
            input.template copy<kWgmmaTokens, kWgmmaThreads, kSparse, kTwo>(to, first_token, k);
            weight.template copy<kWgmmaThreads>(to + kInputBytes, first_n, k);
        }
        ptx::cp_async_commit();
    };
#pragma unroll
    for (int step = 0; step < kWgmmaStages - 2; ++step) copy(step);
    typename WeightTile::Dequantiser dequantiser(weight, first_n);
    if (!WeightTile::kCopied) dequantiser.fill(dequantised, 0);

    // This lane's metadata of a step and its warp's 16 tokens; where there are none the last's, for rows of zeros.
    const int metadata_tile = min(first_token / 16 + warp_of_block(), ceil_div(input.M, 16) - 1);
    const auto metadata_of = [&](int step) {
        return __ldg(input.metadata + (static_cast<i64>(metadata_tile) * steps + min(step, steps - 1)) * 32 + lane);
    };

    float sums[kN / 2], totals[kSlices ? kN / 2 : 1];
#pragma unroll
    for (int e = 0; e < kN / 2; ++e) sums[e] = 0.0f;
#pragma unroll
    for (int e = 0; e < (kSlices ? kN / 2 : 1); ++e) totals[e] = 0.0f;

    const auto add_slice = [&](int step) {  // to the totals: the sums that end with this step
#pragma unroll
        for (int group_of_32 = 0; group_of_32 < (kSlices ? kN / 32 : 0); ++group_of_32) {
            const int first = first_n + 32 * group_of_32;
            const float scale = WeightTile::kScaled ? weight.scale(first + lane, step * kTileK) : 1;
#pragma unroll
            for (int n = 0; n < 8; ++n) {  // of the lane
                const float of_n = slice_scale<WeightTile::kScaled>(scale, n);
                const int e = 16 * group_of_32 + n / 2 * 4 + n % 2;
                totals[e] = __fmaf_rn(sums[e], of_n, totals[e]);
                totals[e + 2] = __fmaf_rn(sums[e + 2], of_n, totals[e + 2]);
            }
        }
    };
    // adds: to the step before. next: step + 1's metadata, which takes the register of step − 1's, whose products have
    // been waited for: ptxas serialises wgmma where a register is written that one may still read.
    const auto advance = [&](int step, bool adds, u32 metadata, u32& next) {
        ptx::cp_async_wait<kWgmmaStages - 3>();
        ptx::fence_async_proxy();
        __syncthreads();
        const u32 stage = shared_address + step % kWgmmaStages * kStageBytes;
        const u32 weights = WeightTile::kCopied ? stage + kInputBytes : dequantised_address + step % 3 * kWeightBytes;
        ptx::wgmma_fence();
        if constexpr (kSparse) {
            const u32 x = stage + group * (kFirstBytes / 2);
            ptx::wgmma_sp_m64n128k32_bf16<0>(sums, half_tile_descriptor(x), tile_descriptor(weights), metadata, adds);
            ptx::wgmma_sp_m64n128k32_bf16<1>(sums, half_tile_descriptor(x + 32), tile_descriptor(weights + 64),
                                             metadata, true);
        }
#pragma unroll
        for (int path = kSparse ? 1 : 0; path < (kTwo ? 2 : 1); ++path)
#pragma unroll
            for (int k = 0; k < kTileK / 16; ++k) {
                const u32 x = stage + path * kFirstBytes + group * (kPathBytes / 2);
                warpgroup_product(sums, tile_descriptor(x + 32 * k), tile_descriptor(weights + 32 * k),
                                  path + k > 0 || adds);
            }
        ptx::wgmma_commit();
        copy(step + kWgmmaStages - 2);
        if (!WeightTile::kCopied && step + 1 < steps)
            dequantiser.fill(dequantised + (step + 1) % 3 * kWeightBytes, step + 1);
        ptx::wgmma_wait<1>();
        if (kSparse) next = metadata_of(step + 1);
    };
    constexpr int kTurn = kSparse ? 2 : 1;  // steps: K of sparse activations is padded to 128
    u32 even = kSparse ? metadata_of(0) : 0, odd = 0;
    for (int begin = 0, end; begin < steps; begin = end) {
        end = kSlices ? min(begin + weight.flush_k(slice_k) / kTileK, steps) : steps;
        for (int turn = begin / kTurn; turn < end / kTurn; ++turn) {
            const int step = turn * kTurn;
            advance(step, step > begin, even, odd);
            if (kSparse) advance(step + 1, true, odd, even);
        }
        ptx::wgmma_wait<0>();
        add_slice(end - 1);
    }
    ptx::cp_async_wait_all();
    __syncthreads();

    constexpr int kStride = kN + kResultPadding;
    float* results = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int e = 0; e < kN / 2; ++e) {
        const int token = 16 * warp_of_block() + (lane >> 2) + 8 * (e >> 1 & 1), n = row_of(e);
        results[token * kStride + n] = kSlices ? totals[kSlices ? e : 0] : sums[e];
    }
    __syncthreads();
    const int tokens = min(kWgmmaTokens, input.M - first_token), rows = min(kN, epilogue.N - first_n);
    for (int i = threadIdx.x; i < tokens * kN; i += blockDim.x) {
        const int token = i / kN, n = i % kN;
        if (n < rows) epilogue.store(first_token + token, first_n + n, results[token * kStride + n]);
    }
}

#endif
