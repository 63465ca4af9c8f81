// Attention's arithmetic and data paths, shared by attention_decode.cu and attention_prefill.cu so that both give a row
// the same bits. A row is a (token, query head) pair of one KV head's group: row = token · G + head, G = H / KVH.
//
// A row at position p of its sequence sees tokens max(0, p − window + 1) … p of the paged cache (kv_cache.cuh), in
// tiles of 64 that begin at absolute positions 0, 64, 128 …. Over the tiles it keeps a maximum m of scores (in units of
// log2), a sum l of weights and a sum o [D] of weighted values, all fp32, from m = −3.4e38, l = 0, o = 0:
//
//   s_t = Σ_d q_d k_td                       mma m16n8k16, fp32 accumulators, d ascending in steps of 16
//   m'  = max(m, max_t s_t · c)              c = scale · log2 e (· k_scale); unseen tokens have s_t = −inf
//   w_t = 2^(s_t · c − m')                   one fma, exp2f (2 ulp)
//   l   = l · 2^(m − m') + Σ_t w_t           in four parts, one per lane of a quad; within it as weigh and add do
//   o   = o · 2^(m − m') + Σ_t w_t v_t       w_t rounded to v's type; mma m16n8k16, t ascending in steps of 16
//
// Runs of tiles ("splits") begin at fixed absolute positions (split_of_tile). A split starts anew; its (m, l, o) joins
// the total (M, L, O) of the splits before it, in ascending order (join_factors); a row ends as O / L (· v_scale).
// A tile or split of which a row sees nothing changes no bit of it, rows of an MMA do not meet, and where splits and
// tiles begin follows from positions alone. So a row's bits follow from its own sequence, not from who computes it.
//
// Against float64: products are exact and sums fp32, so the rounding of the weights (up to 2^-8 of each in bf16, 2^-11
// in f16) and of the result (the same) is nearly all there is. A NaN or infinite V also reaches earlier rows of its own
// sequence that share its tile, as 0 · inf; K and other sequences never do.
//
// KV types: T itself, or E4M3 codes (u8) for T = bf16: k = k_scale[head] · code, v = v_scale[head] · code, fp32 scales
// per layer and KV head, fixed for the cache's life; writers store e4m3(x / scale), nearest even, clamped to ±448.
// Codes widen to bf16 exactly on their way into the tile. The two NaN codes read as ±480: writers must flag NaN.
//
// Hardware must still prove, for equal bits, what the emulator's MMA has by construction: that a row's result does not
// depend on the other rows, nor a sum on products that are 0.
#pragma once

#include "kv_cache.cuh"
#include "mma.cuh"

constexpr int kTileTokens = 64;  // 4 blocks; 8 independent MMA chains in a warp's scores, 2 barriers per 32 KB
constexpr float kLowest = -3.40282347e38f;  // not −inf: a difference of two maxima must not be NaN
constexpr float kLog2E = 1.44269504f;

// ---- splits ---------------------------------------------------------------------------------------------------------

// 1, 2, 4, 8 tiles long from positions 0, 1024, 4096, 16384 on: a short context spreads over many blocks (8 per KV head
// at 512 tokens), a long one has few partial results (4 bytes · G · D per split beside 4 · D per token).
// Mirrored by num_splits in launch_attention.py.
__device__ __forceinline__ int split_of_tile(int tile) {
    if (tile < 16) return tile;
    if (tile < 64) return 8 + tile / 2;
    if (tile < 256) return 24 + tile / 4;
    return 56 + tile / 8;
}
__device__ __forceinline__ int first_tile_of_split(int split) {
    if (split < 16) return split;
    if (split < 40) return 2 * (split - 8);
    if (split < 88) return 4 * (split - 24);
    return 8 * (split - 56);
}

// How a total and the split that joins it are scaled: O · total + o · split, L alike. `maximum` becomes the greater.
struct JoinFactors {
    float total, split;
};
__device__ __forceinline__ JoinFactors join_factors(float& maximum, float of_split) {
    const float before = maximum;
    maximum = fmaxf(before, of_split);
    return {exp2f(before - maximum), exp2f(of_split - maximum)};
}
__device__ __forceinline__ float join(float total, float split, JoinFactors by) {
    return __fmaf_rn(total, by.total, __fmul_rn(split, by.split));
}

// A row's output from its total; + 0 makes a zero positive, which empty tiles may have done already.
__device__ __forceinline__ float finished(float total, float per_sum) {
    return __fadd_rn(__fmul_rn(total, per_sum), 0.0f);
}

// ---- who sees what --------------------------------------------------------------------------------------------------

// A block's share of the work; [n, 8] int32 in memory, made by plan_attention. Rows count from the sequence's first new
// token, which is row first_token of q and out and stands at `position`. An item without rows is padding.
struct AttentionItem {
    int sequence, first_token, position, first_row, rows;
    int first_partial;  // decode: where the item's partial results begin
};
__device__ __forceinline__ AttentionItem load_item(const int* items, int index) {
    const int4* item = reinterpret_cast<const int4*>(items) + 2 * index;
    const int4 a = item[0], b = item[1];
    return {a.x, a.y, a.z, a.w, b.x, b.y};
}

struct Tokens {  // [begin, end) of a sequence
    int begin, end;
};
// What row `row` of the item sees; nothing where the item has no such row.
__device__ __forceinline__ Tokens seen_by(const AttentionItem& item, int row, int G, int window) {
    if (row >= item.rows) return {0, 0};
    const int position = item.position + (item.first_row + row) / G;
    return {max(0, position - window + 1), position + 1};
}
// What all its rows see together; later rows see later tokens.
__device__ __forceinline__ Tokens seen_by_all(const AttentionItem& item, int G, int window) {
    return {seen_by(item, 0, G, window).begin, seen_by(item, item.rows - 1, G, window).end};
}

// Offset of an item's row from the start of q or out, to the head's first element.
__device__ __forceinline__ i64 row_offset(const AttentionItem& item, int row, int G, int kv_head, int D, i64 stride) {
    const int index = item.first_row + row;
    return (item.first_token + index / G) * stride + static_cast<i64>(kv_head * G + index % G) * D;
}

// ---- K and V through shared memory ----------------------------------------------------------------------------------

// Four E4M3 codes as the bf16 numbers they are. The bits are placed so that the exponent field is right but for the
// bias, which a multiplication mends exactly, subnormals included.
__device__ __forceinline__ uint2 widen_e4m3(u32 codes) {
    const __nv_bfloat162 mend = __float2bfloat162_rn(0x1p120f);
    uint2 pairs = {__byte_perm(codes, 0, 0x1404), __byte_perm(codes, 0, 0x3424)};
    pairs.x = (pairs.x & 0x80008000u) | (pairs.x >> 4 & 0x07f007f0u);
    pairs.y = (pairs.y & 0x80008000u) | (pairs.y >> 4 & 0x07f007f0u);
    const __nv_bfloat162 low = __hmul2(reinterpret_cast<__nv_bfloat162&>(pairs.x), mend);
    const __nv_bfloat162 high = __hmul2(reinterpret_cast<__nv_bfloat162&>(pairs.y), mend);
    return {reinterpret_cast<const u32&>(low), reinterpret_cast<const u32&>(high)};
}

// One KV head of one sequence, tile by tile. Warp w of kWarps copies and widens rows [64 w / kWarps, …) of each tile,
// which lie in one block; every other warp needs a barrier to see them. Tokens outside `tokens` and elements past D are
// zeros. Tiles in shared memory are [64][DP + 8] of T: 16 bytes more than a power of two keep ldmatrix free of bank
// conflicts. E4M3 lands in the stages as it lies in memory and is widened into a tile each of K and V behind them, or
// (kOneWide, where shared memory is short) into one that both take turns in: K until all have scored, then V.
template <class T, class KV, int DP, int kWarps, int kStages, bool kOneWide = false>
struct KvTiles {
    static constexpr bool kNarrow = sizeof(KV) == 1;  // E4M3; T is bf16
    static constexpr int kStride = DP + 8, kTileBytes = kTileTokens * kStride * 2, kRows = kTileTokens / kWarps;
    static constexpr int kStageBytes = kNarrow ? kTileTokens * DP : kTileBytes;  // of K or of V
    static constexpr int kWideTiles = !kNarrow ? 0 : kOneWide ? 1 : 2;
    static constexpr int kSharedBytes = 2 * kStages * kStageBytes + kWideTiles * kTileBytes;

    const KV *k, *v;   // the head's row of token 0 in block 0
    const int* table;  // the sequence's blocks
    i64 block_stride;  // elements
    int D;
    Tokens tokens;          // that anyone sees
    unsigned char* memory;  // kSharedBytes of shared memory
    u32 shared;             // its address

    __device__ KvTiles(const KV* k_cache, const KV* v_cache, const int* table, int kv_head, int KVH, int D,
                       Tokens tokens, unsigned char* memory)
        : k(k_cache + kv_row(0, kv_head, KVH, D)), v(v_cache + kv_row(0, kv_head, KVH, D)), table(table),
          block_stride(kv_row(kBlockTokens, 0, KVH, D)), D(D), tokens(tokens), memory(memory),
          shared(ptx::shared_address(memory)) {
        if (kNarrow && D < DP)
            for (int i = threadIdx.x; i < kWideTiles * kTileBytes / 16; i += 32 * kWarps)
                reinterpret_cast<uint4*>(memory + 2 * kStages * kStageBytes)[i] = {};
    }

    // Bytes from the start of `memory`.
    __device__ __forceinline__ int stage(int tile, int is_v) const {
        return (2 * (tile % kStages) + is_v) * kStageBytes;
    }
    __device__ __forceinline__ int widened(int is_v) const {
        return 2 * kStages * kStageBytes + (kOneWide ? 0 : is_v * kTileBytes);
    }

    // Where a tile that has been waited for (and widened) lies.
    __device__ __forceinline__ u32 k_tile(int tile) const { return shared + (kNarrow ? widened(0) : stage(tile, 0)); }
    __device__ __forceinline__ u32 v_tile(int tile) const { return shared + (kNarrow ? widened(1) : stage(tile, 1)); }

    // Starts the copy of this warp's rows; the caller commits.
    __device__ __forceinline__ void copy_k(int tile) const { copy(k, tile, stage(tile, 0)); }
    __device__ __forceinline__ void copy_v(int tile) const { copy(v, tile, stage(tile, 1)); }

    __device__ __forceinline__ void copy(const KV* pages, int tile, int stage) const {
        const u32 to = shared + stage;
        const int row = warp_of_block() * kRows, token = tile * kTileTokens + row;
        const bool any = token < tokens.end && token + kRows > tokens.begin;
        const bool all = token >= tokens.begin && token + kRows <= tokens.end;
        if (any) pages += table[token / kBlockTokens] * block_stride + token % kBlockTokens * D;
        if constexpr (kNarrow) {
#pragma unroll
            for (int i = lane_of_warp(); i < kRows * DP / 16; i += 32)
                if (D == DP || 16 * i < kRows * D)
                    ptx::cp_async_16(to + row * D + 16 * i, any ? pages + 16 * i : k, any ? 16 : 0);
        } else if (all && D == DP) {  // nearly always, and with all offsets known
#pragma unroll
            for (int i = lane_of_warp(); i < kRows * DP / 8; i += 32)
                ptx::cp_async_16(to + ((row + i / (DP / 8)) * kStride + i % (DP / 8) * 8) * 2, pages + 8 * i);
        } else {
#pragma unroll 1
            for (int i = lane_of_warp(); i < kRows * DP / 8; i += 32) {
                const int r = i / (DP / 8), d = i % (DP / 8) * 8;
                const bool wanted = token + r >= tokens.begin && token + r < tokens.end && d < D;
                ptx::cp_async_16(to + ((row + r) * kStride + d) * 2, wanted ? pages + r * D + d : k, wanted ? 16 : 0);
            }
        }
    }

    // E4M3: what this thread has copied, once it has waited for it; afterwards the stage is free. Otherwise nothing.
    __device__ __forceinline__ void widen_k(int tile) const { widen(stage(tile, 0), widened(0)); }
    __device__ __forceinline__ void widen_v(int tile) const { widen(stage(tile, 1), widened(1)); }

    __device__ __forceinline__ void widen(int from, int to) const {
        if constexpr (kNarrow) {
            if (D == DP)
                widen_rows<true>(from, to);
            else
                widen_rows<false>(from, to);
        }
    }
    template <bool kFull>
    __device__ __forceinline__ void widen_rows(int from, int to) const {
        constexpr int kUnroll = kFull ? kRows * DP / 512 + 1 : 1;  // what is not full divides by D
        const int row = warp_of_block() * kRows, width = kFull ? DP : D;
#pragma unroll kUnroll
        for (int i = lane_of_warp(); i < kRows * DP / 16; i += 32) {
            if (16 * i >= kRows * width) break;
            const uint4 codes = *reinterpret_cast<const uint4*>(memory + from + row * width + 16 * i);
            widen_eight(to, row + 16 * i / width, 16 * i % width, codes.x, codes.y);
            widen_eight(to, row + (16 * i + 8) / width, (16 * i + 8) % width, codes.z, codes.w);
        }
    }
    __device__ __forceinline__ void widen_eight(int to, int row, int d, u32 low, u32 high) const {
        const uint2 a = widen_e4m3(low), b = widen_e4m3(high);
        *reinterpret_cast<uint4*>(memory + to + (row * kStride + d) * 2) = make_uint4(a.x, a.y, b.x, b.y);
    }
};

// ---- products -------------------------------------------------------------------------------------------------------
// Fragments as in mma.cuh: of a 16-row tile a lane has rows g and g + 8, and of every 8 columns 2 q and 2 q + 1.

__device__ __forceinline__ void multiply(bf16, float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const u32 b[2] = {b0, b1};
    ptx::mma_m16n8k16_bf16(c, a, b);
}
__device__ __forceinline__ void multiply(f16, float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const u32 b[2] = {b0, b1};
    ptx::mma_m16n8k16_f16(c, a, b);
}

// The queries of rows g and g + 8, given where they begin, or null for rows that are not there.
template <class T, int DP>
__device__ __forceinline__ void load_queries(u32 (&a)[DP / 16][4], const T* row_g, const T* row_g8, int D) {
    const int q = lane_of_warp() & 3;
#pragma unroll
    for (int step = 0; step < DP / 16; ++step)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const T* row = r & 1 ? row_g8 : row_g;
            const int d = 16 * step + 8 * (r >> 1) + 2 * q;
            a[step][r] = row && (D == DP || d < D) ? *reinterpret_cast<const u32*>(row + d) : 0;
        }
}

// s = q · kᵀ for 8 · n tokens whose K rows begin at shared address k.
template <class T, int DP, int n>
__device__ __forceinline__ void score(float (&s)[n][4], const u32 (&queries)[DP / 16][4], u32 k) {
    k += ((lane_of_warp() & 7) * (DP + 8) + (lane_of_warp() >> 3) * 8) * 2;
#pragma unroll
    for (int i = 0; i < n; ++i) s[i][0] = s[i][1] = s[i][2] = s[i][3] = 0.0f;
#pragma unroll
    for (int step = 0; step < DP / 16; step += 2)
#pragma unroll
        for (int i = 0; i < n; ++i) {
            u32 b[4];
            ptx::ldmatrix_x4(b, k + (8 * i * (DP + 8) + 16 * step) * 2);
            multiply(T(), s[i], queries[step], b[0], b[1]);
            multiply(T(), s[i], queries[step + 1], b[2], b[3]);
        }
}

// o += w · v for 8 · n columns, v the shared address of the first column in the tile's first row.
template <class T, int DP, int n>
__device__ __forceinline__ void add_values(float (&o)[n][4], const u32 (&weights)[4][4], u32 v) {
    v += lane_of_warp() * (DP + 8) * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < n; ++i) {
            u32 b[4];
            ptx::ldmatrix_x4_trans(b, v + (32 * half * (DP + 8) + 8 * i) * 2);
            multiply(T(), o[i], weights[2 * half], b[0], b[1]);
            multiply(T(), o[i], weights[2 * half + 1], b[2], b[3]);
        }
}

// ---- scores to weights ----------------------------------------------------------------------------------------------

// −inf for the tokens that rows g and g + 8 do not see, whatever their score; `token` is the first column's.
template <int n>
__device__ __forceinline__ void hide_unseen(float (&s)[n][4], int token, const Tokens (&seen)[2]) {
    token += 2 * (lane_of_warp() & 3);
#pragma unroll
    for (int i = 0; i < n; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r) {
            const int t = token + 8 * i + (r & 1);
            if (t < seen[r >> 1].begin || t >= seen[r >> 1].end) s[i][r] = -__int_as_float(kInfinityBits);
        }
}

// The largest score of row g (half 0) or g + 8 (half 1), for the four lanes that hold the row.
template <int n>
__device__ __forceinline__ float largest(const float (&s)[n][4], int half) {
    float most = fmaxf(s[0][2 * half], s[0][2 * half + 1]);
#pragma unroll
    for (int i = 1; i < n; ++i) most = fmaxf(most, fmaxf(s[i][2 * half], s[i][2 * half + 1]));
    return max_of_lanes<4>(most);
}

// Scores of 16 tokens to weights, and the lane's share of their sums. maximum: m' of rows g, g + 8.
__device__ __forceinline__ float2 weigh(float (&low)[4], float (&high)[4], float c, const float (&maximum)[2]) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        low[r] = exp2f(__fmaf_rn(low[r], c, -maximum[r >> 1]));
        high[r] = exp2f(__fmaf_rn(high[r], c, -maximum[r >> 1]));
    }
    return {__fadd_rn(__fadd_rn(low[0], low[1]), __fadd_rn(high[0], high[1])),
            __fadd_rn(__fadd_rn(low[2], low[3]), __fadd_rn(high[2], high[3]))};
}

// The weights of 16 tokens as an A fragment.
template <class T>
__device__ __forceinline__ void pack_weights(u32 (&a)[4], const float (&low)[4], const float (&high)[4]) {
    a[0] = Word<T>::pack(low[0], low[1]), a[1] = Word<T>::pack(low[2], low[3]);
    a[2] = Word<T>::pack(high[0], high[1]), a[3] = Word<T>::pack(high[2], high[3]);
}

// m and l of rows g and g + 8; l is this lane's share until sum_of_lanes(l, 4).
struct RowStates {
    float maximum[2] = {kLowest, kLowest}, sum[2] = {0.0f, 0.0f};

    // Raises the maximum of a row by the tile's largest score; returns what l and o are to be multiplied by.
    __device__ __forceinline__ float raise(int half, float score, float c) {
        const float before = maximum[half];
        maximum[half] = fmaxf(before, __fmul_rn(score, c));
        return exp2f(before - maximum[half]);
    }
    // Adds a tile's weights, summed by weigh in sixteens of tokens.
    __device__ __forceinline__ void add(const float (&rescale)[2], const float2 (&s)[4]) {
        sum[0] = __fmaf_rn(sum[0], rescale[0], __fadd_rn(__fadd_rn(s[0].x, s[1].x), __fadd_rn(s[2].x, s[3].x)));
        sum[1] = __fmaf_rn(sum[1], rescale[1], __fadd_rn(__fadd_rn(s[0].y, s[1].y), __fadd_rn(s[2].y, s[3].y)));
    }
};

template <int n>
__device__ __forceinline__ void scale_rows(float (&o)[n][4], const float (&by)[2]) {
#pragma unroll
    for (int i = 0; i < n; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r) o[i][r] = __fmul_rn(o[i][r], by[r >> 1]);
}
