// The rows that prepare_* operations quantise, made one at a time into a thread's buffer: loaded, or normalised, or
// silu(gate) · up rounded to bf16. Include in kernel files only.
#pragma once

#include "fp4_lanes.h"
#include "product_args.h"
#include "scratch.h"
#include "thread_pool.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

constexpr int64_t kGrainElements = 8192;  // elements a thread takes at a time
constexpr int32_t kInfinity = 0x7f800000;
constexpr int32_t kBeyondBf16 = 0x7f7f8000;  // fp32 numbers from here on round to bf16's infinity

// Each fills row [K], and zeros up to a whole vector, and returns the largest magnitude's bits; infinity and NaN are
// larger than any number's.
template <class T>
int32_t load_row(const T* x, float* row, int64_t K) {
    I32x16 largest = broadcast_i32(0);
    for (int64_t k = 0; k < K; k += kLanes) {
        const int64_t n = min_of(kLanes, K - k);
        const F32x16 v = load_up_to(x + k, n);
        largest = max(largest, float_to_bits(abs(v)));
        store(row + k, v);
    }
    return largest_lane(largest);
}

template <class T>
int32_t norm_row(const T* x, const float* weight, float eps, float* row, int64_t K) {
    const F32x16 scale = broadcast(inverse_rms(x, K, eps));
    I32x16 largest = broadcast_i32(0);
    for (int64_t k = 0; k < K; k += kLanes) {
        const int64_t n = min_of(kLanes, K - k);
        const F32x16 v = (load_up_to(x + k, n) * scale) * load_up_to(weight + k, n);
        largest = max(largest, float_to_bits(abs(v)));
        store(row + k, rounded_to_bf16(v));
    }
    return largest_lane(largest);
}

template <class T>
int32_t silu_row(const T* gate, const T* up, float* row, int64_t K) {
    I32x16 largest = broadcast_i32(0);
    for (int64_t k = 0; k < K; k += kLanes) {
        const int64_t n = min_of(kLanes, K - k);
        const F32x16 g = load_up_to(gate + k, n);
        const F32x16 v = (g / (broadcast(1.0f) + exp32(negate(g)))) * load_up_to(up + k, n);
        largest = max(largest, float_to_bits(abs(v)));
        store(row + k, rounded_to_bf16(v));
    }
    return largest_lane(largest);
}

template <class T>
int32_t make_row(const OperandRows& a, int64_t t, float* row) {
    const T* x = static_cast<const T*>(a.x) + t * a.x_stride;
    if (a.silu) return silu_row(x, x + a.K, row, a.K);
    if (a.norm_weight) return norm_row(x, a.norm_weight, a.eps, row, a.K);
    return load_row(x, row, a.K);
}

static inline bool is_fused(const OperandRows& a) { return a.silu || a.norm_weight; }
static inline int32_t first_refused(const OperandRows& a) { return is_fused(a) ? kBeyondBf16 : kInfinity; }

// quantise(t, row [K], its largest magnitude) for every row, in any order and thread. Stops and answers false where the
// bits of a largest magnitude are at least `limit`.
template <class F>
bool for_each_row(const OperandRows& a, int32_t limit, ThreadPool& pool, Scratch& scratch, F&& quantise) {
    const int64_t stride = ceil_div(a.K, kLanes) * kLanes;
    float* rows = static_cast<float*>(scratch.reserve(static_cast<size_t>(pool.threads() * stride) * sizeof(float)));
    int bad = 0;  // only ever set to 1, by any thread, and read after the loop
    with_type(a.x_type, [&](auto tag) {
        using T = typename decltype(tag)::type;
        pool.parallel_for(a.T, max_of(1, kGrainElements / stride), [&](int64_t begin, int64_t end, int thread) {
            float* row = rows + thread * stride;
            for (int64_t t = begin; t < end; ++t) {
                const int32_t largest = make_row<T>(a, t, row);
                if (largest >= limit) return __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
                const F32x16 amax = broadcast(bits_float(static_cast<uint32_t>(largest)));
                quantise(t, row, first_lane(is_fused(a) ? rounded_to_bf16(amax) : amax));  // rounding is monotonic
            }
        });
    });
    return !bad;
}

}  // namespace
}  // namespace ENGINE_ISA
}  // namespace engine
