// A weight, re-laid once when the model is loaded.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "slabs.h"
#include "thread_pool.h"
#include "weight_tiles.h"

namespace engine {

class PackedWeight {
public:
    // rows[n] points to K elements; it need not be aligned. Each row is read once.
    PackedWeight(const std::vector<const void*>& rows, int64_t K, DType type, Slabs& slabs, ThreadPool& pool);

    const int64_t N, K;
    const DType type;
    const size_t nbytes;
    const void* data() const { return data_.get(); }

private:
    void pack_tile(const void* const* rows, int64_t num_rows, void* tile) const;

    std::shared_ptr<void> data_;
};

}  // namespace engine
