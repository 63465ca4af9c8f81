// Products of FP4 weights for few tokens: linear_decode.cuh with packed units (weight_layout.cuh), formats of
// fp4_decode.cuh. Both operands become f16, whose products are exact.
//
//   bf16, f16   W4A16   out[t, n] = row_scale[n] · Σ_k x[t, k] · W[n, k] + bias[n] + residual[t, n]
//   fp4                 out[t, n] = token_scale[t] · row_scale[n] · Σ_paths Σ_k Q[t, k] · W[n, k] + …
//                       one path, SharQ with a sparse backbone as it is stored, or dense + dense
//
// x [M, K]; arrays of an operand as in Fp4Matrix and SharqOperand with K padded to 128; out [M, N].
//
//   weight       factors (A)                sum on the tensor core            then in fp32
//   nvfp4 by 32  codes                      32 k, exact where the input has   · scale of 32 k
//   mxfp4        codes                      one scale in them                 · input scale (fp4) · scale of 32 k
//   hif4         codes · micro-exponents    64 k                              · input scale (fp4) · scale of 64 k
//   nvfp4 by 16  codes · scale, exact       128 k (lanes of one instruction
//                                           hold k of different blocks)
//
// Input factors (B): nvfp4 codes · scale, exact; mxfp4, hif4 codes, their scales in fp32; f16 as it is; bf16 scaled by a
// power of two per 128 k (linear_decode.cuh: RowsAsF16), applied after the weight's scales.
//
// Bytes moved: .53 a weight (nvfp4 by 32, mxfp4) or .56. Instructions issued a weight in the loop, compiled for sm_90a,
// nvfp4 by 32, with 8, 16 and 32 columns: SharQ 3.0, 3.5, 4.3; W4A16 in bf16 3.1, 3.7, 4.9. An H200 reads 31 weights a
// clock and SM, which leaves 4.1: so SharQ up to 16 tokens should stay near the bandwidth, W4A16 up to 16.
// References: ReferenceOps.fp4_linear, w4a16_linear.
#pragma once

#include "fp4_decode.cuh"
#include "linear_decode.cuh"
#include "weight_layout.cuh"

// Units of a packed FP4 weight against f16 factors. Codes: fp4_decode.cuh; kInputGroup: k per scale of the input, which
// is kGroup (before the weight's scale), 128 (after it), or 0 where the factors are all there is.
template <class Codes, int kInputGroup>
struct Fp4Weight {
    static constexpr int kUnitK = kFp4UnitK, kUnitBytes = 2 * kHalfTileBytes + 4 * kTileRows * Codes::kScaleWords;
    static constexpr int kColumnPadding = 64;  // lanes g and g + 1 then read different halves of the 32 banks
    const u8* units;
    int units_along_k;

    struct Stream {
        const u8* from;
        unsigned long long read_once;  // L2 policy

        __device__ __forceinline__ Stream(const Fp4Weight& weight, int tile, int unit, int lane)
            : from(weight_unit(weight.units, tile, unit, weight.units_along_k, kUnitBytes) + 16 * lane),
              read_once(ptx::l2_evict_first()) {}

        __device__ __forceinline__ void copy_next(u32 shared) {
            const int lane = lane_of_warp();
            shared += 16 * lane;
            ptx::cp_async_16_hint(shared, from, read_once);
            ptx::cp_async_16_hint(shared + kHalfTileBytes, from + kHalfTileBytes, read_once);
            if (lane < 4 * Codes::kScaleWords)
                ptx::cp_async_16_hint(shared + 2 * kHalfTileBytes, from + 2 * kHalfTileBytes, read_once);
            from += kUnitBytes;
        }
    };

    // k, k + 4 are neighbours, as the pairs of a word are.
    static __device__ __forceinline__ void store_eight(u8* column, int k, const u32 (&words)[4]) {
        *reinterpret_cast<uint4*>(column + 2 * k) =
            make_uint4(__byte_perm(words[0], words[2], 0x5410), __byte_perm(words[0], words[2], 0x7632),
                       __byte_perm(words[1], words[3], 0x5410), __byte_perm(words[1], words[3], 0x7632));
    }

    template <int kTiles>
    __device__ __forceinline__ void multiply(int, int, const u8* unit, const u8* const (&column)[kTiles], int k,
                                             const float* scales, float (&sums)[kTiles][4]) const {
        const int lane = lane_of_warp(), g = lane >> 2, q = lane & 3;
        const uint4 low_raw = reinterpret_cast<const uint4*>(unit)[lane];
        const uint4 high_raw = reinterpret_cast<const uint4*>(unit + kHalfTileBytes)[lane];
        const u32 low[4] = {low_raw.x, low_raw.y, low_raw.z, low_raw.w};
        const u32 high[4] = {high_raw.x, high_raw.y, high_raw.z, high_raw.w};
        u32 low_scale[Codes::kScaleWords], high_scale[Codes::kScaleWords];
#pragma unroll
        for (int i = 0; i < Codes::kScaleWords; ++i) {
            const u32* words = reinterpret_cast<const u32*>(unit + 2 * kHalfTileBytes) + kTileRows * i + g;
            low_scale[i] = words[0], high_scale[i] = words[8];
        }
        float group[kTiles][4], unit_sums[kTiles][4] = {};
        float (&to)[kTiles][4] = kInputGroup == 128 ? unit_sums : sums;
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            u32 a[4], b[4];
            Codes::template pairs<f16>(low[r], low_scale, r, q, a);
            Codes::template pairs<f16>(high[r], high_scale, r, q, b);
            const u32 first[4] = {a[0], b[0], a[1], b[1]}, second[4] = {a[2], b[2], a[3], b[3]};
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
                if (32 * r % Codes::kGroup == 0) group[i][0] = group[i][1] = group[i][2] = group[i][3] = 0.0f;
                const uint4 x = *reinterpret_cast<const uint4*>(column[i] + 2 * (k + 32 * r + 8 * q));
                multiply_add<f16>(group[i], first, {x.x, x.y});
                multiply_add<f16>(group[i], second, {x.z, x.w});
            }
            if (32 * (r + 1) % Codes::kGroup != 0) continue;
            if (kInputGroup == Codes::kGroup && kInputGroup != 128)
                scale_columns(scales + (k + 32 * r) / Codes::kGroup * (kColumns * kTiles) + 2 * q, group);
            const float low_value = Codes::scale(low_scale, r), high_value = Codes::scale(high_scale, r);
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
#pragma unroll
                for (int e = 0; e < 4; ++e) to[i][e] = __fmaf_rn(group[i][e], e < 2 ? low_value : high_value, to[i][e]);
            }
        }
        if (kInputGroup != 128) return;
        scale_columns(scales + k / 128 * (kColumns * kTiles) + 2 * q, unit_sums);
#pragma unroll
        for (int i = 0; i < kTiles; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[i][e] = __fadd_rn(sums[i][e], unit_sums[i][e]);
    }
};

// Activations [M, K] in FP4: one path (`residual` alone), or SharQ's backbone, sparse where `metadata` is given, and
// residual. Arrays as in SharqOperand and Fp4Matrix; a path's scale is of 2^log2_block k.
template <class Codes, class Weight>
struct Fp4Input {
    static constexpr int kScaleGroup = Codes::kInputScaled ? Codes::kGroup : 0;
    using Scale = typename Codes::InputScale;
    const u8* backbone;
    const u8* metadata;
    const Scale* backbone_scale;
    const u8* residual;
    const Scale* residual_scale;
    int backbone_block, residual_block, K;

    __device__ __forceinline__ int paths() const { return backbone ? 2 : 1; }

    template <int kTiles>
    __device__ __forceinline__ void fill(u8* to, float* scales, int first, int columns, int k, int count) const {
        if (kScaleGroup) fill_scales<kTiles>(scales, first, columns, k, count);
        const int eights = count / 8, log2_eights = log2_of(eights);
        for (int i = threadIdx.x; i < columns * eights; i += blockDim.x) {
            const int column = i >> log2_eights, at = 8 * (i & (eights - 1));
            const bool is_backbone = backbone && ((first + column) & 1) == 0;
            const i64 t = backbone ? (first + column) >> 1 : first + column;
            u32 word = 0, scale = 0, pairs[4] = {};
            if (k + at < K) {
                const i64 position = t * K + k + at;  // of the eight, in codes
                const int log2_block = log2_of(is_backbone ? backbone_block : residual_block);
                scale = (is_backbone ? backbone_scale : residual_scale)[(t * K + k + at) >> log2_block];
                word = !is_backbone ? reinterpret_cast<const u32*>(residual)[position / 8]
                       : metadata ? kept_word(position) : reinterpret_cast<const u32*>(backbone)[position / 8];
                Codes::input_pairs(word, scale, at / 8 % 8, pairs);
            }
            *reinterpret_cast<uint4*>(to + column * (2 * count + Weight::kColumnPadding) + 2 * at) =
                make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        }
    }

private:
    template <int kTiles>
    __device__ __forceinline__ void fill_scales(float* to, int first, int columns, int k, int count) const {
        for (int i = threadIdx.x; i < count / Codes::kGroup * (kColumns * kTiles); i += blockDim.x) {
            const int column = first + min(i % (kColumns * kTiles), columns - 1);
            const int block = k / Codes::kGroup + i / (kColumns * kTiles), blocks = K / Codes::kGroup;
            const Scale* scale = backbone && column % 2 == 0 ? backbone_scale : residual_scale;
            const i64 t = backbone ? column >> 1 : column;
            to[i] = block < blocks ? Codes::input_scale(scale[t * blocks + block]) : 0.0f;
        }
    }

    __device__ __forceinline__ u32 kept_word(i64 position) const {
        const u32 kept = reinterpret_cast<const unsigned short*>(backbone)[position / 8];
        const i64 bit = position / 8 * Codes::kMetadataBits;
        return Codes::expand(kept, metadata[bit / 8] >> bit % 8);
    }
};

#define OUTPUT_PARAMETERS                                                                                            \
    const u8 *units, const float *row_scale, const float *bias, const void *residual, void *out, int out_type, int M, \
        int N, int K, int slice_k, int slices_per_block, int chunk_k, float *partials, u32 *arrivals

// x as f16 factors, straight or scaled.
template <class T> struct W4a16Input;
template <> struct W4a16Input<f16> {
    template <class Codes> using Weight = Fp4Weight<Codes, 0>;
    template <class Codes> using Input = Rows<f16, Weight<Codes>>;
};
template <> struct W4a16Input<bf16> {
    template <class Codes> using Weight = Fp4Weight<Codes, 128>;
    template <class Codes> using Input = RowsAsF16<Weight<Codes>>;
};

template <class Codes, class T, int kTiles>
__device__ __forceinline__ void decode_w4a16(const T* x, i64 x_stride, OUTPUT_PARAMETERS) {
    const typename W4a16Input<T>::template Weight<Codes> weight = {units, fp4_units_along_k(K)};
    const typename W4a16Input<T>::template Input<Codes> input = {x, x_stride, K};
    const float power = power_of_two(Codes::template kPower<f16>);
    const Epilogue epilogue = {power, nullptr, row_scale, bias, residual, out, out_type, N};
    decode_linear<kTiles>(weight, input, epilogue, {slice_k, slices_per_block, chunk_k, partials, arrivals}, M, N, K);
}

template <class Codes, int kTiles>
__device__ __forceinline__ void decode_fp4(const u8* backbone, const u8* metadata, const void* backbone_scale,
                                           const u8* codes, const void* codes_scale, int backbone_block,
                                           int codes_block, const float* token_scale, OUTPUT_PARAMETERS) {
    using Weight = Fp4Weight<Codes, Codes::kInputScaled ? Codes::kGroup : 0>;
    using Scale = typename Codes::InputScale;
    const Weight weight = {units, fp4_units_along_k(K)};
    const Fp4Input<Codes, Weight> input = {backbone, metadata, static_cast<const Scale*>(backbone_scale), codes,
                                           static_cast<const Scale*>(codes_scale), backbone_block, codes_block, K};
    const float power = power_of_two(Codes::template kPower<f16> + Codes::kInputPower);
    const Epilogue epilogue = {power, token_scale, row_scale, bias, residual, out, out_type, N};
    decode_linear<kTiles>(weight, input, epilogue, {slice_k, slices_per_block, chunk_k, partials, arrivals}, M, N, K);
}

#define OUTPUT_ARGUMENTS \
    units, row_scale, bias, residual, out, out_type, M, N, K, slice_k, slices_per_block, chunk_k, partials, arrivals
#define W4A16_ENTRY(format, Codes, type, T, tiles, blocks)                                                         \
    extern "C" __global__ void __launch_bounds__(256, blocks)                                \
        linear_decode_##format##_##type##_t##tiles(const T* x, i64 x_stride, OUTPUT_PARAMETERS) {          \
        decode_w4a16<Codes, T, tiles>(x, x_stride, OUTPUT_ARGUMENTS);                                      \
    }
#define FP4_ENTRY(format, Codes, tiles, blocks)                                                                     \
    extern "C" __global__ void __launch_bounds__(256, blocks) linear_decode_##format##_fp4_t##tiles(                \
        const u8* backbone, const u8* metadata, const void* backbone_scale, const u8* codes,                        \
        const void* codes_scale, int backbone_block, int codes_block, const float* token_scale, OUTPUT_PARAMETERS) { \
        decode_fp4<Codes, tiles>(backbone, metadata, backbone_scale, codes, codes_scale, backbone_block,            \
                                 codes_block, token_scale, OUTPUT_ARGUMENTS);                                       \
    }
#define ENTRIES(format, Codes, tiles, blocks)             \
    W4A16_ENTRY(format, Codes, bf16, bf16, tiles, blocks) \
    W4A16_ENTRY(format, Codes, f16, f16, tiles, blocks)   \
    FP4_ENTRY(format, Codes, tiles, blocks)
// All entry points of one format: each is a file, so that nobody compiles what he does not use. `blocks` of 256 threads
// shall fit an SM: 64, 80 and 128 registers a thread.
#define FP4_DECODE_ENTRIES(format, Codes) \
    ENTRIES(format, Codes, 1, 4)          \
    ENTRIES(format, Codes, 2, 3)          \
    ENTRIES(format, Codes, 4, 2)
