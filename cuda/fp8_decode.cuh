// E4M3 codes as 16-bit floats, by placing bits: s to bit 15, e3 … m0 to f16's 13:7 (2^-8 of the value) or bf16's 10:4
// (2^-120), subnormals included. bf16 has the value itself after a product with 2^120; f16 keeps 2^-8, exactly.
#pragma once

#include "fp4_decode.cuh"

constexpr int kFp8ScaleK = 128;  // k per scale, where a row has several

template <class T> constexpr int kFp8Power = 0;  // of two, that factors lack
template <> constexpr int kFp8Power<f16> = 8;

// Four codes to pairs (0, 2) and (1, 3).
template <class T>
__device__ __forceinline__ void e4m3_pairs(u32 codes, u32& even, u32& odd);
template <>
__device__ __forceinline__ void e4m3_pairs<f16>(u32 codes, u32& even, u32& odd) {
    even = (codes << 8 & 0x80008000u) | (codes << 7 & 0x3f803f80u);
    odd = (codes & 0x80008000u) | (codes >> 1 & 0x3f803f80u);
}
template <>
__device__ __forceinline__ void e4m3_pairs<bf16>(u32 codes, u32& even, u32& odd) {
    even = multiply_pair<bf16>((codes << 8 & 0x80008000u) | (codes << 4 & 0x07f007f0u), power_pair<bf16>(120));
    odd = multiply_pair<bf16>((codes & 0x80008000u) | (codes >> 4 & 0x07f007f0u), power_pair<bf16>(120));
}
// Neighbours (0, 1) and (2, 3).
template <class T>
__device__ __forceinline__ uint2 e4m3_in_order(u32 codes) {
    u32 even, odd;
    e4m3_pairs<T>(codes, even, odd);
    return make_uint2(__byte_perm(even, odd, 0x5410), __byte_perm(even, odd, 0x7632));
}
