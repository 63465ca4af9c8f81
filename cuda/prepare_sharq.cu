// prepare_sharq: rows of activations into SharQ operands: a sparse or dense FP4 backbone and the FP4 residual against
// it, of x, of bf16(rms_norm(x)) or of bf16(silu(gate) · up). engine/ops/fp4/split.py says what each number is.
//
//   in    x [T, K] bf16, f16 or f32 (silu: gate | up [T, 2K]), rows x_stride elements apart; norm_weight [K] float32 or
//         null; K a multiple of 32 (hif4: 64), at most 32768; x, norm_weight and every row begin at 16 bytes;
//         tensor_amax: null for a g per row, else the largest magnitude of all rows
//   out   SharqOperand's arrays with K rounded up to P, a multiple of 128, without gaps between rows:
//             g [T] float32                residual [T, P/2]       residual_scale [T, P/16] (mxfp4 P/32, hif4 u32 P/64)
//             backbone [T, P/4], meta [T, P/16] (hif4 P/8), backbone_scale [T, P/32] (hif4 u32 P/64)         …_sparse
//             backbone [T, P/2], backbone_scale as residual_scale                                            …_dense
//         Beyond K: codes 0, scales 0, metadata nibbles 0100
//         *invalid: 0 before; 1 + a row that holds NaN or infinity, or becomes infinite in bf16; that row is unwritten
//
// Grid: T blocks of a multiple of 32 threads; a block owns a row, a thread a tile of 16 k at a time; P/16 threads, at
// most 512, for speed. Shared memory: 640 bytes, and where a norm or silu is fused 2K dynamic ones (beyond 48 KiB the
// launcher asks for them). Bytes moved per element with bf16 x: 2 in (silu 4), .91 out for sparse NVFP4.
//
// prepare_amax: the first of two launches for one g of all rows. *amax, 0 before, becomes the largest magnitude.
// Reference: ReferenceOps.prepare_sharq, bit for bit.
#include "prepare.cuh"

// Where a row's arrays go.
template <class Format>
struct SharqOut {
    uint2* residual;
    void* backbone;
    typename Format::Meta* meta;
    typename Format::Scale *backbone_scale, *residual_scale;
};

template <class Format, bool sparse>
__device__ __forceinline__ void split_tile(float (&x)[kTile], const SharqOut<Format>& out, int tile, bool valid,
                                           bool stored) {
    constexpr int backbone_block = sparse ? Format::kSparseBlock : Format::kBlock;
    const auto backbone_scale = Format::template scale<backbone_block>(x);  // what is kept includes the largest
    u32 words[2];
    float value[kTile];
    backbone_scale.encode(x, words, value);
    if constexpr (sparse) {
        const auto mask = Format::mask(x);
        if (stored) static_cast<u32*>(out.backbone)[tile] = mask.compress(words);
        if (stored) out.meta[tile] = static_cast<typename Format::Meta>(mask.metadata());
        // One rounding, +0 where nothing is left; a product with −0 leaves what was dropped as it is, zeros too.
#pragma unroll
        for (int i = 0; i < kTile; ++i)
            x[i] = __fmaf_rn(-value[i], mask.keeps(i) ? backbone_scale.unit(i) : -0.0f, x[i]);
    } else {
        if (stored) static_cast<uint2*>(out.backbone)[tile] = make_uint2(words[0], words[1]);
#pragma unroll
        for (int i = 0; i < kTile; ++i) x[i] = __fmaf_rn(-value[i], backbone_scale.unit(i), x[i]);
    }
    const auto residual_scale = Format::template scale<Format::kBlock>(x);
    residual_scale.encode(x, words, value);
    if (!stored) return;
    out.residual[tile] = make_uint2(words[0], words[1]);
    store_scale<backbone_block>(out.backbone_scale, tile, valid, backbone_scale.stored);
    store_scale<Format::kBlock>(out.residual_scale, tile, valid, residual_scale.stored);
}

template <class Format, bool sparse, class Source>
__device__ __forceinline__ void prepare_sharq(const Source& from, const float* tensor_amax, void* backbone, void* meta,
                                              void* backbone_scale, void* residual, void* residual_scale, float* g,
                                              int* invalid) {
    extern __shared__ uint4 made[];
    __shared__ RowScratch scratch;
    float scale;
    if (!begin_fp4_row<Format>(from, tensor_amax, made, scratch, g, invalid, scale)) return;

    using Scale = typename Format::Scale;
    constexpr int backbone_block = sparse ? Format::kSparseBlock : Format::kBlock;
    const i64 row = blockIdx.x;
    const int tiles = ceil_div(from.K, 128) * (128 / kTile);
    const SharqOut<Format> out = {
        static_cast<uint2*>(residual) + row * tiles,
        static_cast<char*>(backbone) + row * tiles * (sparse ? 4 : 8),
        static_cast<typename Format::Meta*>(meta) + row * tiles,
        static_cast<Scale*>(backbone_scale) + row * (tiles * kTile / backbone_block),
        static_cast<Scale*>(residual_scale) + row * (tiles * kTile / Format::kBlock),
    };
    const Divisor divisor(scale);
    // Warps go through together: lanes whose tiles lie beyond the row take part in the shuffles.
    for (int tile = threadIdx.x; tile - lane_of_warp() < tiles; tile += blockDim.x) {
        float x[kTile];
        fp4_tile<Format>(from, made, kTile * tile, divisor, x);
        split_tile<Format, sparse>(x, out, tile, kTile * tile < from.K, tile < tiles);
    }
}

template <class Source>
__device__ __forceinline__ void prepare_amax(const Source& from, float* amax, int* invalid) {
    __shared__ RowScratch scratch;
    const u32 largest = make_row(from, nullptr, scratch);
    if (is_valid_row(largest, kInfinityBits, invalid) && threadIdx.x == 0)
        atomicMax(reinterpret_cast<u32*>(amax), largest);  // bits of magnitudes are ordered as they are
}

#define ROWS(T) const T *x, i64 x_stride, const float *norm_weight, float eps, int silu, int K
#define SOURCE(T) (RowSource<T, true>{x, x_stride, norm_weight, eps, silu, K})
#define PARAMETERS(T)                                                                                                  \
    ROWS(T), const float *tensor_amax, void *backbone, void *meta, void *backbone_scale, void *residual,               \
        void *residual_scale, float *g, int *invalid
#define PREPARE(Format, sparse, T)                                                                                     \
    prepare_sharq<Format, sparse>(SOURCE(T), tensor_amax, backbone, meta, backbone_scale, residual, residual_scale, g, \
                                  invalid)
#define KERNEL extern "C" __global__ void __launch_bounds__(512)

KERNEL prepare_sharq_nvfp4_sparse_bf16(PARAMETERS(bf16)) { PREPARE(Nvfp4, true, bf16); }
KERNEL prepare_sharq_nvfp4_sparse_f16(PARAMETERS(f16)) { PREPARE(Nvfp4, true, f16); }
KERNEL prepare_sharq_nvfp4_sparse_f32(PARAMETERS(float)) { PREPARE(Nvfp4, true, float); }
KERNEL prepare_sharq_nvfp4_dense_bf16(PARAMETERS(bf16)) { PREPARE(Nvfp4, false, bf16); }
KERNEL prepare_sharq_nvfp4_dense_f16(PARAMETERS(f16)) { PREPARE(Nvfp4, false, f16); }
KERNEL prepare_sharq_nvfp4_dense_f32(PARAMETERS(float)) { PREPARE(Nvfp4, false, float); }

KERNEL prepare_sharq_mxfp4_sparse_bf16(PARAMETERS(bf16)) { PREPARE(Mxfp4, true, bf16); }
KERNEL prepare_sharq_mxfp4_sparse_f16(PARAMETERS(f16)) { PREPARE(Mxfp4, true, f16); }
KERNEL prepare_sharq_mxfp4_sparse_f32(PARAMETERS(float)) { PREPARE(Mxfp4, true, float); }
KERNEL prepare_sharq_mxfp4_dense_bf16(PARAMETERS(bf16)) { PREPARE(Mxfp4, false, bf16); }
KERNEL prepare_sharq_mxfp4_dense_f16(PARAMETERS(f16)) { PREPARE(Mxfp4, false, f16); }
KERNEL prepare_sharq_mxfp4_dense_f32(PARAMETERS(float)) { PREPARE(Mxfp4, false, float); }

KERNEL prepare_sharq_hif4_sparse_bf16(PARAMETERS(bf16)) { PREPARE(Hif4, true, bf16); }
KERNEL prepare_sharq_hif4_sparse_f16(PARAMETERS(f16)) { PREPARE(Hif4, true, f16); }
KERNEL prepare_sharq_hif4_sparse_f32(PARAMETERS(float)) { PREPARE(Hif4, true, float); }
KERNEL prepare_sharq_hif4_dense_bf16(PARAMETERS(bf16)) { PREPARE(Hif4, false, bf16); }
KERNEL prepare_sharq_hif4_dense_f16(PARAMETERS(f16)) { PREPARE(Hif4, false, f16); }
KERNEL prepare_sharq_hif4_dense_f32(PARAMETERS(float)) { PREPARE(Hif4, false, float); }

KERNEL prepare_amax_bf16(ROWS(bf16), float* amax, int* invalid) { prepare_amax(SOURCE(bf16), amax, invalid); }
KERNEL prepare_amax_f16(ROWS(f16), float* amax, int* invalid) { prepare_amax(SOURCE(f16), amax, invalid); }
KERNEL prepare_amax_f32(ROWS(float), float* amax, int* invalid) { prepare_amax(SOURCE(float), amax, invalid); }
