// Products of FP8 (E4M3) weights for many tokens: linear_tile.cuh with weights made 16-bit on their way to shared
// memory, which is exact. Scales float32 [steps, N]: one a row (the epilogue's row_scale), or one for each 128 k, which
// cut the tensor core's sums; layout: weight_layout.cuh.
//
//   w8a16   x [M, K] bf16 or f16
//   w8a8    codes [M, K] made bf16 by expand_fp8, exactly; token_scale [M]
//
// References: ReferenceOps.w8a16_linear, fp8_linear.
#pragma once

#include "fp8_decode.cuh"
#include "linear_tile.cuh"

// kUnits: units of 16 rows a warp dequantises.
template <class T, int kUnits>
struct Fp8Tile {
    static constexpr bool kCopied = false;
    static constexpr int kUnitBytes = 2 * kHalfTileBytes;
    const u8* units;
    const float* scales;
    int steps, N, units_along_k;

    template <int>
    __device__ __forceinline__ void copy(u32, int, int) const {}
    __device__ __forceinline__ int flush_k(int slice_k) const { return steps > 1 ? kFp8ScaleK : slice_k; }
    static constexpr bool kScaled = true;
    __device__ __forceinline__ float scale(int n, int k) const {
        return steps == 1 ? 1.0f : __ldg(scales + static_cast<i64>(k / kFp8ScaleK) * N + min(n, N - 1));
    }

    struct Dequantiser {
        const u8* from[kUnits];
        int left;  // units still to load
        uint4 low[kUnits], high[kUnits];  // of the next step

        __device__ __forceinline__ Dequantiser(const Fp8Tile& weight, int first_n) : left(weight.units_along_k) {
            const int tiles = ceil_div(weight.N, kTileRows);
#pragma unroll
            for (int i = 0; i < kUnits; ++i) {
                const int tile = min(first_n / kTileRows + kUnits * warp_of_block() + i, tiles - 1);
                from[i] = weight_unit(weight.units, tile, 0, weight.units_along_k, kUnitBytes) + 16 * lane_of_warp();
            }
            load();
        }

        __device__ __forceinline__ void load() {
            if (left-- <= 0) return;
#pragma unroll
            for (int i = 0; i < kUnits; ++i) {
                low[i] = __ldg(reinterpret_cast<const uint4*>(from[i]));
                high[i] = __ldg(reinterpret_cast<const uint4*>(from[i] + kHalfTileBytes));
                from[i] += kUnitBytes;
            }
        }

        __device__ __forceinline__ void fill(u8* to, int) {
#pragma unroll
            for (int i = 0; i < kUnits; ++i) {
                const int row = kTileRows * (kUnits * warp_of_block() + i) + (lane_of_warp() >> 2);
                store(to, row, low[i]);
                store(to, row + 8, high[i]);
            }
            load();
        }

    private:
        // Word r is k = 16 r + 4 q …: half a piece of 16 bytes. Odd rows store words 2, 3, 0, 1, so that sixteen lanes,
        // which hold four rows and store at once, meet all banks.
        static __device__ __forceinline__ void store(u8* to, int row, uint4 codes) {
            const int q = lane_of_warp() & 3, odd = lane_of_warp() >> 2 & 1;
            const u32 words[4] = {odd ? codes.z : codes.x, odd ? codes.w : codes.y, odd ? codes.x : codes.z,
                                  odd ? codes.y : codes.w};
#pragma unroll
            for (int r = 0; r < 4; ++r)
                *reinterpret_cast<uint2*>(to + tile_place(row, 2 * (r ^ 2 * odd) + (q >> 1)) + 8 * (q & 1)) =
                    e4m3_in_order<T>(words[r]);
        }
    };
};

#define FP8_TILE_PARAMETERS                                                                                           \
    const u8 *units, const float *scale, int steps, const float *token_scale, const float *bias, const void *residual, \
        void *out, int out_type, int M, int N, int K, int slice_k
