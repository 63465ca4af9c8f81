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
// Grid: T blocks of a multiple of 32 threads, at most 1024 (HiF4 384); a block owns a row, a thread a tile of 16 k at a
// time; P/16 threads for speed where rows are few, a quarter where they are many. Shared memory: 640 bytes, and where a
// norm or silu is fused 2K dynamic ones (beyond 48 KiB the launcher asks for them). Bytes moved per element with bf16
// x: 2 in (silu 4), .91 out for sparse NVFP4.
//
// prepare_amax: the first of two launches for one g of all rows. *amax, 0 before, becomes the largest magnitude.
// Reference: ReferenceOps.prepare_sharq, bit for bit.
#include "prepare.cuh"

// What becomes of a tile.
template <class Format, bool sparse>
struct SplitTile {
    u32 backbone[2];  // the first word alone where sparse
    u32 meta, residual[2], backbone_scale, residual_scale;
};

// Backbone and residual of a tile in E2M1; x is rounded to bf16 here.
template <class Format, bool sparse>
__device__ __forceinline__ SplitTile<Format, sparse> split(const float (&x)[kTile], const PairScores& scores) {
    SplitTile<Format, sparse> out;
    u32 words[8], sizes[4], order[2] = {0x3210, 0x3210};  // of the residual's pairs
    pack_tile(x, words);
    if constexpr (sparse) {
        const PairMask mask(scores, words);
        const auto scale = Format::template scale<Format::kSparseBlock>(scores.largest());
        u32 kept[4];
        float eight[8];
        mask.gather(words, kept);
        unpack_tile(kept, eight);
        const E2m1Eight rounded(eight, scale.half_inverse);
        rounded.sizes(sizes);
#pragma unroll
        for (int i = 0; i < 4; ++i) kept[i] = scale.residual(kept[i], sizes[i]);
        mask.scatter(kept, words);
        out.backbone[0] = __byte_perm(rounded.codes(), 0, mask.kept);
        out.meta = mask.metadata(), order[0] = mask.order[0], order[1] = mask.order[1];
        out.backbone_scale = scale.stored;
    } else {
        float all[kTile];
        unpack_tile(words, all);
        const auto scale = Format::template scale<Format::kBlock>(largest(all));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const E2m1Eight rounded(all + 8 * half, scale.half_inverse);
            rounded.sizes(sizes);
#pragma unroll
            for (int i = 0; i < 4; ++i) words[4 * half + i] = scale.residual(words[4 * half + i], sizes[i]);
            out.backbone[half] = rounded.codes();
        }
        out.backbone_scale = scale.stored;
    }
    float left[kTile];
    unpack_tile(words, left);
    const auto scale = Format::template scale<Format::kBlock>(largest(left));
    out.residual[0] = __byte_perm(E2m1Eight(left, scale.half_inverse).codes(), 0, order[0]);
    out.residual[1] = __byte_perm(E2m1Eight(left + 8, scale.half_inverse).codes(), 0, order[1]);
    out.residual_scale = scale.stored;
    return out;
}

// The same in S1P2.
template <class Format, bool sparse>
__device__ __forceinline__ SplitTile<Format, sparse> split(const float (&unrounded)[kTile]) {
    SplitTile<Format, sparse> out;
    u32 words[8];
    float x[kTile], value[kTile];
    pack_tile(unrounded, words);
    unpack_tile(words, x);
    const auto scale = Format::scale(x);  // what is kept includes the largest
    scale.encode(x, out.backbone, value);
    out.backbone_scale = scale.stored;
    if constexpr (sparse) {
        const ElementMask mask(words);
        out.backbone[0] = mask.compress(out.backbone), out.meta = mask.metadata();
        // One rounding, +0 where nothing is left; a product with −0 leaves what was dropped as it is, zeros too.
#pragma unroll
        for (int i = 0; i < kTile; ++i) x[i] = __fmaf_rn(-value[i], mask.keeps(i) ? scale.unit(i) : -0.0f, x[i]);
    } else {
#pragma unroll
        for (int i = 0; i < kTile; ++i) x[i] = __fmaf_rn(-value[i], scale.unit(i), x[i]);
    }
    const auto residual_scale = Format::scale(x);
    residual_scale.encode(x, out.residual, value);
    out.residual_scale = residual_scale.stored;
    return out;
}

template <class Format, bool sparse, class Source>
__device__ __forceinline__ SplitTile<Format, sparse> prepare_tile(const Source& from, const uint4* made, int k,
                                                                  const Divisor& divisor) {
    float x[kTile];
    if constexpr (!Format::kGlobalScale) {
        row_tile(from, made, k, x);
    } else {
        divided_tile(from, made, k, divisor, !divisor.ordinary(), x);
    }
    if constexpr (!Format::kE2m1) {
        return split<Format, sparse>(x);
    } else {
        PairScores scores(x);
        if constexpr (Format::kGlobalScale && sparse) {
            // Scores of that size may be compared with one another; elsewhere numbers of that size count as 0.
            if (k < from.K && scores.may_keep_less_than(kLeastQuotient)) {
                divided_tile(from, made, k, divisor, true, x);
                scores = PairScores(x);
            }
        }
        return split<Format, sparse>(x, scores);
    }
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
    const int tiles = ceil_div(from.K, 128) * (128 / kTile);
    const i64 first = static_cast<i64>(blockIdx.x) * tiles;  // of the row
    auto* backbone_scales = static_cast<Scale*>(backbone_scale) + first * kTile / backbone_block;
    auto* residual_scales = static_cast<Scale*>(residual_scale) + first * kTile / Format::kBlock;
    const Divisor divisor(scale);
    // Warps go through together: lanes whose tiles lie beyond the row take part in the shuffles.
    for (int tile = threadIdx.x; tile - lane_of_warp() < tiles; tile += blockDim.x) {
        const auto made_of = prepare_tile<Format, sparse>(from, made, kTile * tile, divisor);
        if (tile >= tiles) continue;
        if constexpr (sparse) {
            static_cast<u32*>(backbone)[first + tile] = made_of.backbone[0];
            static_cast<typename Format::Meta*>(meta)[first + tile] = static_cast<typename Format::Meta>(made_of.meta);
        } else {
            static_cast<uint2*>(backbone)[first + tile] = make_uint2(made_of.backbone[0], made_of.backbone[1]);
        }
        static_cast<uint2*>(residual)[first + tile] = make_uint2(made_of.residual[0], made_of.residual[1]);
        const bool valid = kTile * tile < from.K;
        store_scale<backbone_block>(backbone_scales, tile, valid, made_of.backbone_scale);
        store_scale<Format::kBlock>(residual_scales, tile, valid, made_of.residual_scale);
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
#define KERNEL extern "C" __global__ void __launch_bounds__(1024)

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

KERNEL prepare_amax_bf16(ROWS(bf16), float* amax, int* invalid) { prepare_amax(SOURCE(bf16), amax, invalid); }
KERNEL prepare_amax_f16(ROWS(f16), float* amax, int* invalid) { prepare_amax(SOURCE(f16), amax, invalid); }
KERNEL prepare_amax_f32(ROWS(float), float* amax, int* invalid) { prepare_amax(SOURCE(float), amax, invalid); }

// More than 64 registers a thread.
#undef KERNEL
#define KERNEL extern "C" __global__ void __launch_bounds__(384)

KERNEL prepare_sharq_hif4_sparse_bf16(PARAMETERS(bf16)) { PREPARE(Hif4, true, bf16); }
KERNEL prepare_sharq_hif4_sparse_f16(PARAMETERS(f16)) { PREPARE(Hif4, true, f16); }
KERNEL prepare_sharq_hif4_sparse_f32(PARAMETERS(float)) { PREPARE(Hif4, true, float); }
KERNEL prepare_sharq_hif4_dense_bf16(PARAMETERS(bf16)) { PREPARE(Hif4, false, bf16); }
KERNEL prepare_sharq_hif4_dense_f16(PARAMETERS(f16)) { PREPARE(Hif4, false, f16); }
KERNEL prepare_sharq_hif4_dense_f32(PARAMETERS(float)) { PREPARE(Hif4, false, float); }
