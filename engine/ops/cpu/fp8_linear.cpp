// fp8_linear: out [T, N] = x [T, K] · wᵀ, times scales, + bias + residual, with w in E4M3 and x in E4M3 or as it is.
//
// The work is that of `linear`: an E4M3 number is a bf16 number, so a tile's codes become pairs of bf16 and go through
// the same micro-kernels (micro_kernels.h), vdpbf16ps on avx512-bf16 where x is bf16 or E4M3 (which has no number that
// is subnormal in bf16), fp32 FMA else. Up to kDirectRows rows take pairs from registers; more rows share an expanded
// segment of the tile (fp8_tiles.h) in the cache, so that its expansion costs once per kGroupBlocks blocks of rows.
//
// Order: the products of a segment are summed from 0 in ascending k, then the sum times the weight's scale is added to
// the row's total, segment by segment; the row's own scale comes last. That depends on K and the weight alone: neither
// on T, nor on the block a row falls into, nor on the thread.

#include "e4m3_lanes.h"
#include "kernels.h"
#include "micro_kernels.h"
#include "product_epilogue.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

constexpr int64_t kChunkRows = 512;  // rows re-laid at a time: bounds scratch memory
constexpr int64_t kFewBlocks = 4;    // row blocks up to which memory is the limit, not arithmetic
constexpr int64_t kGroupBlocks = 8;  // row blocks in a piece of work
constexpr int64_t kMaxGroupRows = kGroupBlocks * kMaxRows;
constexpr int kDirectRows = 8;            // with the tables and a line's pairs, what registers hold
constexpr int64_t kPrefetchAhead = 8192;  // bytes, of a tile's stream; for one row the CPU alone does better

// A segment of a tile as bf16 [padded / 2][32 columns][2]. Fetches the next one, while this one is then used.
void expand(const char* lines, int64_t padded, char* pairs) {
    const Expander expander;
    const int64_t bytes = padded * kTileColumns;
    for (int64_t at = 0; at < bytes; at += 2 * kFp8LineBytes, pairs += 4 * kFp8LineBytes) {
        __builtin_prefetch(lines + bytes + at, 0, 2);
        __builtin_prefetch(lines + bytes + at + kFp8LineBytes, 0, 2);
        expander.store(lines + at, pairs, pairs + 2 * kFp8LineBytes);
        expander.store(lines + at + kFp8LineBytes, pairs + kFp8LineBytes, pairs + 3 * kFp8LineBytes);
    }
}

// ---- the loops ------------------------------------------------------------------------------------------------------

// Of the expanded tile.
using InFp32 = FromCache<Fma<bf16>>;
#if ENGINE_ISA_LEVEL >= 3
using InBf16 = FromCache<DotBf16>;
#endif

// totals [rows][32] += sums [rows][width] · scale, from the tile's column `column` on
static inline void add_scaled(const float* sums, int64_t rows, int64_t width, const float* scale, float* totals) {
    for (int64_t r = 0; r < rows; ++r, sums += width, totals += kTileColumns)
        for (int64_t j = 0; j < width; j += kLanes)
            store(totals + j, mul_add(load(sums + j), load(scale + j), load(totals + j)));
}

// One block of rows times one expanded segment.
template <class Format>
void multiply_segment(const typename Format::X* x, const char* w, int64_t steps, int64_t rows, const float* scale,
                      float* totals) {
    static constexpr MicroKernels<Format> micro = micro_kernels<Format>();
    alignas(64) float sums[kMaxSums];
    const int vectors = vectors_at_once(static_cast<int>(rows)), width = vectors * kLanes;
    for (int64_t column = 0; column < kTileColumns; column += width, w += vectors * Format::kVectorBytes) {
        micro.of[rows](x, w, steps, sums);
        add_scaled(sums, rows, width, scale + column, totals + column);
    }
}

// `rows` rows in near-equal blocks of at most kMaxRows, as panels: [padded K][rows of a block].
template <class Format>
struct Panels {
    using X = typename Format::X;
    X* data;
    RowBlocks blocks;
    int64_t row_xs;  // elements of X a row

    static int64_t xs(int64_t padded) { return padded / Format::kStepK * Format::kXPerStep; }
    int64_t rows(int64_t block) const { return blocks.begin(block + 1) - blocks.begin(block); }
    X* at(int64_t block, const Fp8Segment& s) const {
        return data + blocks.begin(block) * row_xs + xs(s.at) * rows(block);
    }
};

// The blocks [begin, end) of rows times one tile; totals [rows][32].
template <class Format>
void multiply_tile(const Fp8LinearArgs& a, const Panels<Format>& x, int64_t begin, int64_t end, int64_t tile,
                   float* totals) {
    const char* w = static_cast<const char*>(a.w) + tile * fp8_tile_bytes(a.K, a.w_step);
    const float* scale = a.w_scale + tile * fp8_scale_rows(a.K, a.w_step) * kTileColumns;
    const int64_t first = x.blocks.begin(begin), rows = x.blocks.begin(end) - first;
    for (int64_t i = 0; i < rows * kTileColumns; i += kLanes) store(totals + i, zero());
    alignas(64) char pairs[kFp8SegmentK * kTileColumns * sizeof(bf16)];
    for (int64_t i = 0; i < fp8_num_segments(a.K, a.w_step); ++i) {
        const Fp8Segment s = fp8_segment(a.K, a.w_step, i);
        const char* lines = w + s.at * kTileColumns;
        const float* segment_scale = scale + s.scale_row * kTileColumns;
        expand(lines, s.padded, pairs);
        for (int64_t b = begin; b < end; ++b)
            multiply_segment<Format>(x.at(b, s), pairs, s.padded / Format::kStepK, x.rows(b), segment_scale,
                                     totals + (x.blocks.begin(b) - first) * kTileColumns);
    }
}

#if ENGINE_ISA_LEVEL >= 3

// One block of R rows times one tile, without expanding it first; the same sums in the same order. totals [R][32].
template <int R>
void multiply_codes(const Fp8LinearArgs& a, const Panels<InBf16>& panels, int64_t tile, float* totals) {
    const char* w = static_cast<const char*>(a.w) + tile * fp8_tile_bytes(a.K, a.w_step);
    const float* scale = a.w_scale + tile * fp8_scale_rows(a.K, a.w_step) * kTileColumns;
    const Expander expander;
    for (int64_t i = 0; i < R * kTileColumns; i += kLanes) store(totals + i, zero());
    for (int64_t i = 0; i < fp8_num_segments(a.K, a.w_step); ++i) {
        const Fp8Segment s = fp8_segment(a.K, a.w_step, i);
        const uint32_t* x = panels.at(0, s);
        F32x16 acc[R][2];
        for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = zero();
        for (int64_t k = 0; k < s.padded; k += kFp8LineK, w += 2 * kFp8LineBytes) {
            __m512i pairs[2][2];  // [of k][16 columns]
            for (int c = 0; c < 2; ++c) {
                if (R > 1) __builtin_prefetch(w + c * kFp8LineBytes + kPrefetchAhead, 0, 2);
                expander(w + c * kFp8LineBytes, pairs[0][c], pairs[1][c]);
            }
            for (int p = 0; p < 2; ++p, x += R) {
                for (int r = 0; r < R; ++r) {
                    const __m512bh row = (__m512bh)_mm512_set1_epi32(static_cast<int32_t>(x[r]));
                    for (int c = 0; c < 2; ++c)
                        acc[r][c].v = _mm512_dpbf16_ps(acc[r][c].v, (__m512bh)pairs[p][c], row);
                }
            }
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < 2; ++c) {
                float* total = totals + r * kTileColumns + c * kLanes;
                const F32x16 of_segment = load(scale + s.scale_row * kTileColumns + c * kLanes);
                store(total, mul_add(acc[r][c], of_segment, load(total)));
            }
    }
}

// The tiles [begin, end) for R rows.
template <int R = kDirectRows>
void multiply_few(const Fp8LinearArgs& a, const Panels<InBf16>& x, int64_t row, int64_t begin, int64_t end) {
    if (x.blocks.rows < R) {
        if constexpr (R > 1) multiply_few<R - 1>(a, x, row, begin, end);
        return;
    }
    alignas(64) float totals[R * kTileColumns];
    for (int64_t tile = begin; tile < end; ++tile) {
        multiply_codes<R>(a, x, tile, totals);
        finish_tile(a.to, a.x_scale, nullptr, totals, row, R, tile * kTileColumns);
    }
}

#endif

template <class Format, class In>
void multiply_chunk(const Fp8LinearArgs& a, int64_t first_row, int64_t num_rows, ThreadPool& pool, Scratch& scratch) {
    using X = typename Format::X;
    const int64_t row_xs = Panels<Format>::xs(fp8_padded_K(a.K, a.w_step)), segments = fp8_num_segments(a.K, a.w_step);
    X* data = static_cast<X*>(scratch.reserve(static_cast<size_t>(num_rows * row_xs) * sizeof(X)));
    const Panels<Format> panels{data, RowBlocks(num_rows), row_xs};
    const int64_t blocks = panels.blocks.count;
    pool.parallel_for(blocks, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t b = begin; b < end; ++b) {
            const In* x = static_cast<const In*>(a.x) + (first_row + panels.blocks.begin(b)) * a.x_stride;
            for (int64_t i = 0; i < segments; ++i) {
                const Fp8Segment s = fp8_segment(a.K, a.w_step, i);
                lay_out_panel<Format>(x + s.k, a.x_stride, panels.rows(b), s.count, Panels<Format>::xs(s.padded),
                                      panels.at(b, s));
            }
        }
    });
    // As in linear.cpp.
    const int64_t tiles = num_tiles(a.to.N), groups = ceil_div(blocks, kGroupBlocks);
#if ENGINE_ISA_LEVEL >= 3
    if constexpr (Format::kPairs) {
        if (num_rows <= kDirectRows)
            return pool.parallel_streams(tiles, pool.stream_grain(tiles), [&](int64_t begin, int64_t end, int) {
                multiply_few(a, panels, first_row, begin, end);
            });
    }
#endif
    const int64_t grain = blocks <= kFewBlocks ? pool.stream_grain(tiles) : 1;
    pool.parallel_streams(tiles * groups, grain, [&](int64_t begin, int64_t end, int) {
        alignas(64) float totals[kMaxGroupRows * kTileColumns];
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t tile = piece / groups, group = piece % groups;
            const int64_t from = blocks * group / groups, to = blocks * (group + 1) / groups;
            multiply_tile<Format>(a, panels, from, to, tile, totals);
            const int64_t row = panels.blocks.begin(from), rows = panels.blocks.begin(to) - row;
            finish_tile(a.to, a.x_scale, nullptr, totals, first_row + row, rows, tile * kTileColumns);
        }
    });
}

template <class Format, class In>
void multiply_all(const Fp8LinearArgs& a, ThreadPool& pool, Scratch& scratch) {
    for (int64_t row = 0; row < a.T; row += kChunkRows)
        multiply_chunk<Format, In>(a, row, min_of(kChunkRows, a.T - row), pool, scratch);
}

}  // namespace

void fp8_linear(const Fp8LinearArgs& a, ThreadPool& pool, Scratch& scratch) {
#if ENGINE_ISA_LEVEL >= 3
    if (a.codes) return multiply_all<InBf16, e4m3>(a, pool, scratch);
    if (a.x_type == DType::bf16) return multiply_all<InBf16, bf16>(a, pool, scratch);
#endif
    if (a.codes) return multiply_all<InFp32, e4m3>(a, pool, scratch);
    with_type(a.x_type, [&](auto tag) {
        multiply_all<InFp32, typename decltype(tag)::type>(a, pool, scratch);
    });
}

}  // namespace ENGINE_ISA
}  // namespace engine
