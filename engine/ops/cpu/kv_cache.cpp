#include "kv_cache.h"

#include <cstdlib>
#include <new>

namespace engine {
namespace {

constexpr size_t kAlignment = 64;

size_t bytes_per_layer(int64_t num_blocks, int64_t KVH, int64_t D, DType type) {
    const KVLayer shape{nullptr, type, KVH, D};
    return static_cast<size_t>(num_blocks * KVH * (shape.k_bytes() + shape.v_bytes()));
}

}  // namespace

KVCache::KVCache(int64_t num_layers, int64_t num_blocks, int64_t KVH, int64_t D, DType type)
    : num_layers(num_layers), num_blocks(num_blocks), KVH(KVH), D(D), type(type),
      nbytes(static_cast<size_t>(num_layers) * bytes_per_layer(num_blocks, KVH, D, type)),
      layer_bytes_(bytes_per_layer(num_blocks, KVH, D, type)),
      allocation_(std::calloc(nbytes + kAlignment, 1)) {  // calloc leaves large memory untouched until it is used
    if (!allocation_) throw std::bad_alloc();
}

KVCache::~KVCache() { std::free(allocation_); }

KVLayer KVCache::layer(int64_t index) const {
    const uintptr_t start = (reinterpret_cast<uintptr_t>(allocation_) + kAlignment - 1) / kAlignment * kAlignment;
    return {reinterpret_cast<char*>(start) + static_cast<size_t>(index) * layer_bytes_, type, KVH, D};
}

}  // namespace engine
