// FP4 in registers: the bits of engine/ops/fp4 (elements, scales, blocks, split), on tiles of 16 k in a thread: how
// numbers become nibbles and scale bytes.
//
//     bit    3    2    1    0        E2M1  s e1 e0 m    0 .5 1 1.5 2 3 4 6         S1P2  s i f1 f0    0 .25 … 1.75
//     byte | code of k + 1 | code of k |                a word holds eight codes, k in bits 3:0
//
// A tile is 16 floats, or eight words of two neighbours in bf16, the first in the low half. A block of a scale may span
// neighbouring lanes, whose tiles lie one after the other: NVFP4 16 or 32 k, MXFP4 32, HiF4 64, i.e. 1, 2 or 4 lanes.
// All lanes of a warp call these functions together.
//
// Where the arithmetic here differs from the definition's, its result does not, because what is quantised has 8
// significant bits: bf16 numbers, and residuals x − q·s of NVFP4 and MXFP4, which are exact and no longer: they are
// computed in bf16.
// * amax / 6 is amax · fp32(1/6): the two round to the same UE4M3;
// * E2M1 codes are found in fp16: see E2m1Scale and Nvfp4::half_inverse;
// * x / step of HiF4 is a product with the reciprocal, corrected twice by fma: correctly rounded.
#pragma once

#include "common.cuh"

constexpr int kTile = 16;  // k in a thread

// ---- tiles ----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ __nv_bfloat162 two_bf16(u32 word) { return reinterpret_cast<const __nv_bfloat162&>(word); }
__device__ __forceinline__ u32 word_of(__nv_bfloat162 pair) { return reinterpret_cast<const u32&>(pair); }
__device__ __forceinline__ float larger_of(__nv_bfloat162 pair) {
    return fmaxf(Word<bf16>::low(word_of(pair)), Word<bf16>::high(word_of(pair)));
}

template <int N>
__device__ __forceinline__ void pack_tile(const float (&x)[N], u32 (&words)[N / 2]) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) words[i] = Word<bf16>::pack(x[2 * i], x[2 * i + 1]);
}
template <int N>
__device__ __forceinline__ void unpack_tile(const u32 (&words)[N], float (&x)[2 * N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[2 * i] = Word<bf16>::low(words[i]), x[2 * i + 1] = Word<bf16>::high(words[i]);
}

template <int N>
__device__ __forceinline__ float largest(const float (&x)[N]) {
    float most = fabsf(x[0]);
#pragma unroll
    for (int i = 1; i < N; ++i) most = fmaxf(most, fabsf(x[i]));
    return most;
}

// ---- elements -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ __half2 two_halves(u32 word) { return reinterpret_cast<const __half2&>(word); }
__device__ __forceinline__ __half2 both(float x) { return __float2half2_rn(x); }
__device__ __forceinline__ u32 word_of(__half2 pair) { return reinterpret_cast<const u32&>(pair); }

// Eight numbers rounded to E2M1: a word of their magnitudes' codes, and the numbers in fp16, of which the signs are
// still wanted: pair j holds k = j in its low half and k = j + 4 in its high one.
struct E2m1Eight {
    u32 magnitudes, pairs[4];

    // Nearest E2M1 of x / s with half_inverse = 1 / 2s, ties to even, saturating.
    //
    // In fp16, two numbers at a time. The code of y = |x| / s is a concave, piecewise linear function of y rounded to a
    // whole number: slope 2 up to 2, 1 up to 4, 1/2 up to 6, 0 beyond. The three pieces saturate where the next begins,
    // so at most one of them is not whole, and adding them to 1024, where halves have steps of 1, rounds once.
    __device__ __forceinline__ E2m1Eight(const float* x, float half_inverse) {
        const __half2 whole = both(1024.0f);
        magnitudes = 0;
#pragma unroll
        for (int j = 3; j >= 0; --j) {
            pairs[j] = Word<f16>::pack(__fmul_rn(x[j], half_inverse), __fmul_rn(x[j + 4], half_inverse));
            const __half2 half_y = __habs2(two_halves(pairs[j]));
            const __half2 first = __hmul2_sat(half_y, both(1.0f)), second = __hadd2_sat(half_y, both(-1.0f));
            const __half2 third = __hadd2_sat(half_y, both(-2.0f));
            const __half2 code = __hadd2(__hfma2(second, both(2.0f), __hfma2(first, both(4.0f), whole)), third);
            magnitudes = magnitudes * 16 + word_of(code);
        }
        magnitudes -= 0x64006400u * 0x1111u;  // 0x6400 is 1024
    }

    __device__ __forceinline__ u32 codes() const {
        const u32 even = __byte_perm(pairs[0], pairs[2], 0x7351), odd = __byte_perm(pairs[1], pairs[3], 0x7351);
        return magnitudes | (even >> 4 & 0x08080808u) | (odd & 0x80808080u);
    }

    // Two neighbours' magnitudes in bf16, looked up byte by byte.
    __device__ __forceinline__ void sizes(u32 (&words)[4]) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32 four = magnitudes >> 16 * i;
            const u32 high = __byte_perm(0x3f3f3f00u, 0x40404040u, four);
            const u32 low = __byte_perm(0xc0800000u, 0xc0804000u, four);
            words[2 * i] = __byte_perm(low, high, 0x5140), words[2 * i + 1] = __byte_perm(low, high, 0x7362);
        }
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
// two, or the better one of each. even: scores 0 and 2 in bf16, odd: 1 and 3.
struct Kept {
    bool both_low, both_high, odd_low, odd_high;

    __device__ __forceinline__ Kept(__nv_bfloat162 even, __nv_bfloat162 odd) {
        const u32 most = word_of(__hmax2(even, odd)), least = word_of(__hmin2(even, odd));  // low two, high two
        const __nv_bfloat162 low = two_bf16(__byte_perm(least, most, 0x5410));   // least, most
        const __nv_bfloat162 high = two_bf16(__byte_perm(most, least, 0x7632));  // most, least
        both_low = __hge(__low2bfloat16(low), __low2bfloat16(high));
        both_high = !__hge(__high2bfloat16(low), __high2bfloat16(high));
        odd_low = __hgt(__low2bfloat16(odd), __low2bfloat16(even));
        odd_high = __hgt(__high2bfloat16(odd), __high2bfloat16(even));
    }
    __device__ __forceinline__ bool keeps(int candidate) const {
        const bool better = (candidate < 2 ? odd_low : odd_high) == (candidate % 2 == 1);
        return candidate < 2 ? both_low || (!both_high && better) : both_high || (!both_low && better);
    }
    // The lower and the higher one of what is kept, of four things.
    template <class T>
    __device__ __forceinline__ T first(T a, T b, T c) const {
        return both_high ? c : both_low || !odd_low ? a : b;
    }
    template <class T>
    __device__ __forceinline__ T second(T b, T c, T d) const {
        return both_low ? b : both_high || odd_high ? d : c;
    }
    __device__ __forceinline__ u32 metadata() const {
        return both_low ? 0 | 1 << 2 : both_high ? 2 | 3 << 2 : (odd_low ? 1 : 0) + (odd_high ? 3 << 2 : 2 << 2);
    }
};

// The scores of neighbours: in each eight k, four pairs compete.
struct PairScores {
    __nv_bfloat162 even[2], odd[2];  // by chunks

    // x is looked at as if rounded to bf16.
    __device__ __forceinline__ explicit PairScores(const float (&x)[kTile])
        : even{of(x, 0), of(x, 8)}, odd{of(x, 2), of(x, 10)} {}

    __device__ __forceinline__ float largest() const {
        return larger_of(__hmax2(__hmax2(even[0], odd[0]), __hmax2(even[1], odd[1])));
    }
    // Whether the second largest of four scores may be below this.
    __device__ __forceinline__ bool may_keep_less_than(float bound) const {
        const __nv_bfloat162 least = __hmin2(__hmax2(even[0], odd[0]), __hmax2(even[1], odd[1]));
        return fminf(Word<bf16>::low(word_of(least)), Word<bf16>::high(word_of(least))) < bound;
    }

private:
    static __device__ __forceinline__ __nv_bfloat162 of(const float (&x)[kTile], int k) {
        return __floats2bfloat162_rn(fmaxf(fabsf(x[k]), fabsf(x[k + 1])), fmaxf(fabsf(x[k + 4]), fabsf(x[k + 5])));
    }
};

// The best two of the four pairs of each eight k, in a tile's words of two neighbours. The words are put in order: of
// either two pairs the better one comes first. So what is kept is the first ones, or either two.
struct PairMask {
    bool both_low[2], both_high[2];
    u32 order[2], kept;  // __byte_perm's selectors for codes, whose bytes are pairs, back to the order of k

    __device__ __forceinline__ PairMask(const PairScores& scores, u32 (&words)[8]) : kept(0) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const Kept chunk(scores.even[c], scores.odd[c]);
            sort(chunk.odd_low, words[4 * c], words[4 * c + 1]);
            sort(chunk.odd_high, words[4 * c + 2], words[4 * c + 3]);
            order[c] = (chunk.odd_low ? 0x01 : 0x10) | (chunk.odd_high ? 0x2300 : 0x3200);
            // A chunk's metadata, and two of kept's nibbles.
            const auto entry = [c](u32 meta, u32 pairs) { return meta << (16 + 4 * c) | (pairs + 0x22 * c) << 8 * c; };
            const u32 of_low = chunk.odd_low ? entry(4, 0x01) : entry(4, 0x10);
            const u32 of_high = chunk.odd_high ? entry(14, 0x10) : entry(14, 0x01);
            const u32 better_high = chunk.odd_high ? 4 << (16 + 4 * c) : 0;
            const u32 of_each = (chunk.odd_low ? entry(9, 0x10) : entry(8, 0x10)) | better_high;
            kept |= chunk.both_low ? of_low : chunk.both_high ? of_high : of_each;
            both_low[c] = chunk.both_low, both_high[c] = chunk.both_high;
        }
    }
    __device__ __forceinline__ u32 metadata() const { return kept >> 16; }
    __device__ __forceinline__ void gather(const u32 (&words)[8], u32 (&kept)[4]) const {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            kept[2 * c] = both_high[c] ? words[4 * c + 3] : words[4 * c];
            kept[2 * c + 1] = both_low[c] ? words[4 * c + 1] : words[4 * c + 2];
        }
    }
    __device__ __forceinline__ void scatter(const u32 (&kept)[4], u32 (&words)[8]) const {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            (both_high[c] ? words[4 * c + 3] : words[4 * c]) = kept[2 * c];
            (both_low[c] ? words[4 * c + 1] : words[4 * c + 2]) = kept[2 * c + 1];
        }
    }

private:
    static __device__ __forceinline__ void sort(bool swap, u32& first, u32& second) {
        const u32 better = swap ? second : first;
        second = swap ? first : second, first = better;
    }
};

// Elements compete in each four k.
struct ElementMask {
    Kept chunks[4];

    __device__ __forceinline__ explicit ElementMask(const u32 (&words)[8])
        : chunks{of(words, 0), of(words, 2), of(words, 4), of(words, 6)} {}
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
            const u32 first = chunks[c].first(0, 4, 8), second = chunks[c].second(4, 8, 12);
            kept |= ((codes >> first & 15) | (codes >> second & 15) << 4) << 8 * c;
        }
        return kept;
    }

private:
    static __device__ __forceinline__ Kept of(const u32 (&words)[8], int i) {
        const u32 even = __byte_perm(words[i], words[i + 1], 0x5410), odd = __byte_perm(words[i], words[i + 1], 0x7632);
        return Kept(__habs2(two_bf16(even)), __habs2(two_bf16(odd)));
    }
};

// ---- scales ---------------------------------------------------------------------------------------------------------

struct Ue4m3 {
    u32 byte;
    float value;
};

// Nearest UE4M3 of s, not negative; ties to even, subnormals kept, saturating.
__device__ __forceinline__ Ue4m3 round_ue4m3(float s) {
#if PTX_ARCH >= 89
    const uint16_t code = ptx::e4m3x2(s, 0.0f);
    return {code, __low2float(two_halves(ptx::f16x2_of_e4m3(code)))};
#else
    s = fminf(s, 448.0f);
    // Numbers in [2^e, 2^(e+1)) have steps of 2^(e−3), those below 2^-6 the steps of e = −6; adding 2^(20+e), whose
    // last bit is worth a step, rounds and leaves s / step there.
    const u32 power = max(__float_as_uint(s) & kInfinityBits, 121u << 23);  // 2^e
    const float aligner = __uint_as_float(power + (20u << 23)), aligned = __fadd_rn(s, aligner);
    const u32 steps = __float_as_uint(aligned) - __float_as_uint(aligner);
    return {steps + (power >> 20) - (121u << 3), __fadd_rn(aligned, -aligner)};
#endif
}

// Nearest E4M3 code of x, saturating; the sign is x's.
__device__ __forceinline__ u32 e4m3_code(float x) {
    return round_ue4m3(fabsf(x)).byte | (__float_as_uint(x) >> 24 & 0x80u);
}
// Of two numbers, the first's code in the low byte.
__device__ __forceinline__ u32 e4m3_codes(float low, float high) {
#if PTX_ARCH >= 89
    return ptx::e4m3x2(low, high);
#else
    return e4m3_code(low) | e4m3_code(high) << 8;
#endif
}

// The scale s of E2M1 elements: as it is stored, the same in all the block's lanes; twice in bf16; and 1 / 2s.
struct E2m1Scale {
    u32 stored, unit;
    float half_inverse;

    // What is left of two bf16 numbers when their rounded sizes are taken away: exact, so +0 where nothing is left.
    __device__ __forceinline__ u32 residual(u32 x, u32 size) const {
        return word_of(__hfma2(__hneg2(two_bf16(size | (x & 0x80008000u))), two_bf16(unit), two_bf16(x)));
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
    static constexpr bool kGlobalScale = true, kE2m1 = true;
    static constexpr int kBlock = 16, kSparseBlock = 32;
    using Scale = u8;
    using Meta = u8;  // of a tile

    // The definition rounds x · fp32(1/s), which lies above a tie it should meet where s = 15·2^e and the tie is at
    // 1.25·2^i, but not where it is at 2^i. A factor of 1 + .9·2^-11 does the same to fp16: it is lost in rounding 2^i
    // and not in rounding 1.25·2^i. (All other ties are met, or round up either way; and since x has 8 significant bits
    // and s has 4, what is no tie is far from one, by 2^-9, so that the reciprocal may be an approximate one.)
    static __device__ __forceinline__ float half_inverse(float s) {
        const bool is_15 = (__float_as_uint(s) & 0x00700000u) == 0x00700000u;
        return __fmul_rn(ptx::reciprocal(s), is_15 ? 0.5f * (1.0f + 0.9f * 0x1p-11f) : 0.5f);
    }

    // amax: of the tile; block: k the scale is for.
    template <int block>
    static __device__ __forceinline__ E2m1Scale scale(float amax) {
        amax = max_of_lanes<block / kTile>(amax);
        const Ue4m3 nearest = round_ue4m3(fmaxf(__fmul_rn(amax, 1.0f / 6.0f), 0x1p-9f));
        return {nearest.byte, Word<bf16>::pack(nearest.value, nearest.value), half_inverse(nearest.value)};
    }
};

struct Mxfp4 {
    static constexpr bool kGlobalScale = false, kE2m1 = true;
    static constexpr int kBlock = 32, kSparseBlock = 32;
    using Scale = u8;
    using Meta = u8;

    // byte = exponent of amax − 2, at least 0; byte 0 is 2^-127, subnormal. Half the reciprocal is 2^(126 − byte).
    template <int block>
    static __device__ __forceinline__ E2m1Scale scale(float amax) {
        const u32 byte = max(__float_as_uint(max_of_lanes<block / kTile>(amax)) >> 23, 2u) - 2;
        return {byte, max(byte << 7, 0x0040u) * 0x10001u, __uint_as_float((253 - byte) << 23)};
    }
};

struct Hif4 {
    static constexpr bool kGlobalScale = false, kE2m1 = false;
    static constexpr int kBlock = 64, kSparseBlock = 64;
    using Scale = u32;
    using Meta = unsigned short;

    // E1_16 of k in [4i, 4i + 4) in bit 16 + i, E1_8 of [8i, 8i + 8) in bit 8 + i, E6M2 in bits 7:0.
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
