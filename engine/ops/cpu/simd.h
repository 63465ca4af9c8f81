// Sixteen fp32 lanes, written once for every instruction set, so that kernels have one text and, where they use only
// the operations marked exact, one result on all of them.
//
// Include in kernel files only. Everything is in an unnamed namespace inside the instruction set's own: nothing here
// can be shared with code compiled for another one.
//
// Loads convert to fp32 (exact). Stores round to nearest even, keep subnormals, turn overflow into infinity, and keep
// NaN a (quiet) NaN. `n` in load_n/store_n is the number of elements, 0..16; missing lanes read as 0.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtypes.h"

#if ENGINE_ISA_LEVEL >= 1
#include <immintrin.h>
#endif

namespace engine {
namespace ENGINE_ISA {
namespace {

constexpr int kLanes = 16;

template <class T>
struct type_tag {};

static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

#if ENGINE_ISA_LEVEL >= 2  // ---------------------------------------------------------------- AVX-512: one register

struct F32x16 {
    __m512 v;
};
struct I32x16 {
    __m512i v;
};

static inline F32x16 zero() { return {_mm512_setzero_ps()}; }
static inline F32x16 broadcast(float a) { return {_mm512_set1_ps(a)}; }
static inline I32x16 broadcast_i32(int32_t a) { return {_mm512_set1_epi32(a)}; }

static inline F32x16 operator+(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline F32x16 operator-(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline F32x16 operator*(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline F32x16 operator/(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline F32x16 sqrt(F32x16 a) { return {_mm512_sqrt_ps(a.v)}; }
static inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // one rounding
static inline F32x16 min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }  // b where either is NaN
static inline F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is NaN
static inline F32x16 round_to_integer(F32x16 a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

static inline I32x16 operator+(I32x16 a, I32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline I32x16 operator-(I32x16 a, I32x16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
static inline I32x16 operator&(I32x16 a, I32x16 b) { return {_mm512_and_si512(a.v, b.v)}; }
template <int n>
static inline I32x16 shift_left(I32x16 a) { return {_mm512_slli_epi32(a.v, n)}; }
template <int n>
static inline I32x16 shift_right_signed(I32x16 a) { return {_mm512_srai_epi32(a.v, n)}; }
static inline F32x16 bits_to_float(I32x16 a) { return {_mm512_castsi512_ps(a.v)}; }
static inline I32x16 float_to_bits(F32x16 a) { return {_mm512_castps_si512(a.v)}; }
static inline I32x16 to_i32(F32x16 a) { return {_mm512_cvtps_epi32(a.v)}; }  // of integers; anything for NaN

static inline I32x16 load_i32(const void* p) { return {_mm512_loadu_si512(p)}; }
// Aligned, and in the order written among others of its kind: a stream read in ascending order is what the CPU
// prefetches best, and compilers move loads about.
static inline __m512i load_in_order(const void* p) {
    __m512i r;
    asm volatile("vmovdqa64 %1, %0" : "=v"(r) : "m"(*static_cast<const __m512i*>(p)));
    return r;
}
static inline F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline F32x16 load(const f16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
static inline F32x16 load(const bf16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
static inline F32x16 load(const e4m3* p) {  // not for NaN; read as fp16, whose exponent bias is larger by 8
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i magnitude = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(0x3f80));
    const __m256i sign = _mm256_and_si256(_mm256_slli_epi16(wide, 8), _mm256_set1_epi16(INT16_MIN));
    return F32x16{_mm512_cvtph_ps(_mm256_or_si256(magnitude, sign))} * broadcast(256.0f);
}
static inline void store(float* p, F32x16 a) { _mm512_storeu_ps(p, a.v); }
static inline void store(f16* p, F32x16 a) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, mode));
}
static inline void store(bf16* p, F32x16 a) {
    // Not vcvtneps2bf16, which flushes subnormals.
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(last, _mm512_set1_epi32(0x7fff)));
    up = _mm512_mask_or_epi32(up, _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}

#elif ENGINE_ISA_LEVEL == 1  // ------------------------------------------------------------------ AVX2: two registers

struct F32x16 {
    __m256 a, b;
};
struct I32x16 {
    __m256i a, b;
};

static inline F32x16 zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline F32x16 broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline I32x16 broadcast_i32(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }

static inline F32x16 operator+(F32x16 x, F32x16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline F32x16 operator-(F32x16 x, F32x16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
static inline F32x16 operator*(F32x16 x, F32x16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static inline F32x16 operator/(F32x16 x, F32x16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
static inline F32x16 sqrt(F32x16 x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
static inline F32x16 fma(F32x16 x, F32x16 y, F32x16 z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
static inline F32x16 min(F32x16 x, F32x16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
static inline F32x16 max(F32x16 x, F32x16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
static inline F32x16 round_to_integer(F32x16 x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.a, mode), _mm256_round_ps(x.b, mode)};
}

static inline I32x16 operator+(I32x16 x, I32x16 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
static inline I32x16 operator-(I32x16 x, I32x16 y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
static inline I32x16 operator&(I32x16 x, I32x16 y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
template <int n>
static inline I32x16 shift_left(I32x16 x) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
template <int n>
static inline I32x16 shift_right_signed(I32x16 x) { return {_mm256_srai_epi32(x.a, n), _mm256_srai_epi32(x.b, n)}; }
static inline F32x16 bits_to_float(I32x16 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
static inline I32x16 float_to_bits(F32x16 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
static inline I32x16 to_i32(F32x16 x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }

static inline __m128i load_8_halves(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
static inline I32x16 load_i32(const void* p) {
    return {_mm256_loadu_si256(static_cast<const __m256i*>(p)), _mm256_loadu_si256(static_cast<const __m256i*>(p) + 1)};
}
static inline F32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline F32x16 load(const f16* p) {
    return {_mm256_cvtph_ps(load_8_halves(p)), _mm256_cvtph_ps(load_8_halves(p + 8))};
}
static inline F32x16 load(const bf16* p) {
    const I32x16 wide{_mm256_cvtepu16_epi32(load_8_halves(p)), _mm256_cvtepu16_epi32(load_8_halves(p + 8))};
    return bits_to_float(shift_left<16>(wide));
}
static inline F32x16 load(const e4m3* p) {  // not for NaN; read as fp16, whose exponent bias is larger by 8
    const __m256i wide = _mm256_cvtepu8_epi16(load_8_halves(p));
    const __m256i magnitude = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(0x3f80));
    const __m256i sign = _mm256_and_si256(_mm256_slli_epi16(wide, 8), _mm256_set1_epi16(INT16_MIN));
    const __m256i halves = _mm256_or_si256(magnitude, sign);
    const F32x16 small{_mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
                       _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
    return small * broadcast(256.0f);
}
static inline void store(float* p, F32x16 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
static inline void store(f16* p, F32x16 x) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, mode));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, mode));
}
static inline __m256i rounded_to_bf16(__m256 x) {  // in the low half of each 32-bit lane
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(last, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, is_nan), 16);
}
static inline void store(bf16* p, F32x16 x) {
    const __m256i packed = _mm256_packus_epi32(rounded_to_bf16(x.a), rounded_to_bf16(x.b));  // per 128-bit half
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

#else  // ------------------------------------------------- portable: compiler vectors, as many registers as it takes

typedef float RawF32x16 __attribute__((vector_size(64)));
typedef int32_t RawI32x16 __attribute__((vector_size(64)));

struct F32x16 {
    RawF32x16 v;
};
struct I32x16 {
    RawI32x16 v;
};

static inline F32x16 broadcast(float a) { return {RawF32x16{a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a}}; }
static inline I32x16 broadcast_i32(int32_t a) { return {RawI32x16{a, a, a, a, a, a, a, a, a, a, a, a, a, a, a, a}}; }
static inline F32x16 zero() { return broadcast(0.0f); }

static inline F32x16 operator+(F32x16 a, F32x16 b) { return {a.v + b.v}; }
static inline F32x16 operator-(F32x16 a, F32x16 b) { return {a.v - b.v}; }
static inline F32x16 operator*(F32x16 a, F32x16 b) { return {a.v * b.v}; }
static inline F32x16 operator/(F32x16 a, F32x16 b) { return {a.v / b.v}; }
static inline F32x16 min(F32x16 a, F32x16 b) { return {a.v < b.v ? a.v : b.v}; }
static inline F32x16 max(F32x16 a, F32x16 b) { return {a.v > b.v ? a.v : b.v}; }
static inline F32x16 sqrt(F32x16 a) {
    for (int i = 0; i < kLanes; ++i) a.v[i] = __builtin_sqrtf(a.v[i]);
    return a;
}
static inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {  // exact, hence a slow library call on x86 without FMA
    for (int i = 0; i < kLanes; ++i) c.v[i] = __builtin_fmaf(a.v[i], b.v[i], c.v[i]);
    return c;
}
static inline F32x16 round_to_integer(F32x16 a) {
    for (int i = 0; i < kLanes; ++i) a.v[i] = __builtin_nearbyintf(a.v[i]);
    return a;
}

static inline I32x16 operator+(I32x16 a, I32x16 b) { return {a.v + b.v}; }
static inline I32x16 operator-(I32x16 a, I32x16 b) { return {a.v - b.v}; }
static inline I32x16 operator&(I32x16 a, I32x16 b) { return {a.v & b.v}; }
template <int n>
static inline I32x16 shift_left(I32x16 a) { return {a.v << n}; }
template <int n>
static inline I32x16 shift_right_signed(I32x16 a) { return {a.v >> n}; }
static inline F32x16 bits_to_float(I32x16 a) { return {reinterpret_cast<RawF32x16>(a.v)}; }
static inline I32x16 float_to_bits(F32x16 a) { return {reinterpret_cast<RawI32x16>(a.v)}; }
static inline I32x16 to_i32(F32x16 a) {
    I32x16 r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = a.v[i] == a.v[i] ? static_cast<int32_t>(a.v[i]) : 0;
    return r;
}

static inline float float_of(uint32_t bits) {
    float r;
    std::memcpy(&r, &bits, 4);
    return r;
}
static inline uint32_t bits_of(float a) {
    uint32_t r;
    std::memcpy(&r, &a, 4);
    return r;
}
static inline float to_float(bf16 a) { return float_of(uint32_t{a.bits} << 16); }
static inline float to_float(f16 a) {
    const uint32_t sign = uint32_t{a.bits & 0x8000u} << 16, magnitude = a.bits & 0x7fffu;
    if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | magnitude << 13);  // infinity, NaN
    const float value = float_of(magnitude << 13) * 0x1p112f;                       // exact; also for subnormals
    return float_of(sign | bits_of(value));
}
static inline float to_float(e4m3 a) {  // not for NaN
    return float_of(uint32_t{a.bits & 0x80u} << 24 | uint32_t{a.bits & 0x7fu} << 20) * 0x1p120f;
}
static inline bf16 to_bf16(float a) {
    const uint32_t bits = bits_of(a);
    if (a != a) return {static_cast<uint16_t>((bits | 0x400000) >> 16)};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
static inline f16 to_f16(float a) {
    const uint32_t sign = bits_of(a) >> 16 & 0x8000, magnitude = bits_of(a) & 0x7fffffff;
    uint32_t r;
    if (magnitude > 0x7f800000) r = 0x7e00 | (magnitude >> 13 & 0x1ff);  // NaN
    else if (magnitude >= 0x477ff000) r = 0x7c00;                        // rounds to 2^16 or more
    else if (magnitude < 0x38800000)  // below 2^-14: adding 1/2 leaves multiples of 2^-24 in the low bits, rounded
        r = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
    else r = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    return {static_cast<uint16_t>(sign | r)};
}

static inline I32x16 load_i32(const void* p) {
    I32x16 r;
    std::memcpy(&r, p, 64);
    return r;
}
static inline F32x16 load(const float* p) {
    F32x16 r;
    std::memcpy(&r, p, 64);
    return r;
}
template <class T>
static inline F32x16 load(const T* p) {
    F32x16 r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = to_float(p[i]);
    return r;
}
static inline void store(float* p, F32x16 a) { std::memcpy(p, &a, 64); }
static inline void store(f16* p, F32x16 a) {
    for (int i = 0; i < kLanes; ++i) p[i] = to_f16(a.v[i]);
}
static inline void store(bf16* p, F32x16 a) {
    for (int i = 0; i < kLanes; ++i) p[i] = to_bf16(a.v[i]);
}

#endif

// Rows become columns: lane j of a[i] and lane i of a[j] change places.
static inline void transpose(I32x16 (&a)[kLanes]) {
#if ENGINE_ISA_LEVEL >= 2
    I32x16 b[kLanes];
    for (int i = 0; i < 16; i += 2) {  // 2 × 2 blocks of 32 bits within each 128-bit quarter, then of 64 bits
        b[i].v = _mm512_unpacklo_epi32(a[i].v, a[i + 1].v);
        b[i + 1].v = _mm512_unpackhi_epi32(a[i].v, a[i + 1].v);
    }
    for (int i = 0; i < 16; i += 4) {  // now a[i + j] holds, per quarter q, column 4q + j of rows i … i + 3
        a[i].v = _mm512_unpacklo_epi64(b[i].v, b[i + 2].v);
        a[i + 1].v = _mm512_unpackhi_epi64(b[i].v, b[i + 2].v);
        a[i + 2].v = _mm512_unpacklo_epi64(b[i + 1].v, b[i + 3].v);
        a[i + 3].v = _mm512_unpackhi_epi64(b[i + 1].v, b[i + 3].v);
    }
    for (int j = 0; j < 4; ++j) {  // 4 × 4 quarters
        const __m512i low01 = _mm512_shuffle_i32x4(a[j].v, a[j + 4].v, 0x44);
        const __m512i high01 = _mm512_shuffle_i32x4(a[j].v, a[j + 4].v, 0xee);
        const __m512i low23 = _mm512_shuffle_i32x4(a[j + 8].v, a[j + 12].v, 0x44);
        const __m512i high23 = _mm512_shuffle_i32x4(a[j + 8].v, a[j + 12].v, 0xee);
        b[j].v = _mm512_shuffle_i32x4(low01, low23, 0x88);
        b[j + 4].v = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        b[j + 8].v = _mm512_shuffle_i32x4(high01, high23, 0x88);
        b[j + 12].v = _mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
    for (int i = 0; i < 16; ++i) a[i] = b[i];
#else
    int32_t in[kLanes][kLanes], out[kLanes][kLanes];
    std::memcpy(in, a, sizeof in);
    for (int i = 0; i < kLanes; ++i)
        for (int j = 0; j < kLanes; ++j) out[j][i] = in[i][j];
    std::memcpy(a, out, sizeof out);
#endif
}

// a·b + c, fused where that is fast: for sums whose bits the contract leaves to the backend.
static inline F32x16 mul_add(F32x16 a, F32x16 b, F32x16 c) {
#if ENGINE_ISA_LEVEL >= 1 || defined(__FP_FAST_FMAF)
    return fma(a, b, c);
#else
    return a * b + c;
#endif
}

template <class T>
static inline F32x16 load_n(const T* p, int64_t n) {
    if (n == kLanes) return load(p);
    T full[kLanes] = {};
    std::memcpy(full, p, static_cast<size_t>(n) * sizeof(T));
    return load(full);
}

static inline void store_n(int32_t* p, I32x16 a, int64_t n) {
#if ENGINE_ISA_LEVEL >= 2
    _mm512_mask_storeu_epi32(p, static_cast<__mmask16>((1u << n) - 1), a.v);
#else
    std::memcpy(p, &a, static_cast<size_t>(n) * sizeof(int32_t));
#endif
}

template <class T>
static inline void store_n(T* p, F32x16 a, int64_t n) {
    if (n == kLanes) return store(p, a);
    T full[kLanes];
    store(full, a);
    std::memcpy(p, full, static_cast<size_t>(n) * sizeof(T));
}

}  // namespace
}  // namespace ENGINE_ISA
}  // namespace engine
