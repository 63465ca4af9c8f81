// The end of a product with a quantised weight: scales, bias, residual, one rounding. Include in kernel files only.
#pragma once

#include "fp32_math.h"
#include "product_args.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

// sums [rows][32] of one tile to out[row …][column …]; only the first n columns exist. Either scale may be null for 1:
// one a row [T], one a column [N, and readable up to a whole tile].
template <class Out>
void finish_columns(const ProductOut& to, const float* row_scale, const float* column_scale, const float* sums,
                    int64_t row, int64_t rows, int64_t column, int64_t n) {
    for (int64_t r = row; r < row + rows; ++r, sums += 2 * kLanes) {
        Out* out = static_cast<Out*>(to.out) + r * to.out_stride + column;
        const Out* residual = static_cast<const Out*>(to.residual);
        if (residual) residual += r * to.residual_stride + column;
        for (int64_t j = 0; j < n; j += kLanes) {
            const int64_t left = min_of(kLanes, n - j);
            F32x16 scale = broadcast(row_scale ? row_scale[r] : 1.0f);
            if (column_scale) scale = scale * load(column_scale + column + j);
            F32x16 y = load(sums + j) * scale;
            if (to.bias) y = y + load_n(to.bias + column + j, left);
            if (residual) y = y + load_n(residual + j, left);
            store_n(out + j, y, left);
        }
    }
}

static inline void finish_tile(const ProductOut& to, const float* row_scale, const float* column_scale,
                               const float* sums, int64_t row, int64_t rows, int64_t column) {
    const int64_t n = min_of(2 * kLanes, to.N - column);
    with_type(to.out_type, [&](auto tag) {
        using Out = typename decltype(tag)::type;
        finish_columns<Out>(to, row_scale, column_scale, sums, row, rows, column, n);
    });
}

}  // namespace
}  // namespace ENGINE_ISA
}  // namespace engine
