// Arguments of the FP8 operations: activations into E4M3, FP8 weights in tiles, and their products. What the bits mean
// is defined by engine/ops/fp8.py. Strides are elements from row to row.
#pragma once

#include "fp8_tiles.h"
#include "product_args.h"

namespace engine {

// Writes codes [T, K] and scale [T]. Answers whether all numbers were finite; if not, they hold nothing of use.
struct PrepareFp8Args {
    OperandRows rows;
    uint8_t* codes;
    float* scale;
};

// out [T, N] = x · wᵀ, times x_scale, and what `to` says
struct Fp8LinearArgs {
    const void* x;         // [T, K], x_type; codes: E4M3
    bool codes;            // x holds E4M3 codes, and x_scale is given
    DType x_type;          // else
    int64_t x_stride;
    const float* x_scale;  // [T], or null for 1
    int64_t T, K;
    const void* w;         // tiles, see fp8_tiles.h
    const float* w_scale;
    int64_t w_step;        // k per scale of the weight
    ProductOut to;
};

}  // namespace engine
