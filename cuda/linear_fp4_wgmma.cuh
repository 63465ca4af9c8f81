// Products of FP4 weights for many tokens on Hopper: wgmma with weights dequantised to bf16, which is exact (see
// linear_fp4_tile.cuh).
//
//   bf16                W4A16, linear_wgmma.cuh: x [M, K]; 256 rows n, as cuBLAS sums, or 128
//   one                 FP4 activations in one path
//   two                 in two dense ones, one pass over the weight: the work of two bf16 products
//   sparse_and_dense    SharQ: the backbone on sparse products, the work of 1.5
//   sparse              the backbone alone; with `one` for the residual what the paper describes, two products
//
// FP4 activations are expanded to bf16 once (expand_*_fragments) in the order of A's registers, so that they go from
// global memory to registers and shared memory is left to the weights: a sparse product reads 128 bytes a clock of B
// alone. A fragment is four words for each lane, those of 16 tokens × 16 k, of a sparse path 16 × 16 as kept:
//
//     first, second [ceil(M / 16), K / 16 or K / 32, 32 lanes, 4 words]      metadata [ceil(M / 16), K / 64, 32 lanes]
//
// Word r of lane 4 g + q has k = 8 (r / 2) + 2 q, + 1 of token g + 8 (r % 2). k within eight, the 2:4 pattern and the
// metadata are those of linear_tile.cuh; tokens there are not are zeros.
//
// A block is two warpgroups and owns 128 tokens × 128 n. A step of 64 k: the weights are there (proxy fence, barrier);
// its products are issued; step s − 1's are waited for, and step s + 1's activations loaded to the registers that they
// held; while the tensor core is at step s, step s + 2's weights are dequantised into one of four buffers, which step s
// − 2 read last. Order of sums: over slice_k the tensor core's, of each 64 k the first path before the second; slices
// are added in fp32. It depends on K alone.
//
// Grid: x token blocks, y row blocks. Shared memory: 68 KB, 4 · 16 of weights and then the results. M, N any; K padded
// to 128. Limits: see linear_wgmma.cuh. What hardware must show besides: the metadata's order (CUTLASS's, not
// measured).
// Reference: ReferenceOps.fp4_linear, w4a16_linear.
#pragma once

#include "linear_fp4_tile.cuh"
#include "linear_wgmma.cuh"

#if PTX_SM90A

struct FragmentInput {
    const uint4 *first, *second;  // second: null where there is one path
    const u32* metadata;          // of a sparse first path
    int M, K;
};

// What a lane multiplies in a step.
template <bool kSparse, bool kTwo>
struct Fragments {
    static constexpr int kFirst = kSparse ? 2 : 4, kSecond = kTwo ? 4 : 0;
    u32 first[kFirst][4], second[kTwo ? 4 : 1][4], metadata;

    __device__ __forceinline__ void load(const FragmentInput& input, i64 tile_and_step) {
        const int lane = lane_of_warp();
#pragma unroll
        for (int i = 0; i < kFirst; ++i) fetch(first[i], input.first + (tile_and_step * kFirst + i) * 32 + lane);
#pragma unroll
        for (int i = 0; i < kSecond; ++i) fetch(second[i], input.second + (tile_and_step * kSecond + i) * 32 + lane);
        if (kSparse) metadata = __ldg(input.metadata + tile_and_step * 32 + lane);
    }

    // sums (+)= these · 64 k of weights at w.
    __device__ __forceinline__ void multiply(float (&sums)[64], u32 w, bool adds) const {
        if constexpr (kSparse) {
            ptx::wgmma_sp_m64n128k32_bf16<0>(sums, first[0], tile_descriptor(w), metadata, adds);
            ptx::wgmma_sp_m64n128k32_bf16<1>(sums, first[1], tile_descriptor(w + 64), metadata, true);
        } else {
#pragma unroll
            for (int k = 0; k < 4; ++k)
                ptx::wgmma_m64n128k16_bf16(sums, first[k], tile_descriptor(w + 32 * k), k > 0 || adds);
        }
#pragma unroll
        for (int k = 0; k < kSecond; ++k)
            ptx::wgmma_m64n128k16_bf16(sums, second[k], tile_descriptor(w + 32 * k), true);
    }

private:
    static __device__ __forceinline__ void fetch(u32 (&to)[4], const uint4* from) {
        const uint4 words = __ldg(from);
        to[0] = words.x, to[1] = words.y, to[2] = words.z, to[3] = words.w;
    }
};

template <Paths paths, class WeightTile>
__device__ __forceinline__ void fragment_linear(const WeightTile& weight, const FragmentInput& input,
                                                const Epilogue& epilogue, int slice_k) {
    constexpr bool kSparse = paths == Paths::sparse || paths == Paths::sparse_and_dense;
    using Activations = Fragments<kSparse, paths == Paths::two || paths == Paths::sparse_and_dense>;
    constexpr int kBuffers = 4, kWeightBytes = 128 * kTileRowBytes;
    extern __shared__ __align__(1024) u8 shared[];
    const u32 shared_address = ptx::shared_address(shared);
    const int first_token = blockIdx.x * kWgmmaTokens, first_n = blockIdx.y * 128;
    const int steps = input.K / kTileK;  // an even number

    typename WeightTile::Dequantiser dequantiser(weight, first_n);
    dequantiser.fill(shared, 0);
    dequantiser.fill(shared + kWeightBytes, 1);

    // A warp's 16 tokens; where there are none any others, whose results are not stored.
    const i64 tile = min(first_token / 16 + warp_of_block(), ceil_div(input.M, 16) - 1);
    float sums[64], totals[64];
#pragma unroll
    for (int e = 0; e < 64; ++e) sums[e] = totals[e] = 0.0f;

    // adds: to the step before. next: step + 1's activations, which take the registers of step − 1's; ptxas serialises
    // wgmma where a register is written that one may still read.
    const auto advance = [&](int step, bool adds, const Activations& now, Activations& next) {
        ptx::fence_async_proxy();
        __syncthreads();
        ptx::wgmma_fence();
        now.multiply(sums, shared_address + step % kBuffers * kWeightBytes, adds);
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        next.load(input, tile * steps + min(step + 1, steps - 1));
        if (step + 2 < steps) dequantiser.fill(shared + (step + 2) % kBuffers * kWeightBytes, step + 2);
    };
    Activations even, odd;
    even.load(input, tile * steps);
    for (int begin = 0, end; begin < steps; begin = end) {
        end = min(begin + weight.flush_k(slice_k) / kTileK, steps);
        for (int pair = begin / 2; pair < end / 2; ++pair) {
            advance(2 * pair, 2 * pair > begin, even, odd);
            advance(2 * pair + 1, true, odd, even);
        }
        ptx::wgmma_wait<0>();
        add_slice(weight, first_n, (end - 1) * kTileK, sums, totals);
    }
    store_results<128>(totals, shared, epilogue, first_token, first_n, input.M);
}

// ---- activations in FP4 as fragments --------------------------------------------------------------------------------
// As expand_dense and expand_sparse (linear_fp4_tile.cuh), in the order above. Grid: lanes of fragments over blocks of
// whole warps. A quad makes four octets, those of two tokens × 16 k (or as many kept), lane r's being all four lanes'
// words r, and transposes them.

__device__ __forceinline__ void transpose_quad(uint4& w) {
    const bool odd = threadIdx.x & 1, high = threadIdx.x & 2;
    const u32 y = __shfl_xor_sync(kAllLanes, odd ? w.x : w.y, 1), w1 = __shfl_xor_sync(kAllLanes, odd ? w.z : w.w, 1);
    if (odd) w.x = y, w.z = w1;
    else w.y = y, w.w = w1;
    const u32 z = __shfl_xor_sync(kAllLanes, high ? w.x : w.z, 2), w2 = __shfl_xor_sync(kAllLanes, high ? w.y : w.w, 2);
    if (high) w.x = z, w.y = w2;
    else w.z = z, w.w = w2;
}

// of_octet(t, number): eight values of token t.
template <class OfOctet>
__device__ __forceinline__ void expand_fragments(uint4* out, int M, int octets, OfOctet of_octet) {
    const i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x, fragment = i / 32;
    const int fragments = octets / 2, lane = lane_of_warp();
    const i64 tile = fragment / fragments, t = 16 * tile + (lane >> 2) + 8 * (lane & 1);
    const int octet = 2 * static_cast<int>(fragment % fragments) + (lane >> 1 & 1);
    uint4 words = make_uint4(0, 0, 0, 0);
    if (t < M) words = of_octet(t, octet);
    transpose_quad(words);
    if (tile < ceil_div(M, 16)) out[i] = words;
}

template <class Codes, bool permuted>
__device__ __forceinline__ void expand_dense_fragments(const Fp4Path& path, uint4* out, int M) {
    expand_fragments(out, M, path.K / 8, [&](i64 t, int octet) { return path.dense<Codes, permuted>(t, 8 * octet); });
}
template <class Codes>
__device__ __forceinline__ void expand_sparse_fragments(const Fp4Path& path, uint4* out, u32* words, int M) {
    expand_fragments(out, M, path.K / 16, [&](i64 t, int octet) {
        const uint2 low = path.kept<Codes>(t, 16 * octet), high = path.kept<Codes>(t, 16 * octet + 8);
        return make_uint4(low.x, low.y, high.x, high.y);
    });
    const i64 word = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (word < static_cast<i64>(ceil_div(M, 16)) * (path.K / 64) * 32) words[word] = path.metadata_word<Codes>(word, M);
}

// ---- entry points --------------------------------------------------------------------------------------------------

#define WGMMA_BF16_ENTRY(format, Codes, rows)                                                                          \
    extern "C" __global__ void __launch_bounds__(256, 1)                                                               \
        linear_wgmma_##format##_bf16_n##rows(const bf16* x, i64 x_stride, TILE_PARAMETERS) {                           \
        const Fp4Tile<Codes, bf16, false, rows / 128> weight = {units, N, fp4_units_along_k(K)};                       \
        const float power = power_of_two(Codes::kValuePower<bf16>);                                                    \
        const Epilogue epilogue = {power, token_scale, row_scale, bias, residual, out, out_type, N};                   \
        wgmma_linear<rows>(weight, {x, nullptr, nullptr, x_stride, M, K}, epilogue, slice_k);                          \
    }
#define WGMMA_FP4_ENTRY(format, Codes, paths)                                                                          \
    extern "C" __global__ void __launch_bounds__(256, 1)                                                               \
        linear_wgmma_##format##_##paths(const uint4* first, const uint4* second, const u32* metadata,                  \
                                        TILE_PARAMETERS) {                                                             \
        constexpr bool kSparse = Paths::paths == Paths::sparse || Paths::paths == Paths::sparse_and_dense;             \
        constexpr bool kPermuted = kSparse && Codes::kMetadataBits == 4;                                               \
        const Fp4Tile<Codes, bf16, kPermuted, 1> weight = {units, N, fp4_units_along_k(K)};                            \
        const float power = power_of_two(Codes::kValuePower<bf16>);                                                    \
        const Epilogue epilogue = {power, token_scale, row_scale, bias, residual, out, out_type, N};                   \
        fragment_linear<Paths::paths>(weight, {first, second, metadata, M, K}, epilogue, slice_k);                     \
    }
#define EXPAND_FRAGMENTS_ENTRY(name, Codes, permuted)                                                                  \
    extern "C" __global__ void expand_##name##_fragments(const u8* codes, const u8* metadata, const void* scale,       \
                                                         int block, uint4* out, int M, int K) {                        \
        expand_dense_fragments<Codes, permuted>({codes, metadata, scale, block, K}, out, M);                           \
    }
#define FP4_WGMMA_ENTRIES(format, Codes)                                                                               \
    WGMMA_BF16_ENTRY(format, Codes, 256)                                                                               \
    WGMMA_BF16_ENTRY(format, Codes, 128)                                                                               \
    WGMMA_FP4_ENTRY(format, Codes, one)                                                                                \
    WGMMA_FP4_ENTRY(format, Codes, two)                                                                                \
    WGMMA_FP4_ENTRY(format, Codes, sparse_and_dense)                                                                   \
    WGMMA_FP4_ENTRY(format, Codes, sparse)                                                                             \
    EXPAND_FRAGMENTS_ENTRY(format##_dense, Codes, false)                                                               \
    EXPAND_FRAGMENTS_ENTRY(format##_permuted, Codes, Codes::kMetadataBits == 4)                                        \
    extern "C" __global__ void expand_##format##_sparse_fragments(const u8* codes, const u8* metadata,                 \
                                                                  const void* scale, int block, uint4* out,            \
                                                                  u32* words, int M, int K) {                          \
        expand_sparse_fragments<Codes>({codes, metadata, scale, block, K}, out, words, M);                             \
    }
#else
#define FP4_WGMMA_ENTRIES(format, Codes)  // sm_90a alone has wgmma
#endif
