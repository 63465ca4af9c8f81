// A weight [N, K] re-laid for `linear`: tiles of 32 output columns, each one stream through memory.
//
//   f32, f16:  [ceil(N / 32)] [K] [32]                 element k of 32 neighbouring rows n, side by side
//   bf16:      [ceil(N / 32)] [ceil(K / 2)] [32] [2]   two k per row together, as the bf16 dot product reads them
//
// Values are copied bit for bit. Rows beyond N and, for bf16, the k beyond an odd K are zero.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "dtypes.h"
#include "slabs.h"
#include "thread_pool.h"

namespace engine {

constexpr int64_t kTileColumns = 32;

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
