// FP4 in registers: the bits of engine/ops/fp4 (elements, scales, blocks, split), on tiles of 16 k in a thread: how
// numbers become nibbles and scale bytes.
//
//     bit    3    2    1    0        E2M1  s e1 e0 m    0 .5 1 1.5 2 3 4 6         S1P2  s i f1 f0    0 .25 … 1.75
//     byte | code of k + 1 | code of k |                a word holds eight codes, k in bits 3:0
//
// A block of a scale may span neighbouring lanes, whose tiles lie one after the other: NVFP4 16 or 32 k, MXFP4 32, HiF4
// 64, i.e. 1, 2 or 4 lanes. All lanes of a warp call these functions together.
//
// Where the arithmetic here differs from the definition's, its result does not, because what is quantised has 8
// significant bits: bf16 numbers, and residuals x − q·s of NVFP4 and MXFP4, which are exact and no longer.
// * amax / 6 is amax · fp32(1/6): the two round to the same UE4M3;
// * E2M1 codes are found in fp16: see E2m1Scale and Nvfp4::half_inverse;
// * x / step of HiF4 is a product with the reciprocal, corrected twice by fma: correctly rounded.
#pragma once

#include "common.cuh"

constexpr int kTile = 16;  // k in a thread

// ---- elements -------------------------------------------------------------------------------------------------------

// Words of eight codes: the magnitudes' nibbles, and the signs of eight numbers in bit 3 of theirs. The numbers come in
// pairs of halves: pair j holds k = j in its low half and k = j + 4 in its high one.
__device__ __forceinline__ u32 with_signs(u32 magnitudes, const u32 (&pairs)[4]) {
    const u32 even = __byte_perm(pairs[0], pairs[2], 0x7351), odd = __byte_perm(pairs[1], pairs[3], 0x7351);
    return magnitudes | (even >> 4 & 0x08080808u) | (odd & 0x80808080u);
}

__device__ __forceinline__ __half2 halves(u32 word) { return reinterpret_cast<const __half2&>(word); }
__device__ __forceinline__ __half2 both(float x) { return __float2half2_rn(x); }
__device__ __forceinline__ u32 word_of(__half2 pair) { return reinterpret_cast<const u32&>(pair); }

// E2M1 under one scale s: s itself and 1 / 2s.
struct E2m1Scale {
    float unit, half_inverse;

    // Nearest E2M1 of x / s, ties to even, saturating: eight codes, and their values in units.
    //
    // In fp16, two numbers at a time. The code of y = |x| / s is a concave, piecewise linear function of y rounded to a
    // whole number: slope 2 up to 2, 1 up to 4, 1/2 up to 6, 0 beyond. The three pieces saturate where the next begins,
    // so at most one of them is not whole, and adding them to 1024, where halves have steps of 1, rounds once.
    __device__ __forceinline__ u32 encode(const float* x, float* value) const {
        const __half2 whole = both(1024.0f);
        u32 pairs[4], magnitudes = 0;
#pragma unroll
        for (int j = 3; j >= 0; --j) {
            pairs[j] = Word<f16>::pack(__fmul_rn(x[j], half_inverse), __fmul_rn(x[j + 4], half_inverse));
            const __half2 half_y = __habs2(halves(pairs[j]));
            const __half2 first = __hmul2_sat(half_y, both(1.0f)), second = __hadd2_sat(half_y, both(-1.0f));
            const __half2 third = __hadd2_sat(half_y, both(-2.0f));
            const __half2 up_to_4 = __hfma2(first, both(4.0f), whole), up_to_6 = __hfma2(second, both(2.0f), up_to_4);
            const __half2 code = __hadd2(up_to_6, third);
            magnitudes = magnitudes * 16 + word_of(code);
            // value = the code's pieces over their slopes = 2·code − up_to_6 − up_to_4 / 2, exact at every step
            const __half2 twice = __hfma2(code, both(2.0f), __hneg2(up_to_6));
            const __half2 size = __hadd2(__hfma2(up_to_4, both(-0.5f), twice), both(-512.0f));
            const u32 with_sign = word_of(size) | (pairs[j] & 0x80008000u);
            value[j] = __low2float(halves(with_sign));
            value[j + 4] = __high2float(halves(with_sign));
        }
        return with_signs(magnitudes - 0x64006400u * 0x1111u, pairs);  // 0x6400 is 1024
    }
};

// S1P2 under a step; a unit is a quarter of it.
struct S1p2Scale {
    float step, inverse, unit;

    // Nearest S1P2 of x / step, ties to even, saturating: 2^23 + its magnitude's code, which is its value in units.
    __device__ __forceinline__ float round(float x) const {
        const float guess = __fmul_rn(fabsf(x), inverse);
        const float y = __fmaf_rn(__fmaf_rn(-guess, step, fabsf(x)), inverse, guess);  // |x| / step, correctly rounded
        return __fmaf_rn(fminf(y, 1.75f), 4.0f, kWhole);
    }
    static constexpr float kWhole = 8388608.0f;  // adding it rounds to a whole number, which the low bits hold
};

// ---- the mask -------------------------------------------------------------------------------------------------------

// Which two of four scores are the largest, the lower number winning ties: both of the lower two, both of the higher
// two, or the better one of each.
struct Kept {
    bool both_low, both_high, odd_low, odd_high;

    __device__ __forceinline__ Kept(float s0, float s1, float s2, float s3)
        : both_low(fminf(s0, s1) >= fmaxf(s2, s3)), both_high(fminf(s2, s3) > fmaxf(s0, s1)), odd_low(s1 > s0),
          odd_high(s3 > s2) {}
    __device__ __forceinline__ bool keeps(int candidate) const {
        const bool better = (candidate < 2 ? odd_low : odd_high) == (candidate % 2 == 1);
        return candidate < 2 ? both_low || (!both_high && better) : both_high || (!both_low && better);
    }
    __device__ __forceinline__ u32 first() const { return both_low ? 0 : both_high ? 2 : odd_low ? 1 : 0; }
    __device__ __forceinline__ u32 second() const { return both_low ? 1 : both_high ? 3 : odd_high ? 3 : 2; }
    __device__ __forceinline__ u32 metadata() const { return first() | second() << 2; }
};

// Pairs of neighbours compete in each eight k.
struct PairMask {
    Kept chunks[2];

    __device__ __forceinline__ bool keeps(int i) const { return chunks[i / 8].keeps(i % 8 / 2); }
    __device__ __forceinline__ u32 metadata() const { return chunks[0].metadata() | chunks[1].metadata() << 4; }
    // The kept codes in the order of k; pairs are bytes.
    __device__ __forceinline__ u32 compress(const u32 (&words)[2]) const {
        const u32 low = chunks[0].first() | chunks[0].second() << 4, high = chunks[1].first() | chunks[1].second() << 4;
        return __byte_perm(words[0], words[1], low | (high + 0x44) << 8);
    }
};

// Elements compete in each four k.
struct ElementMask {
    Kept chunks[4];

    __device__ __forceinline__ bool keeps(int i) const { return chunks[i / 4].keeps(i % 4); }
    __device__ __forceinline__ u32 metadata() const {
        const u32 low = chunks[0].metadata() | chunks[1].metadata() << 4;
        return low | chunks[2].metadata() << 8 | chunks[3].metadata() << 12;
    }
    __device__ __forceinline__ u32 compress(const u32 (&words)[2]) const {
        u32 kept = 0;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const u32 codes = words[c / 2] >> 16 * (c % 2);
            kept |= ((codes >> 4 * chunks[c].first() & 15) | (codes >> 4 * chunks[c].second() & 15) << 4) << 8 * c;
        }
        return kept;
    }
};

__device__ __forceinline__ PairMask mask_pairs(const float (&x)[kTile]) {
    float score[kTile / 2];
#pragma unroll
    for (int i = 0; i < kTile / 2; ++i) score[i] = fmaxf(fabsf(x[2 * i]), fabsf(x[2 * i + 1]));
    return {{Kept(score[0], score[1], score[2], score[3]), Kept(score[4], score[5], score[6], score[7])}};
}
__device__ __forceinline__ ElementMask mask_elements(const float (&x)[kTile]) {
    const auto of = [&](int i) { return Kept(fabsf(x[i]), fabsf(x[i + 1]), fabsf(x[i + 2]), fabsf(x[i + 3])); };
    return {{of(0), of(4), of(8), of(12)}};
}

// ---- scales ---------------------------------------------------------------------------------------------------------

template <int N>
__device__ __forceinline__ float largest(const float (&x)[N]) {
    float most = fabsf(x[0]);
#pragma unroll
    for (int i = 1; i < N; ++i) most = fmaxf(most, fabsf(x[i]));
    return most;
}

struct Ue4m3 {
    u32 byte;
    float value;
};

// Nearest UE4M3 of s in [0, 448], ties to even, subnormals kept. Numbers in [2^e, 2^(e+1)) have steps of 2^(e−3), those
// below 2^-6 the steps of e = −6; adding 2^(20+e), whose last bit is worth a step, rounds and leaves s / step there.
__device__ __forceinline__ Ue4m3 round_ue4m3(float s) {
    const u32 power = max(__float_as_uint(s) & kInfinityBits, 121u << 23);  // 2^e
    const float aligner = __uint_as_float(power + (20u << 23)), aligned = __fadd_rn(s, aligner);
    const u32 steps = __float_as_uint(aligned) - __float_as_uint(aligner);
    return {steps + (power >> 20) - (121u << 3), __fadd_rn(aligned, -aligner)};
}

// Nearest E4M3 code of x, saturating; the sign is x's.
__device__ __forceinline__ u32 e4m3_code(float x) {
    return round_ue4m3(fminf(fabsf(x), 448.0f)).byte | (__float_as_uint(x) >> 24 & 0x80u);
}

// A tile's scale: the stored scale of its block, the same in all the block's lanes, and what an element's unit is
// worth. encode: sixteen codes, and the numbers they stand for in units, signed.
struct E2m1TileScale {
    E2m1Scale scale;
    u32 stored;

    __device__ __forceinline__ float unit(int) const { return scale.unit; }
    __device__ __forceinline__ void encode(const float (&x)[kTile], u32 (&words)[2], float (&value)[kTile]) const {
        words[0] = scale.encode(x, value);
        words[1] = scale.encode(x + 8, value + 8);
    }
};
struct S1p2TileScale {
    S1p2Scale fours[4];
    u32 stored;

    __device__ __forceinline__ float unit(int i) const { return fours[i / 4].unit; }
    __device__ __forceinline__ void encode(const float (&x)[kTile], u32 (&words)[2], float (&value)[kTile]) const {
        words[0] = words[1] = 0;
#pragma unroll
        for (int i = 0; i < kTile; ++i) {
            const float code = fours[i / 4].round(x[i]);
            value[i] = copysignf(__fadd_rn(code, -S1p2Scale::kWhole), x[i]);
            const u32 nibble = (__float_as_uint(code) & 7) | (__float_as_uint(x[i]) >> 28 & 8);
            words[i / 8] |= nibble << 4 * (i % 8);
        }
    }
};

// Formats: k of a block (of the backbone where sparse), the mask, stored types.

struct Nvfp4 {
    static constexpr bool kGlobalScale = true;
    static constexpr int kBlock = 16, kSparseBlock = 32;
    using Scale = u8;
    using Meta = u8;  // of a tile

    static __device__ __forceinline__ PairMask mask(const float (&x)[kTile]) { return mask_pairs(x); }

    // The definition rounds x · fp32(1/s), which lies above a tie it should meet where s = 15·2^e and the tie is at
    // 1.25·2^i, but not where it is at 2^i. A factor of 1 + .9·2^-11 does the same to fp16: it is lost in rounding 2^i
    // and not in rounding 1.25·2^i. (All other ties are met, or round up either way; and since x has 8 significant bits
    // and s has 4, what is no tie is far from one, by 2^-9, so that the reciprocal may be an approximate one.)
    static __device__ __forceinline__ float half_inverse(float s) {
        const bool is_15 = (__float_as_uint(s) & 0x00700000u) == 0x00700000u;
        return __fdividef(is_15 ? 0.5f * (1.0f + 0.9f * 0x1p-11f) : 0.5f, s);
    }

    template <int block>
    static __device__ __forceinline__ E2m1TileScale scale(const float (&x)[kTile]) {
        const float amax = max_of_lanes<block / kTile>(largest(x));
        const float s = fmaxf(fminf(__fmul_rn(amax, 1.0f / 6.0f), 448.0f), 0x1p-9f);
        const Ue4m3 nearest = round_ue4m3(s);
        return {{nearest.value, half_inverse(nearest.value)}, nearest.byte};
    }
};

struct Mxfp4 {
    static constexpr bool kGlobalScale = false;
    static constexpr int kBlock = 32, kSparseBlock = 32;
    using Scale = u8;
    using Meta = u8;

    static __device__ __forceinline__ PairMask mask(const float (&x)[kTile]) { return mask_pairs(x); }

    // byte = exponent of amax − 2, at least 0; byte 0 is 2^-127, subnormal. Half the reciprocal is 2^(126 − byte).
    template <int block>
    static __device__ __forceinline__ E2m1TileScale scale(const float (&x)[kTile]) {
        const u32 amax = __float_as_uint(max_of_lanes<block / kTile>(largest(x)));
        const u32 byte = max(amax >> 23, 2u) - 2;
        const u32 value = max(byte << 23, 0x00400000u);
        return {{__uint_as_float(value), __uint_as_float((253 - byte) << 23)}, byte};
    }
};

struct Hif4 {
    static constexpr bool kGlobalScale = false;
    static constexpr int kBlock = 64, kSparseBlock = 64;
    using Scale = u32;
    using Meta = unsigned short;

    static __device__ __forceinline__ ElementMask mask(const float (&x)[kTile]) { return mask_elements(x); }

    // E1_16 of k in [4i, 4i + 4) in bit 16 + i, E1_8 of [8i, 8i + 8) in bit 8 + i, E6M2 in bits 7:0.
    template <int block>
    static __device__ __forceinline__ S1p2TileScale scale(const float (&x)[kTile]) {
        float of_4[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float low = fmaxf(fabsf(x[4 * i]), fabsf(x[4 * i + 1]));
            of_4[i] = fmaxf(low, fmaxf(fabsf(x[4 * i + 2]), fabsf(x[4 * i + 3])));
        }
        const float amax = max_of_lanes<4>(largest(of_4));
        const float clamped = fmaxf(fminf(__fmul_rn(amax, 1.0f / 7.0f), 0x1.8p15f), 0x1p-48f);
        const u32 bits = __float_as_uint(clamped);
        const u32 rounded = (bits + 0xfffffu + (bits >> 21 & 1)) >> 21;  // exponent and two bits of mantissa
        const float E = __uint_as_float(rounded << 21), inverse = __frcp_rn(E);

        S1p2TileScale tile;
        const int place = lane_of_warp() & 3;  // which quarter of the block
        u32 micro = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const u32 e8 = fmaxf(of_4[i & 2], of_4[i | 1]) >= 4.0f * E;
            const float step_of_8 = e8 ? 2.0f * E : E;
            const u32 e16 = of_4[i] >= 2.0f * step_of_8;
            const float step = e16 ? 2.0f * step_of_8 : step_of_8;
            const float power = e8 + e16 == 0 ? 1.0f : e8 + e16 == 1 ? 0.5f : 0.25f;
            tile.fours[i] = {step, inverse * power, 0.25f * step};  // powers of two: all exact
            micro |= e16 << (16 + 4 * place + i) | e8 << (8 + 2 * place + i / 2);
        }
        micro |= __shfl_xor_sync(kAllLanes, micro, 1);
        micro |= __shfl_xor_sync(kAllLanes, micro, 2);
        tile.stored = micro | (rounded - ((127 - 48) << 2));
        return tile;
    }
};
