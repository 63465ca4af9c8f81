// Packed weights as the matrix products read them; engine/ops/gpu/weight_layout.py packs. Lane l, g = l >> 2, q = l &
// 3.
//
// A unit is 16 rows × as many k as follow; units of 16 rows (a tile) lie one after the other along k, then come the
// next 16 rows, so that a warp that works on a tile reads one stream of whole 64-byte pieces. N is padded to 16, K to
// 128 (as FP4 and FP8 activations are): codes 0, scales 0.
//
//     FP4, 128 k    bytes      0 …  511   rows 0 … 7: lane l's 16 bytes, word r = row g, k = 32 r + 8 q + i in nibble i
//                   bytes    512 … 1023   rows 8 … 15 likewise
//                   bytes   1024 …        scales, little-endian words:
//        nvfp4 by 32, mxfp4    16 words   word of row: byte j is the scale of k in [32 j, 32 j + 32)
//        nvfp4 by 16           32 words   word of (h, row) at 16 h + row: byte j for k in [64 h + 16 j, + 16)
//        hif4                  32 words   word of (h, row) at 16 h + row: the scale of k in [64 h, + 64)
//     FP8, 64 k     bytes      0 …  511   rows 0 … 7: lane l's 16 bytes, word r = row g, k = 16 r + 4 q + i in byte i
//                   bytes    512 … 1023   rows 8 … 15 likewise
//
// "In nibble i" holds where instructions take FP4; for kernels that dequantise, the bits of a word are placed otherwise
// (fp4_decode.cuh).
//
// A lane's words are B fragments as they are, n = g: of m16n8k64 FP4 (words 0, 1 | 2, 3), of sparse m16n8k128 FP4 (all
// four), of m16n8k32 FP8; and a row's four group scales are the word that block-scaled FP4 instructions take.
// Dequantised to 16 bits the same words are rows g and g + 8 of the A operand of m16n8k16, if the other operand has its
// k permuted the same way: any order of k is a right one.
#pragma once

#include "common.cuh"

constexpr int kTileRows = 16;
constexpr int kHalfTileBytes = 512;  // 8 rows' codes of a unit
constexpr int kFp4UnitK = 128;
constexpr int kFp8UnitK = 64;

__device__ __forceinline__ int fp4_units_along_k(int K) { return ceil_div(K, kFp4UnitK); }
__device__ __forceinline__ int fp8_units_along_k(int K) { return 2 * ceil_div(K, 2 * kFp8UnitK); }

// The unit of a tile and a number along k, of units of so many bytes.
__device__ __forceinline__ const u8* weight_unit(const u8* units, int tile, int unit, int units_along_k, int bytes) {
    return units + (static_cast<i64>(tile) * units_along_k + unit) * bytes;
}
