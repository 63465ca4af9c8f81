// Products of FP4 weights for many tokens on Hopper: linear_wgmma.cuh with weights dequantised to bf16 (exact: see
// linear_fp4_tile.cuh). 256 rows n for bf16 activations, as cuBLAS sums; 128 for FP4 ones, whose sums are cut in
// slices.
//
//   one                 W4A16: x [M, K] bf16; or FP4 activations in one path, expanded (expand_*_dense)
//   two                 dense + dense, both paths expanded, one pass over the weight: the work of two bf16 products
//   sparse_and_dense    SharQ: the backbone on sparse products, operands as linear_fp4_tile.cuh's: the work of 1.5
//
// Reference: ReferenceOps.fp4_linear, w4a16_linear.
#pragma once

#include "linear_fp4_tile.cuh"
#include "linear_wgmma.cuh"

#define WGMMA_ENTRY(name, Codes, paths, rows)                                                                          \
    extern "C" __global__ void __launch_bounds__(256, 1)                                                               \
        linear_wgmma_##name##_n##rows(const bf16* first, const bf16* second, const u32* metadata, i64 x_stride,        \
                                      TILE_PARAMETERS) {                                                               \
        constexpr bool kPermuted = paths == Paths::sparse_and_dense && Codes::kMetadataBits == 4;                      \
        const Fp4Tile<Codes, bf16, kPermuted, rows / 128> weight = {units, N, fp4_units_along_k(K)};                   \
        const float power = power_of_two(Codes::kValuePower<bf16>);                                                    \
        const Epilogue epilogue = {power, token_scale, row_scale, bias, residual, out, out_type, N};                   \
        wgmma_linear<paths, rows>(weight, {first, second, metadata, x_stride, M, K}, epilogue, slice_k);               \
    }
#if PTX_SM90A
#define FP4_WGMMA_ENTRIES(format, Codes)                                        \
    WGMMA_ENTRY(format##_one, Codes, Paths::one, 256)                           \
    WGMMA_ENTRY(format##_one, Codes, Paths::one, 128)                           \
    WGMMA_ENTRY(format##_two, Codes, Paths::two, 128)                           \
    WGMMA_ENTRY(format##_sparse_and_dense, Codes, Paths::sparse_and_dense, 128)
#else
#define FP4_WGMMA_ENTRIES(format, Codes)  // sm_90a alone has wgmma
#endif
