// attention_decode: paged attention of few rows per sequence; its arithmetic is attention_tile.cuh's.
//
//   q, out [T, H·D] of T, rows q_stride and out_stride elements apart, at multiples of 4 and 8 bytes; H = G · KVH
//   k_cache, v_cache [blocks, KVH, 16, D] of this layer (kv_cache.cuh), of T or E4M3, D a multiple of 8 up to DP
//   k_scales, v_scales [KVH] float32 for E4M3, else null;  block_tables [S, table_stride] int32
//   items [n, 8] int32 (AttentionItem), at most 16 rows each
//   partials [P, KVH, partial_rows, D + 4] float32: o [rows, D], then m, l, 0, 0 per row; P counts all items' splits
//   arrivals [n, KVH] uint32, zero before the first launch and left zero by each
//
// Grid (x, KVH, n): block (i, j, k) takes splits i, i + x, … of item k for KV head j; x decides speed alone, so one
// captured grid serves every length. 128 threads. The rows, all query heads of the group, are the 16 rows of one MMA
// tile: K and V are read once for the group. Of each tile of 64 tokens warp w scores [16 w, + 16), the warps meet to
// agree on maxima, leave their weights in shared memory, meet again, and each adds up a quarter of the columns.
// Tensor cores whatever G: a tile's 128 MMA (D = 128) take some 250 clocks of an SM, where its 32 KB take 1,700 to come
// (19 bytes a clock: 4.3 TB/s over 132 SMs); with FMA, G = 7 takes 900 and as much again for conversions. And one
// arithmetic for every G is what lets prefill give the same bits.
//
// Each split leaves its result in partials. Where an item has up to kFusedSplits, the block that arrives last joins
// them (a launch saved, ~1.3 us); with more, attention_join does, a block to a row. Always in ascending order.
//
// Reads 2·D·sizeof(KV) bytes per token and KV head; writes and reads 4·G·(D + 4) per split and KV head, through L2:
// 11 % of K and V for G = 7, D = 128 below position 1024, 1.4 % beyond 16384. In flight per block: 1 to 2 tiles.
// Shared memory 71 KB (D = 128; E4M3 69): 3 blocks on an SM with 227 KB, 1 with 99 KB. Instructions issued per tile and
// scheduler at D = 128: ~480 in those 1,700 clocks; E4M3 ~830 in 860, and at D = 64 ~560 in 430: these two may be bound
// by instructions on an H200.
// Limits: D > 128 has one stage (71 KB); with E4M3 there K and V are widened into the same memory, which costs a third
// barrier a tile and leaves 68 KB instead of the 101 that sm_86, 89 and 120 do not have.
// Hardware must still prove speed and the last arriver's fence. Reference: ReferenceOps.attention.
#include "attention_tile.cuh"

constexpr int kDecodeWarps = 4;
constexpr int kItemRows = 16;
constexpr int kFusedSplits = 24;  // 86 KB of partial results at G = 7, D = 128: about as long to join as a launch takes

template <class T, class KV>
struct DecodeArgs {
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
    float* partials;
    int partial_rows;
    u32* arrivals;
    T* out;
    i64 out_stride;

    __device__ __forceinline__ int group() const { return H / KVH; }
    __device__ __forceinline__ float value_scale(int kv_head) const { return v_scales ? v_scales[kv_head] : 1.0f; }
    __device__ __forceinline__ float* partial(const AttentionItem& item, int split, int kv_head) const {
        return partials + (static_cast<i64>(item.first_partial + split) * KVH + kv_head) * partial_rows * (D + 4);
    }
};

// The splits of an item: [first, first + count) of its sequence.
struct Splits {
    int first, count;
};
__device__ __forceinline__ Splits splits_of(Tokens tokens) {
    const int first = split_of_tile(tokens.begin / kTileTokens);
    return {first, split_of_tile((tokens.end - 1) / kTileTokens) + 1 - first};
}

// ---- joining partial results ----------------------------------------------------------------------------------------

// Rows [row, end) of an item: a thread takes four columns of a row at a time.
template <class T, class KV>
__device__ __forceinline__ void join_partials(const DecodeArgs<T, KV>& a, const AttentionItem& item, int kv_head,
                                              int splits, int row, int end) {
    const int fours = a.D / 4;
    for (int i = row * fours + threadIdx.x; i < end * fours; i += blockDim.x) {
        const int r = i / fours, d = i % fours * 4;
        float maximum = kLowest, sum = 0.0f, o[4] = {};
#pragma unroll 4
        for (int split = 0; split < splits; ++split) {
            const float* partial = a.partial(item, split, kv_head);
            const float4 state = __ldcg(reinterpret_cast<const float4*>(partial + a.partial_rows * a.D) + r);
            const float4 values = __ldcg(reinterpret_cast<const float4*>(partial + r * a.D + d));
            const JoinFactors by = join_factors(maximum, state.x);
            sum = join(sum, state.y, by);
            o[0] = join(o[0], values.x, by), o[1] = join(o[1], values.y, by);
            o[2] = join(o[2], values.z, by), o[3] = join(o[3], values.w, by);
        }
        const float per_sum = __fdiv_rn(a.value_scale(kv_head), sum);
        T* out = a.out + row_offset(item, r, a.group(), kv_head, a.D, a.out_stride) + d;
        *reinterpret_cast<uint2*>(out) = make_uint2(
            Word<T>::pack(finished(o[0], per_sum), finished(o[1], per_sum)),
            Word<T>::pack(finished(o[2], per_sum), finished(o[3], per_sum)));
    }
}

// Grid (partial_rows, KVH, n), 64 threads: items with more than kFusedSplits splits.
template <class T, class KV>
__device__ __forceinline__ void attention_join(const DecodeArgs<T, KV>& a) {
    ptx::wait_for_earlier_kernels();
    const AttentionItem item = load_item(a.items, blockIdx.z);
    const int row = blockIdx.x;
    if (row >= item.rows) return;
    const int splits = splits_of(seen_by_all(item, a.group(), a.window)).count;
    if (splits > kFusedSplits) join_partials(a, item, blockIdx.y, splits, row, row + 1);
}

// ---- a split --------------------------------------------------------------------------------------------------------

// What the warps tell each other about a tile.
struct DecodeExchange {
    uint4 weights[kDecodeWarps][32];  // A fragments, by the warp whose tokens they are
    float2 sums[kDecodeWarps][32];    // of weights, of rows g and g + 8
    float maxima[kDecodeWarps][kItemRows];
};

template <class T, class KV, int DP>
struct DecodeSplit {
    static constexpr int kStages = DP <= 128 ? 2 : 1;
    static constexpr int kColumns = DP / 8 / kDecodeWarps;  // of a warp, in eights
    static constexpr bool kOneWide = sizeof(KV) == 1 && DP > 128;
    using Tiles = KvTiles<T, KV, DP, kDecodeWarps, kStages, kOneWide>;

    const Tiles& tiles;
    DecodeExchange& exchange;
    const Tokens (&seen)[2];
    float c;  // scores to units of log2
    RowStates rows;
    float o[kColumns][4] = {};

    __device__ __forceinline__ void run(const u32 (&queries)[DP / 16][4], int begin, int end) {
#pragma unroll
        for (int ahead = -kStages; ahead < 0; ++ahead) copy_ahead(begin + ahead, begin, end);
        for (int tile = begin; tile < end; ++tile) {
            float s[2][4], rescale[2];
            score_own_tokens(queries, tile, s);
            __syncthreads();  // maxima are there; the tile before is done with
            copy_ahead(tile, begin, end);
            weigh_own_tokens(s, rescale);
            wait_for_copies();
            tiles.widen_v(tile);
            __syncthreads();  // weights, sums and V are there
            add_own_columns(tile, rescale);
            if (kOneWide) __syncthreads();  // V has been read, the next K may come
        }
    }

    // At `tile`, what may be overwritten is K of `tile` and V of the one before. One group of copies each time.
    __device__ __forceinline__ void copy_ahead(int tile, int begin, int end) const {
        const int of_v = tile - 1 + kStages, of_k = tile + kStages;
        if (of_v >= begin && of_v < end) tiles.copy_v(of_v);
        if (of_k < end) tiles.copy_k(of_k);
        ptx::cp_async_commit();
    }
    // K of a tile came with the group before the newest kStages - 1, and so, after copy_ahead, did its V.
    __device__ __forceinline__ void wait_for_copies() const { ptx::cp_async_wait<kStages - 1>(); }

    __device__ __forceinline__ void score_own_tokens(const u32 (&queries)[DP / 16][4], int tile, float (&s)[2][4]) {
        const int first = 16 * warp_of_block(), g = lane_of_warp() >> 2;
        wait_for_copies();
        tiles.widen_k(tile);
        __syncwarp();  // a warp copies the K it scores
        score<T, DP>(s, queries, tiles.k_tile(tile) + first * Tiles::kStride * 2);
        hide_unseen(s, tile * kTileTokens + first, seen);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float most = largest(s, half);
            if ((lane_of_warp() & 3) == 0) exchange.maxima[warp_of_block()][g + 8 * half] = most;
        }
    }

    __device__ __forceinline__ void weigh_own_tokens(float (&s)[2][4], float (&rescale)[2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = (lane_of_warp() >> 2) + 8 * half;
            float most = exchange.maxima[0][row];
            for (int warp = 1; warp < kDecodeWarps; ++warp) most = fmaxf(most, exchange.maxima[warp][row]);
            rescale[half] = rows.raise(half, most, c);
        }
        exchange.sums[warp_of_block()][lane_of_warp()] = weigh(s[0], s[1], c, rows.maximum);
        u32 weights[4];
        pack_weights<T>(weights, s[0], s[1]);
        exchange.weights[warp_of_block()][lane_of_warp()] =
            make_uint4(weights[0], weights[1], weights[2], weights[3]);
    }

    __device__ __forceinline__ void add_own_columns(int tile, const float (&rescale)[2]) {
        float2 sums[kDecodeWarps];
        u32 weights[kDecodeWarps][4];
#pragma unroll
        for (int warp = 0; warp < kDecodeWarps; ++warp) {
            sums[warp] = exchange.sums[warp][lane_of_warp()];
            const uint4 fragment = exchange.weights[warp][lane_of_warp()];
            weights[warp][0] = fragment.x, weights[warp][1] = fragment.y;
            weights[warp][2] = fragment.z, weights[warp][3] = fragment.w;
        }
        rows.add(rescale, sums);
        scale_rows(o, rescale);
        add_values<T, DP>(o, weights, tiles.v_tile(tile) + warp_of_block() * kColumns * 16);
    }
};

// ---- a block --------------------------------------------------------------------------------------------------------

// The only split there is goes straight to out, the others to partials.
template <class T, class KV, int DP>
__device__ __forceinline__ void store_split(const DecodeArgs<T, KV>& a, const AttentionItem& item, int kv_head,
                                            DecodeSplit<T, KV, DP>& split, float* partial) {
    const int g = lane_of_warp() >> 2, q = lane_of_warp() & 3, warp = warp_of_block();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = g + 8 * half;
        const float sum = sum_of_lanes(split.rows.sum[half], 4);
        if (row >= item.rows) continue;
        const float per_sum = __fdiv_rn(a.value_scale(kv_head), sum);
        T* out = a.out + row_offset(item, row, a.group(), kv_head, a.D, a.out_stride);
#pragma unroll
        for (int i = 0; i < split.kColumns; ++i) {
            const int d = (warp * split.kColumns + i) * 8 + 2 * q;
            if (DP != a.D && d >= a.D) continue;
            const float x = split.o[i][2 * half], y = split.o[i][2 * half + 1];
            if (partial)
                *reinterpret_cast<float2*>(partial + row * a.D + d) = make_float2(x, y);
            else
                *reinterpret_cast<u32*>(out + d) = Word<T>::pack(finished(x, per_sum), finished(y, per_sum));
        }
        if (partial && warp == 0 && q == 0)
            reinterpret_cast<float4*>(partial + a.partial_rows * a.D)[row] =
                make_float4(split.rows.maximum[half], sum, 0.0f, 0.0f);
    }
}

// Whether this block is the last of `count` to come here; then it sees what all of them wrote.
__device__ __forceinline__ bool arrives_last(u32* arrivals, u32 count) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(arrivals, 1u) == count - 1;
        if (last) *arrivals = 0;
        __threadfence();
    }
    __syncthreads();
    return last;
}

template <class T, class KV, int DP>
__device__ __forceinline__ void attention_decode(const DecodeArgs<T, KV>& a) {
    extern __shared__ uint4 attention_shared[];
    __shared__ DecodeExchange exchange;
    using Split = DecodeSplit<T, KV, DP>;

    ptx::wait_for_earlier_kernels();
    const AttentionItem item = load_item(a.items, blockIdx.z);
    if (item.rows == 0) return;
    const int kv_head = blockIdx.y, G = a.group(), g = lane_of_warp() >> 2;
    const Tokens seen[2] = {seen_by(item, g, G, a.window), seen_by(item, g + 8, G, a.window)};
    const Tokens tokens = seen_by_all(item, G, a.window);
    const typename Split::Tiles tiles(a.k_cache, a.v_cache, a.block_tables + i64{item.sequence} * a.table_stride,
                                      kv_head, a.KVH, a.D, tokens, reinterpret_cast<unsigned char*>(attention_shared));
    u32 queries[DP / 16][4];
    load_queries<T, DP>(queries, g < item.rows ? a.q + row_offset(item, g, G, kv_head, a.D, a.q_stride) : nullptr,
                        g + 8 < item.rows ? a.q + row_offset(item, g + 8, G, kv_head, a.D, a.q_stride) : nullptr, a.D);
    const float c = a.scale * kLog2E * (a.k_scales ? a.k_scales[kv_head] : 1.0f);

    const Splits splits = splits_of(tokens);
    for (int i = blockIdx.x; i < splits.count; i += gridDim.x) {
        const int begin = max(first_tile_of_split(splits.first + i), tokens.begin / kTileTokens);
        const int end = min(first_tile_of_split(splits.first + i + 1), (tokens.end - 1) / kTileTokens + 1);
        __syncthreads();  // the split before is done with shared memory, zeros past D are there
        Split split{tiles, exchange, seen, c};
        split.run(queries, begin, end);
        store_split(a, item, kv_head, split, splits.count > 1 ? a.partial(item, i, kv_head) : nullptr);
        if (splits.count > 1 && splits.count <= kFusedSplits &&
            arrives_last(a.arrivals + blockIdx.z * a.KVH + kv_head, splits.count))
            join_partials(a, item, kv_head, splits.count, 0, item.rows);
    }
}

// attention_decode_<q's type>[_e4m3]_<DP>, D up to DP (with -DHEAD_DIM=<DP> that one alone); attention_join_<q's type>.
// Three blocks to an SM is what shared memory has room for.
#define PARAMETERS(T, KV)                                                                                             \
    const T *q, i64 q_stride, const KV *k_cache, const KV *v_cache, const int *block_tables, int table_stride,        \
        const int *items, int H, int KVH, int D, float scale, int window, const float *k_scales,                      \
        const float *v_scales, float *partials, int partial_rows, unsigned int *arrivals, T *out, i64 out_stride
#define ARGUMENTS                                                                                                     \
    {q, q_stride, k_cache, v_cache, block_tables, table_stride, items, H, KVH, D, scale, window, k_scales, v_scales,  \
     partials, partial_rows, arrivals, out, out_stride}
#if !defined(HEAD_DIM) || HEAD_DIM == 64
extern "C" __global__ void __launch_bounds__(128, 3) attention_decode_bf16_64(PARAMETERS(bf16, bf16)) {
    attention_decode<bf16, bf16, 64>(ARGUMENTS);
}
extern "C" __global__ void __launch_bounds__(128, 3) attention_decode_f16_64(PARAMETERS(f16, f16)) {
    attention_decode<f16, f16, 64>(ARGUMENTS);
}
extern "C" __global__ void __launch_bounds__(128, 3) attention_decode_bf16_e4m3_64(PARAMETERS(bf16, u8)) {
    attention_decode<bf16, u8, 64>(ARGUMENTS);
}
#endif
#if !defined(HEAD_DIM) || HEAD_DIM == 96
extern "C" __global__ void __launch_bounds__(128, 3) attention_decode_bf16_96(PARAMETERS(bf16, bf16)) {
    attention_decode<bf16, bf16, 96>(ARGUMENTS);
}
extern "C" __global__ void __launch_bounds__(128, 3) attention_decode_f16_96(PARAMETERS(f16, f16)) {
    attention_decode<f16, f16, 96>(ARGUMENTS);
}
extern "C" __global__ void __launch_bounds__(128, 3) attention_decode_bf16_e4m3_96(PARAMETERS(bf16, u8)) {
    attention_decode<bf16, u8, 96>(ARGUMENTS);
}
#endif
#if !defined(HEAD_DIM) || HEAD_DIM == 128
extern "C" __global__ void __launch_bounds__(128, 3) attention_decode_bf16_128(PARAMETERS(bf16, bf16)) {
    attention_decode<bf16, bf16, 128>(ARGUMENTS);
}
extern "C" __global__ void __launch_bounds__(128, 3) attention_decode_f16_128(PARAMETERS(f16, f16)) {
    attention_decode<f16, f16, 128>(ARGUMENTS);
}
extern "C" __global__ void __launch_bounds__(128, 3) attention_decode_bf16_e4m3_128(PARAMETERS(bf16, u8)) {
    attention_decode<bf16, u8, 128>(ARGUMENTS);
}
#endif
#if !defined(HEAD_DIM) || HEAD_DIM == 256
extern "C" __global__ void __launch_bounds__(128, 2) attention_decode_bf16_256(PARAMETERS(bf16, bf16)) {
    attention_decode<bf16, bf16, 256>(ARGUMENTS);
}
extern "C" __global__ void __launch_bounds__(128, 2) attention_decode_f16_256(PARAMETERS(f16, f16)) {
    attention_decode<f16, f16, 256>(ARGUMENTS);
}
extern "C" __global__ void __launch_bounds__(128, 2) attention_decode_bf16_e4m3_256(PARAMETERS(bf16, u8)) {
    attention_decode<bf16, u8, 256>(ARGUMENTS);
}
#endif
extern "C" __global__ void attention_join_bf16(PARAMETERS(bf16, bf16)) { attention_join<bf16, bf16>(ARGUMENTS); }
extern "C" __global__ void attention_join_f16(PARAMETERS(f16, f16)) { attention_join<f16, f16>(ARGUMENTS); }
