// An FP4 weight, re-laid once when the model is loaded.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "fp4_tiles.h"
#include "slabs.h"
#include "thread_pool.h"

namespace engine {

class PackedFp4 {
public:
    // One row n of the weight, in the canonical arrays. Need not be aligned.
    struct Row {
        const uint8_t* codes;  // [K/2]
        const uint8_t* scale;  // [K/block] scales of 1 byte, or 4 (hif4)
        float g;
    };

    PackedFp4(const std::vector<Row>& rows, int64_t K, Fp4Format format, int block, Slabs& slabs, ThreadPool& pool);

    const int64_t N, K;
    const Fp4Format format;
    const int block;
    const size_t nbytes;
    const void* data() const { return tiles_.get(); }
    const float* g() const { return g_.data(); }  // [N], zeros up to a whole tile

private:
    void pack_tile(const Row* rows, int64_t num_rows, uint8_t* tile) const;

    std::shared_ptr<void> tiles_;
    std::vector<float> g_;
};

}  // namespace engine
