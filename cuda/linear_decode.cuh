// Matrix products for few tokens, bound by reading the weight once: out = x · weightᵀ for every kind of weight.
//
//   Y[t, n] = Σ_k X[t, k] W[n, k]     mma m16n8k16 with weights as A (16 rows n), activations as B (8 columns)
//
// A column is a token, or with two paths (SharQ's backbone and residual) 2t is token t's backbone and 2t + 1 its
// residual: one weight fragment feeds both, and their sums meet in one lane.
//
// A warp owns a tile of 16 rows n and all columns of its block (8 · kTiles); the block's warps have neighbouring tiles.
// It reads its tile as a stream of units (weight_layout.cuh) through a ring of kStages of its own in shared memory:
// cp.async by the lane, so no barrier but __syncwarp, and kStages − 1 units per warp are always under way. Activations
// are brought to shared memory once per block as 16-bit factors, chunk_k of k at a time.
//
// Order of sums, the same whatever M, the column, kTiles and the grid: K is cut into slices of slice_k, which depends
// on K alone (launch_linear.py: slice_k). Within a slice fp32 sums of groups (of 32 to 128 k, see each weight) are
// added in the order of k, a slice starts from 0, two paths are added, then slices in order. Which block computes which
// slices is free: where gridDim.y > 1 sums of slices go to `partials`, and the last block to arrive at a (row block,
// column group) adds all of them in order. It leaves `arrivals` at zero, as it found it.
//
// Grid: x column groups, y splits of slices_per_block slices, z blocks of (blockDim.x / 32) tiles: column groups are
// neighbours in time, so they find the weight in L2. Block: a multiple of 32 threads, at most 256.
// Shared memory (launch_linear.py): warps · kStages · unit bytes; columns · (2 chunk_k + padding) of factors; a slice's
// sums; fp32 scales where the input has them.
// Memory traffic: the weight once (a column group more reads L2), activations once a block, M · N outputs; with splits
// 8 · M · N · slices bytes of partial sums through L2.
//
// These entry points serve any number of tokens, in column groups, with the same bits for each: decode rows
// (engine/scheduler.py) take no others, and with deterministic=True every row is one. The weight is dequantised once a
// column group then, which is what that guarantee costs.
//
// Launched while the kernel before still runs, a block reads its first units meanwhile (ptx::grid_dependency_wait).
//
// What hardware must show: that 3 units of 1 KB in flight per warp and 12 to 32 warps an SM reach the bandwidth (the
// H200 wants about 32 KB in flight an SM), that issue slots hold (linear_fp4.cuh counts them), and the choice of
// splits.
#pragma once

#include "common.cuh"
#include "mma.cuh"
#include "weight_layout.cuh"

constexpr int kStages = 4;
constexpr int kColumns = 8;  // of an mma
constexpr int kResultPadding = 8;  // floats a row of results: spreads tokens over banks

enum OutputType { kOutputF32 = 0, kOutputF16 = 1, kOutputBf16 = 2 };

template <class T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]);
template <>
__device__ __forceinline__ void multiply_add<bf16>(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    ptx::mma_m16n8k16_bf16(c, a, b);
}
template <>
__device__ __forceinline__ void multiply_add<f16>(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    ptx::mma_m16n8k16_f16(c, a, b);
}

// What becomes of a finished sum: out[t, n] = sum · power · (token_scale[t] · row_scale[n]) + bias[n] + residual[t, n],
// rounded once. Null pointers are left out. out and residual [M, N] are of the output type, residual may be out.
struct Epilogue {
    float power;  // of two: what the factors left out
    const float* token_scale;
    const float* row_scale;
    const float* bias;
    const void* residual;
    void* out;
    int out_type;
    int N;

    __device__ __forceinline__ void store(int t, int n, float sum) const {
        float scale = row_scale ? row_scale[n] : 1.0f;
        if (token_scale) scale = __fmul_rn(token_scale[t], scale);
        float y = __fmul_rn(__fmul_rn(sum, power), scale);
        if (bias) y = __fadd_rn(y, bias[n]);
        const i64 at = static_cast<i64>(t) * N + n;
        if (out_type == kOutputF32) store_as<float>(at, y);
        else if (out_type == kOutputF16) store_as<f16>(at, y);
        else store_as<bf16>(at, y);
    }
    template <class T>
    __device__ __forceinline__ void store_as(i64 at, float y) const {
        if (residual) y = __fadd_rn(y, to_float(static_cast<const T*>(residual)[at]));
        static_cast<T*>(out)[at] = from_float<T>(y);
    }
};

__device__ __forceinline__ int log2_of(int power) { return 31 - __clz(power); }
__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

// Whether this block is the last of gridDim.y to arrive here; then it sees what the others wrote before. The count goes
// back to zero for the next launch.
__device__ __forceinline__ bool arrives_last(u32* arrivals) {
    __shared__ bool is_last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(arrivals, 1u) == gridDim.y - 1;
        if (is_last) *arrivals = 0;
    }
    __syncthreads();
    __threadfence();
    return is_last;
}

template <class Weight>
__device__ __forceinline__ u32 next_slot(u32 offset) {
    return offset == (kStages - 1) * Weight::kUnitBytes ? 0 : offset + Weight::kUnitBytes;
}

// How the work is cut; see above.
struct Cut {
    int slice_k, slices_per_block, chunk_k;  // slice_k and chunk_k powers of two
    float* partials;  // [slices, M, N padded to 16]; null where gridDim.y is 1
    u32* arrivals;    // [gridDim.z, gridDim.x], zero
};

// Eight neighbours of a row from column k on, as 32-bit words; beyond K zeros. vectors: rows are aligned to 16 bytes.
__device__ __forceinline__ void load_sixteen_bytes(const void* row, int k, int K, bool vectors, u32 (&words)[4]) {
    const unsigned short* from = static_cast<const unsigned short*>(row) + k;
    if (vectors && k + 8 <= K) {
        const uint4 raw = *reinterpret_cast<const uint4*>(from);
        words[0] = raw.x, words[1] = raw.y, words[2] = raw.z, words[3] = raw.w;
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const u32 low = k + 2 * i < K ? from[2 * i] : 0, high = k + 2 * i + 1 < K ? from[2 * i + 1] : 0;
        words[i] = low | high << 16;
    }
}

// Activations as they are, x [M, K] of f16 or bf16 with rows `stride` elements apart, as factors of the same type.
template <class T, class Weight>
struct Rows {
    static constexpr int kScaleGroup = 0;  // no scales
    const T* x;
    i64 stride;
    int K;

    __device__ __forceinline__ int paths() const { return 1; }

    template <int kTiles>
    __device__ __forceinline__ void fill(u8* to, float*, int first, int columns, int k, int count) const {
        const bool vectors = is_aligned(x) && stride % 8 == 0;
        const int eights = count / 8, log2_eights = log2_of(eights);
        for (int i = threadIdx.x; i < columns * eights; i += blockDim.x) {
            const int column = i >> log2_eights, at = 8 * (i & (eights - 1));
            u32 words[4];
            load_sixteen_bytes(x + (first + column) * stride, k + at, K, vectors, words);
            Weight::store_eight(to + column * (2 * count + Weight::kColumnPadding), at, words);
        }
    }
};

// bf16 activations as f16 factors, each 128 k of a row under a power of two that brings the largest to [2^15, 2^16):
// exact but for elements 2^-29 and less of that largest one, whose error is at most 2^-40 of it.
template <class Weight>
struct RowsAsF16 {
    static constexpr int kScaleGroup = 128;
    const bf16* x;
    i64 stride;
    int K;

    __device__ __forceinline__ int paths() const { return 1; }

    template <int kTiles>
    __device__ __forceinline__ void fill(u8* to, float* scales, int first, int columns, int k, int count) const {
        const bool vectors = is_aligned(x) && stride % 8 == 0;
        const int eights = count / 8, log2_eights = log2_of(eights), items = columns * eights, lane = lane_of_warp();
        for (int start = threadIdx.x - lane; start < items; start += blockDim.x) {
            const int i = start + lane, column = i >> log2_eights, at = 8 * (i & (eights - 1));
            u32 words[4] = {}, largest = 0;
            if (i < items) load_sixteen_bytes(x + (first + column) * stride, k + at, K, vectors, words);
#pragma unroll
            for (int j = 0; j < 4; ++j)
                largest = max(largest, max(words[j] << 16 & 0x7fff0000u, words[j] & 0x7fff0000u));
#pragma unroll
            for (int distance = 1; distance < 16; distance *= 2)
                largest = max(largest, __shfl_xor_sync(kAllLanes, largest, distance));
            if (i >= items) continue;
            const u32 exponent = max(largest >> 23, 16u) - 15;  // of the scale, biased
            const float inverse = __uint_as_float((254 - exponent) << 23);
#pragma unroll
            for (int j = 0; j < 4; ++j)
                words[j] = Word<f16>::pack(__fmul_rn(Word<bf16>::low(words[j]), inverse),
                                           __fmul_rn(Word<bf16>::high(words[j]), inverse));
            Weight::store_eight(to + column * (2 * count + Weight::kColumnPadding), at, words);
            if (at % 128 == 0) scales[at / 128 * (kColumns * kTiles) + column] = __uint_as_float(exponent << 23);
        }
        for (int i = threadIdx.x; i < count / 128 * (kColumns * kTiles); i += blockDim.x)
            if (i % (kColumns * kTiles) >= columns) scales[i] = 0.0f;
    }
};

// Sums of columns 8 i + 2 q and the next times their scales at by[8 i], by[8 i + 1].
template <int kTiles>
__device__ __forceinline__ void scale_columns(const float* by, float (&sums)[kTiles][4]) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
        const float2 scale = *reinterpret_cast<const float2*>(by + kColumns * i);
        sums[i][0] = __fmul_rn(sums[i][0], scale.x), sums[i][1] = __fmul_rn(sums[i][1], scale.y);
        sums[i][2] = __fmul_rn(sums[i][2], scale.x), sums[i][3] = __fmul_rn(sums[i][3], scale.y);
    }
}

// Weight:
//     kUnitK, kUnitBytes, kColumnPadding   of the layout; padding so that B fragments are read without bank conflicts
//     Stream                               what a lane reads, unit after unit: Stream(weight, tile, unit, lane) and
//                                          copy_next(shared), which starts the copies of a unit
//     store_eight(column, k, words)        puts eight activations k … k + 7 where `multiply` looks for them
//     multiply(tile, unit, shared, columns, k, scales, sums)   a unit, in shared memory, times the columns from k on,
//                                                              added to the slice's sums
// Input:
//     paths()                              1, or 2 where columns alternate between backbone and residual
//     kScaleGroup                          k per fp32 scale that `multiply` has to apply; 0: none
//     fill<kTiles>(factors, scales, first, columns, k, count)   columns first … first + columns of k … k + count,
//                                          beyond K zeros; scales [count / kScaleGroup][8 · kTiles], finite for columns
//                                          there are not, too
template <int kTiles, class Weight, class Input>
__device__ __forceinline__ void decode_linear(const Weight& weight, const Input& input, const Epilogue& epilogue,
                                              const Cut& cut, int M, int N, int K) {
    extern __shared__ __align__(128) u8 shared[];
    const int lane = lane_of_warp(), warp = warp_of_block(), warps = blockDim.x / 32, g = lane >> 2, q = lane & 3;
    const int tile = blockIdx.z * warps + warp;
    const bool has_rows = tile * kTileRows < N;  // a warp without repeats the last tile's work and drops it
    const int paths = input.paths(), group_tokens = kColumns * kTiles / paths;
    const int first_token = blockIdx.x * group_tokens, tokens = min(group_tokens, M - first_token);
    const int columns = tokens * paths;

    u8* ring = shared + warp * kStages * Weight::kUnitBytes;
    u8* factors = shared + warps * kStages * Weight::kUnitBytes;
    const int column_bytes = 2 * cut.chunk_k + Weight::kColumnPadding;
    float* totals = reinterpret_cast<float*>(factors + columns * column_bytes);  // [tokens][row_stride]
    float* scales = totals + kColumns * kTiles / paths * (kTileRows * warps + kResultPadding);
    const u8* column[kTiles];  // this lane's; what columns there are not is computed from the last one and never used
#pragma unroll
    for (int i = 0; i < kTiles; ++i) column[i] = factors + min(kColumns * i + g, columns - 1) * column_bytes;

    const int units = ceil_div(K, Weight::kUnitK), slice_units = cut.slice_k / Weight::kUnitK;
    const int chunk_units = cut.chunk_k / Weight::kUnitK, slices = ceil_div(units, slice_units);
    const int first_slice = blockIdx.y * cut.slices_per_block;
    const int last_slice = min(first_slice + cut.slices_per_block, slices);
    const int last_unit = min(last_slice * slice_units, units);

    int to_fetch = last_unit - first_slice * slice_units;
    u32 fetch_slot = 0, slot = 0;  // offsets in the ring
    const u32 ring_address = ptx::shared_address(ring);
    typename Weight::Stream stream(weight, min(tile, ceil_div(N, kTileRows) - 1), first_slice * slice_units, lane);
    const auto fetch = [&] {
        if (to_fetch > 0) stream.copy_next(ring_address + fetch_slot);
        ptx::cp_async_commit();
        --to_fetch;
        fetch_slot = next_slot<Weight>(fetch_slot);
    };
    ptx::launch_dependents();
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) fetch();  // weights, which no kernel writes
    ptx::grid_dependency_wait();

    const int padded_N = ceil_div(N, kTileRows) * kTileRows;
    const int rows = kTileRows * warps, row_stride = rows + kResultPadding;
    const int own_row = kTileRows * warp + g;
    // Sum e of tile i belongs to row g + 8 (e >> 1) and to token 8 i + 2 q + (e & 1); with two paths, once they are
    // added, only even e count, and the token is 4 i + q.
    const auto for_each_sum = [&](auto&& action) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (paths == 1 || e % 2 == 0)
                    action(paths == 1 ? kColumns * i + 2 * q + (e & 1) : kColumns / 2 * i + q, 8 * (e >> 1), i, e);
    };

    for (int slice = first_slice; slice < last_slice; ++slice) {
        float sums[kTiles][4] = {};
        const int first = slice * slice_units, last = min(first + slice_units, units);
        for (int chunk = first; chunk < last; chunk += chunk_units) {
            __syncthreads();  // the chunk before has been used
            input.template fill<kTiles>(factors, scales, first_token * paths, columns, chunk * Weight::kUnitK,
                                        cut.chunk_k);
            __syncthreads();
            const int end = min(chunk + chunk_units, last);
#pragma unroll 1
            for (int unit = chunk; unit < end; ++unit) {
                ptx::cp_async_wait<kStages - 2>();
                __syncwarp();  // other lanes' copies are there, and nobody reads the slot that is filled next
                fetch();
                const int k = (unit - chunk) * Weight::kUnitK;
                weight.template multiply<kTiles>(tile, unit, ring + slot, column, k, scales, sums);
                slot = next_slot<Weight>(slot);
            }
        }
        if (paths == 2)
#pragma unroll
            for (int i = 0; i < kTiles; ++i)
                sums[i][0] = __fadd_rn(sums[i][0], sums[i][1]), sums[i][2] = __fadd_rn(sums[i][2], sums[i][3]);
        if (gridDim.y > 1) {
            float* to = cut.partials + (static_cast<i64>(slice) * M + first_token) * padded_N + tile * kTileRows + g;
            for_each_sum([&](int token, int row, int i, int e) {
                if (has_rows && token < tokens) __stcg(to + static_cast<i64>(token) * padded_N + row, sums[i][e]);
            });
        } else {
            for_each_sum([&](int token, int row, int i, int e) {
                float& total = totals[token * row_stride + own_row + row];
                total = slice == first_slice ? sums[i][e] : __fadd_rn(total, sums[i][e]);
            });
        }
    }
    ptx::cp_async_wait_all();
    if (gridDim.y > 1 && !arrives_last(cut.arrivals + blockIdx.z * gridDim.x + blockIdx.x)) return;
    __syncthreads();

    const int first_n = blockIdx.z * rows;
    for (int i = threadIdx.x; i < tokens * rows; i += blockDim.x) {
        const int token = i / rows, row = i - token * rows, n = first_n + row;
        if (n >= N) continue;
        float total = gridDim.y > 1 ? 0.0f : totals[token * row_stride + row];
        if (gridDim.y > 1) {
            const float* from = cut.partials + static_cast<i64>(first_token + token) * padded_N + n;
            total = __ldcg(from);
            for (int slice = 1; slice < slices; ++slice)
                total = __fadd_rn(total, __ldcg(from + static_cast<i64>(slice) * M * padded_N));
        }
        epilogue.store(first_token + token, n, total);
    }
}
