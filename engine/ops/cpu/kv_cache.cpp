#include "kv_cache.h"

#include <algorithm>
#include <cstdlib>
#include <new>

namespace engine {
namespace {

constexpr size_t kAlignment = 64;

}  // namespace

KVCache::KVCache(int64_t num_layers, int64_t num_blocks, int64_t KVH, int64_t D, DType type, const float* scales)
    : num_layers(num_layers), num_blocks(num_blocks), KVH(KVH), D(D), type(type),
      layer_bytes_(static_cast<size_t>(num_blocks * KVH * tile_pair_bytes({nullptr, type, num_blocks, KVH, D}))),
      allocation_(std::calloc(nbytes() + kAlignment, 1)),  // large: untouched pages of it are not resident
      scales_(nullptr) {
    if (!allocation_) throw std::bad_alloc();
    if (scales) scales_ = new float[2 * num_layers];
    if (scales) std::copy_n(scales, 2 * num_layers, scales_);
}

KVCache::~KVCache() {
    std::free(allocation_);
    delete[] scales_;
}

KVLayer KVCache::layer(int64_t index) const {
    const uintptr_t start = (reinterpret_cast<uintptr_t>(allocation_) + kAlignment - 1) / kAlignment * kAlignment;
    char* data = reinterpret_cast<char*>(start) + static_cast<size_t>(index) * layer_bytes_;
    if (!scales_) return {data, type, num_blocks, KVH, D};
    return {data, type, num_blocks, KVH, D, scales_[index], scales_[num_layers + index]};
}

}  // namespace engine
