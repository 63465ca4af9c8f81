// How an FP4 weight [N, K] lies in memory: tiles of 32 output columns (rows n of the weight), each one stream over K in
// blocks of 64 k. A block is 1024 bytes of codes, then its scales, whole cache lines all:
//
//   codes   [2 halves of 32 k] [2 vectors of 16 columns] [4 lines p] [16 columns] [4 bytes j]
//           byte j of line p:  k = 8p + j in the low nibble,  k = 8p + 4 + j in the high one
//   scales  nvfp4, mxfp4   uint8  [64 / block] [32]      per block of 16 or 32 k
//           hif4           uint32 [32]                   the canonical word of 64 k
//
// The low nibbles of a line are 16 columns × 4 k, four bytes of a 32-bit lane each: what an 8-bit dot product takes.
// Codes and scale bytes are the canonical ones. Columns beyond N and k beyond K are zero.
#pragma once

#include "fp4_args.h"

namespace engine {

constexpr int64_t kFp4TileColumns = 32;
constexpr int64_t kFp4BlockK = 64;
constexpr int64_t kFp4CodeBytes = kFp4TileColumns * kFp4BlockK / 2;

static inline int64_t fp4_num_tiles(int64_t N) { return (N + kFp4TileColumns - 1) / kFp4TileColumns; }

static inline int64_t fp4_block_bytes(Fp4Format format, int block) {
    return kFp4CodeBytes + kFp4TileColumns * (format == Fp4Format::hif4 ? 4 : kFp4BlockK / block);
}

static inline int64_t fp4_tile_bytes(int64_t K, Fp4Format format, int block) {
    return (K + kFp4BlockK - 1) / kFp4BlockK * fp4_block_bytes(format, block);
}

}  // namespace engine
