// How an FP8 weight [N, K] lies in memory: tiles of 32 output columns (rows n of the weight), each one stream over K,
// cut into segments: at most 512 k that share their scales. A segment is padded to a multiple of 4 k, and each 4 k are
// two cache lines, one per 16 columns:
//
//   line   [4 quarters] [2 pairs of k] [4 columns] [2 k]   one byte each
//
// so that interleaving a line's bytes with those of another register, quarter by quarter (what x86 calls unpacking),
// gives pairs of 16-bit numbers, a column a lane. Codes are the stored ones; columns beyond N and k beyond a segment
// are zero. Scales lie apart:
//
//   scale  [tiles] [ceil(K / step)] [32]   step = k per scale; a row of them serves its segments
#pragma once

#include "dtypes.h"
#include "weight_tiles.h"

namespace engine {

constexpr int64_t kFp8LineK = 4;
constexpr int64_t kFp8LineBytes = 64;
constexpr int64_t kFp8SegmentK = 512;  // expanded to bf16, a tile's segment fits the L1 cache

struct Fp8Segment {
    int64_t k, count;    // which k
    int64_t at, padded;  // where they lie, in k with padding
    int64_t scale_row;
};

static inline int64_t fp8_pieces(int64_t length) { return (length + kFp8SegmentK - 1) / kFp8SegmentK; }
static inline int64_t fp8_padded(int64_t length) { return (length + kFp8LineK - 1) / kFp8LineK * kFp8LineK; }

// Below, step ≤ K.
static inline int64_t fp8_scale_rows(int64_t K, int64_t step) { return (K + step - 1) / step; }
static inline int64_t fp8_last_step(int64_t K, int64_t step) { return K - (fp8_scale_rows(K, step) - 1) * step; }

static inline int64_t fp8_num_segments(int64_t K, int64_t step) {
    return (fp8_scale_rows(K, step) - 1) * fp8_pieces(step) + fp8_pieces(fp8_last_step(K, step));
}

static inline Fp8Segment fp8_segment(int64_t K, int64_t step, int64_t i) {
    const int64_t row = i / fp8_pieces(step), first = i % fp8_pieces(step) * kFp8SegmentK;
    const int64_t left = (row == fp8_scale_rows(K, step) - 1 ? fp8_last_step(K, step) : step) - first;
    const int64_t count = left < kFp8SegmentK ? left : kFp8SegmentK;
    return {row * step + first, count, row * fp8_padded(step) + first, fp8_padded(count), row};
}

static inline int64_t fp8_padded_K(int64_t K, int64_t step) {
    return (fp8_scale_rows(K, step) - 1) * fp8_padded(step) + fp8_padded(fp8_last_step(K, step));
}

static inline int64_t fp8_tile_bytes(int64_t K, int64_t step) { return fp8_padded_K(K, step) * kTileColumns; }

}  // namespace engine
