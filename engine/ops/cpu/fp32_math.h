// Arithmetic that engine/ops/reference.py fixes to the last bit, on sixteen lanes. Include in kernel files only, after
// simd.h. Compile with -ffp-contract=off: a multiplication and an addition stay two roundings unless fma() says so.
#pragma once

#include "simd.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

#if ENGINE_ISA_LEVEL >= 2

static inline F32x16 add_neighbours(F32x16 a, F32x16 b) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return F32x16{_mm512_permutex2var_ps(a.v, even, b.v)} + F32x16{_mm512_permutex2var_ps(a.v, odd, b.v)};
}
static inline float first_lane(F32x16 a) { return _mm512_cvtss_f32(a.v); }
static inline float largest_lane(F32x16 a) { return _mm512_reduce_max_ps(a.v); }
static inline F32x16 scale_by_power_of_two(F32x16 p, F32x16 n) { return {_mm512_scalef_ps(p.v, n.v)}; }

#elif ENGINE_ISA_LEVEL == 1

static inline __m256 add_neighbours(__m256 a, __m256 b) {
    const __m256d mixed = _mm256_castps_pd(_mm256_hadd_ps(a, b));  // works within 128-bit halves
    return _mm256_castpd_ps(_mm256_permute4x64_pd(mixed, 0xd8));
}
static inline F32x16 add_neighbours(F32x16 x, F32x16 y) { return {add_neighbours(x.a, x.b), add_neighbours(y.a, y.b)}; }
static inline float first_lane(F32x16 x) { return _mm256_cvtss_f32(x.a); }
static inline float largest_lane(F32x16 x) {
    const __m256 eight = _mm256_max_ps(x.a, x.b);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

#else

static inline F32x16 add_neighbours(F32x16 a, F32x16 b) {
    F32x16 r;
    for (int i = 0; i < kLanes / 2; ++i) {
        r.v[i] = a.v[2 * i] + a.v[2 * i + 1];
        r.v[i + kLanes / 2] = b.v[2 * i] + b.v[2 * i + 1];
    }
    return r;
}
static inline float first_lane(F32x16 a) { return a.v[0]; }
static inline float largest_lane(F32x16 a) {
    float largest = a.v[0];
    for (int i = 1; i < kLanes; ++i) largest = a.v[i] > largest ? a.v[i] : largest;
    return largest;
}

#endif

#if ENGINE_ISA_LEVEL < 2
// p · 2^n, one rounding: 2^n may not be an fp32, its two factors are.
static inline F32x16 scale_by_power_of_two(F32x16 p, F32x16 n) {
    const I32x16 bias = broadcast_i32(127), exponent = to_i32(n), half = shift_right_signed<1>(exponent);
    const F32x16 first = bits_to_float(shift_left<23>(half + bias));
    const F32x16 second = bits_to_float(shift_left<23>(exponent - half + bias));
    return (p * first) * second;
}
#endif

static inline F32x16 negate(F32x16 a) { return broadcast(-1.0f) * a; }  // also of zeros

// Loads and stores of the first n lanes, n in 1..16, quick for 16.
template <class T>
static inline F32x16 load_up_to(const T* p, int64_t n) { return n == kLanes ? load(p) : load_n(p, n); }
template <class T>
static inline void store_up_to(T* p, F32x16 a, int64_t n) { n == kLanes ? store(p, a) : store_n(p, a, n); }

static inline float sum_of_lanes(F32x16 a) {
    for (int width = kLanes; width > 1; width /= 2) a = add_neighbours(a, a);
    return first_lane(a);
}

// e^x, exactly reference.exp32.
static inline F32x16 exp32(F32x16 x) {
    x = min(broadcast(89.0f), max(broadcast(-104.0f), x));  // in this order of arguments NaN stays
    const F32x16 n = round_to_integer(x * broadcast(1.44269504f));
    const F32x16 r = fma(broadcast(1.90465421e-9f), n, fma(broadcast(-0.693147182f), n, x));
    F32x16 p = broadcast(0x1.6a23cep-10f);
    p = fma(p, r, broadcast(0x1.123a2p-7f));
    p = fma(p, r, broadcast(0x1.5558f2p-5f));
    p = fma(p, r, broadcast(0x1.555492p-3f));
    p = fma(p, r, broadcast(0x1.fffffcp-2f));
    p = fma(p, r, broadcast(1.0f));
    p = fma(p, r, broadcast(1.0f));
    return scale_by_power_of_two(p, n);
}

template <class T>
struct Element {
    using type = T;
};

// Calls f(Element<T>{}) for the C++ type of `type`, which is one of activations.
template <class F>
static inline void with_type(DType type, F&& f) {
    switch (type) {
        case DType::f32: return f(Element<float>{});
        case DType::f16: return f(Element<f16>{});
        case DType::bf16: return f(Element<bf16>{});
        case DType::e4m3: return;
    }
}

constexpr int64_t kPartials = 1024;  // reference.NUM_PARTIALS

// Sixteen neighbouring partial sums of x [K] squared, from partial `first` on.
template <class T>
static inline F32x16 partial_squares(const T* x, int64_t K, int64_t first) {
    F32x16 sum = zero();
    int64_t k = first;
    for (; k + kLanes <= K; k += kPartials) {
        const F32x16 v = load(x + k);
        sum = fma(v, v, sum);
    }
    if (k >= K) return sum;
    const F32x16 v = load_n(x + k, K - k);
    return fma(v, v, sum);
}

// The tree over 16 · `vectors` partial sums, stopped where sixteen sums are left. Nothing to add beyond K: x + 0 is x.
template <int vectors, class T>
static inline F32x16 sixteen_sums(const T* x, int64_t K, int64_t first) {
    if (first >= K) return zero();
    if constexpr (vectors == 1) {
        return partial_squares(x, K, first);
    } else {
        return add_neighbours(sixteen_sums<vectors / 2>(x, K, first),
                              sixteen_sums<vectors / 2>(x, K, first + vectors / 2 * kLanes));
    }
}

// 1 / sqrt(mean(x²) + eps), exactly reference.inverse_rms.
template <class T>
static inline float inverse_rms(const T* x, int64_t K, float eps) {
    const float sum = sum_of_lanes(sixteen_sums<kPartials / kLanes>(x, K, 0));
    return 1.0f / __builtin_sqrtf(sum / static_cast<float>(K) + eps);
}

}  // namespace
}  // namespace ENGINE_ISA
}  // namespace engine
