#include "packed_weight.h"

#include <algorithm>
#include <cstring>

namespace engine {
namespace {

// Interleaves `num_rows` rows of `count` elements: out[i][row], kTileColumns wide. In blocks, so that whole cache lines
// are read and written.
template <class Element>
void interleave(const void* const* rows, int64_t num_rows, int64_t count, Element* out) {
    constexpr int64_t kBlock = 16;
    for (int64_t first = 0; first < count; first += kBlock) {
        const int64_t n = std::min(kBlock, count - first);
        Element block[kTileColumns][kBlock] = {};
        for (int64_t r = 0; r < num_rows; ++r)
            std::memcpy(block[r], static_cast<const char*>(rows[r]) + first * sizeof(Element), n * sizeof(Element));
        for (int64_t i = 0; i < n; ++i)
            for (int64_t r = 0; r < kTileColumns; ++r) out[(first + i) * kTileColumns + r] = block[r][i];
    }
}

}  // namespace

PackedWeight::PackedWeight(const std::vector<const void*>& rows, int64_t k, DType t, Slabs& slabs, ThreadPool& pool)
    : N(static_cast<int64_t>(rows.size())), K(k), type(t),
      nbytes(static_cast<size_t>(num_tiles(N) * tile_bytes(K, type))), data_(slabs.allocate(nbytes)) {
    pool.parallel_for(num_tiles(N), 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t tile = begin; tile < end; ++tile) {
            const int64_t first = tile * kTileColumns;
            char* out = static_cast<char*>(data_.get()) + tile * tile_bytes(K, type);
            pack_tile(&rows[first], std::min(kTileColumns, N - first), out);
        }
    });
}

void PackedWeight::pack_tile(const void* const* rows, int64_t num_rows, void* tile) const {
    if (type == DType::f32) return interleave(rows, num_rows, K, static_cast<uint32_t*>(tile));
    if (type == DType::f16) return interleave(rows, num_rows, K, static_cast<uint16_t*>(tile));
    uint32_t* pairs = static_cast<uint32_t*>(tile);
    interleave(rows, num_rows, K / 2, pairs);
    if (K % 2 == 0) return;
    uint16_t* last = reinterpret_cast<uint16_t*>(pairs + K / 2 * kTileColumns);
    std::memset(last, 0, kTileColumns * 2 * sizeof(uint16_t));
    for (int64_t r = 0; r < num_rows; ++r)
        std::memcpy(last + 2 * r, static_cast<const uint16_t*>(rows[r]) + (K - 1), sizeof(uint16_t));
}

}  // namespace engine
