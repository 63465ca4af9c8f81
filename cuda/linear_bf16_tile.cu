// Products with 16-bit weights for many tokens: linear_tile.cuh with both operands copied as they are.
//
//   out[t, n] = Σ_k x[t, k] · W[n, k] + bias[n] + residual[t, n]      x [M, K] and W [N, K] of one type, bf16 or f16
//
// K a multiple of 8, rows aligned to 16 bytes. Reference: ReferenceOps.linear.
#include "linear_tile.cuh"

#define ENTRY(T, warps_m)                                                                                         \
    extern "C" __global__ void __launch_bounds__(128 * warps_m)                                                   \
        linear_tile_##T##_m##warps_m(const T* x, i64 x_stride, const T* w, const float* bias, const void* residual, \
                                     void* out, int out_type, int M, int N, int K, int slice_k) {                 \
        const TileInput input = {x, nullptr, nullptr, x_stride, M, K};                                            \
        const Epilogue epilogue = {1.0f, nullptr, nullptr, bias, residual, out, out_type, N};                     \
        tile_linear<T, Paths::one, warps_m>(RowMajorTile<kTileN>{w, N, K}, input, epilogue, slice_k);             \
    }
ENTRY(bf16, 1)
ENTRY(bf16, 2)
ENTRY(f16, 1)
ENTRY(f16, 2)
