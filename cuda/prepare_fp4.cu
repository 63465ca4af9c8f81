// prepare_fp4: rows of activations into FP4 in one path: codes and a scale per block, of x, of bf16(rms_norm(x)) or of
// bf16(silu(gate) · up).
//
//   in    as for prepare_sharq: x, x_stride, norm_weight, eps, silu, K, tensor_amax
//   out   Fp4Matrix's arrays with K rounded up to P, a multiple of 128, without gaps between rows; beyond K zeros:
//             payload [T, P/2] uint8, scale uint8 [T, P/16] (mxfp4 P/32, hif4 uint32 P/64), g [T] float32
//         *invalid as for prepare_sharq
//
// Grid, block and shared memory as for prepare_sharq. Bytes moved per element with bf16 x: 2 in (silu 4), .56 out for
// NVFP4. Reference: ReferenceOps.prepare_fp4, bit for bit.
#include "prepare.cuh"

template <class Format, class Source>
__device__ __forceinline__ void prepare_fp4(const Source& from, const float* tensor_amax, void* payload, void* scales,
                                            float* g, int* invalid) {
    extern __shared__ uint4 made[];
    __shared__ RowScratch scratch;
    float row_scale;
    if (!begin_fp4_row<Format>(from, tensor_amax, made, scratch, g, invalid, row_scale)) return;

    constexpr int block = Format::kBlock;
    const int tiles = ceil_div(from.K, 128) * (128 / kTile);
    const i64 first = static_cast<i64>(blockIdx.x) * tiles;  // of the row
    auto* row_scales = static_cast<typename Format::Scale*>(scales) + first * kTile / block;
    const Divisor divisor(row_scale);
    // Warps go through together: lanes whose tiles lie beyond the row take part in the shuffles.
    for (int tile = threadIdx.x; tile - lane_of_warp() < tiles; tile += blockDim.x) {
        float x[kTile];
        u32 words[8], codes[2], stored;
        if constexpr (Format::kGlobalScale) {
            divided_tile(from, made, kTile * tile, divisor, !divisor.ordinary(), x);
        } else {
            row_tile(from, made, kTile * tile, x);
        }
        pack_tile(x, words);  // numbers too small for `divisor` have the same codes however they are rounded
        unpack_tile(words, x);
        if constexpr (Format::kE2m1) {
            const auto scale = Format::template scale<block>(largest(x));
            codes[0] = E2m1Eight(x, scale.half_inverse).codes();
            codes[1] = E2m1Eight(x + 8, scale.half_inverse).codes();
            stored = scale.stored;
        } else {
            const auto scale = Format::scale(x);
            float value[kTile];
            scale.encode(x, codes, value);
            stored = scale.stored;
        }
        if (tile >= tiles) continue;
        static_cast<uint2*>(payload)[first + tile] = make_uint2(codes[0], codes[1]);
        store_scale<block>(row_scales, tile, kTile * tile < from.K, stored);
    }
}

#define PARAMETERS(T)                                                                                                  \
    const T *x, i64 x_stride, const float *norm_weight, float eps, int silu, int K, const float *tensor_amax,          \
        void *payload, void *scale, float *g, int *invalid
#define SOURCE(T) (RowSource<T, true>{x, x_stride, norm_weight, eps, silu, K})
#define PREPARE(Format, T) prepare_fp4<Format>(SOURCE(T), tensor_amax, payload, scale, g, invalid)
#define KERNEL extern "C" __global__ void __launch_bounds__(1024)

KERNEL prepare_fp4_nvfp4_bf16(PARAMETERS(bf16)) { PREPARE(Nvfp4, bf16); }
KERNEL prepare_fp4_nvfp4_f16(PARAMETERS(f16)) { PREPARE(Nvfp4, f16); }
KERNEL prepare_fp4_nvfp4_f32(PARAMETERS(float)) { PREPARE(Nvfp4, float); }
KERNEL prepare_fp4_mxfp4_bf16(PARAMETERS(bf16)) { PREPARE(Mxfp4, bf16); }
KERNEL prepare_fp4_mxfp4_f16(PARAMETERS(f16)) { PREPARE(Mxfp4, f16); }
KERNEL prepare_fp4_mxfp4_f32(PARAMETERS(float)) { PREPARE(Mxfp4, float); }
KERNEL prepare_fp4_hif4_bf16(PARAMETERS(bf16)) { PREPARE(Hif4, bf16); }
KERNEL prepare_fp4_hif4_f16(PARAMETERS(f16)) { PREPARE(Hif4, f16); }
KERNEL prepare_fp4_hif4_f32(PARAMETERS(float)) { PREPARE(Hif4, float); }
