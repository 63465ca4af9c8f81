// attention_f32: paged attention of fp32 activations and caches, without tensor cores and without tuning: what an fp32
// model needs to run at all.
//
//   q, out [T, H·D] float32, rows q_stride and out_stride elements apart, q at multiples of 16 bytes; H = G · KVH
//   k_cache, v_cache [blocks, KVH, 16, D] float32 of this layer (kv_cache.cuh), D a multiple of 8 up to 256
//   block_tables [S, table_stride] int32;  items [n, 8] int32, any number of rows each
//
// Rows and what they see are attention_tile.cuh's; the order of sums is simpler. A warp owns a row and walks its tokens
// in groups of 32 at absolute positions 0, 32, 64 …: lane t scores token t (d ascending), the warp finds the maximum
// and the sum of weights, then lane i adds up columns i, i + 32, … (t ascending). A row's bits follow from its own
// sequence alone, and it touches nothing it does not see, not even multiplied by 0.
//
// Grid (KVH, n), 256 threads: block (i, j) owns item j's rows of KV head i, a warp every eighth. No shared memory.
// Reads 8·D bytes of K and V per token, KV head and *row*. Reference: ReferenceOps.attention.
#include "attention_tile.cuh"

constexpr int kLaneColumns = 8;  // of a lane, for D = 256

__device__ __forceinline__ float dot(const float* a, const float* b, int D) {
    float sum = 0.0f;
    for (int d = 0; d < D; d += 4) {
        const float4 x = *reinterpret_cast<const float4*>(a + d), y = *reinterpret_cast<const float4*>(b + d);
        sum = __fmaf_rn(x.w, y.w, __fmaf_rn(x.z, y.z, __fmaf_rn(x.y, y.y, __fmaf_rn(x.x, y.x, sum))));
    }
    return sum;
}

// One row by one warp. k, v: the KV head's first element in block 0.
__device__ __forceinline__ void attend(const float* q, const float* k, const float* v, const int* table,
                                       i64 block_stride, int D, float c, Tokens seen, float* out) {
    const int lane = lane_of_warp();
    float maximum = kLowest, sum = 0.0f, o[kLaneColumns] = {};
    for (int first = seen.begin / 32 * 32; first < seen.end; first += 32) {
        const int token = first + lane;
        const bool sees = token >= seen.begin && token < seen.end;
        const i64 at = sees ? table[token / kBlockTokens] * block_stride + token % kBlockTokens * D : 0;
        const float score = sees ? dot(q, k + at, D) : -__int_as_float(kInfinityBits);

        const float before = maximum;
        maximum = fmaxf(before, __fmul_rn(max_of_lanes<32>(score), c));
        const float rescale = exp2f(before - maximum), weight = exp2f(__fmaf_rn(score, c, -maximum));
        sum = __fmaf_rn(sum, rescale, sum_of_lanes(weight));
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) o[i] = __fmul_rn(o[i], rescale);
        for (int t = max(0, seen.begin - first); t < min(32, seen.end - first); ++t) {
            const float of_token = __shfl_sync(kAllLanes, weight, t);
            const float* row = v + __shfl_sync(kAllLanes, at, t);
#pragma unroll
            for (int i = 0; i < kLaneColumns; ++i)
                if (lane + 32 * i < D) o[i] = __fmaf_rn(of_token, row[lane + 32 * i], o[i]);
        }
    }
    const float per_sum = __fdiv_rn(1.0f, sum);
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i)
        if (lane + 32 * i < D) out[lane + 32 * i] = __fmul_rn(o[i], per_sum);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    attention_f32(const float* q, i64 q_stride, const float* k_cache, const float* v_cache, const int* block_tables,
                  int table_stride, const int* items, int H, int KVH, int D, float scale, int window, float* out,
                  i64 out_stride) {
    const AttentionItem item = load_item(items, blockIdx.y);
    const int kv_head = blockIdx.x, G = H / KVH;
    const i64 head = kv_row(0, kv_head, KVH, D), block_stride = kv_row(kBlockTokens, 0, KVH, D);
    const int* table = block_tables + i64{item.sequence} * table_stride;
    for (int row = warp_of_block(); row < item.rows; row += blockDim.x / 32)
        attend(q + row_offset(item, row, G, kv_head, D, q_stride), k_cache + head, v_cache + head, table, block_stride,
               D, scale * kLog2E, seen_by(item, row, G, window),
               out + row_offset(item, row, G, kv_head, D, out_stride));
}
