// How a weight [N, K] lies in memory for `linear`: tiles of 32 output columns, each one stream.
//
//   f32, f16:  [ceil(N / 32)] [K] [32]                 element k of 32 neighbouring rows n, side by side
//   bf16:      [ceil(N / 32)] [ceil(K / 2)] [32] [2]   two k per row together, as the bf16 dot product reads them
//
// Values are the stored ones, bit for bit. Rows beyond N and, for bf16, the k beyond an odd K are zero.
#pragma once

#include "dtypes.h"

namespace engine {

constexpr int64_t kTileColumns = 32;  // two AVX-512 registers: what a 12-row micro-kernel multiplies at once

static inline int64_t num_tiles(int64_t N) { return (N + kTileColumns - 1) / kTileColumns; }

static inline int64_t tile_bytes(int64_t K, DType type) {
    return kTileColumns * (type == DType::bf16 ? (K + 1) / 2 * 2 : K) * size_of(type);
}

}  // namespace engine
