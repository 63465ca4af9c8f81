// The end of an FP4 product: global scales, bias, residual, one rounding. Include in kernel files only.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

// sums [rows][32] of one tile to out[row …][column …]; only the first n columns exist. g [T], or null for 1.
template <class Out>
void finish_columns(const Fp4LinearArgs& a, const float* g, const float* sums, int64_t row, int64_t rows,
                    int64_t column, int64_t n) {
    for (int64_t r = row; r < row + rows; ++r, sums += 2 * kLanes) {
        Out* out = static_cast<Out*>(a.out) + r * a.out_stride + column;
        const Out* residual = static_cast<const Out*>(a.residual);
        if (residual) residual += r * a.residual_stride + column;
        for (int64_t j = 0; j < n; j += kLanes) {
            const int64_t left = min_of(kLanes, n - j);
            F32x16 scale = load(a.w_g + column + j);
            if (g) scale = broadcast(g[r]) * scale;
            F32x16 y = load(sums + j) * scale;
            if (a.bias) y = y + load_n(a.bias + column + j, left);
            if (residual) y = y + load_n(residual + j, left);
            store_n(out + j, y, left);
        }
    }
}

static inline void finish_tile(const Fp4LinearArgs& a, const float* g, const float* sums, int64_t row, int64_t rows,
                               int64_t column) {
    const int64_t n = min_of(2 * kLanes, a.N - column);
    if (a.out_type == DType::f32) return finish_columns<float>(a, g, sums, row, rows, column, n);
    if (a.out_type == DType::f16) return finish_columns<f16>(a, g, sums, row, rows, column, n);
    return finish_columns<bf16>(a, g, sums, row, rows, column, n);
}

}  // namespace
}  // namespace ENGINE_ISA
}  // namespace engine
