// embed, rms_norm, silu_mul: one pass over rows, bit for bit what engine/ops/reference.py defines.

#include "kernels.h"
#include "simd.h"
#include "fp32_math.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

// Elements a thread takes at a time. Waking another thread costs about what 8192 elements of silu do.
constexpr int64_t kGrainElements = 8192;

static inline int64_t row_grain(int64_t columns) { return max_of(1, kGrainElements / columns); }

template <class In, class Out>
void convert_row(const In* in, Out* out, int64_t C) {
    for (int64_t i = 0; i < C; i += kLanes) {
        const int64_t n = min_of(kLanes, C - i);
        store_up_to(out + i, load_up_to(in + i, n), n);
    }
}

template <class T>
void convert_row(const T* in, T* out, int64_t C) {
    std::memcpy(out, in, static_cast<size_t>(C) * sizeof(T));
}

template <class T>
void rms_norm_row(const T* x, const float* weight, float eps, T* out, int64_t C) {
    const F32x16 scale = broadcast(inverse_rms(x, C, eps));
    for (int64_t i = 0; i < C; i += kLanes) {
        const int64_t n = min_of(kLanes, C - i);
        store_up_to(out + i, (load_up_to(x + i, n) * scale) * load_up_to(weight + i, n), n);
    }
}

template <class T>
void silu_mul_row(const T* gate, const T* up, T* out, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kLanes) {
        const int64_t n = min_of(kLanes, end - i);
        const F32x16 g = load_up_to(gate + i, n);
        const F32x16 silu = g / (broadcast(1.0f) + exp32(negate(g)));
        store_up_to(out + i, silu * load_up_to(up + i, n), n);
    }
}

}  // namespace

void embed(const EmbedArgs& a, ThreadPool& pool) {
    with_type(a.table_type, [&](auto in) {
        with_type(a.out_type, [&](auto result) {
            using In = typename decltype(in)::type;
            using Out = typename decltype(result)::type;
            pool.parallel_for(a.T, row_grain(a.C), [&](int64_t begin, int64_t end, int) {
                for (int64_t t = begin; t < end; ++t) {
                    const In* row = static_cast<const In*>(a.table) + a.token_ids[t] * a.table_stride;
                    convert_row(row, static_cast<Out*>(a.out) + t * a.out_stride, a.C);
                }
            });
        });
    });
}

void rms_norm(const RmsNormArgs& a, ThreadPool& pool) {
    with_type(a.type, [&](auto tag) {
        using T = typename decltype(tag)::type;
        pool.parallel_for(a.T, row_grain(a.C), [&](int64_t begin, int64_t end, int) {
            for (int64_t t = begin; t < end; ++t) {
                const T* x = static_cast<const T*>(a.x) + t * a.x_stride;
                rms_norm_row(x, a.weight, a.eps, static_cast<T*>(a.out) + t * a.out_stride, a.C);
            }
        });
    });
}

// A piece is kGrainElements columns of one row, so that one long row can occupy several threads.
void silu_mul(const SiluMulArgs& a, ThreadPool& pool) {
    const int64_t pieces = ceil_div(a.F, kGrainElements);
    with_type(a.type, [&](auto tag) {
        using T = typename decltype(tag)::type;
        pool.parallel_for(a.T * pieces, row_grain(a.F), [&](int64_t begin, int64_t end, int) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t t = i / pieces, first = i % pieces * kGrainElements;
                const T* gate = static_cast<const T*>(a.gate_up) + t * a.gate_up_stride;
                T* out = static_cast<T*>(a.out) + t * a.out_stride;
                silu_mul_row(gate, gate + a.F, out, first, min_of(first + kGrainElements, a.F));
            }
        });
    });
}

}  // namespace ENGINE_ISA
}  // namespace engine
