// Products of FP4 weights for many tokens: linear_tile.cuh with weights dequantised, scales included, on their way from
// packed units to shared memory. Formats: fp4_decode.cuh; layout: weight_layout.cuh.
//
//   w4a16               x [M, K] bf16, or f16 for nvfp4 (whose values f16 has too)
//   one, two            activations in FP4 expanded to bf16, which is exact (below), in one path or two
//   sparse_and_dense    SharQ: the backbone on mma.sp at half the multiplications, 1.5 passes' worth in one
//   sparse              the backbone alone; with `one` for the residual what the paper describes, two products
//
//   out[t, n] = Σ paths Σ_k X[t, k] · W[n, k] · token_scale[t] · row_scale[n] + bias[n] + residual[t, n]
//
// Values are exact in bf16 (6 significant bits at most; MXFP4 and HiF4 within bf16's range), and so are the products.
// Reference: ReferenceOps.fp4_linear, w4a16_linear; tolerance 2e-6 of max |Y|.
#pragma once

#include "fp4_decode.cuh"
#include "linear_tile.cuh"

// Eight values as neighbours in the order of k, or, where sparse products want it, of (0, 2, 4, 6, 1, 3, 5, 7).
template <bool permuted>
__device__ __forceinline__ uint4 in_order(const u32 (&pairs)[4]) {
    const u32 a = pairs[permuted ? 2 : 1], b = pairs[permuted ? 1 : 2];  // pairs (k, k + 4): of 0 and a, of b and 3
    const u32 low[2] = {__byte_perm(pairs[0], a, 0x5410), __byte_perm(pairs[0], a, 0x7632)};
    const u32 high[2] = {__byte_perm(b, pairs[3], 0x5410), __byte_perm(b, pairs[3], 0x7632)};
    return permuted ? make_uint4(low[0], low[1], high[0], high[1]) : make_uint4(low[0], high[0], low[1], high[1]);
}

// kUnits: units of 16 rows a warp dequantises.
template <class Codes, class T, bool permuted, int kUnits>
struct Fp4Tile {
    static constexpr bool kCopied = false;
    static constexpr int kWords = Codes::kScaleWords, kUnitBytes = 2 * kHalfTileBytes + 4 * kTileRows * kWords;
    const u8* units;
    int N, units_along_k;

    template <int>
    __device__ __forceinline__ void copy(u32, int, int) const {}
    static constexpr bool kScaled = false;
    __device__ __forceinline__ int flush_k(int slice_k) const { return slice_k; }
    __device__ __forceinline__ float scale(int, int) const { return 1.0f; }

    // A warp's units of 16 rows: this 128 k and, on their way, the next.
    struct Dequantiser {
        struct Unit {
            uint4 low, high;
            u32 low_scale[kWords], high_scale[kWords];
        };
        // Lanes of odd rows store the second of two words first, so that eight lanes, which hold two rows and store at
        // once, meet all banks.
        const int odd;
        const u32 place;  // of the piece stored first
        const u8* from[kUnits];
        int left;  // 128 k still to load
        Unit now[kUnits], next[kUnits];

        __device__ __forceinline__ Dequantiser(const Fp4Tile& weight, int first_n)
            : odd(lane_of_warp() >> 2 & 1),
              place(tile_place(kTileRows * kUnits * warp_of_block() + (lane_of_warp() >> 2),
                               4 * odd + (lane_of_warp() & 3))),
              left(weight.units_along_k) {
            const int tiles = ceil_div(weight.N, kTileRows);
#pragma unroll
            for (int i = 0; i < kUnits; ++i) {
                const int tile = min(first_n / kTileRows + kUnits * warp_of_block() + i, tiles - 1);
                from[i] = weight_unit(weight.units, tile, 0, weight.units_along_k, kUnitBytes);
            }
            load();
        }

        __device__ __forceinline__ void load() {
            if (left-- <= 0) return;
#pragma unroll
            for (int i = 0; i < kUnits; ++i) {
                const int lane = lane_of_warp(), g = lane >> 2;
                next[i].low = __ldg(reinterpret_cast<const uint4*>(from[i]) + lane);
                next[i].high = __ldg(reinterpret_cast<const uint4*>(from[i] + kHalfTileBytes) + lane);
#pragma unroll
                for (int w = 0; w < kWords; ++w) {
                    const u32* words = reinterpret_cast<const u32*>(from[i] + 2 * kHalfTileBytes) + kTileRows * w + g;
                    next[i].low_scale[w] = __ldg(words), next[i].high_scale[w] = __ldg(words + 8);
                }
                from[i] += kUnitBytes;
            }
        }

        __device__ __forceinline__ void fill(u8* to, int step) {
            if (step % 2 == 0) {
#pragma unroll
                for (int i = 0; i < kUnits; ++i) now[i] = next[i];
                load();
            }
#pragma unroll
            for (int i = 0; i < kUnits; ++i) {
                u8* low = to + kTileRows * kTileRowBytes * i;
                u8* high = low + 8 * kTileRowBytes;
                if (step % 2 == 0) {
                    store<0>(low, now[i].low.x, now[i].low.y, now[i].low_scale);
                    store<0>(high, now[i].high.x, now[i].high.y, now[i].high_scale);
                } else {
                    store<2>(low, now[i].low.z, now[i].low.w, now[i].low_scale);
                    store<2>(high, now[i].high.z, now[i].high.w, now[i].high_scale);
                }
            }
        }

    private:
        // Words r and r + 1 of a row: k in [32 r, + 64) of 128; their pieces' places differ in one bit.
        template <int r>
        __device__ __forceinline__ void store(u8* to, u32 first, u32 second, const u32 (&scale)[kWords]) const {
            const int q = lane_of_warp() & 3;
            u32 pairs[4];
            Codes::template values<T>(odd ? second : first, scale, r + odd, q, pairs);
            *reinterpret_cast<uint4*>(to + place) = in_order<permuted>(pairs);
            Codes::template values<T>(odd ? first : second, scale, r + 1 - odd, q, pairs);
            *reinterpret_cast<uint4*>(to + (place ^ 64)) = in_order<permuted>(pairs);
        }
    };
};

// ---- activations in FP4 as bf16 -------------------------------------------------------------------------------------
// One path of an operand [M, K] (arrays as in SharqOperand and Fp4Matrix), K a multiple of 128, in the order
// `permuted`; a sparse backbone, which comes with metadata, too: zeros where nothing was kept.
// Grid: rows of eight k over blocks of any number of threads. Bytes: .56 in and 2 out a value.

struct Fp4Path {
    const u8 *codes, *metadata;
    const void* scale;
    int block, K;

    template <class Codes>
    __device__ __forceinline__ u32 scale_of(i64 t, int k) const {
        return static_cast<const typename Codes::InputScale*>(scale)[t * (K / block) + k / block];
    }

    // Eight k of token t from k on.
    template <class Codes, bool permuted>
    __device__ __forceinline__ uint4 dense(i64 t, int k) const {
        const i64 i = (t * K + k) / 8;
        u32 word, pairs[4];
        if (metadata) {
            const i64 bit = i * Codes::kMetadataBits;
            word = Codes::expand(reinterpret_cast<const unsigned short*>(codes)[i], metadata[bit / 8] >> bit % 8);
        } else {
            word = reinterpret_cast<const u32*>(codes)[i];
        }
        Codes::input_values(word, scale_of<Codes>(t, k), k / 8 % 8, pairs);
        return in_order<permuted>(pairs);
    }

    // The four that a sparse backbone kept of them: two of each group of four k in the permuted order (or HiF4's own).
    template <class Codes>
    __device__ __forceinline__ uint2 kept(i64 t, int k) const {
        const u32 codes_kept = reinterpret_cast<const unsigned short*>(codes)[(t * K + k) / 8];
        u32 pairs[4];  // of kept ones 0 and 2, 1 and 3
        const u32 word = (codes_kept & 0xffu) | (codes_kept & 0xff00u) << 8;
        Codes::input_values(word, scale_of<Codes>(t, k), k / 8 % 8, pairs);
        return Codes::kMetadataBits == 4 ? make_uint2(pairs[0], pairs[1])
                                         : make_uint2(__byte_perm(pairs[0], pairs[1], 0x5410),
                                                      __byte_perm(pairs[0], pairs[1], 0x7632));
    }

    // Word number `word` of the instructions' metadata [ceil(M / 16), K / 64, 32]; tokens there are not have 0100.
    template <class Codes>
    __device__ __forceinline__ u32 metadata_word(i64 word, int M) const {
        const int lane = word & 31, q = lane & 3;
        const i64 tile = word / 32 / (K / 64);
        const int k = static_cast<int>(word / 32 % (K / 64)) * 64 + 16 * q;
        u32 nibbles = 0;
#pragma unroll
        for (int high = 0; high < 2; ++high) {
            const i64 t = tile * 16 + (lane >> 2) + 8 * high;
            u32 own = 0x4444u;
            if (t < M && Codes::kMetadataBits == 4) {  // a byte is two chunks of eight, each for two groups
                const u32 two = metadata[(t * K + k) / 16];
                own = (two & 15) * 0x11u | (two >> 4) * 0x1100u;
            } else if (t < M) {
                own = reinterpret_cast<const unsigned short*>(metadata)[(t * K + k) / 16];
            }
            nibbles |= own << 16 * high;
        }
        return nibbles;
    }
};

template <class Codes, bool permuted>
__device__ __forceinline__ void expand_dense(const Fp4Path& path, bf16* out, int M) {
    const i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int K = path.K;
    if (i < static_cast<i64>(M) * K / 8)
        reinterpret_cast<uint4*>(out)[i] = path.dense<Codes, permuted>(i * 8 / K, static_cast<int>(i * 8 % K));
}

// The kept half of a sparse backbone, out [M, K / 2], and its metadata words.
template <class Codes>
__device__ __forceinline__ void expand_sparse(const Fp4Path& path, bf16* out, u32* words, int M) {
    const i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;  // eight k of a row
    const int K = path.K;
    if (i < static_cast<i64>(M) * K / 8)
        reinterpret_cast<uint2*>(out)[i] = path.kept<Codes>(i * 8 / K, static_cast<int>(i * 8 % K));
    // The same threads, fewer of them: 32 for 16 rows × 64 k.
    if (i < static_cast<i64>(ceil_div(M, 16)) * (K / 64) * 32) words[i] = path.metadata_word<Codes>(i, M);
}

// ---- entry points --------------------------------------------------------------------------------------------------

#define TILE_PARAMETERS                                                                                               \
    const u8 *units, const float *token_scale, const float *row_scale, const float *bias, const void *residual,       \
        void *out, int out_type, int M, int N, int K, int slice_k
#define TILE_ARGUMENTS units, token_scale, row_scale, bias, residual, out, out_type, M, N, K, slice_k

template <class Codes, class T, Paths paths, int kWarpsM>
__device__ __forceinline__ void fp4_tile(const TileInput& input, TILE_PARAMETERS) {
    constexpr bool kSparse = paths == Paths::sparse || paths == Paths::sparse_and_dense;
    using Weight = Fp4Tile<Codes, T, kSparse && Codes::kMetadataBits == 4, 2 / kWarpsM>;
    const Weight weight = {units, N, fp4_units_along_k(K)};
    const float power = power_of_two(Codes::template kValuePower<T>);
    const Epilogue epilogue = {power, token_scale, row_scale, bias, residual, out, out_type, N};
    tile_linear<T, paths, kWarpsM>(weight, input, epilogue, slice_k);
}

#define TILE_ENTRY(name, Codes, T, paths, warps_m)                                                                   \
    extern "C" __global__ void __launch_bounds__(128 * warps_m)                                                      \
        linear_tile_##name##_m##warps_m(const T* first, const T* second, const u32* metadata, i64 x_stride,          \
                                        TILE_PARAMETERS) {                                                           \
        fp4_tile<Codes, T, paths, warps_m>({first, second, metadata, x_stride, M, K}, TILE_ARGUMENTS);               \
    }
#define TILE_ENTRIES(name, Codes, T, paths)  \
    TILE_ENTRY(name, Codes, T, paths, 1)     \
    TILE_ENTRY(name, Codes, T, paths, 2)
#define EXPAND_ENTRY(name, Codes, permuted)                                                                          \
    extern "C" __global__ void expand_##name(const u8* codes, const u8* metadata, const void* scale, int block,      \
                                             bf16* out, int M, int K) {                                              \
        expand_dense<Codes, permuted>({codes, metadata, scale, block, K}, out, M);                                   \
    }
#define FP4_TILE_ENTRIES(format, Codes)                                                                              \
    TILE_ENTRIES(format##_one_bf16, Codes, bf16, Paths::one)                                                         \
    TILE_ENTRIES(format##_two_bf16, Codes, bf16, Paths::two)                                                         \
    TILE_ENTRIES(format##_sparse_and_dense_bf16, Codes, bf16, Paths::sparse_and_dense)                               \
    TILE_ENTRIES(format##_sparse_bf16, Codes, bf16, Paths::sparse)                                                   \
    EXPAND_ENTRY(format##_dense, Codes, false)                                                                       \
    EXPAND_ENTRY(format##_permuted, Codes, Codes::kMetadataBits == 4)                                                \
    extern "C" __global__ void expand_##format##_sparse(const u8* codes, const u8* metadata, const void* scale,      \
                                                        int block, bf16* out, u32* words, int M, int K) {            \
        expand_sparse<Codes>({codes, metadata, scale, block, K}, out, words, M);                                     \
    }
