// The paged KV cache as this backend lays it out: blocks of 16 tokens, in each a tile per KV head.
//
//   [layers] [blocks] [KVH] { K tile, V tile }
//   K tile, f32 and f16:  [D] [16]          element d of 16 tokens side by side: scores of 16 tokens are 16 lanes
//   K tile, bf16:         [D / 2] [16] [2]  two d per token together, as the bf16 dot product reads them
//   V tile:               [16] [DV]         DV = D rounded up to 16 lanes, the rest zero; the output's D are the lanes
//
// K and V of one (block, head) are neighbours: for 16-bit types and D = 64 they are one page of memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtypes.h"

namespace engine {

constexpr int64_t kBlockTokens = 16;

// One layer's tiles.
struct KVLayer {
    char* data;
    DType type;
    int64_t KVH, D;

    int64_t DV() const { return (D + 15) / 16 * 16; }
    int64_t k_bytes() const { return kBlockTokens * D * size_of(type); }
    int64_t v_bytes() const { return kBlockTokens * DV() * size_of(type); }
    char* k_tile(int64_t block, int64_t head) const { return data + (block * KVH + head) * (k_bytes() + v_bytes()); }
    char* v_tile(int64_t block, int64_t head) const { return k_tile(block, head) + k_bytes(); }
};

class KVCache {
public:
    // Zeroed; pages the operating system has not been asked for yet cost nothing. Throws std::bad_alloc.
    KVCache(int64_t num_layers, int64_t num_blocks, int64_t KVH, int64_t D, DType type);
    ~KVCache();
    KVCache(const KVCache&) = delete;
    KVCache& operator=(const KVCache&) = delete;

    const int64_t num_layers, num_blocks, KVH, D;
    const DType type;
    const size_t nbytes;
    KVLayer layer(int64_t index) const;

private:
    size_t layer_bytes_;
    void* allocation_;
};

}  // namespace engine
