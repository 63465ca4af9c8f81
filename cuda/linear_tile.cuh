// Matrix products for many tokens on mma.sync: out = x · weightᵀ in tiles of tokens × 128 rows n, 64 k at a time.
//
//   Y[t, n] = Σ_paths Σ_k X[t, k] W[n, k]     activations are A, weights B of m16n8k16; sparse ones of m16n8k32 mma.sp
//
// A block owns kWarpsM · 64 tokens × 128 n and has kWarpsM · 4 warps, each 64 tokens × 32 n. Activations are 16-bit in
// global memory (FP4 ones are made so once, linear_fp4_tile.cuh) and come by cp.async through a ring of `stages`;
// weights come the same way where they are 16-bit, else as packed units to registers, 128 k ahead, and from there
// dequantised to two buffers in turn. One barrier a step: while some warps multiply step s others dequantise step s +
// 1.
//
// In shared memory a row of 64 k is 128 bytes whose 16-byte pieces are XORed with row % 8, so that ldmatrix meets no
// bank conflicts; rows of sparse activations are 64 bytes, pieces XORed with row / 2 % 4. These are wgmma's swizzles by
// 128 and 64 bytes as well.
//
// Sparse: 2:4 needs one candidate of each of a chunk's four pairs in a group of four k, so k is (0, 2, 4, 6, 1, 3, 5,
// 7) within eight, in both operands and the other path (nvfp4, mxfp4); HiF4's mask is 2:4 as it is. The metadata word
// of lane 4 g + q has for k in [16 q, + 16) of 64 row g's nibbles in its low half, row g + 8's in its high half:
// selector 0 takes lanes q = 0, 1, the first 32 k, selector 1 the others.
//
// Order of sums: the tensor core's within slice_k (launch_linear.py) or 128 k where weights have scales along k, path
// after path in each 32 or 64 k; slices are added in fp32. It depends on K alone, so a token's bits are the same in any
// batch and for both sizes of block. linear_decode's order is another: decode rows have its bits, prefill rows these.
//
// Grid: x token blocks, y row blocks (neighbours in x share the weight through L2). Shared memory: stages · (token
// bytes + 16 KB of 16-bit weights), 32 KB for dequantised ones. M, N, K any; K of FP4 activations padded to 128, else a
// multiple of 8.
// Limits: mma.sync runs at about .62 of Hopper's wgmma rate; a warp's step is 64 mma a path, 24 ldmatrix
// and, of FP4 weights, 32 codes a lane to dequantise (about 100 instructions). What hardware must show: the metadata's
// order (derived, not measured), and that one block of 8 warps an SM hides its own latencies.
#pragma once

#include "linear_decode.cuh"

constexpr int kTileK = 64, kTileN = 128, kWarpTokens = 64, kWarpN = 32;
constexpr int kTileRowBytes = 2 * kTileK;
constexpr int kTileWeightBytes = kTileN * kTileRowBytes;
constexpr int kTileStages = 3;

// Piece `sixteen` (16 bytes) of a row of 128 bytes; of a row of 64 bytes.
__device__ __forceinline__ u32 tile_place(int row, int sixteen) {
    return row * kTileRowBytes + 16 * (sixteen ^ (row & 7));
}
__device__ __forceinline__ u32 half_tile_place(int row, int sixteen) {
    return row * (kTileRowBytes / 2) + 16 * (sixteen ^ (row >> 1 & 3));
}

// Rows first … of a 16-bit matrix [rows, K] to a tile of kRows, pieces from column k on, by kThreads threads; what is
// beyond rows or K becomes zeros. A thread has the same piece of every kStep-th row: places differ by constants.
template <int kRows, int kThreads, bool half_rows>
__device__ __forceinline__ void copy_tile(u32 shared, const void* matrix, i64 stride, int first, int rows, int k,
                                          int K) {
    constexpr int kPieces = half_rows ? 4 : 8, kStep = kThreads / kPieces;
    static_assert(kStep % 8 == 0 && kRows % kStep == 0, "rows that are kStep apart have one place in their swizzle");
    const int row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces, column = k + 8 * piece;
    const u32 to = shared + (half_rows ? half_tile_place(row, piece) : tile_place(row, piece));
    const auto* from = static_cast<const unsigned short*>(matrix) + (first + row) * stride + column;
#pragma unroll
    for (int i = 0; i < kRows / kStep; ++i) {
        const bool inside = first + row + i * kStep < rows && column < K;  // else the address is not looked at
        ptx::cp_async_16(to + i * kStep * 16 * kPieces, from + i * kStep * stride, inside ? 16 : 0);
    }
}

// Activations of a tile product: up to two 16-bit matrices, the first of them possibly sparse.
struct TileInput {
    const void* first;   // [M, K], or sparse [M, K / 2]
    const void* second;  // [M, K] or null
    const u32* metadata;  // sparse: [ceil(M / 16), K / 64, 32]
    i64 stride;          // of first and second, halved where sparse
    int M, K;

    // 64 k of kTokens tokens: the first path's tile, then the second's.
    template <int kTokens, int kThreads, bool kSparse, bool kTwo>
    __device__ __forceinline__ void copy(u32 shared, int first_token, int k) const {
        constexpr int kHalf = kSparse ? 2 : 1;
        copy_tile<kTokens, kThreads, kSparse>(shared, first, stride / kHalf, first_token, M, k / kHalf, K / kHalf);
        if (kTwo)
            copy_tile<kTokens, kThreads, false>(shared + kTokens * kTileRowBytes / kHalf, second, stride, first_token,
                                                M, k, K);
    }
};

enum class Paths { one, two, sparse_and_dense, sparse };

template <class T>
__device__ __forceinline__ void multiply_add_sparse(float (&c)[4], const u32 (&a)[4], const u32 (&b)[4], u32 metadata,
                                                    int half);
template <>
__device__ __forceinline__ void multiply_add_sparse<bf16>(float (&c)[4], const u32 (&a)[4], const u32 (&b)[4],
                                                          u32 metadata, int half) {
    if (half == 0) ptx::mma_sp_m16n8k32_bf16<0>(c, a, b, metadata);
    else ptx::mma_sp_m16n8k32_bf16<1>(c, a, b, metadata);
}
template <>
__device__ __forceinline__ void multiply_add_sparse<f16>(float (&c)[4], const u32 (&a)[4], const u32 (&b)[4],
                                                         u32 metadata, int half) {
    if (half == 0) ptx::mma_sp_m16n8k32_f16<0>(c, a, b, metadata);
    else ptx::mma_sp_m16n8k32_f16<1>(c, a, b, metadata);
}

// The scale of a lane's n-th row of 32, 8 (n / 2) + 2 q + n % 2, from the lane that holds it.
template <bool scaled>
__device__ __forceinline__ float slice_scale(float scale_of_lane, int n) {
    return scaled ? __shfl_sync(kAllLanes, scale_of_lane, 8 * (n / 2) + 2 * (lane_of_warp() & 3) + n % 2) : 1.0f;
}

// Sums of a warp: 4 tiles of 16 tokens by 4 of 8 rows n.
using TileSums = float[4][4][4];

// WeightTile:
//     kCopied                    its 16-bit elements come by cp.async: copy<threads>(shared, first_n, k)
//     else Dequantiser           what a thread holds: Dequantiser(weight, first_n), and fill(to, step), called for each
//                                step in order, which puts 128 n × 64 k there
//     flush_k(slice_k)           how many k the tensor core may sum: a power of two
//     kScaled, scale(n, k)       whether such a sum, of row n and ending with the 64 k from k on, has a scale; which
template <class T, Paths paths, int kWarpsM, class WeightTile>
__device__ __forceinline__ void tile_linear(const WeightTile& weight, const TileInput& input, const Epilogue& epilogue,
                                            int slice_k) {
    constexpr bool kSparse = paths == Paths::sparse || paths == Paths::sparse_and_dense;
    constexpr bool kTwo = paths == Paths::two || paths == Paths::sparse_and_dense;
    constexpr int kTokens = kWarpsM * kWarpTokens, kThreads = 128 * kWarpsM;
    constexpr int kFirstBytes = kTokens * (kSparse ? kTileRowBytes / 2 : kTileRowBytes);
    constexpr int kInputBytes = kFirstBytes + (kTwo ? kTokens * kTileRowBytes : 0);
    constexpr int kStageBytes = kInputBytes + (WeightTile::kCopied ? kTileWeightBytes : 0);
    extern __shared__ __align__(128) u8 shared[];
    u8* dequantised = shared + kTileStages * kStageBytes;
    const u32 shared_address = ptx::shared_address(shared), dequantised_address = ptx::shared_address(dequantised);

    const int lane = lane_of_warp(), warp_m = warp_of_block() / 4, warp_n = warp_of_block() % 4;
    const int first_token = blockIdx.x * kTokens, first_n = blockIdx.y * kTileN;
    const int steps = ceil_div(input.K, kTileK), flush_steps = weight.flush_k(slice_k) / kTileK;

    const auto copy = [&](int step) {
        if (step < steps) {
            const u32 to = shared_address + step % kTileStages * kStageBytes;
            const int k = step * kTileK;
            input.template copy<kTokens, kThreads, kSparse, kTwo>(to, first_token, k);
            weight.template copy<kThreads>(to + kInputBytes, first_n, k);
        }
        ptx::cp_async_commit();
    };

    // Metadata of this lane for tile i of 16 tokens and a step; tiles there are not repeat the last, their rows are
    // zeros.
    const int metadata_tiles = ceil_div(input.M, 16);
    const auto metadata_of = [&](int i, int step) {
        const int tile = min((first_token + kWarpTokens * warp_m) / 16 + i, metadata_tiles - 1);
        return __ldg(input.metadata + (static_cast<i64>(tile) * steps + step) * 32 + lane);
    };

    // 64 tokens × 32 n × 64 k: activations and weights of a stage at `x`, `w`.
    const auto multiply = [&](u32 x, u32 w, int step, TileSums& sums) {
        u32 metadata[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) metadata[i] = kSparse ? metadata_of(i, step) : 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u32 b[4][4];
#pragma unroll
            for (int j = 0; j < 4; ++j)
                ptx::ldmatrix_x4(b[j], w + tile_place(kWarpN * warp_n + 8 * j + (lane & 7), 4 * half + (lane >> 3)));
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = kWarpTokens * warp_m + 16 * i + (lane & 15), piece = lane >> 4;
                u32 a[4];
                if (kSparse) {
                    ptx::ldmatrix_x4(a, x + half_tile_place(row, 2 * half + piece));
#pragma unroll
                    for (int j = 0; j < 4; ++j) multiply_add_sparse<T>(sums[i][j], a, b[j], metadata[i], half);
                }
#pragma unroll
                for (int path = kSparse ? 1 : 0; path < (kTwo ? 2 : 1); ++path)
#pragma unroll
                    for (int sixteen = 0; sixteen < 2; ++sixteen) {
                        ptx::ldmatrix_x4(a, x + path * kFirstBytes + tile_place(row, 4 * half + 2 * sixteen + piece));
#pragma unroll
                        for (int j = 0; j < 4; ++j)
                            multiply_add<T>(sums[i][j], a, {b[j][2 * sixteen], b[j][2 * sixteen + 1]});
                    }
            }
        }
    };

#pragma unroll
    for (int step = 0; step < kTileStages - 1; ++step) copy(step);
    typename WeightTile::Dequantiser dequantiser(weight, first_n);
    if (!WeightTile::kCopied) dequantiser.fill(dequantised, 0);

    TileSums totals = {}, sums = {};
    for (int step = 0; step < steps; ++step) {
        ptx::cp_async_wait<kTileStages - 2>();
        __syncthreads();  // this step's operands are there; nobody reads the buffers that are filled next
        copy(step + kTileStages - 1);
        if (!WeightTile::kCopied && step + 1 < steps)
            dequantiser.fill(dequantised + (step + 1) % 2 * kTileWeightBytes, step + 1);
        const u32 stage = shared_address + step % kTileStages * kStageBytes;
        const u32 buffer = dequantised_address + step % 2 * kTileWeightBytes;
        multiply(stage, WeightTile::kCopied ? stage + kInputBytes : buffer, step, sums);
        if ((step + 1) % flush_steps == 0 || step + 1 == steps) {
            const float scale = WeightTile::kScaled ? weight.scale(first_n + kWarpN * warp_n + lane, step * kTileK) : 1;
#pragma unroll
            for (int n = 0; n < 8; ++n) {  // of the lane
                const float of_n = slice_scale<WeightTile::kScaled>(scale, n);
#pragma unroll
                for (int m = 0; m < 8; ++m) {
                    const int e = m % 2 * 2 + n % 2;
                    float &total = totals[m / 2][n / 2][e], &sum = sums[m / 2][n / 2][e];
                    total = __fmaf_rn(sum, of_n, total);
                    sum = 0.0f;
                }
            }
        }
    }
    ptx::cp_async_wait_all();
    __syncthreads();

    // Through shared memory, so that neighbouring threads write neighbouring n.
    constexpr int kStride = kTileN + kResultPadding;
    float* results = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int e = 0; e < 64; ++e) {
        const int token = kWarpTokens * warp_m + 16 * (e / 16) + (lane >> 2) + 8 * (e >> 1 & 1);
        const int n = kWarpN * warp_n + 8 * (e / 4 % 4) + 2 * (lane & 3) + (e & 1);
        results[token * kStride + n] = totals[e / 16][e / 4 % 4][e % 4];
    }
    __syncthreads();
    const int tokens = min(kTokens, input.M - first_token), rows = min(kTileN, epilogue.N - first_n);
    for (int i = threadIdx.x; i < tokens * kTileN; i += blockDim.x) {
        const int token = i / kTileN, n = i % kTileN;
        if (n < rows) epilogue.store(first_token + token, first_n + n, results[token * kStride + n]);
    }
}

// Weights [N, K] of 16 bits, row by row, kRows to a tile.
template <int kRows>
struct RowMajorTile {
    static constexpr bool kCopied = true;
    const void* w;
    int N, K;

    struct Dequantiser {
        __device__ __forceinline__ Dequantiser(const RowMajorTile&, int) {}
        __device__ __forceinline__ void fill(u8*, int) {}
    };
    template <int kThreads>
    __device__ __forceinline__ void copy(u32 shared, int first_n, int k) const {
        copy_tile<kRows, kThreads, false>(shared, w, K, first_n, N, k, K);
    }
    static constexpr bool kScaled = false;
    __device__ __forceinline__ int flush_k(int slice_k) const { return slice_k; }
    __device__ __forceinline__ float scale(int, int) const { return 1.0f; }
};
