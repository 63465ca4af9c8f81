// How attention's work is shared out; compiled once. The split decides who computes a row, never what it becomes.
#pragma once

#include <vector>

#include "attention_args.h"

namespace engine {

struct AttentionBatch {
    const int32_t* query_start;   // [S + 1]
    const int32_t* context_lens;  // [S]
    const int32_t* block_tables;  // [S, width]
    int64_t S, width;
};

// Items that cover every row once, the most work first.
std::vector<AttentionItem> plan_attention(const AttentionBatch& batch, int64_t H, int64_t KVH, int threads);

}  // namespace engine
