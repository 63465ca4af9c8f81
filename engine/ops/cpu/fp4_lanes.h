// What the FP4 kernels need of sixteen lanes beyond simd.h and fp32_math.h: comparisons, neighbours, nibbles. Include
// in kernel files only. A comparison gives a number whose bit i belongs to lane i. Everything here is exact.
#pragma once

#include "fp32_math.h"
#include "simd.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

#if ENGINE_ISA_LEVEL >= 2

static inline uint32_t greater(F32x16 a, F32x16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
static inline uint32_t at_least(F32x16 a, F32x16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
static inline F32x16 keep(uint32_t mask, F32x16 a) { return {_mm512_maskz_mov_ps(static_cast<__mmask16>(mask), a.v)}; }
static inline I32x16 max(I32x16 a, I32x16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
static inline I32x16 min(I32x16 a, I32x16 b) { return {_mm512_min_epi32(a.v, b.v)}; }
static inline I32x16 operator|(I32x16 a, I32x16 b) { return {_mm512_or_si512(a.v, b.v)}; }

static inline F32x16 max_of_neighbours(F32x16 a, F32x16 b) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return {_mm512_max_ps(_mm512_permutex2var_ps(a.v, even, b.v), _mm512_permutex2var_ps(a.v, odd, b.v))};
}
template <int n>
static inline F32x16 rotate_in_fours(F32x16 a) {
    return {_mm512_permute_ps(a.v, n == 1 ? 0x39 : n == 2 ? 0x4e : 0x93)};
}
static inline F32x16 swap_fours(F32x16 a) { return {_mm512_shuffle_f32x4(a.v, a.v, 0xb1)}; }
static inline uint64_t nibbles(I32x16 codes) {
    const __m512i pairs = _mm512_or_si512(codes.v, _mm512_srli_epi64(codes.v, 28));
    return static_cast<uint64_t>(_mm_cvtsi128_si64(_mm512_cvtepi64_epi8(pairs)));
}

#elif ENGINE_ISA_LEVEL == 1

static inline uint32_t bits_of_lanes(__m256 a, __m256 b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(a) | _mm256_movemask_ps(b) << 8);
}
static inline uint32_t greater(F32x16 x, F32x16 y) {
    return bits_of_lanes(_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ));
}
static inline uint32_t at_least(F32x16 x, F32x16 y) {
    return bits_of_lanes(_mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ));
}
static inline __m256 lanes_of_bits(uint32_t mask) {
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i all = _mm256_set1_epi32(static_cast<int32_t>(mask));
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, bit), bit));
}
static inline F32x16 keep(uint32_t mask, F32x16 x) {
    return {_mm256_and_ps(lanes_of_bits(mask), x.a), _mm256_and_ps(lanes_of_bits(mask >> 8), x.b)};
}
static inline I32x16 max(I32x16 x, I32x16 y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
static inline I32x16 min(I32x16 x, I32x16 y) { return {_mm256_min_epi32(x.a, y.a), _mm256_min_epi32(x.b, y.b)}; }
static inline I32x16 operator|(I32x16 x, I32x16 y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }

static inline __m256 max_of_neighbours(__m256 x, __m256 y) {
    const __m256 even = _mm256_shuffle_ps(x, y, 0x88), odd = _mm256_shuffle_ps(x, y, 0xdd);  // within 128-bit halves
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_max_ps(even, odd)), 0xd8));
}
static inline F32x16 max_of_neighbours(F32x16 x, F32x16 y) {
    return {max_of_neighbours(x.a, x.b), max_of_neighbours(y.a, y.b)};
}
template <int n>
static inline F32x16 rotate_in_fours(F32x16 x) {
    constexpr int order = n == 1 ? 0x39 : n == 2 ? 0x4e : 0x93;
    return {_mm256_permute_ps(x.a, order), _mm256_permute_ps(x.b, order)};
}
static inline F32x16 swap_fours(F32x16 x) {
    return {_mm256_permute2f128_ps(x.a, x.a, 1), _mm256_permute2f128_ps(x.b, x.b, 1)};
}
static inline uint64_t nibbles(__m256i codes) {  // of eight lanes: 32 bits
    const __m256i pairs = _mm256_or_si256(codes, _mm256_srli_epi64(codes, 28));  // in the lowest byte of each 64 bits
    const __m256i order = _mm256_setr_epi8(0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1,  //
                                           -1, -1, 0, 8, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i gathered = _mm256_shuffle_epi8(pairs, order);
    const __m128i both = _mm_or_si128(_mm256_castsi256_si128(gathered), _mm256_extracti128_si256(gathered, 1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(both));
}
static inline uint64_t nibbles(I32x16 codes) { return nibbles(codes.a) | nibbles(codes.b) << 32; }

#else

static inline uint32_t greater(F32x16 a, F32x16 b) {
    uint32_t mask = 0;
    for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(a.v[i] > b.v[i]) << i;
    return mask;
}
static inline uint32_t at_least(F32x16 a, F32x16 b) {
    uint32_t mask = 0;
    for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(a.v[i] >= b.v[i]) << i;
    return mask;
}
static inline F32x16 keep(uint32_t mask, F32x16 a) {
    for (int i = 0; i < kLanes; ++i) a.v[i] = mask >> i & 1 ? a.v[i] : 0.0f;
    return a;
}
static inline I32x16 max(I32x16 a, I32x16 b) { return {a.v > b.v ? a.v : b.v}; }
static inline I32x16 min(I32x16 a, I32x16 b) { return {a.v < b.v ? a.v : b.v}; }
static inline I32x16 operator|(I32x16 a, I32x16 b) { return {a.v | b.v}; }

static inline F32x16 max_of_neighbours(F32x16 a, F32x16 b) {
    F32x16 r;
    for (int i = 0; i < kLanes / 2; ++i) {
        r.v[i] = a.v[2 * i] > a.v[2 * i + 1] ? a.v[2 * i] : a.v[2 * i + 1];
        r.v[i + kLanes / 2] = b.v[2 * i] > b.v[2 * i + 1] ? b.v[2 * i] : b.v[2 * i + 1];
    }
    return r;
}
template <int n>
static inline F32x16 rotate_in_fours(F32x16 a) {
    F32x16 r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = a.v[(i & ~3) | ((i + n) & 3)];
    return r;
}
static inline F32x16 swap_fours(F32x16 a) {
    F32x16 r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = a.v[i ^ 4];
    return r;
}
static inline uint64_t nibbles(I32x16 codes) {
    uint64_t r = 0;
    for (int i = 0; i < kLanes; ++i) r |= static_cast<uint64_t>(codes.v[i]) << (4 * i);
    return r;
}

#endif

static inline I32x16 select(uint32_t mask, I32x16 yes, I32x16 no) {
    return float_to_bits(keep(mask, bits_to_float(yes))) | float_to_bits(keep(~mask, bits_to_float(no)));
}
static inline F32x16 abs(F32x16 a) { return bits_to_float(float_to_bits(a) & broadcast_i32(0x7fffffff)); }
static inline I32x16 sign_bits(F32x16 a) { return float_to_bits(a) & broadcast_i32(INT32_MIN); }

// `a` rounded to bf16, nearest-even, as fp32. Not for NaN.
static inline F32x16 rounded_to_bf16(F32x16 a) {
    const I32x16 bits = float_to_bits(a), last = shift_right_signed<16>(bits) & broadcast_i32(1);
    return bits_to_float((bits + last + broadcast_i32(0x7fff)) & broadcast_i32(-65536));
}

static inline int32_t largest_lane(I32x16 a) {
    int32_t lanes[kLanes], largest = INT32_MIN;
    std::memcpy(lanes, &a, sizeof lanes);
    for (int32_t lane : lanes) largest = lane > largest ? lane : largest;
    return largest;
}

static inline uint32_t float_bits(float a) {
    uint32_t bits;
    std::memcpy(&bits, &a, 4);
    return bits;
}
static inline float bits_float(uint32_t bits) {
    float a;
    std::memcpy(&a, &bits, 4);
    return a;
}

}  // namespace
}  // namespace ENGINE_ISA
}  // namespace engine
