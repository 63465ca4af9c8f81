// attention_prefill: paged attention of many rows per sequence on tensor cores; its arithmetic is attention_tile.cuh's.
//
//   q, out [T, H·D] of T, rows q_stride and out_stride elements apart, at multiples of 4 bytes; H = G · KVH
//   k_cache, v_cache [blocks, KVH, 16, D] of this layer (kv_cache.cuh), of T or E4M3, D a multiple of 8 up to DP
//   k_scales, v_scales [KVH] float32 for E4M3, else null;  block_tables [S, table_stride] int32
//   items [n, 8] int32 (AttentionItem), at most 128 rows each (D > 128: 64): chunks of several sequences in one launch
//   like_decode: 1 joins splits as attention_decode does, for decode rows (engine/scheduler.py); 0, for prefill rows,
//   takes all tiles as one split
//
// Grid (KVH, n): block (i, j) owns item j's rows of KV head i; the group's query heads share each K and V tile. 256
// threads (D > 128: 128). Warp w owns rows [16 w, + 16) from queries to output and goes over the tiles of 64 tokens
// that the block's rows see, passing those its own rows do not. Queries, weights and sums stay in registers; cp.async
// brings the next tile while this one is worked on (D > 128: one stage, no overlap within the block).
//
// Moves 4·D bytes of K and V per token (16 bits) and 128 rows, through L2; q and out once. Shared memory: 68 KB at
// D = 128, with E4M3 50; 66 and 98 KB at D = 256. Per whole tile and warp 128 MMA among ~670 instructions (D = 128,
// sm_90): issue slots are the limit on an H200, at 76 % of its tensor cores by count; on sm_80 to 89 the tensor cores
// are. A hundred of the 670 are exp2f's care for subnormals, which ex2.approx.ftz would save.
//
// like_decode = 1 makes a row's bits those of attention_decode, whatever the chunk and wherever it is cut. Ending a
// split costs ~230 instructions per warp (D = 128): 35 % of a tile for each tile below position 1024, where attention
// itself is little, 17, 9 and 4 % from 1024, 4096, 16384 on. With 0 only the order of sums differs, and the total lies
// idle; D = 64 and 128 keep part of it, D = 256 all, in local memory (tests/test_cuda_compile.py counts it as spills).
// Limits: as for decode; no wgmma: for long prompts on Hopper such a kernel belongs beside this one. Hardware must
// still prove speed. Reference: ReferenceOps.attention.
#include "attention_tile.cuh"

template <class T, class KV>
struct PrefillArgs {
    const T* q;
    i64 q_stride;
    const KV *k_cache, *v_cache;
    const int* block_tables;
    int table_stride;
    const int* items;
    int H, KVH, D;
    float scale;
    int window;
    const float *k_scales, *v_scales;
    int like_decode;
    T* out;
    i64 out_stride;
};

// The rows of a warp.
template <class T, int DP>
struct PrefillRows {
    static constexpr int kColumns = DP / 8;  // in eights

    Tokens seen[2];  // by rows g, g + 8
    float c;         // scores to units of log2
    u32 queries[DP / 16][4];
    RowStates rows;
    float o[kColumns][4] = {};
    float total_maximum[2] = {kLowest, kLowest}, total_sum[2] = {}, total[kColumns][4] = {};

    // Whether a row sees all the tokens [begin, end), or any.
    static __device__ __forceinline__ bool sees_all(Tokens seen, int begin, int end) {
        return begin >= seen.begin && end <= seen.end;
    }
    static __device__ __forceinline__ bool sees_any(Tokens seen, int begin, int end) {
        return begin < seen.end && end > seen.begin;
    }

    __device__ __forceinline__ void add_tile(int tile, u32 k, u32 v) {
        const int begin = tile * kTileTokens, end = begin + kTileTokens;
        if (!__any_sync(kAllLanes, sees_any(seen[0], begin, end) || sees_any(seen[1], begin, end))) return;
        float s[8][4], rescale[2];
        score<T, DP>(s, queries, k);
        if (!__all_sync(kAllLanes, sees_all(seen[0], begin, end) && sees_all(seen[1], begin, end)))
            hide_unseen(s, begin, seen);
#pragma unroll
        for (int half = 0; half < 2; ++half) rescale[half] = rows.raise(half, largest(s, half), c);

        u32 weights[4][4];
        float2 sums[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            sums[i] = weigh(s[2 * i], s[2 * i + 1], c, rows.maximum);
            pack_weights<T>(weights[i], s[2 * i], s[2 * i + 1]);
        }
        rows.add(rescale, sums);
        if (__any_sync(kAllLanes, rescale[0] != 1.0f || rescale[1] != 1.0f)) scale_rows(o, rescale);  // rare later on
        add_values<T, DP>(o, weights, v);
    }

    // Joins the split to the total and begins another.
    __device__ __forceinline__ void end_split() {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const JoinFactors by = join_factors(total_maximum[half], rows.maximum[half]);
            total_sum[half] = join(total_sum[half], sum_of_lanes(rows.sum[half], 4), by);
#pragma unroll
            for (int i = 0; i < kColumns; ++i)
#pragma unroll
                for (int r = 2 * half; r < 2 * half + 2; ++r) {
                    total[i][r] = join(total[i][r], o[i][r], by);
                    o[i][r] = 0.0f;
                }
        }
        rows = RowStates();
    }

    // One row's output, D elements.
    __device__ __forceinline__ void store(int half, float value_scale, T* out, int D) const {
        const float per_sum = __fdiv_rn(value_scale, total_sum[half]);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            const int d = 8 * i + 2 * (lane_of_warp() & 3);
            if (D == DP || d < D)
                *reinterpret_cast<u32*>(out + d) = Word<T>::pack(finished(total[i][2 * half], per_sum),
                                                                finished(total[i][2 * half + 1], per_sum));
        }
    }
};

// Brings `tile` into place for all warps and starts on the next. The first tile's copy is under way already, unless
// there is but one stage to copy into.
template <class Tiles, int kStages>
__device__ __forceinline__ void next_tile(const Tiles& tiles, int tile, int end) {
    const auto copy = [&](int of) {
        if (of < end) tiles.copy_k(of), tiles.copy_v(of);
        ptx::cp_async_commit();
    };
    if constexpr (Tiles::kNarrow) {
        ptx::cp_async_wait<0>();
        __syncthreads();  // all are done with the widened tile before
        tiles.widen_k(tile), tiles.widen_v(tile);
        copy(tile + 1);  // over what this thread itself has just widened
    } else if constexpr (kStages == 2) {
        ptx::cp_async_wait<0>();
        __syncthreads();  // all have copied this tile and are done with the one before
        copy(tile + 1);
        return;
    } else {
        __syncthreads();  // all are done with the tile before
        copy(tile);
        ptx::cp_async_wait<0>();
    }
    __syncthreads();
}

// Of the block's rows, this lane's g (half 0) or g + 8.
__device__ __forceinline__ int own_row(int half) {
    return 16 * warp_of_block() + (lane_of_warp() >> 2) + 8 * half;
}

template <class T, class KV, int DP>
__device__ __forceinline__ void attention_prefill(const PrefillArgs<T, KV>& a) {
    extern __shared__ uint4 attention_shared[];
    constexpr int kWarps = DP <= 128 ? 8 : 4, kStages = DP <= 128 && sizeof(KV) == 2 ? 2 : 1;
    using Tiles = KvTiles<T, KV, DP, kWarps, kStages>;

    const AttentionItem item = load_item(a.items, blockIdx.y);
    if (item.rows == 0) return;
    const int kv_head = blockIdx.x, G = a.H / a.KVH;
    const Tokens tokens = seen_by_all(item, G, a.window);
    const int begin = tokens.begin / kTileTokens, end = (tokens.end - 1) / kTileTokens + 1;
    const Tiles tiles(a.k_cache, a.v_cache, a.block_tables + i64{item.sequence} * a.table_stride, kv_head, a.KVH, a.D,
                      tokens, reinterpret_cast<unsigned char*>(attention_shared));
    if (Tiles::kNarrow || kStages == 2) {
        tiles.copy_k(begin), tiles.copy_v(begin);
        ptx::cp_async_commit();
    }

    PrefillRows<T, DP> rows;
    const T* q[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = own_row(half);
        rows.seen[half] = seen_by(item, row, G, a.window);
        q[half] = row < item.rows ? a.q + row_offset(item, row, G, kv_head, a.D, a.q_stride) : nullptr;
    }
    load_queries<T, DP>(rows.queries, q[0], q[1], a.D);
    rows.c = a.scale * kLog2E * (a.k_scales ? a.k_scales[kv_head] : 1.0f);

    for (int tile = begin; tile < end;) {
        const int stop = a.like_decode ? min(end, first_tile_of_split(split_of_tile(tile) + 1)) : end;
        for (; tile < stop; ++tile) {
            next_tile<Tiles, kStages>(tiles, tile, end);
            rows.add_tile(tile, tiles.k_tile(tile), tiles.v_tile(tile));
        }
        rows.end_split();
    }
    const float value_scale = a.v_scales ? a.v_scales[kv_head] : 1.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half)
        if (own_row(half) < item.rows)
            rows.store(half, value_scale, a.out + row_offset(item, own_row(half), G, kv_head, a.D, a.out_stride), a.D);
}

// attention_prefill_<q's type>[_e4m3]_<DP>, D up to DP (with -DHEAD_DIM=<DP> that one alone).
#define PARAMETERS(T, KV)                                                                                             \
    const T *q, i64 q_stride, const KV *k_cache, const KV *v_cache, const int *block_tables, int table_stride,        \
        const int *items, int H, int KVH, int D, float scale, int window, const float *k_scales,                      \
        const float *v_scales, int like_decode, T *out, i64 out_stride
#define ARGUMENTS                                                                                                     \
    {q, q_stride, k_cache, v_cache, block_tables, table_stride, items, H, KVH, D, scale, window, k_scales, v_scales,  \
     like_decode, out, out_stride}
#if !defined(HEAD_DIM) || HEAD_DIM == 64
extern "C" __global__ void __launch_bounds__(256, 2) attention_prefill_bf16_64(PARAMETERS(bf16, bf16)) {
    attention_prefill<bf16, bf16, 64>(ARGUMENTS);
}
extern "C" __global__ void __launch_bounds__(256, 2) attention_prefill_f16_64(PARAMETERS(f16, f16)) {
    attention_prefill<f16, f16, 64>(ARGUMENTS);
}
extern "C" __global__ void __launch_bounds__(256, 2) attention_prefill_bf16_e4m3_64(PARAMETERS(bf16, u8)) {
    attention_prefill<bf16, u8, 64>(ARGUMENTS);
}
#endif
#if !defined(HEAD_DIM) || HEAD_DIM == 96
extern "C" __global__ void __launch_bounds__(256, 1) attention_prefill_bf16_96(PARAMETERS(bf16, bf16)) {
    attention_prefill<bf16, bf16, 96>(ARGUMENTS);
}
extern "C" __global__ void __launch_bounds__(256, 1) attention_prefill_f16_96(PARAMETERS(f16, f16)) {
    attention_prefill<f16, f16, 96>(ARGUMENTS);
}
extern "C" __global__ void __launch_bounds__(256, 1) attention_prefill_bf16_e4m3_96(PARAMETERS(bf16, u8)) {
    attention_prefill<bf16, u8, 96>(ARGUMENTS);
}
#endif
#if !defined(HEAD_DIM) || HEAD_DIM == 128
extern "C" __global__ void __launch_bounds__(256, 1) attention_prefill_bf16_128(PARAMETERS(bf16, bf16)) {
    attention_prefill<bf16, bf16, 128>(ARGUMENTS);
}
extern "C" __global__ void __launch_bounds__(256, 1) attention_prefill_f16_128(PARAMETERS(f16, f16)) {
    attention_prefill<f16, f16, 128>(ARGUMENTS);
}
extern "C" __global__ void __launch_bounds__(256, 1) attention_prefill_bf16_e4m3_128(PARAMETERS(bf16, u8)) {
    attention_prefill<bf16, u8, 128>(ARGUMENTS);
}
#endif
#if !defined(HEAD_DIM) || HEAD_DIM == 256
extern "C" __global__ void __launch_bounds__(128, 1) attention_prefill_bf16_256(PARAMETERS(bf16, bf16)) {
    attention_prefill<bf16, bf16, 256>(ARGUMENTS);
}
extern "C" __global__ void __launch_bounds__(128, 1) attention_prefill_f16_256(PARAMETERS(f16, f16)) {
    attention_prefill<f16, f16, 256>(ARGUMENTS);
}
extern "C" __global__ void __launch_bounds__(128, 1) attention_prefill_bf16_e4m3_256(PARAMETERS(bf16, u8)) {
    attention_prefill<bf16, u8, 256>(ARGUMENTS);
}
#endif
