// Arguments of the row operations. Strides are elements from row to row.
#pragma once

#include "dtypes.h"

namespace engine {

// out [T, C] = table [V, C] at token_ids [T]; the types may differ.
struct EmbedArgs {
    const void* table;
    DType table_type;
    int64_t table_stride;
    const int32_t* token_ids;
    int64_t T, C;
    void* out;
    DType out_type;
    int64_t out_stride;
};

// out [T, C] = x [T, C] / rms · weight [C]
struct RmsNormArgs {
    const void* x;
    int64_t x_stride;
    const float* weight;
    float eps;
    int64_t T, C;
    void* out;
    int64_t out_stride;
    DType type;  // of x and out
};

// out [T, F] = silu(gate) · up, gate_up [T, 2F] = gate | up
struct SiluMulArgs {
    const void* gate_up;
    int64_t gate_up_stride;
    int64_t T, F;
    void* out;
    int64_t out_stride;
    DType type;  // of gate_up and out
};

}  // namespace engine
