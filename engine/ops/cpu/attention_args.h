// Arguments of the operations on the KV cache. Strides are elements from row to row.
#pragma once

#include "kv_cache.h"

namespace engine {

// Per head of qkv [T, (H + 2 KVH) D]: optional RMSNorm, rotation; q to out [T, H D], k and v to the cache.
struct RopeArgs {
    const void* qkv;
    DType type;  // of qkv and out: cache.type unless that is E4M3
    int64_t qkv_stride;
    const float* rope_table;  // [P, D] = cos [D / 2] | sin [D / 2]
    const int32_t* positions;     // [T]
    const int32_t* slot_mapping;  // [T]
    int64_t T, H;
    const float* q_norm;  // [D] or null
    const float* k_norm;  // [D] or null
    float eps;
    KVLayer cache;
    void* out;
    int64_t out_stride;
};

// A share of the work: rows of one sequence that read one KV head. A row is a (token, query head of the group) pair,
// row = token · G + head, where token counts the sequence's new tokens and G = H / KVH.
struct AttentionItem {
    int64_t first_token;         // of the sequence, as a row of q
    const int32_t* block_table;  // of the sequence
    int64_t work;                // rows × tokens, about
    int32_t kv_head;
    int32_t row_begin, row_end;
};

struct AttentionArgs {
    const void* q;  // [T, H D]
    DType type;     // of q and out: cache.type unless that is E4M3
    int64_t q_stride;
    int64_t H;
    const int32_t* positions;  // [T]
    const AttentionItem* items;
    int64_t num_items;
    KVLayer cache;
    float scale;
    int64_t window;  // tokens a row sees at most, its own included
    void* out;       // [T, H D]
    int64_t out_stride;
};

constexpr int64_t kItemRows = 128;  // at most: their fp32 outputs (32 KB for D = 64) stay in the first caches

}  // namespace engine
