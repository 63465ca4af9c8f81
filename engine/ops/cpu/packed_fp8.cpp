#include "packed_fp8.h"

#include <algorithm>
#include <cstring>

namespace engine {

PackedFp8::PackedFp8(const std::vector<Row>& rows, int64_t k, int64_t s, Slabs& slabs, ThreadPool& pool)
    : N(static_cast<int64_t>(rows.size())), K(k), step(s),
      tiles_(slabs.allocate(static_cast<size_t>(num_tiles(N) * fp8_tile_bytes(K, step)))),
      scale_(static_cast<size_t>(num_tiles(N) * fp8_scale_rows(K, step) * kTileColumns)) {
    pool.parallel_for(num_tiles(N), 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t tile = begin; tile < end; ++tile) {
            const int64_t first = tile * kTileColumns;
            uint8_t* out = static_cast<uint8_t*>(tiles_.get()) + tile * fp8_tile_bytes(K, step);
            pack_tile(&rows[static_cast<size_t>(first)], std::min(kTileColumns, N - first), out,
                      scale_.data() + first * fp8_scale_rows(K, step));
        }
    });
}

void PackedFp8::pack_tile(const Row* rows, int64_t num_rows, uint8_t* tile, float* scale) const {
    for (int64_t s = 0; s < fp8_scale_rows(K, step); ++s)
        for (int64_t n = 0; n < num_rows; ++n) scale[s * kTileColumns + n] = rows[n].scale[s];
    for (int64_t i = 0; i < fp8_num_segments(K, step); ++i) {
        const Fp8Segment segment = fp8_segment(K, step, i);
        for (int64_t k = 0; k < segment.padded; k += kFp8LineK) {
            uint8_t codes[kTileColumns][kFp8LineK] = {};
            const size_t n = static_cast<size_t>(std::min(kFp8LineK, segment.count - k));
            for (int64_t r = 0; r < num_rows; ++r) std::memcpy(codes[r], rows[r].codes + segment.k + k, n);
            uint8_t* lines = tile + (segment.at + k) * kTileColumns;
            for (int64_t r = 0; r < kTileColumns; ++r) {
                uint8_t* quarter = lines + r / 16 * kFp8LineBytes + r % 16 / 4 * 16 + r % 4 * 2;
                std::memcpy(quarter, codes[r], 2);
                std::memcpy(quarter + 8, codes[r] + 2, 2);
            }
        }
    }
}

}  // namespace engine
