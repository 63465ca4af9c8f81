// What the products with quantised weights share: where their rows come from and where the results go.
#pragma once

#include "dtypes.h"

namespace engine {

// The rows [T, K] that a prepare_* operation quantises: x as it is, or bf16 of what a norm or SwiGLU makes of it.
struct OperandRows {
    const void* x;  // [T, K]; silu: [T, 2K] = gate | up
    DType x_type;
    int64_t x_stride;           // elements from row to row
    int64_t T, K;
    const float* norm_weight;   // [K]: the rows are bf16(rms_norm(x) · weight); or null
    float eps;
    bool silu;                  // the rows are bf16(silu(gate) · up)
};

// out [T, N] = the product, times its scales, + bias [N] + residual [T, N], rounded once
struct ProductOut {
    int64_t N;
    const float* bias;     // or null
    const void* residual;  // of out's type, or null; may be out itself
    int64_t residual_stride;
    void* out;
    DType out_type;
    int64_t out_stride;
};

}  // namespace engine
