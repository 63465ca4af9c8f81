// Products of FP8 weights for many tokens on Hopper: linear_wgmma.cuh with weights made bf16 (exact). x [M, K] bf16,
// W8A8's from expand_fp8. Where a row has several scales only 128 rows n serve, whose sums can be cut; see
// linear_fp8_tile.cuh.
#include "linear_fp8_tile.cuh"
#include "linear_wgmma.cuh"

#define ENTRY(rows)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256, 1)                                                               \
        linear_wgmma_fp8_n##rows(const bf16* x, i64 x_stride, FP8_TILE_PARAMETERS) {                                   \
        const Fp8Tile<bf16, rows / 128> weight = {units, scale, steps, N, fp8_units_along_k(K)};                       \
        const Epilogue epilogue = {1.0f, token_scale, steps == 1 ? scale : nullptr, bias, residual, out, out_type, N}; \
        wgmma_linear<rows>(weight, {x, nullptr, nullptr, x_stride, M, K}, epilogue, slice_k);                   \
    }
#if PTX_SM90A
ENTRY(256)
ENTRY(128)
#endif
