// FP4 codes and scales as 16- and 32-bit floats, by placing bits. With fp4.cuh, which makes the codes, the only CUDA
// file that knows nibbles and scale bytes; formats as there and in engine/ops/fp4.
//
// A word holds eight codes. It becomes four pairs (k, k + 4), k = 0 … 3, of f16 or bf16, because a code of each half of
// the word moves to its place at once:
//
//     bit          15   14 … 12   11 10  9   8   7   6   5   4   3 … 0
//     f16,  E2M1    s             e1 e0  m                                 value · 2^-14
//     bf16, E2M1    s                        e1  e0  m                     value · 2^-126
//     f16,  S1P2    s                    i  f1  f0                         value · 2^-15     (bits 9:7, subnormal)
//     bf16, S1P2    s                                i  f1  f0             value · 2^-127    (bits 6:4, subnormal)
//
// which is right for subnormal numbers as well; the power of two is left to a later step. Where the codes lie:
//
//     bit of a half   15  14  13  12   11 10 9   8 7 6   5 4 3   2 1 0
//     nibbles         k = 3: s eem     k = 2: s eem (11:8)   k = 1 (7:4)   k = 0 (3:0)           activations, as stored
//     placed          s0  s2  s3  s1   eem 0     eem 1   eem 2   eem 3                           weights, packed so
//
// From nibbles a code takes 1.9 instructions: a shift for the sign, one for the magnitude and two LOP3 a pair. Placed
// ones make it 1.4 for E2M1 in f16, as k = 0 and 1 have their sign as far from the magnitude as f16 wants it: a product
// that reads 31 weights a clock and SM can spend four instructions on each.
#pragma once

#include "common.cuh"

__device__ __forceinline__ u32 multiply_pair(f16, u32 a, u32 b) {
    const __half2 product = __hmul2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
    return reinterpret_cast<const u32&>(product);
}
__device__ __forceinline__ u32 multiply_pair(bf16, u32 a, u32 b) {
    const __nv_bfloat162 product =
        __hmul2(reinterpret_cast<const __nv_bfloat162&>(a), reinterpret_cast<const __nv_bfloat162&>(b));
    return reinterpret_cast<const u32&>(product);
}
template <class T>
__device__ __forceinline__ u32 multiply_pair(u32 a, u32 b) {
    return multiply_pair(T(), a, b);
}
template <class T>
__device__ __forceinline__ void multiply_pairs(u32 (&pairs)[4], u32 by) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = multiply_pair<T>(pairs[i], by);
}

// A type's exponent, where codes are placed in it (the lowest bit), and what power of two factors keep: made of E2M1
// codes, of those times a UE4M3 scale, of S1P2 codes with their micro-exponents.
template <class T> struct Bits;
template <> struct Bits<f16> {
    static constexpr int kExponentBit = 10, kBias = 15, kE2m1 = 9, kS1p2 = 7, kS1p2Bias = 15;
    static constexpr int kE2m1Power = 14, kScaledPower = 14, kS1p2Power = 15;
};
template <> struct Bits<bf16> {
    static constexpr int kExponentBit = 7, kBias = 127, kE2m1 = 6, kS1p2 = 4, kS1p2Bias = 127;
    static constexpr int kE2m1Power = 0, kScaledPower = 7, kS1p2Power = 2;
};

// A power of two in both halves; exponent within the type's normal range.
template <class T>
__device__ __forceinline__ constexpr u32 power_pair(int exponent) {
    return static_cast<u32>(exponent + Bits<T>::kBias) * (0x00010001u << Bits<T>::kExponentBit);
}

// Moves a code of each half: the sign to bit 15, the three bits of magnitude to `lowest` and above.
template <int sign, int magnitude, int lowest>
__device__ __forceinline__ u32 place_code(u32 word) {
    constexpr u32 kMask = (7u << lowest) * 0x00010001u, kSigns = 0x80008000u;
    constexpr int kShift = lowest - magnitude;
    const u32 moved = kShift > 0 ? word << (kShift & 31) : word >> (-kShift & 31);
    if (kShift == 15 - sign) return moved & (kMask | kSigns);
    return (word << (15 - sign) & kSigns) | (moved & kMask);
}
template <int lowest>
__device__ __forceinline__ void place_nibbles(u32 word, u32 (&pairs)[4]) {
    pairs[0] = place_code<3, 0, lowest>(word), pairs[1] = place_code<7, 4, lowest>(word);
    pairs[2] = place_code<11, 8, lowest>(word), pairs[3] = place_code<15, 12, lowest>(word);
}
template <int lowest>
__device__ __forceinline__ void place_placed(u32 word, u32 (&pairs)[4]) {
    pairs[0] = place_code<15, 9, lowest>(word), pairs[1] = place_code<12, 6, lowest>(word);
    pairs[2] = place_code<14, 3, lowest>(word), pairs[3] = place_code<13, 0, lowest>(word);
}

// ---- scales --------------------------------------------------------------------------------------------------------

// UE4M3 byte j of a word. Its bits in fp32's exponent and mantissa are 2^-120 of it, subnormals included.
__device__ __forceinline__ float ue4m3_value(u32 word, int j) {
    const u32 placed = j < 3 ? word << (20 - 8 * j) : word >> 4;
    return __fmul_rn(__uint_as_float(placed & 0x07f00000u), 0x1p120f);
}
// E8M0 byte j of a word; byte 0 is 2^-127, subnormal; byte 0xFF, a NaN, becomes infinite here.
__device__ __forceinline__ float e8m0_value(u32 word, int j) {
    return __uint_as_float(max((word >> 8 * j & 0xffu) << 23, 0x00400000u));
}
// The E6M2 byte of a HiF4 scale word.
__device__ __forceinline__ float e6m2_value(u32 word) {
    return __uint_as_float(((word & 0xffu) << 21) + ((127u - 48) << 23));
}
// UE4M3 bytes j and j + 2 of a word, j = 0 or 1, times 2^(power of Bits<T>): f16 2^0, bf16 2^119, the largest 448
// takes.
__device__ __forceinline__ u32 ue4m3_pair(f16, u32 word, int j) {
    const u32 placed = __funnelshift_l(word, word, 7 - 8 * j) & 0x3f803f80u;  // 2^-8 of them
    return multiply_pair<f16>(placed, power_pair<f16>(8));
}
__device__ __forceinline__ u32 ue4m3_pair(bf16, u32 word, int j) {
    const u32 placed = __funnelshift_l(word, word, 4 - 8 * j) & 0x07f007f0u;  // 2^-120 of them
    return multiply_pair<bf16>(multiply_pair<bf16>(placed, power_pair<bf16>(120)), power_pair<bf16>(119));
}
// The lowest byte, E8M0, in both halves of bf16; E6M2 times 2^power.
__device__ __forceinline__ u32 e8m0_pair(u32 byte) { return max((byte & 0xffu) << 7, 0x40u) * 0x00010001u; }
__device__ __forceinline__ u32 e6m2_pair(u32 byte, int power) {
    return (((byte & 0xffu) << 5) + ((127u - 48 + power) << 7)) * 0x00010001u;
}
// The low or the high half in both.
__device__ __forceinline__ u32 splat(u32 pair, int half) { return __byte_perm(pair, 0, half ? 0x3232 : 0x1010); }
// 2^(base + micro-exponents) for the eight k that are number `eight` of a HiF4 block: its first four k in the low half.
template <class T>
__device__ __forceinline__ u32 micro_exponent_pair(u32 word, int eight, int base) {
    const u32 e16 = word >> (16 + 2 * eight), e8 = word >> (8 + eight) & 1;
    const u32 exponents = (e8 * 0x00010001u) + ((e16 & 1) | (e16 & 2) << 15);
    return power_pair<T>(base) + (exponents << Bits<T>::kExponentBit);
}

// ---- what a sparse backbone kept -----------------------------------------------------------------------------------

// Eight codes from the four kept ones (16 bits) of 8 k and their metadata.
__device__ __forceinline__ u32 expand_pairs(u32 kept, u32 metadata) {  // NVFP4, MXFP4: a nibble, pairs of neighbours
    return (kept & 0xffu) << 8 * (metadata & 3) | (kept >> 8) << 8 * (metadata >> 2 & 3);
}
__device__ __forceinline__ u32 expand_elements(u32 kept, u32 metadata) {  // HiF4: two nibbles, single elements
    const u32 low = (kept & 15) << 4 * (metadata & 3) | (kept >> 4 & 15) << 4 * (metadata >> 2 & 3);
    const u32 high = (kept >> 8 & 15) << 4 * (metadata >> 4 & 3) | (kept >> 12 & 15) << 4 * (metadata >> 6 & 3);
    return low | high << 16;
}

// ---- formats -------------------------------------------------------------------------------------------------------
// How eight codes of a weight become factors of exact products, and what is multiplied in later. For word r of a lane q
// (k = 32 r + 8 q + i of a unit of 128 k):
//     kGroup        k whose sum of products is multiplied by scale(words, r), the group ending with word r; 128: none
//     kScaleWords   32-bit words of scales a row and unit
//     pairs<T>      the factors, the value times 2^-kPower<T> without the group's scale
//     values<T>     the factors with their scale, the value times 2^-kValuePower<T>, exact but where bf16's range ends
// As activations (exact in f16), eight codes whose block scale is `scale`:
//     kInputScaled  whether an fp32 scale of the block remains to be multiplied in
//     input_pairs   the factors, the value times 2^-kInputPower without that
//     input_values  bf16 pairs, the value itself

template <int block>
struct Nvfp4Codes;

template <> struct Nvfp4Codes<32> {
    static constexpr int kGroup = 32, kScaleWords = 1;
    template <class T> static constexpr int kPower = Bits<T>::kE2m1Power;

    template <class T>
    static __device__ __forceinline__ void pairs(u32 word, const u32 (&)[1], int, int, u32 (&pairs)[4]) {
        place_placed<Bits<T>::kE2m1>(word, pairs);
        if (kPower<T> == 0) multiply_pairs<T>(pairs, power_pair<T>(126));
    }
    static __device__ __forceinline__ float scale(const u32 (&words)[1], int r) { return ue4m3_value(words[0], r); }

    template <class T> static constexpr int kValuePower = Bits<T>::kScaledPower;
    template <class T>
    static __device__ __forceinline__ void values(u32 word, const u32 (&words)[1], int r, int, u32 (&pairs)[4]) {
        place_placed<Bits<T>::kE2m1>(word, pairs);
        multiply_pairs<T>(pairs, splat(ue4m3_pair(T(), words[0], r & 1), r >> 1));
    }

    using InputScale = u8;
    static constexpr bool kInputScaled = false;
    static constexpr int kInputPower = 14, kMetadataBits = 4;
    static __device__ __forceinline__ u32 expand(u32 kept, u32 metadata) { return expand_pairs(kept, metadata); }
    static __device__ __forceinline__ void input_pairs(u32 word, u32 scale, int, u32 (&pairs)[4]) {
        place_nibbles<Bits<f16>::kE2m1>(word, pairs);
        multiply_pairs<f16>(pairs, splat(ue4m3_pair(f16(), scale, 0), 0));
    }
    static __device__ __forceinline__ float input_scale(u32) { return 1.0f; }
    static __device__ __forceinline__ void input_values(u32 word, u32 scale, int, u32 (&pairs)[4]) {
        place_nibbles<Bits<bf16>::kE2m1>(word, pairs);
        multiply_pairs<bf16>(pairs, splat(ue4m3_pair(bf16(), scale, 0), 0));
        multiply_pairs<bf16>(pairs, power_pair<bf16>(7));
    }
};

// A lane's eight k of a word lie in one block of 16, but an instruction's 16 k do not, so the scale goes into the
// factors: E2M1 × UE4M3 is exact in both types (a multiple of 2^-24 below 1 for f16).
template <> struct Nvfp4Codes<16> : Nvfp4Codes<32> {
    static constexpr int kGroup = 128, kScaleWords = 2;
    template <class T> static constexpr int kPower = Bits<T>::kScaledPower;

    template <class T>
    static __device__ __forceinline__ void pairs(u32 word, const u32 (&words)[2], int r, int q, u32 (&pairs)[4]) {
        place_placed<Bits<T>::kE2m1>(word, pairs);
        multiply_pairs<T>(pairs, splat(ue4m3_pair(T(), words[r >> 1], q >> 1), r & 1));
    }
    static __device__ __forceinline__ float scale(const u32 (&)[2], int) { return 1.0f; }

    template <class T>
    static __device__ __forceinline__ void values(u32 word, const u32 (&words)[2], int r, int q, u32 (&values)[4]) {
        pairs<T>(word, words, r, q, values);
    }
};

struct Mxfp4Codes {
    static constexpr int kGroup = 32, kScaleWords = 1;
    template <class T> static constexpr int kPower = Bits<T>::kE2m1Power;

    template <class T>
    static __device__ __forceinline__ void pairs(u32 word, const u32 (&words)[1], int r, int q, u32 (&pairs)[4]) {
        Nvfp4Codes<32>::pairs<T>(word, words, r, q, pairs);
    }
    static __device__ __forceinline__ float scale(const u32 (&words)[1], int r) { return e8m0_value(words[0], r); }

    template <class T> static constexpr int kValuePower = 0;  // bf16 alone has the scales' range
    template <class T>
    static __device__ __forceinline__ void values(u32 word, const u32 (&words)[1], int r, int, u32 (&pairs)[4]) {
        place_placed<Bits<T>::kE2m1>(word, pairs);
        multiply_pairs<T>(pairs, power_pair<T>(126));
        multiply_pairs<T>(pairs, e8m0_pair(words[0] >> 8 * r));
    }
    static __device__ __forceinline__ void input_values(u32 word, u32 scale, int, u32 (&pairs)[4]) {
        place_nibbles<Bits<bf16>::kE2m1>(word, pairs);
        multiply_pairs<bf16>(pairs, power_pair<bf16>(126));
        multiply_pairs<bf16>(pairs, e8m0_pair(scale));
    }

    using InputScale = u8;
    static constexpr bool kInputScaled = true;
    static constexpr int kInputPower = -13;  // 6 · 2^13 still fits f16: sums keep as far as can be from fp32's low end
    static constexpr int kMetadataBits = 4;
    static __device__ __forceinline__ u32 expand(u32 kept, u32 metadata) { return expand_pairs(kept, metadata); }
    static __device__ __forceinline__ void input_pairs(u32 word, u32, int, u32 (&pairs)[4]) {
        place_nibbles<Bits<f16>::kE2m1>(word, pairs);
        multiply_pairs<f16>(pairs, power_pair<f16>(15));
        multiply_pairs<f16>(pairs, power_pair<f16>(12));
    }
    static __device__ __forceinline__ float input_scale(u32 scale) { return e8m0_value(scale, 0); }
};

struct Hif4Codes {
    static constexpr int kGroup = 64, kScaleWords = 2;
    template <class T> static constexpr int kPower = Bits<T>::kS1p2Power;

    template <class T>
    static __device__ __forceinline__ void pairs(u32 word, const u32 (&words)[2], int r, int q, u32 (&pairs)[4]) {
        place_placed<Bits<T>::kS1p2>(word, pairs);
        const int base = Bits<T>::kS1p2Bias - kPower<T>;
        multiply_pairs<T>(pairs, micro_exponent_pair<T>(words[r >> 1], 4 * (r & 1) + q, base));
    }
    static __device__ __forceinline__ float scale(const u32 (&words)[2], int r) { return e6m2_value(words[r >> 1]); }

    template <class T> static constexpr int kValuePower = 0;  // bf16 alone has the scales' range
    template <class T>
    static __device__ __forceinline__ void values(u32 word, const u32 (&words)[2], int r, int q, u32 (&values)[4]) {
        pairs<T>(word, words, r, q, values);
        multiply_pairs<T>(values, e6m2_pair(words[r >> 1], kPower<T>));
    }
    static __device__ __forceinline__ void input_values(u32 word, u32 scale, int eight, u32 (&pairs)[4]) {
        place_nibbles<Bits<bf16>::kS1p2>(word, pairs);
        multiply_pairs<bf16>(pairs, micro_exponent_pair<bf16>(scale, eight, 125));
        multiply_pairs<bf16>(pairs, e6m2_pair(scale, 2));
    }

    using InputScale = u32;
    static constexpr bool kInputScaled = true;
    static constexpr int kInputPower = 2, kMetadataBits = 8;
    static __device__ __forceinline__ u32 expand(u32 kept, u32 metadata) { return expand_elements(kept, metadata); }
    static __device__ __forceinline__ void input_pairs(u32 word, u32 scale, int eight, u32 (&pairs)[4]) {
        place_nibbles<Bits<f16>::kS1p2>(word, pairs);
        multiply_pairs<f16>(pairs, micro_exponent_pair<f16>(scale, eight, 13));
    }
    static __device__ __forceinline__ float input_scale(u32 scale) { return e6m2_value(scale); }
};
