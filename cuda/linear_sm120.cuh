// FP4 × FP4 matrix products on the block-scaled tensor cores of sm_120a and sm_121a, for any number of tokens: SharQ
// with both paths in one pass over the weight, its sparse and its dense half alone, NVFP4 and MXFP4.
//
//   Y[t, n] = g[t] · g_w[n] · Σ_k (backbone[t, k] + residual[t, k]) · W[n, k] + bias[n] + added[t, n], rounded once
//
// Activations are the instruction's A (16 tokens), weights its B (8 rows n). Instructions for 128 k of such a tile, all
// on the same B registers (weight_layout.cuh), which are loaded once:
//     weight, k per scale   backbone stored sparse            stored dense      residual, or a single path
//     nvfp4, 32             1 OMMA.SF.SP.168128               2 OMMA.SF.16864   2, 4X (ue4m3): the weight's four scales
//                                                                               made eight by __byte_perm
//     nvfp4, 16             2 OMMA.SF.16864, expanded         2                 2, 4X
//     mxfp4, 32             2 OMMA.SF.16864, expanded         2                 2, 2X (ue8m0)
// Sparse instructions take a scale per 32 k (4X, ue4m3) or 64 k (2X, ue8m0) of *both* operands: the last two rows have
// other ones, so their backbone is expanded in registers to dense fragments. (For MXFP4's 32 there is a sparse 4X with
// ue8m0, OMMA.SF.SP.168128….E8.4X, in the PTX of CUDA 13.5 but not yet of 13.0; nobody is known to have probed it.)
// HiF4 has no such instruction at all: linear_hif4.cu. SharQ on nvfp4 by 32 issues 3 instructions where NVFP4 issues 2,
// 16 cycles each per sub-partition as third parties measured: 2/3 of NVFP4's rate where compute is the limit, all of it
// where memory is.
//
// Order of sums, the same for every M, shape, grid and split, so that a token's bits depend on nothing but its own row
// (deterministic=True needs no other entry points): K is cut into slices of slice_k, which depends on K alone
// (launch_linear.py: slice_k). A slice starts from 0 and takes 128 k after 128 k: backbone, then residual, a dense one
// as k in [0, 64), [64, 128), all into one accumulator. Slices are added in order, to nearest.
// One accumulator for both paths: a second would double the registers of sums and lose as much. An instruction
// truncates its sum to fp32 (emulate/ptx_fp4.h: toward zero), so a slice loses less than 2^-23 of its running sum per
// instruction: at most 6e-6 of a sum whose terms have one sign, with slices of 4096 k (K = 32768); 1e-7 to 8e-7 of max
// |Y| was seen.
//
// Shapes:         block             warps             stages     registers, instructions of the loop over 128 k (SharQ)
//     m16      16 tokens ×  64 rows    1 ×  4         7 or 8     106     118, of which   6 OMMA    decode
//     m64      64 tokens ×  64 rows    1 ×  4         3 to 6     189     184,           24         many sequences
//     m128    128 tokens × 128 rows    2 ×  4         3 to 7     243     262,           48         prefill
// A block owns its tokens × rows and a run of slices; a warp kTiles tiles of 16 tokens × kUnits units of 16 rows. A
// stage is 128 k of both operands, copied by all threads with cp.async, with one barrier a stage; two m16 or m64 blocks
// share an SM, so at m16 up to 61 KB of weights are under way there. Grid: x token blocks (neighbours in time: they
// find the weight in L2), y runs of slices, z row blocks. With gridDim.y > 1 sums of slices go to `partials`, and the
// last block to arrive adds them. Weights of m16 and m64 are read once and marked evict-first.
// Shared memory (launch_linear_sm120.py: shared_bytes): stages · (tokens · bytes of 128 k + rows/16 · unit), later the
// results. Bytes of a token's 128 k: SharQ 116, its sparse half 44, NVFP4 72, two dense paths 144; MXFP4 4 less a path.
// Any M, N, K. Operands and weights have K padded to 128 with zeros (metadata 0100), weights N to 16; tokens there are
// not become zeros in shared memory and read nothing. Pointers aligned to 16.
// Memory traffic: the weight once per token block (but for L2), activations once per row block, M · N outputs; with
// splits 8 · M · N · slices bytes through L2. Limits, per SM and clock: m16 at 1.8 TB/s wants 4.4 bytes of weights,
// instructions allow 45 (m64: 11); m128 wants 15 bytes from L2 at the full rate of instructions, and a third of the
// issue slots.
// Reference: engine/ops/fp4/product.py (whose fp32 sums round to nearest).
//
// ONLY HARDWARE CAN PROVE, none of it seen on any by this project (probe single instructions first):
//   * the order of scale bytes in a word, and that lanes 4 (m % 8) + m / 8 and 4 n hold the words that count;
//   * the metadata's map (lane, half of k, nibble), and that 0100 over zero codes is harmless;
//   * the rounding: toward zero, once per instruction; addends cut 2^-27 below the scales and 2^-35 below the sum;
//   * that a scale byte 0 of UE4M3 makes zero products, as padding along K has it;
//   * every speed above.
#pragma once

#include "fp4_decode.cuh"
#include "linear_decode.cuh"

#if PTX_SM120A

enum class Backbone { none, sparse, expanded, dense };  // expanded: stored sparse, multiplied dense

// ---- formats: scale bytes of 128 k of a dense path, words of scales of a weight's row, and the dense instruction ----
// multiply<h> takes k in [64 h, + 64) of 128, the activations' scales as stored, a weight's as dense_scales makes them.

struct Nvfp4By32 {
    static constexpr int kScaleBytes = 8, kWeightWords = 1;
    static __device__ __forceinline__ void dense_scales(const u32 (&words)[1], u32 (&dense)[2]) {
        dense[0] = __byte_perm(words[0], 0, 0x1100), dense[1] = __byte_perm(words[0], 0, 0x3322);
    }
    template <int h>
    static __device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], u32 scale_a,
                                                    u32 scale_b) {
        ptx::mma_m16n8k64_nvfp4(c, a, b, scale_a, scale_b);
    }
};
struct Nvfp4By16 : Nvfp4By32 {
    static constexpr int kWeightWords = 2;
    static __device__ __forceinline__ void dense_scales(const u32 (&words)[2], u32 (&dense)[2]) {
        dense[0] = words[0], dense[1] = words[1];
    }
};
struct Mxfp4By32 {
    static constexpr int kScaleBytes = 4, kWeightWords = 1;
    static __device__ __forceinline__ void dense_scales(const u32 (&words)[1], u32 (&dense)[2]) {
        dense[0] = dense[1] = words[0];
    }
    template <int h>
    static __device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2], u32 scale_a,
                                                    u32 scale_b) {
        ptx::mma_m16n8k64_mxfp4<2 * h, 2 * h>(c, a, b, scale_a, scale_b);
    }
};

// ---- a stage's activations ------------------------------------------------------------------------------------------

// Arrays of SharqOperand or Fp4Matrix with K padded to 128; those of a path that is not multiplied are not read.
struct Fp4Activations {
    const u8* backbone;
    const u8* metadata;
    const u8* backbone_scale;
    const u8* codes;  // the residual, or the only path
    const u8* codes_scale;
};

// Where 16 bytes of a row are: rows of 64 or 32 bytes permute theirs, so that ldmatrix's eight rows meet in no bank.
template <int kBytes>
__device__ __forceinline__ int place(int row, int sixteen) {
    return kBytes == 64 ? sixteen ^ (row >> 1 & 3) : kBytes == 32 ? sixteen ^ (row >> 2 & 1) : sixteen;
}

// kBytes of each of `rows` tokens to shared memory, from an array with `stride` bytes a token.
template <int kBytes, int kRows, int kThreads>
__device__ __forceinline__ void copy_rows(u32 shared, const u8* from, i64 stride, int rows) {
    constexpr int kPiece = kBytes < 16 ? kBytes : 16, kPieces = kBytes / kPiece;
#pragma unroll
    for (int first = 0; first < kRows * kPieces; first += kThreads) {
        const int i = first + threadIdx.x, row = i / kPieces, piece = i % kPieces;
        if (row >= rows) continue;
        const u8* global = from + row * stride + piece * kPiece;
        const u32 to = shared + row * kBytes + place<kBytes>(row, piece) * kPiece;
        if constexpr (kPiece == 16) ptx::cp_async_16(to, global);
        else ptx::cp_async_small<kPiece>(to, global);
    }
}
// Rows from `rows` on become `word` throughout.
template <int kBytes, int kRows, int kThreads>
__device__ __forceinline__ void pad_rows(u8* shared, int rows, u32 word) {
#pragma unroll 1
    for (int i = rows * kBytes / 4 + threadIdx.x; i < kRows * kBytes / 4; i += kThreads)
        reinterpret_cast<u32*>(shared)[i] = word;
}

// 128 k of kRows tokens in shared memory: one array after the other, each [kRows, its bytes for 128 k].
template <class Format, Backbone kBackbone, bool kResidual, int kRows, int kThreads>
struct ActivationTile {
    static constexpr bool kStoredSparse = kBackbone == Backbone::sparse || kBackbone == Backbone::expanded;
    static constexpr int kBackboneBytes = kBackbone == Backbone::none ? 0 : kStoredSparse ? 32 : 64;
    static constexpr int kCodesBytes = kResidual ? 64 : 0;
    static constexpr int kMetadataBytes = kStoredSparse ? 8 : 0;
    static constexpr int kBackboneScaleBytes = kStoredSparse ? 4 : kBackboneBytes ? Format::kScaleBytes : 0;
    static constexpr int kCodesScaleBytes = kResidual ? Format::kScaleBytes : 0;

    static constexpr int kCodes = kRows * kBackboneBytes;  // where they start
    static constexpr int kMetadata = kCodes + kRows * kCodesBytes;
    static constexpr int kBackboneScale = kMetadata + kRows * kMetadataBytes;
    static constexpr int kCodesScale = kBackboneScale + kRows * kBackboneScaleBytes;
    static constexpr int kTileBytes = kCodesScale + kRows * kCodesScaleBytes;

    // Starts the copies of 128 k, number `unit` of `units`, of tokens first … first + rows.
    static __device__ __forceinline__ void copy(u32 tile, const Fp4Activations& x, int first, int rows, int unit,
                                                int units) {
        const auto array = [&](auto bytes, const u8* from, int start) {
            constexpr int kBytes = decltype(bytes)::value;
            const i64 stride = static_cast<i64>(units) * kBytes;
            if constexpr (kBytes > 0)
                copy_rows<kBytes, kRows, kThreads>(tile + start, from + first * stride + unit * kBytes, stride, rows);
        };
        array(Bytes<kBackboneBytes>(), x.backbone, 0);
        array(Bytes<kCodesBytes>(), x.codes, kCodes);
        array(Bytes<kMetadataBytes>(), x.metadata, kMetadata);
        array(Bytes<kBackboneScaleBytes>(), x.backbone_scale, kBackboneScale);
        array(Bytes<kCodesScaleBytes>(), x.codes_scale, kCodesScale);
    }

    // Makes zeros of the tokens from `rows` on.
    static __device__ __forceinline__ void pad(u8* tile, int rows) {
        pad_rows<kBackboneBytes, kRows, kThreads>(tile, rows, 0);
        pad_rows<kCodesBytes, kRows, kThreads>(tile + kCodes, rows, 0);
        pad_rows<kMetadataBytes, kRows, kThreads>(tile + kMetadata, rows, 0x44444444u);
        pad_rows<kBackboneScaleBytes, kRows, kThreads>(tile + kBackboneScale, rows, 0);
        pad_rows<kCodesScaleBytes, kRows, kThreads>(tile + kCodesScale, rows, 0);
    }

private:
    template <int n>
    struct Bytes {
        static constexpr int value = n;
    };
};

// ---- products of a warp ---------------------------------------------------------------------------------------------

// Eight rows of a weight unit as B: codes of all 128 k, scales of the sparse instruction, of the dense one's halves.
struct WeightFragment {
    u32 codes[4], sparse_scales, dense_scales[2];
};

template <class Format>
__device__ __forceinline__ WeightFragment load_weight(const u8* unit, int half) {
    const int lane = lane_of_warp();
    const uint4 raw = reinterpret_cast<const uint4*>(unit + half * kHalfTileBytes)[lane];
    u32 words[Format::kWeightWords];
#pragma unroll
    for (int i = 0; i < Format::kWeightWords; ++i)
        words[i] = reinterpret_cast<const u32*>(unit + 2 * kHalfTileBytes)[kTileRows * i + 8 * half + (lane >> 2)];
    WeightFragment b = {{raw.x, raw.y, raw.z, raw.w}, words[0]};
    Format::dense_scales(words, b.dense_scales);
    return b;
}

// Sixteen tokens of a tile as A, from token `row` on. Lane l, g = l >> 2, q = l & 3; scales and metadata of row
// g + 8 (l & 1), which are read from lanes q = 0, 1 (metadata: of k in [64 (q >> 1), + 64) from all).
template <class Format, class Tile>
struct TokenFragments {
    const u8* tile;
    int row;

    template <int kBytes, int h>
    __device__ __forceinline__ void load(const u8* codes, u32 (&a)[4]) const {
        const int lane = lane_of_warp(), at = row + (lane & 15);
        ptx::ldmatrix_x4(a, ptx::shared_address(codes + at * kBytes + 16 * place<kBytes>(at, 2 * h + (lane >> 4))));
    }
    // Word number h of a row's scales, or the row's only one.
    template <int kBytes>
    __device__ __forceinline__ u32 scales(const u8* from, int h) const {
        const int lane = lane_of_warp(), at = row + (lane >> 2) + 8 * (lane & 1);
        return reinterpret_cast<const u32*>(from)[at * (kBytes / 4) + (kBytes == 8 ? h : 0)];
    }
    __device__ __forceinline__ u32 metadata() const {
        const int lane = lane_of_warp(), at = row + (lane >> 2) + 8 * (lane & 1);
        return reinterpret_cast<const u32*>(tile + Tile::kMetadata)[2 * at + (lane >> 1 & 1)];
    }
    __device__ __forceinline__ u32 sparse_scales() const { return scales<4>(tile + Tile::kBackboneScale, 0); }

    // The sparse backbone's k in [64 h, + 64) as a dense fragment: register r has the eight k that are number
    // q + 4 (r >> 1) of those, of row g + 8 (r & 1), made of two kept pairs and a nibble of metadata.
    template <int h>
    __device__ __forceinline__ void expand(u32 (&a)[4]) const {
        const int lane = lane_of_warp();
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int at = row + (lane >> 2) + 8 * (r & 1), eight = (lane & 3) + 4 * (r >> 1);
            const u8* codes = tile + at * 32 + 16 * place<32>(at, h) + 2 * eight;
            const u32 nibbles = tile[Tile::kMetadata + 8 * at + 4 * h + eight / 2];
            a[r] = expand_pairs(*reinterpret_cast<const unsigned short*>(codes), nibbles >> 4 * (eight & 1) & 15);
        }
    }
    // A scale per 32 k as the dense instruction wants it for k in [64 h, + 64).
    template <int h>
    __device__ __forceinline__ u32 expanded_scales() const {
        return Format::kScaleBytes == 8 ? __byte_perm(sparse_scales(), 0, h ? 0x3322 : 0x1100) : sparse_scales();
    }
};

// sums += 16 tokens · 8 kTiles rows over k in [64 h, + 64).
template <class Format, int h, int kTiles>
__device__ __forceinline__ void multiply_dense(float (&sums)[kTiles][4], const u32 (&a)[4], u32 scales,
                                               const WeightFragment (&b)[kTiles]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
        Format::template multiply<h>(sums[j], a, {b[j].codes[2 * h], b[j].codes[2 * h + 1]}, scales,
                                     b[j].dense_scales[h]);
}

// The same for 128 k of a path stored dense: codes and scales of the block's tokens.
template <class Format, class Tile, int kTiles>
__device__ __forceinline__ void multiply_dense_path(const TokenFragments<Format, Tile>& tokens, const u8* codes,
                                                    const u8* scales, const WeightFragment (&b)[kTiles],
                                                    float (&sums)[kTiles][4]) {
    u32 a[4];
    tokens.template load<64, 0>(codes, a);
    multiply_dense<Format, 0>(sums, a, tokens.template scales<Format::kScaleBytes>(scales, 0), b);
    tokens.template load<64, 1>(codes, a);
    multiply_dense<Format, 1>(sums, a, tokens.template scales<Format::kScaleBytes>(scales, 1), b);
}

// All paths over 128 k, in the order of the header.
template <class Format, Backbone kBackbone, bool kResidual, class Tile, int kTiles>
__device__ __forceinline__ void multiply_paths(const TokenFragments<Format, Tile>& tokens,
                                               const WeightFragment (&b)[kTiles], float (&sums)[kTiles][4]) {
    const u8* tile = tokens.tile;
    u32 a[4];
    if constexpr (kBackbone == Backbone::sparse) {
        const u32 metadata = tokens.metadata(), scales = tokens.sparse_scales();
        tokens.template load<32, 0>(tile, a);
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
            ptx::mma_sp_m16n8k128_nvfp4(sums[j], a, b[j].codes, metadata, scales, b[j].sparse_scales);
    } else if constexpr (kBackbone == Backbone::expanded) {
        tokens.template expand<0>(a);
        multiply_dense<Format, 0>(sums, a, tokens.template expanded_scales<0>(), b);
        tokens.template expand<1>(a);
        multiply_dense<Format, 1>(sums, a, tokens.template expanded_scales<1>(), b);
    } else if constexpr (kBackbone == Backbone::dense) {
        multiply_dense_path(tokens, tile, tile + Tile::kBackboneScale, b, sums);
    }
    if constexpr (kResidual) multiply_dense_path(tokens, tile + Tile::kCodes, tile + Tile::kCodesScale, b, sums);
}

// ---- the product ----------------------------------------------------------------------------------------------------

// A block's tokens × rows, its warps along each, how many share an SM, whether its weights are read this once.
template <int tiles, int token_warps, int units, int row_warps, int blocks, bool read_once>
struct Shape {
    static constexpr int kTiles = tiles, kUnits = units;  // of a warp: 16 tokens, 16 rows
    static constexpr int kRowWarps = row_warps;
    static constexpr int kThreads = 32 * token_warps * row_warps, kBlocks = blocks;
    static constexpr int kTokens = 16 * tiles * token_warps, kRows = kTileRows * units * row_warps;
    static constexpr bool kReadOnce = read_once;
};
using M16 = Shape<1, 1, 1, 4, 2, true>;
using M64 = Shape<4, 1, 1, 4, 2, true>;
using M128 = Shape<4, 2, 2, 4, 1, false>;

constexpr int kSharedOfSm = 100 * 1024, kSharedBesides = 1024 + 128;  // bytes; besides: reserved and static, a block
constexpr int kMostStages = 8;

// What a block has in shared memory.
template <class Format, Backbone kBackbone, bool kResidual, class Shape>
struct Stages {
    static_assert(kBackbone != Backbone::sparse || (Format::kScaleBytes == 8 && Format::kWeightWords == 1),
                  "sparse products take a UE4M3 scale per 32 k of both operands");
    using Tile = ActivationTile<Format, kBackbone, kResidual, Shape::kTokens, Shape::kThreads>;
    static constexpr int kUnits = Shape::kRows / kTileRows;
    static constexpr int kUnitBytes = 2 * kHalfTileBytes + 4 * kTileRows * Format::kWeightWords;
    static constexpr int kStageBytes = Tile::kTileBytes + kUnits * kUnitBytes;
    static constexpr int kFitting = (kSharedOfSm / Shape::kBlocks - kSharedBesides) / kStageBytes;
    static constexpr int kStages = kFitting < kMostStages ? kFitting : kMostStages;

    // Starts the copies of k unit `unit` of `tiles` tiles of weights, kUnits or what is left, from the first on.
    static __device__ __forceinline__ void copy_weights(u32 to, const u8* weights, int first, int tiles, int unit,
                                                        int units, unsigned long long read_once) {
        constexpr int kPieces = kUnitBytes / 16;
#pragma unroll
        for (int start = 0; start < kUnits * kPieces; start += Shape::kThreads) {
            const int i = start + threadIdx.x, tile = i / kPieces, piece = i - tile * kPieces;
            if (tile >= tiles) continue;
            const u8* from = weight_unit(weights, first + tile, unit, units, kUnitBytes) + 16 * piece;
            if (Shape::kReadOnce) ptx::cp_async_16_hint(to + 16 * i, from, read_once);
            else ptx::cp_async_16(to + 16 * i, from);
        }
    }
};

// The sum for one token and row, of all slices in order.
__device__ __forceinline__ float sum_of_slices(const float* partials, int slices, int M, int padded_N, int token,
                                               int n) {
    const float* from = partials + static_cast<i64>(token) * padded_N + n;
    float sum = __ldcg(from);
    for (int slice = 1; slice < slices; ++slice)
        sum = __fadd_rn(sum, __ldcg(from + static_cast<i64>(slice) * M * padded_N));
    return sum;
}

template <class Format, Backbone kBackbone, bool kResidual, class Shape>
__device__ __forceinline__ void linear_fp4(const Fp4Activations& x, const u8* weights, const Epilogue& epilogue,
                                           const Cut& cut, int M, int N, int K) {
    using Block = Stages<Format, kBackbone, kResidual, Shape>;
    using Tile = typename Block::Tile;
    constexpr int kStages = Block::kStages, kTiles = Shape::kTiles, kColumnTiles = 2 * Shape::kUnits;
    extern __shared__ __align__(128) u8 shared[];
    const int lane = lane_of_warp(), warp = warp_of_block(), g = lane >> 2, q = lane & 3;
    const int warp_token = warp / Shape::kRowWarps * 16 * kTiles, warp_unit = warp % Shape::kRowWarps * Shape::kUnits;
    const int first_token = blockIdx.x * Shape::kTokens, tokens = min(Shape::kTokens, M - first_token);
    const int first_row = blockIdx.z * Shape::kRows, padded_N = ceil_div(N, kTileRows) * kTileRows;
    const int tiles = min(Block::kUnits, (padded_N - first_row) / kTileRows);  // of weights

    const int units = fp4_units_along_k(K), slice_units = cut.slice_k / kFp4UnitK;
    const int slices = ceil_div(units, slice_units), first_slice = blockIdx.y * cut.slices_per_block;
    const int last_slice = min(first_slice + cut.slices_per_block, slices);
    const int last_unit = min(last_slice * slice_units, units);
    const unsigned long long read_once = ptx::l2_evict_first();

    int fetched = first_slice * slice_units, fetch_slot = 0, slot = 0;
    const auto next = [](int slot) { return slot + 1 == kStages ? 0 : slot + 1; };
    const auto fetch = [&] {
        if (fetched < last_unit) {
            const u32 stage = ptx::shared_address(shared + fetch_slot * Block::kStageBytes);
            Block::copy_weights(stage + Tile::kTileBytes, weights, first_row / kTileRows, tiles, fetched, units,
                                read_once);
            Tile::copy(stage, x, first_token, tokens, fetched, units);
        }
        ptx::cp_async_commit();
        ++fetched;
        fetch_slot = next(fetch_slot);
    };

    float sums[kTiles][kColumnTiles][4], totals[kTiles][kColumnTiles][4];
    // Sum e of tile i, j belongs to token 16 i + g + 8 (e >> 1) and row 8 j + 2 q + (e & 1) of the warp's.
    const auto for_each_sum = [&](auto&& action) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i)
#pragma unroll
            for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
                for (int e = 0; e < 4; ++e) action(i, j, e);
    };
    // action(token, row, of them and of the next row): places within the block.
    const auto for_each_pair = [&](const auto& of, auto&& action) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i)
#pragma unroll
            for (int j = 0; j < kColumnTiles; ++j)
#pragma unroll
                for (int e = 0; e < 4; e += 2)
                    action(warp_token + 16 * i + g + 4 * e, kTileRows * warp_unit + 8 * j + 2 * q,
                           make_float2(of[i][j][e], of[i][j][e + 1]));
    };
    const auto multiply_stage = [&](const u8* stage) {
        WeightFragment b[kColumnTiles];
#pragma unroll
        for (int j = 0; j < kColumnTiles; ++j) {
            const int unit = min(warp_unit + j / 2, tiles - 1);  // beyond the last: computed from it, never used
            b[j] = load_weight<Format>(stage + Tile::kTileBytes + unit * Block::kUnitBytes, j % 2);
        }
#pragma unroll
        for (int i = 0; i < kTiles; ++i)
            multiply_paths<Format, kBackbone, kResidual>(TokenFragments<Format, Tile>{stage, warp_token + 16 * i}, b,
                                                         sums[i]);
    };

    ptx::launch_dependents();
    if (Shape::kTokens == 16) {  // decoding: the first weights, which no kernel writes, come as near as L2 meanwhile
        const int bytes = min(kStages - 1, last_unit - fetched) * Block::kUnitBytes;
#pragma unroll 1
        for (int tile = 0; tile < tiles; ++tile)
            for (int at = 128 * threadIdx.x; at < bytes; at += 128 * Shape::kThreads)
                ptx::prefetch_l2(weight_unit(weights, first_row / kTileRows + tile, fetched, units, Block::kUnitBytes)
                                 + at);
    }
    ptx::grid_dependency_wait();
#pragma unroll 1  // the instructions come from memory, too
    for (int i = 0; i < kStages - 1; ++i) fetch();
#pragma unroll 1
    for (int i = 0; i < kStages; ++i) Tile::pad(shared + i * Block::kStageBytes, tokens);

    for (int slice = first_slice; slice < last_slice; ++slice) {
        for_each_sum([&](int i, int j, int e) { sums[i][j][e] = 0.0f; });
        const int end = min((slice + 1) * slice_units, units);
#pragma unroll 1
        for (int unit = slice * slice_units; unit < end; ++unit) {
            ptx::cp_async_wait<kStages - 2>();
            __syncthreads();  // others' copies are there, and nobody reads the slot that is filled next
            fetch();
            multiply_stage(shared + slot * Block::kStageBytes);
            slot = next(slot);
        }
        for_each_sum([&](int i, int j, int e) {
            totals[i][j][e] = slice == first_slice ? sums[i][j][e] : __fadd_rn(totals[i][j][e], sums[i][j][e]);
        });
        if (gridDim.y > 1)
            for_each_pair(sums, [&](int token, int row, float2 pair) {
                const i64 at = (static_cast<i64>(slice) * M + first_token + token) * padded_N + first_row + row;
                if (token < tokens && first_row + row < padded_N)
                    __stcg(reinterpret_cast<float2*>(cut.partials + at), pair);
            });
    }
    ptx::cp_async_wait_all();
    __syncthreads();  // the stages have been used

    const int stride = Shape::kRows + kResultPadding;
    float* results = reinterpret_cast<float*>(shared);
    if (gridDim.y == 1)
        for_each_pair(totals, [&](int token, int row, float2 pair) {
            *reinterpret_cast<float2*>(results + token * stride + row) = pair;
        });
    else if (!arrives_last(cut.arrivals + blockIdx.z * gridDim.x + blockIdx.x)) return;
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * Shape::kRows; i += Shape::kThreads) {
        const int token = i / Shape::kRows, row = i % Shape::kRows, n = first_row + row;
        if (n >= N) continue;
        const float total = gridDim.y == 1 ? results[token * stride + row]
                                           : sum_of_slices(cut.partials, slices, M, padded_N, first_token + token, n);
        epilogue.store(first_token + token, n, total);
    }
}

#define SM120_PARAMETERS                                                                                               \
    const u8 *backbone, const u8 *metadata, const u8 *backbone_scale, const u8 *codes, const u8 *codes_scale,          \
        const float *token_scale, const u8 *units, const float *row_scale, const float *bias, const void *residual,    \
        void *out, int out_type, int M, int N, int K, int slice_k, int slices_per_block, float *partials, u32 *arrivals
#define SM120_ENTRY(name, Format, kBackbone, kResidual, Shape)                                                         \
    extern "C" __global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks) name(SM120_PARAMETERS) {             \
        const Epilogue epilogue = {1.0f, token_scale, row_scale, bias, residual, out, out_type, N};                    \
        linear_fp4<Format, kBackbone, kResidual, Shape>({backbone, metadata, backbone_scale, codes, codes_scale},      \
                                                        units, epilogue,                                               \
                                                        {slice_k, slices_per_block, 0, partials, arrivals}, M, N, K);  \
    }
#define SM120_ENTRIES(name, Format, kBackbone, kResidual)          \
    SM120_ENTRY(name##_m16, Format, kBackbone, kResidual, M16)     \
    SM120_ENTRY(name##_m64, Format, kBackbone, kResidual, M64)     \
    SM120_ENTRY(name##_m128, Format, kBackbone, kResidual, M128)

#endif  // PTX_SM120A
