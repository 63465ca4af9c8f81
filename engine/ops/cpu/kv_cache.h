// The paged KV cache as this backend lays it out: blocks of 16 tokens, in each a tile per KV head.
//
//   [layers] [KVH] [blocks] { K tile, V tile }
//   K tile, f32 and f16:  [D] [16]          element d of 16 tokens side by side: scores of 16 tokens are 16 lanes
//   K tile, bf16:         [D / 2] [16] [2]  two d per token together, as the bf16 dot product reads them
//   V tile:               [16] [DV]         DV = D rounded up to 16 lanes, the rest zero; the output's D are the lanes
//   E4M3:                 bf16's tiles in codes, in lines of 64 that expand to two lines of bf16 (code_place)
//
// A head's blocks lie one after the other, K and V together (a page of memory for 16-bit types and D = 64): a sequence
// that owns neighbouring blocks, as most do, is one stream to the processor's prefetcher.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtypes.h"

namespace engine {

constexpr int64_t kBlockTokens = 16;
constexpr int64_t kMaxHeadDim = 256;

// One layer's tiles.
struct KVLayer {
    char* data;
    DType type;
    int64_t num_blocks, KVH, D;
    float k_scale = 1.0f, v_scale = 1.0f;  // what E4M3 codes are multiplied with
};

// Where the code of a bf16 tile's element lies.
static inline int64_t code_place(int64_t element) {
    const int64_t in_line = element % 64, in_half = in_line % 32;
    return element - in_line + in_half / 8 * 16 + in_line / 32 * 8 + in_half % 8;
}

static inline int64_t value_stride(int64_t D) { return (D + 15) / 16 * 16; }  // DV, elements
static inline int64_t k_tile_bytes(const KVLayer& kv) { return kBlockTokens * kv.D * size_of(kv.type); }
static inline int64_t tile_pair_bytes(const KVLayer& kv) {
    return k_tile_bytes(kv) + kBlockTokens * value_stride(kv.D) * size_of(kv.type);
}
static inline char* k_tile(const KVLayer& kv, int64_t block, int64_t head) {
    return kv.data + (head * kv.num_blocks + block) * tile_pair_bytes(kv);
}
static inline char* v_tile(const KVLayer& kv, int64_t block, int64_t head) {
    return k_tile(kv, block, head) + k_tile_bytes(kv);
}

class KVCache {
public:
    // Zeroed; memory that has not been written to yet costs nothing. scales [2][num_layers]: of E4M3's K and V, else
    // null. Throws std::bad_alloc.
    KVCache(int64_t num_layers, int64_t num_blocks, int64_t KVH, int64_t D, DType type, const float* scales);
    ~KVCache();
    KVCache(const KVCache&) = delete;
    KVCache& operator=(const KVCache&) = delete;

    const int64_t num_layers, num_blocks, KVH, D;
    const DType type;
    KVLayer layer(int64_t index) const;
    size_t nbytes() const { return static_cast<size_t>(num_layers) * layer_bytes_; }

private:
    const size_t layer_bytes_;
    void* allocation_;
    float* scales_;  // as given, or null
};

}  // namespace engine
