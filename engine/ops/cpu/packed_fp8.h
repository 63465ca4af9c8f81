// An FP8 weight, re-laid once when the model is loaded.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "fp8_tiles.h"
#include "slabs.h"
#include "thread_pool.h"

namespace engine {

class PackedFp8 {
public:
    // One row n of the weight. Need not be aligned.
    struct Row {
        const uint8_t* codes;  // [K]
        const float* scale;    // [ceil(K / step)]
    };

    // step: k per scale, at most K.
    PackedFp8(const std::vector<Row>& rows, int64_t K, int64_t step, Slabs& slabs, ThreadPool& pool);

    const int64_t N, K, step;
    size_t nbytes() const {
        return static_cast<size_t>(num_tiles(N) * fp8_tile_bytes(K, step)) + scale_.size() * sizeof(float);
    }
    const void* data() const { return tiles_.get(); }
    const float* scale() const { return scale_.data(); }  // [tiles] [ceil(K / step)] [32]

private:
    void pack_tile(const Row* rows, int64_t num_rows, uint8_t* tile, float* scale) const;

    std::shared_ptr<void> tiles_;
    std::vector<float> scale_;
};

}  // namespace engine
