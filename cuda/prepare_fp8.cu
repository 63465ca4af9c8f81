// prepare_fp8: rows of activations into E4M3 with a scale per row, of x, of bf16(rms_norm(x)) or of
// bf16(silu(gate) · up).
//
//     scale = max(amax |x| / 448, 1e-9)      code = e4m3(x / scale), nearest, ties to even; the sign is x's
//
//   in    as for prepare_sharq, any K up to 32768, any type without rounding it to bf16
//   out   codes [T, P] uint8 with K rounded up to P, a multiple of 128, zeros beyond K; scale [T] float32
//         *invalid as for prepare_sharq
//
// Grid, block and shared memory (2K rounded up to 32 bytes) as for prepare_sharq. Bytes moved per element with bf16 x:
// 2 in (silu 4), 1 out. Reference: ReferenceOps.prepare_fp8, bit for bit.
#include "prepare.cuh"

template <class Source>
__device__ __forceinline__ void prepare_fp8(const Source& from, uint4* codes, float* scale, int* invalid) {
    extern __shared__ uint4 made[];
    __shared__ RowScratch scratch;
    const u32 largest = make_row(from, made, scratch);
    if (!is_valid_row(largest, kInfinityBits, invalid)) return;
    const Divisor divisor(row_scale(largest, 448.0f));
    if (threadIdx.x == 0) scale[blockIdx.x] = divisor.g;

    const int tiles = ceil_div(from.K, 128) * (128 / kTile);
    codes += static_cast<i64>(blockIdx.x) * tiles;
    for (int tile = threadIdx.x; tile < tiles; tile += blockDim.x) {
        float x[kTile];
        divided_tile(from, made, kTile * tile, divisor, !divisor.ordinary(), x);
        u32 words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            words[i] = e4m3_codes(x[4 * i], x[4 * i + 1]) | e4m3_codes(x[4 * i + 2], x[4 * i + 3]) << 16;
        codes[tile] = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

#define PARAMETERS(T)                                                                                                  \
    const T *x, i64 x_stride, const float *norm_weight, float eps, int silu, int K, uint4 *codes, float *scale,        \
        int *invalid
#define PREPARE(T)                                                                                                     \
    prepare_fp8(RowSource<T, false>{x, x_stride, norm_weight, eps, silu, K}, codes, scale, invalid)
#define KERNEL extern "C" __global__ void __launch_bounds__(1024)

KERNEL prepare_fp8_bf16(PARAMETERS(bf16)) { PREPARE(bf16); }
KERNEL prepare_fp8_f16(PARAMETERS(f16)) { PREPARE(f16); }
KERNEL prepare_fp8_f32(PARAMETERS(float)) { PREPARE(float); }
