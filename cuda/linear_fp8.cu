// Products with FP8 (E4M3) weights for few tokens: cuda/linear_decode.cuh with units of 16 rows × 64 k
// (weight_layout.cuh).
//
//   fp8    out[t, n] = token_scale[t] · Σ_k codes[t, k] · W[n, k] · scale + …     W8A8, codes [M, K] E4M3
//   bf16   out[t, n] = Σ_k x[t, k] · W[n, k] · scale + …                          W8A16, x [M, K]; and f16
//
// E4M3 becomes f16 by placing bits (s to 15, the seven others to 13:7, which is 2^-8 of the value, subnormals
// included), so products are exact. Sums of 64 k come from the tensor core, and are scaled and added in fp32. Scales
// float32 [steps, N]: one a row (multiplied in at the end) or one for each 128 k. bf16 activations: RowsAsF16.
//
// Bytes moved: 1 a weight; 1.75 integer instructions a weight to make f16, of the 8 that an H200 has time for.
// References: ReferenceOps.fp8_linear, w8a16_linear.
#include "fp8_decode.cuh"
#include "linear_decode.cuh"

// kInputGroup: 128 where the input has scales, else 0.
template <int kInputGroup>
struct Fp8Weight {
    static constexpr int kUnitK = kFp8UnitK, kUnitBytes = 2 * kHalfTileBytes;
    static constexpr int kColumnPadding = 16;  // lanes 4 g + q read 16 bytes at 32 q: odd columns fill the gaps
    const u8* units;
    const float* scale;
    int steps, units_along_k, N;

    struct Stream {
        const u8* from;
        unsigned long long read_once;

        __device__ __forceinline__ Stream(const Fp8Weight& weight, int tile, int unit, int lane)
            : from(weight_unit(weight.units, tile, unit, weight.units_along_k, kUnitBytes) + 16 * lane),
              read_once(ptx::l2_evict_first()) {}

        __device__ __forceinline__ void copy_next(u32 shared) {
            shared += 16 * lane_of_warp();
            ptx::cp_async_16_hint(shared, from, read_once);
            ptx::cp_async_16_hint(shared + kHalfTileBytes, from + kHalfTileBytes, read_once);
            from += kUnitBytes;
        }
    };

    // Of 64 k lane q wants 16 r + 4 q + i for all r: they lie at 16 q + 4 r, each four as 0, 2, 1, 3.
    static __device__ __forceinline__ void store_eight(u8* column, int k, const u32 (&words)[4]) {
        const int in_unit = k % kUnitK, first = k - in_unit + in_unit % 16 * 4 + in_unit / 16 * 4;
        store_four(column + 2 * first, words[0], words[1]);
        store_four(column + 2 * (first + 16), words[2], words[3]);
    }

    template <int kTiles>
    __device__ __forceinline__ void multiply(int tile, int unit, const u8* shared, const u8* const (&column)[kTiles],
                                             int k, const float* scales, float (&sums)[kTiles][4]) const {
        const int lane = lane_of_warp(), g = lane >> 2, q = lane & 3;
        float low_scale = 1.0f, high_scale = 1.0f;
        if (steps > 1) {
            const float* step = scale + static_cast<i64>(unit * kUnitK / kFp8ScaleK) * N;
            const int row = tile * kTileRows + g;
            low_scale = __ldg(step + min(row, N - 1)), high_scale = __ldg(step + min(row + 8, N - 1));
        }
        const uint4 low_raw = reinterpret_cast<const uint4*>(shared)[lane];
        const uint4 high_raw = reinterpret_cast<const uint4*>(shared + kHalfTileBytes)[lane];
        const u32 low[4] = {low_raw.x, low_raw.y, low_raw.z, low_raw.w};
        const u32 high[4] = {high_raw.x, high_raw.y, high_raw.z, high_raw.w};
        float unit_sums[kTiles][4] = {};
#pragma unroll
        for (int r = 0; r < 4; r += 2) {
            u32 first[4], second[4];
            e4m3_pairs<f16>(low[r], first[0], first[2]), e4m3_pairs<f16>(high[r], first[1], first[3]);
            e4m3_pairs<f16>(low[r + 1], second[0], second[2]), e4m3_pairs<f16>(high[r + 1], second[1], second[3]);
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
                const uint4 x = *reinterpret_cast<const uint4*>(column[i] + 2 * (k + 16 * q + 4 * r));
                multiply_add<f16>(unit_sums[i], first, {x.x, x.y});
                multiply_add<f16>(unit_sums[i], second, {x.z, x.w});
            }
        }
        if (kInputGroup) scale_columns(scales + k / 128 * (kColumns * kTiles) + 2 * q, unit_sums);
#pragma unroll
        for (int i = 0; i < kTiles; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                sums[i][e] = __fmaf_rn(unit_sums[i][e], e < 2 ? low_scale : high_scale, sums[i][e]);
    }

private:
    static __device__ __forceinline__ void store_four(u8* to, u32 a, u32 b) {
        *reinterpret_cast<uint2*>(to) = make_uint2(__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632));
    }
};

// Activations [M, K] in E4M3, K a multiple of 8.
template <class Weight>
struct Fp8Input {
    static constexpr int kScaleGroup = 0;
    const u8* codes;
    int K;

    __device__ __forceinline__ int paths() const { return 1; }

    template <int kTiles>
    __device__ __forceinline__ void fill(u8* to, float*, int first, int columns, int k, int count) const {
        const int eights = count / 8, log2_eights = log2_of(eights);
        for (int i = threadIdx.x; i < columns * eights; i += blockDim.x) {
            const int column = i >> log2_eights, at = 8 * (i & (eights - 1));
            u32 words[4] = {};
            if (k + at < K) {
                const u8* from = codes + static_cast<i64>(first + column) * K + k + at;
                const uint2 raw = *reinterpret_cast<const uint2*>(from);
                const uint2 low = e4m3_in_order<f16>(raw.x), high = e4m3_in_order<f16>(raw.y);
                words[0] = low.x, words[1] = low.y, words[2] = high.x, words[3] = high.y;
            }
            Weight::store_eight(to + column * (2 * count + Weight::kColumnPadding), at, words);
        }
    }
};

#define OUTPUT_PARAMETERS                                                                                             \
    const u8 *units, const float *scale, int steps, const float *bias, const void *residual, void *out, int out_type, \
        int M, int N, int K, int slice_k, int slices_per_block, int chunk_k, float *partials, u32 *arrivals
#define OUTPUT_ARGUMENTS                                                                                        \
    units, scale, steps, bias, residual, out, out_type, M, N, K, slice_k, slices_per_block, chunk_k, partials, \
        arrivals

// power: of two, what the factors of both sides lack.
template <int kTiles, class Weight, class Input>
__device__ __forceinline__ void decode_fp8(const Input& input, const float* token_scale, int power, OUTPUT_PARAMETERS) {
    const Weight weight = {units, scale, steps, fp8_units_along_k(K), N};
    const Epilogue epilogue = {power_of_two(power), token_scale, steps == 1 ? scale : nullptr, bias, residual, out,
                               out_type, N};
    decode_linear<kTiles>(weight, input, epilogue, {slice_k, slices_per_block, chunk_k, partials, arrivals}, M, N, K);
}

#define ENTRIES(tiles, blocks)                                                                                         \
    extern "C" __global__ void __launch_bounds__(256, blocks)                                                          \
        linear_decode_fp8_fp8_t##tiles(const u8* codes, const float* token_scale, OUTPUT_PARAMETERS) {                 \
        decode_fp8<tiles, Fp8Weight<0>>(Fp8Input<Fp8Weight<0>>{codes, K}, token_scale, 16, OUTPUT_ARGUMENTS);          \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, blocks)                                                          \
        linear_decode_fp8_f16_t##tiles(const f16* x, i64 x_stride, OUTPUT_PARAMETERS) {                                \
        decode_fp8<tiles, Fp8Weight<0>>(Rows<f16, Fp8Weight<0>>{x, x_stride, K}, nullptr, 8, OUTPUT_ARGUMENTS);        \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, blocks)                                                          \
        linear_decode_fp8_bf16_t##tiles(const bf16* x, i64 x_stride, OUTPUT_PARAMETERS) {                              \
        decode_fp8<tiles, Fp8Weight<128>>(RowsAsF16<Fp8Weight<128>>{x, x_stride, K}, nullptr, 8, OUTPUT_ARGUMENTS);    \
    }
ENTRIES(1, 4)
ENTRIES(2, 3)
ENTRIES(4, 2)
