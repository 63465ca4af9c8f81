#include "kv_cache.h"

#include <cstdlib>
#include <new>

namespace engine {
namespace {

constexpr size_t kAlignment = 64;

}  // namespace

KVCache::KVCache(int64_t num_layers, int64_t num_blocks, int64_t KVH, int64_t D, DType type)
    : num_layers(num_layers), num_blocks(num_blocks), KVH(KVH), D(D), type(type),
      layer_bytes_(static_cast<size_t>(num_blocks * KVH * tile_pair_bytes({nullptr, type, num_blocks, KVH, D}))),
      allocation_(std::calloc(nbytes() + kAlignment, 1)) {  // large: untouched pages of it are not resident
    if (!allocation_) throw std::bad_alloc();
}

KVCache::~KVCache() { std::free(allocation_); }

KVLayer KVCache::layer(int64_t index) const {
    const uintptr_t start = (reinterpret_cast<uintptr_t>(allocation_) + kAlignment - 1) / kAlignment * kAlignment;
    return {reinterpret_cast<char*>(start) + static_cast<size_t>(index) * layer_bytes_, type, num_blocks, KVH, D};
}

}  // namespace engine
