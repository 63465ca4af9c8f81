// Products with bf16 weights for many tokens on Hopper: linear_wgmma.cuh with both operands copied as they are.
//
//   out[t, n] = Σ_k x[t, k] · W[n, k] + bias[n] + residual[t, n]      x [M, K], W [N, K] bf16
//
// K a multiple of 8, rows aligned to 16 bytes. Reference: ReferenceOps.linear.
#include "linear_wgmma.cuh"

#define ENTRY(rows)                                                                                                    \
    extern "C" __global__ void __launch_bounds__(256, 1)                                                               \
        linear_wgmma_bf16_n##rows(const bf16* x, i64 x_stride, const bf16* w, const float* bias, const void* residual, \
                                  void* out, int out_type, int M, int N, int K, int slice_k) {                         \
        const TileInput input = {x, nullptr, nullptr, x_stride, M, K};                                                 \
        const Epilogue epilogue = {1.0f, nullptr, nullptr, bias, residual, out, out_type, N};                          \
        wgmma_linear<rows>(RowMajorTile<rows>{w, N, K}, input, epilogue, slice_k);                              \
    }
#if PTX_SM90A
ENTRY(256)
ENTRY(128)
#endif
