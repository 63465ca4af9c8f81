// Arguments of the FP4 operations: activations split into FP4 operands, FP4 weights in tiles, and their products.
// What the bits mean is defined by engine/ops/fp4. Strides are elements from row to row.
#pragma once

#include "product_args.h"

namespace engine {

enum class Fp4Format : int32_t { nvfp4, mxfp4, hif4 };

// An operand [T, K] in the canonical, unpadded arrays of engine/fp4_types.py. Path 0 is the backbone or the only path,
// path 1 the residual.
struct Fp4Operand {
    Fp4Format format;
    int64_t T, K;
    int paths;                // 1 or 2
    bool sparse;              // path 0 keeps half: compressed codes and meta
    const float* g;           // [T]
    const uint8_t* codes[2];  // [T, K/2]; sparse [T, K/4]
    const uint8_t* meta;      // sparse: [T, K/16], hif4 [T, K/8]; else null
    const void* scale[2];     // [T, K/block], uint8 or (hif4) uint32
    int block[2];             // k per scale: 16, 32 or 64
};

// Writes the arrays of `to` (its pointers are then to writable memory). Answers whether all numbers were finite and
// stayed so when rounded to bf16; if not, the arrays hold nothing of use.
struct PrepareArgs {
    OperandRows rows;  // of f32 or bf16
    float fixed_g;     // every row's g; 0: each row's own by the rule
    Fp4Operand to;
};

// How a weight's block scales are chosen, see engine/ops/fp4/grades.py.
enum class WeightGrade : int32_t { rtn, four_over_six, sweep };

// Writes one shard's arrays and answers its largest magnitude. Where that is not finite, or rounds to bf16's infinity
// and the format has no global scale, nothing is written.
struct QuantizeWeightArgs {
    const void* w;  // [N, K]
    DType w_type;
    int64_t w_stride;
    int64_t N, K;
    Fp4Format format;
    int block;  // k per scale: nvfp4 16 or 32, mxfp4 32, hif4 64
    WeightGrade grade;
    uint8_t* codes;  // [N, K/2]
    void* scale;     // [N, K/block], uint8 or (hif4) uint32
    float* g;        // [N]
};

// Writes one shard's codes and scales, chosen against each other's errors, see engine/ops/fp4/feedback.py. nvfp4, mxfp4.
// Panels: [K/block, K, block], panel b being columns [b · block, (b + 1) · block) of a matrix [K, K].
struct QuantizeFeedbackArgs {
    const void* w;  // [N, K]
    DType w_type;
    int64_t w_stride;
    int64_t N, K;
    float g;
    Fp4Format format;
    int block;
    const float* first;   // panels
    const float* later;   // panels
    const float* weight;  // [K]
    int refinements;      // passes with `later`
    uint8_t* codes;       // [N, K/2]
    uint8_t* scale;       // [N, K/block]
};

// out [T, N] = operand · wᵀ · g · g_w, and what `to` says
struct Fp4LinearArgs {
    Fp4Operand x;
    const void* w;         // tiles, see fp4_tiles.h
    const float* w_g;      // [N] and zeros up to a whole tile
    int w_block;           // k per scale: nvfp4 16 or 32, mxfp4 32, hif4 64
    ProductOut to;
};

// The same with x [T, K] as it is.
struct W4a16Args {
    const void* x;
    DType x_type;
    int64_t x_stride;
    int64_t T, K;
    Fp4Format w_format;
    const void* w;
    const float* w_g;
    int w_block;
    ProductOut to;
};

}  // namespace engine
