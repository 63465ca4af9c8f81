// FP4 in registers: the bits of engine/ops/fp4 (elements, scales, blocks, split), on tiles of 16 k in a thread. The only
// CUDA file that knows nibbles and scale bytes.
//
//     bit    3    2    1    0        E2M1  s e1 e0 m    0 .5 1 1.5 2 3 4 6         S1P2  s i f1 f0    0 .25 … 1.75
//     byte | code of k + 1 | code of k |                a word holds eight codes, k in bits 3:0
//
// A block of a scale may span neighbouring lanes, whose tiles lie one after the other: NVFP4 16 or 32 k, MXFP4 32, HiF4
// 64, i.e. 1, 2 or 4 lanes. All lanes of a warp call these functions together.
//
// Where the arithmetic here differs from the definition's, its result does not:
// * amax / 6 is amax · fp32(1/6): amax has 8 significant bits (so has a residual, which is exact), and the two then
//   round to the same UE4M3;
// * x / step of HiF4 is a product with the reciprocal, corrected twice by fma: correctly rounded.
#pragma once

#include "common.cuh"

constexpr int kTile = 16;  // k in a thread

// ---- elements --------------------------------------------------------------------------------------------------------

// A magnitude rounded to an element: `code` is 2^23 + its code, so that the low bits of the float are the code; `units`
// is what it is worth, in the unit its scale keeps.
struct Rounded {
    float code, units;
};

constexpr float kWhole = 8388608.0f;  // 2^23: adding it rounds to a whole number, ties to even, which the low bits hold

// Under a scale s of E2M1 elements: s itself (the unit of Rounded), and half its rounded reciprocal.
struct E2m1Scale {
    float unit, half_inverse;

    // Nearest E2M1 of |x|·fp32(1/s), ties to even, saturating. Its code is a concave, piecewise linear function of that
    // number y, rounded to a whole one: slope 2 up to 2, 1 up to 4, 1/2 up to 6, 0 beyond. The three pieces saturate
    // where the next begins, so at most one of them is not whole and adding them to 2^23 rounds once.
    __device__ __forceinline__ Rounded round(float x) const {
        const float half = __fmul_rn(fabsf(x), half_inverse);  // y / 2
        const float first = __saturatef(half), second = __saturatef(__fadd_rn(half, -1.0f));
        const float third = __saturatef(__fadd_rn(half, -2.0f));
        const float up_to_4 = __fmaf_rn(first, 4.0f, kWhole), up_to_6 = __fmaf_rn(second, 2.0f, up_to_4);
        const float code = __fadd_rn(up_to_6, third);
        // value = code's pieces over their slopes = 2·code − up_to_6 − up_to_4 / 2, every step exact
        const float value = __fmaf_rn(up_to_4, -0.5f, __fmaf_rn(code, 2.0f, -up_to_6));
        return {code, __fadd_rn(value, -0.5f * kWhole)};
    }
};

// Under a step of S1P2 elements; the unit of Rounded is a quarter of it.
struct S1p2Scale {
    float step, inverse, unit;

    __device__ __forceinline__ Rounded round(float x) const {
        const float guess = __fmul_rn(fabsf(x), inverse);
        const float y = __fmaf_rn(__fmaf_rn(-guess, step, fabsf(x)), inverse, guess);  // |x| / step, correctly rounded
        const float code = __fmaf_rn(fminf(y, 1.75f), 4.0f, kWhole);
        return {code, __fadd_rn(code, -kWhole)};
    }
};

// x − what `rounded` stands for with x's sign: one rounding, and +0 where nothing is left.
__device__ __forceinline__ float minus(float x, float unit, Rounded rounded) {
    return __fmaf_rn(-copysignf(rounded.units, x), unit, x);
}

// Codes of N elements, eight a word, from Rounded.code and the numbers that give the signs. Horner's rule on the floats'
// bits: the code arrives in its nibble, of 2^23's bits what is not shifted out is subtracted, and the sign bits arrive
// in bit 3 of their nibble with the exponent's in the others.
template <int N>
__device__ __forceinline__ void pack_codes(const float (&code)[N], const float (&x)[N], u32 (&words)[N / 8]) {
    constexpr u32 kWholeBits = 0x4b000000u;
#pragma unroll
    for (int w = 0; w < N / 8; ++w) {
        u32 magnitudes = 0, signs = 0;
#pragma unroll
        for (int i = 8 * w + 7; i >= 8 * w; --i) {
            magnitudes = magnitudes * 16 + __float_as_uint(code[i]);
            signs = __funnelshift_l(__float_as_uint(x[i]), signs, 4);
        }
        words[w] = (magnitudes - kWholeBits * 17) | (signs & 0x88888888u);
    }
}

// ---- the mask --------------------------------------------------------------------------------------------------------

// Numbers first < second of the two largest of four scores, the lower number winning ties.
struct Kept {
    int first, second;

    __device__ __forceinline__ Kept(float s0, float s1, float s2, float s3) {
        const bool both_low = fminf(s0, s1) >= fmaxf(s2, s3), both_high = fminf(s2, s3) > fmaxf(s0, s1);
        first = both_low ? 0 : both_high ? 2 : s1 > s0 ? 1 : 0;
        second = both_low ? 1 : both_high ? 3 : s3 > s2 ? 3 : 2;
    }
    __device__ __forceinline__ u32 metadata() const { return first | second << 2; }

    // What is kept of four candidates, and the candidates with something else in those places.
    __device__ __forceinline__ void take(const float (&x)[4], float& a, float& b) const {
        a = first == 0 ? x[0] : first == 1 ? x[1] : x[2];
        b = second == 1 ? x[1] : second == 2 ? x[2] : x[3];
    }
    __device__ __forceinline__ void put(float (&x)[4], float a, float b) const {
        x[0] = first == 0 ? a : x[0];
        x[1] = first == 1 ? a : second == 1 ? b : x[1];
        x[2] = first == 2 ? a : second == 2 ? b : x[2];
        x[3] = second == 3 ? b : x[3];
    }
};

// Candidate c of a chunk of 4 · width elements is x[chunk + c · width], …, width of them.
template <int width>
__device__ __forceinline__ void candidates(const float (&x)[kTile], int chunk, int i, float (&four)[4]) {
#pragma unroll
    for (int c = 0; c < 4; ++c) four[c] = x[chunk * 4 * width + c * width + i];
}

// A tile's mask: 4 · width elements a chunk, of which half are kept. width 2: pairs compete, 1: elements.
template <int width>
struct TileMask {
    static constexpr int kChunks = kTile / (4 * width);
    Kept kept[kChunks];

    // The kept elements in the order of k.
    __device__ __forceinline__ void take(const float (&x)[kTile], float (&kept_x)[kTile / 2]) const {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
            for (int i = 0; i < width; ++i) {
                float four[4];
                candidates<width>(x, chunk, i, four);
                float* to = kept_x + chunk * 2 * width + i;
                kept[chunk].take(four, to[0], to[width]);
            }
    }
    // Puts other numbers where the kept ones were.
    __device__ __forceinline__ void put(float (&x)[kTile], const float (&kept_x)[kTile / 2]) const {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
            for (int i = 0; i < width; ++i) {
                float four[4];
                candidates<width>(x, chunk, i, four);
                const float* from = kept_x + chunk * 2 * width + i;
                kept[chunk].put(four, from[0], from[width]);
#pragma unroll
                for (int c = 0; c < 4; ++c) x[chunk * 4 * width + c * width + i] = four[c];
            }
    }
    // A nibble a chunk, the first chunk's lowest.
    __device__ __forceinline__ u32 metadata() const {
        u32 nibbles = 0;
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) nibbles |= kept[chunk].metadata() << 4 * chunk;
        return nibbles;
    }
};

__device__ __forceinline__ TileMask<2> mask_pairs(const float (&x)[kTile]) {
    float score[kTile / 2];
#pragma unroll
    for (int i = 0; i < kTile / 2; ++i) score[i] = fmaxf(fabsf(x[2 * i]), fabsf(x[2 * i + 1]));
    return {{Kept(score[0], score[1], score[2], score[3]), Kept(score[4], score[5], score[6], score[7])}};
}
__device__ __forceinline__ TileMask<1> mask_elements(const float (&x)[kTile]) {
    const auto of = [&](int i) { return Kept(fabsf(x[i]), fabsf(x[i + 1]), fabsf(x[i + 2]), fabsf(x[i + 3])); };
    return {{of(0), of(4), of(8), of(12)}};
}

// ---- scales ----------------------------------------------------------------------------------------------------------

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

// A tile's scale: how its elements round (`of`, by number 0 … 15), and the stored scale of the block, the same in all
// the block's lanes.
struct E2m1TileScale {
    E2m1Scale scale;
    u32 stored;
    __device__ __forceinline__ const E2m1Scale& of(int) const { return scale; }
};
struct S1p2TileScale {
    S1p2Scale fours[4];
    u32 stored;
    __device__ __forceinline__ const S1p2Scale& of(int i) const { return fours[i / 4]; }
};

// Formats: kLanes of a block (of the backbone where sparse), how candidates of the mask are made, stored types.

struct Nvfp4 {
    static constexpr bool kGlobalScale = true;
    static constexpr int kBlock = 16, kSparseBlock = 32, kMaskWidth = 2;
    using Scale = u8;
    using Meta = u8;  // of a tile

    static __device__ __forceinline__ TileMask<2> mask(const float (&x)[kTile]) { return mask_pairs(x); }

    template <int block>
    static __device__ __forceinline__ E2m1TileScale scale(const float (&x)[kTile]) {
        const float amax = max_of_lanes<block / kTile>(largest(x));
        const float s = fmaxf(fminf(__fmul_rn(amax, 1.0f / 6.0f), 448.0f), 0x1p-9f);
        const Ue4m3 nearest = round_ue4m3(s);
        return {{nearest.value, __fmul_rn(0.5f, __frcp_rn(nearest.value))}, nearest.byte};
    }
};

struct Mxfp4 {
    static constexpr bool kGlobalScale = false;
    static constexpr int kBlock = 32, kSparseBlock = 32, kMaskWidth = 2;
    using Scale = u8;
    using Meta = u8;

    static __device__ __forceinline__ TileMask<2> mask(const float (&x)[kTile]) { return mask_pairs(x); }

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
    static constexpr int kBlock = 64, kSparseBlock = 64, kMaskWidth = 1;
    using Scale = u32;
    using Meta = unsigned short;

    static __device__ __forceinline__ TileMask<1> mask(const float (&x)[kTile]) { return mask_elements(x); }

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

// ---- tiles -----------------------------------------------------------------------------------------------------------

// Codes of N of a tile's elements, 16 / N of each group of four, and x − what they stand for in place of x.
template <int N, class TileScale>
__device__ __forceinline__ void encode(float (&x)[N], const TileScale& scale, u32 (&words)[N / 8]) {
    float code[N], rest[N];
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const auto& s = scale.of(i * (kTile / N));
        const Rounded rounded = s.round(x[i]);
        code[i] = rounded.code;
        rest[i] = minus(x[i], s.unit, rounded);
    }
    pack_codes(code, x, words);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = rest[i];
}
