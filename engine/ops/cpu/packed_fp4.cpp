#include "packed_fp4.h"

#include <algorithm>
#include <cstring>

namespace engine {
namespace {

// Four bytes of canonical codes, k = 8p … 8p + 7, to a column's four bytes of line p.
uint32_t line_of(const uint8_t* codes) {
    uint32_t pairs;  // byte i: k = 2i low, 2i + 1 high
    std::memcpy(&pairs, codes, 4);
    const uint32_t even = pairs & 0x0f0f0f0f, odd = pairs >> 4 & 0x0f0f0f0f;  // byte i: k = 2i, 2i + 1
    const auto byte = [](uint32_t word, int i) { return word >> 8 * i & 0xff; };
    const uint32_t first = byte(even, 0) | byte(odd, 0) << 8 | byte(even, 1) << 16 | byte(odd, 1) << 24;
    const uint32_t second = byte(even, 2) | byte(odd, 2) << 8 | byte(even, 3) << 16 | byte(odd, 3) << 24;
    return first | second << 4;
}

}  // namespace

PackedFp4::PackedFp4(const std::vector<Row>& rows, int64_t k, Fp4Format f, int b, Slabs& slabs, ThreadPool& pool)
    : N(static_cast<int64_t>(rows.size())), K(k), format(f), block(b),
      nbytes(static_cast<size_t>(fp4_num_tiles(N) * fp4_tile_bytes(K, format, block))),
      tiles_(slabs.allocate(nbytes)), g_(static_cast<size_t>(fp4_num_tiles(N) * kFp4TileColumns)) {
    std::transform(rows.begin(), rows.end(), g_.begin(), [](const Row& row) { return row.g; });
    pool.parallel_for(fp4_num_tiles(N), 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t tile = begin; tile < end; ++tile) {
            const int64_t first = tile * kFp4TileColumns;
            uint8_t* out = static_cast<uint8_t*>(tiles_.get()) + tile * fp4_tile_bytes(K, format, block);
            pack_tile(&rows[static_cast<size_t>(first)], std::min(kFp4TileColumns, N - first), out);
        }
    });
}

void PackedFp4::pack_tile(const Row* rows, int64_t num_rows, uint8_t* tile) const {
    const int64_t scale_size = format == Fp4Format::hif4 ? 4 : 1, scales_a_block = kFp4BlockK / block;
    std::memset(tile, 0, static_cast<size_t>(fp4_tile_bytes(K, format, block)));
    for (int64_t k0 = 0; k0 < K; k0 += kFp4BlockK, tile += fp4_block_bytes(format, block)) {
        const int64_t count = std::min(kFp4BlockK, K - k0);  // 32 or 64
        for (int64_t n = 0; n < num_rows; ++n) {
            for (int64_t k = 0; k < count; k += 8) {
                const uint32_t line = line_of(rows[n].codes + (k0 + k) / 2);
                std::memcpy(tile + ((k / 32 * 2 + n / 16) * 4 + k % 32 / 8) * 64 + n % 16 * 4, &line, 4);
            }
            for (int64_t s = 0; s < std::min(scales_a_block, count / block); ++s) {
                const uint8_t* scale = rows[n].scale + (k0 / block + s) * scale_size;
                std::memcpy(tile + kFp4CodeBytes + (s * kFp4TileColumns + n) * scale_size, scale, scale_size);
            }
        }
    }
}

}  // namespace engine
