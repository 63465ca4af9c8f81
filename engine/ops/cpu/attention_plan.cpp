#include "attention_plan.h"

#include <algorithm>

namespace engine {
namespace {

constexpr int64_t kItemsPerThread = 4;  // so that the last items to finish are a small part of the whole
constexpr int64_t kFewRows = 8;         // a tile of the kernel: fewer rows read K and V for less work

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Items when each holds at most `rows` rows; G query heads share a KV head.
int64_t count_items(const AttentionBatch& batch, int64_t G, int64_t KVH, int64_t rows) {
    int64_t count = 0;
    for (int64_t s = 0; s < batch.S; ++s)
        count += ceil_div((batch.query_start[s + 1] - batch.query_start[s]) * G, rows) * KVH;
    return count;
}

int64_t choose_rows(const AttentionBatch& batch, int64_t G, int64_t KVH, int threads) {
    int64_t rows = kItemRows;
    while (rows > kFewRows && count_items(batch, G, KVH, rows) < kItemsPerThread * threads) rows /= 2;
    while (rows > 1 && count_items(batch, G, KVH, rows) < threads) rows /= 2;
    return rows > G ? rows / G * G : rows;  // whole tokens
}

}  // namespace

std::vector<AttentionItem> plan_attention(const AttentionBatch& batch, int64_t H, int64_t KVH, int threads) {
    const int64_t G = H / KVH, rows = choose_rows(batch, G, KVH, threads);
    std::vector<AttentionItem> items;
    items.reserve(static_cast<size_t>(count_items(batch, G, KVH, rows)));
    for (int64_t s = 0; s < batch.S; ++s) {
        const int64_t first = batch.query_start[s], total = (batch.query_start[s + 1] - first) * G;
        const int64_t before = batch.context_lens[s] - total / G;
        for (int64_t begin = 0; begin < total; begin += rows) {
            const int64_t end = std::min(begin + rows, total);
            const int64_t work = (end - begin) * (before + ceil_div(end, G));  // windows make it less, for all alike
            for (int64_t head = 0; head < KVH; ++head)
                items.push_back({first, batch.block_tables + s * batch.width, work, static_cast<int32_t>(head),
                                 static_cast<int32_t>(begin), static_cast<int32_t>(end)});
        }
    }
    std::stable_sort(items.begin(), items.end(),
                     [](const AttentionItem& a, const AttentionItem& b) { return a.work > b.work; });
    return items;
}

}  // namespace engine
