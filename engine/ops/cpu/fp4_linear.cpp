// fp4_linear: out [T, N] = (path 0 + path 1) · wᵀ · g · g_w + bias + residual, FP4 activations times FP4 weights.
//
// The work: activations are expanded to signed bytes, 32 k of a row in one entry (lay_out); that is T · K work beside
// N · T · K. A tile of 32 columns (fp4_tiles.h) is then read once per block of rows: 32 k of it become sixteen
// registers of unsigned bytes, and each row multiplies both its paths with those. So a second path costs arithmetic,
// but no memory traffic.
//
// Unsigned: the dot-product instructions take an unsigned and a signed factor, so weights carry an offset; that offset
// times a row's sum of x, known when the row is laid out, is where its dot products begin.
//
// Order: within 32 k the paths' exact dot products, each times its scale, are added in fp32, path 0 first; the sum
// times the weight's scale is added to the accumulator, 32 k after 32 k (where weights have scales per 16,
// twice per 32 k). That depends on K alone: neither on T, nor on the block a row falls into, nor on the thread.

#include "fp4_dot.h"
#include "fp4_tiles.h"
#include "kernels.h"
#include "product_epilogue.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

constexpr int kStepK = 32;
constexpr int64_t kMaxBlockRows = 64;
constexpr int64_t kBlockBytes = 384 << 10;  // of laid-out rows: beside a tile's stream they stay in the L2 cache
constexpr int64_t kChunkBytes = 16 << 20;   // of rows laid out at a time: bounds scratch memory
constexpr int64_t kFewRows = 8;  // up to here weights take longer from memory than to multiply

// 32 k of one row.
template <int P>
struct Entry {
    int8_t x[P][kStepK];  // whole numbers
    float unit[P][2];     // what 1 is worth in k 0 … 15 and 16 … 31; only the first where a path has one group per 32
    int32_t start[P][2];  // − offset · sum of x, of the same groups
};

// A path has two groups per 32 k where its own scales or the weight's are per 16, else one.
template <class W, int P_, int groups0, int groups1>
struct Shape {
    using Weights = W;
    static constexpr int P = P_;
    static constexpr int groups(int path) { return path == 0 ? groups0 : groups1; }
    static_assert(W::kScalesPerHalf == 1 || (groups0 == 2 && groups1 == 2), "a group lies in one block of the weight");
};

// ---- micro-kernel --------------------------------------------------------------------------------------------------

template <class S, int p>
static inline void add_path(const Bytes (&w)[2][8], const Entry<S::P>& x,
                            F32x16 (&term)[S::Weights::kScalesPerHalf][2]) {
    constexpr int groups = S::groups(p), steps = 8 / groups;
    for (int h = 0; h < groups; ++h) {
        const int32_t start = x.start[p][h];
        Dots dots[2] = {Dots::begin(start), Dots::begin(start)};
        for (int s = h * steps; s < (h + 1) * steps; ++s) {
            const auto four = four_bytes(x.x[p] + 4 * s);
            for (int c = 0; c < 2; ++c) dots[c].add(w[c][s], four);
        }
        const F32x16 unit = broadcast(x.unit[p][h]);
        const int block = S::Weights::kScalesPerHalf == 2 ? h : 0;
        const bool first = p == 0 && (h == 0 || block == h);
        for (int c = 0; c < 2; ++c) {
            const F32x16 dot = to_float(dots[c].total(start));
            term[block][c] = first ? dot * unit : mul_add(dot, unit, term[block][c]);
        }
    }
}

template <class S>
static inline void add_row(const Bytes (&w)[2][8], const F32x16 (&scale)[S::Weights::kScalesPerHalf][2],
                           const Entry<S::P>& x, float* sums) {
    F32x16 term[S::Weights::kScalesPerHalf][2];
    add_path<S, 0>(w, x, term);
    if constexpr (S::P == 2) add_path<S, 1>(w, x, term);
    for (int c = 0; c < 2; ++c) {
        F32x16 sum = load(sums + c * kLanes);
        for (int s = 0; s < S::Weights::kScalesPerHalf; ++s) sum = mul_add(term[s][c], scale[s][c], sum);
        store(sums + c * kLanes, sum);
    }
}

// What the CPU's prefetchers need beside loads in ascending order. Measured on Zen 4, against other distances and
// caches: several rows take 5 to 15 % less time with the next 3 KB in L1; one row in two paths up to 25 % less with
// 8 KB in L2 (at large K, where a row and its weights take turns in L1), one row in one path up to 15 % more with
// either.
template <class S>
static inline void fetch_ahead(const uint8_t* block, int half, int64_t rows) {
    if (rows > 1) prefetch_weights<typename S::Weights>(block, half);
    else if (S::P == 2) prefetch_weights<typename S::Weights, 8192, 2>(block, half);
}

// sums [rows][32] = rows · one tile; x [steps][rows]
template <class S>
void multiply(const uint8_t* w, const Entry<S::P>* x, int64_t steps, int64_t rows, float* sums) {
    using W = typename S::Weights;
    for (int64_t i = 0; i < rows * 2; ++i) store(sums + i * kLanes, zero());
    for (int64_t step = 0; step < steps; ++step, x += rows) {
        const int half = static_cast<int>(step & 1);
        const uint8_t* block = w + step / 2 * W::kBlockBytes;
        const uint8_t *lines = block + half * (kFp4CodeBytes / 2), *scales = block + kFp4CodeBytes;
        fetch_ahead<S>(block, half, rows);
        Bytes bytes[2][8];
        F32x16 scale[W::kScalesPerHalf][2];
        for (int c = 0; c < 2; ++c) {
            W::expand(lines + c * 256, scales, half, c, bytes[c]);
            for (int s = 0; s < W::kScalesPerHalf; ++s) scale[s][c] = W::scale(scales, half, s, c);
        }
        for (int64_t r = 0; r < rows; ++r) add_row<S>(bytes, scale, x[r], sums + r * 2 * kLanes);
    }
}

// ---- laying out rows ------------------------------------------------------------------------------------------------

constexpr int8_t kE2m1Integers[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
constexpr int8_t kS1p2Integers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 0, -1, -2, -3, -4, -5, -6, -7};

// 32 packed codes to whole numbers.
static inline void integers_of(const uint64_t (&packed)[2], const int8_t (&table)[16], int8_t* x) {
#if ENGINE_ISA_LEVEL >= 1
    const __m128i codes = _mm_set_epi64x(static_cast<int64_t>(packed[1]), static_cast<int64_t>(packed[0]));
    const __m128i nibble = _mm_set1_epi8(15), values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    const __m128i even = _mm_and_si128(codes, nibble), odd = _mm_and_si128(_mm_srli_epi16(codes, 4), nibble);
    __m128i* out = reinterpret_cast<__m128i*>(x);
    _mm_storeu_si128(out, _mm_shuffle_epi8(values, _mm_unpacklo_epi8(even, odd)));
    _mm_storeu_si128(out + 1, _mm_shuffle_epi8(values, _mm_unpackhi_epi8(even, odd)));
#else
    for (int k = 0; k < kStepK; ++k) x[k] = table[packed[k / 16] >> 4 * (k % 16) & 15];
#endif
}

static inline int32_t sum_of_16(const int8_t* x) {
#if ENGINE_ISA_LEVEL >= 1
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    const __m128i sums = _mm_sad_epu8(_mm_xor_si128(bytes, _mm_set1_epi8(-128)), _mm_setzero_si128());  // of x + 128
    return _mm_cvtsi128_si32(sums) + _mm_extract_epi16(sums, 4) - 16 * 128;
#else
    int32_t sum = 0;
    for (int k = 0; k < 16; ++k) sum += x[k];
    return sum;
#endif
}

// Two kept pairs (bytes) of each chunk of eight k, to where they were: four chunks, 32 k.
static inline void spread_pairs(const uint8_t* kept, const uint8_t* meta, uint64_t (&packed)[2]) {
    for (int v = 0; v < 2; ++v, kept += 4) {
        const uint32_t first = meta[v] & 15, second = meta[v] >> 4;
        packed[v] = uint64_t{kept[0]} << 8 * (first & 3) | uint64_t{kept[1]} << 8 * (first >> 2)
                    | uint64_t{kept[2]} << (32 + 8 * (second & 3)) | uint64_t{kept[3]} << (32 + 8 * (second >> 2));
    }
}

// HiF4: two kept elements (nibbles) of each chunk of four k: eight chunks, 32 k.
static inline void spread_elements(const uint8_t* kept, const uint8_t* meta, uint64_t (&packed)[2]) {
    packed[0] = packed[1] = 0;
    for (int c = 0; c < 8; ++c) {
        const uint32_t chosen = meta[c / 2] >> 4 * (c % 2) & 15;
        const uint64_t low = kept[c] & 15u, high = kept[c] >> 4;
        packed[c / 4] |= (low << 4 * (chosen & 3) | high << 4 * (chosen >> 2)) << 16 * (c % 4);
    }
}

// One row of one path.
struct PathRow {
    const uint8_t *codes, *meta;  // meta: where sparse
    const uint8_t* scale;         // hif4: of uint32
    int block_bits;               // k >> block_bits is the number of k's block
    Fp4Format format;

    uint32_t scale_of(int64_t k) const {
        const int64_t i = k >> block_bits;
        if (format != Fp4Format::hif4) return scale[i];
        uint32_t word;
        std::memcpy(&word, scale + 4 * i, 4);
        return word;
    }
    float decode_scale(int64_t k, float times) const {
        const uint32_t word = scale_of(k);
        if (format == Fp4Format::hif4) return bits_float(((word & 0xff) << 21) + ((127 - 48) << 23)) * times;
        if (format == Fp4Format::mxfp4) return bits_float(word ? word << 23 : 0x00400000) * times;
        return bits_float(word << 20) * 0x1p120f * times;
    }
};

static inline PathRow path_row(const Fp4Operand& a, int p, int64_t t) {
    const bool hif4 = a.format == Fp4Format::hif4, sparse = p == 0 && a.sparse;
    const int64_t scales = a.K / a.block[p];
    return {a.codes[p] + t * (sparse ? a.K / 4 : a.K / 2), sparse ? a.meta + t * (a.K / (hif4 ? 8 : 16)) : nullptr,
            static_cast<const uint8_t*>(a.scale[p]) + t * scales * (hif4 ? 4 : 1),
            a.block[p] == 16 ? 4 : a.block[p] == 32 ? 5 : 6, a.format};
}

// The micro-exponents of 32 k applied: four neighbours share theirs.
static inline void apply_micro_exponents(uint32_t word, int half, int8_t* x) {
    for (int s = 0; s < 8; ++s) {
        const uint32_t e = (word >> (8 + half * 4 + s / 2) & 1) + (word >> (16 + half * 8 + s) & 1);
        for (int k = 4 * s; k < 4 * s + 4; ++k) x[k] = static_cast<int8_t>(x[k] * (1 << e));
    }
}

template <class S, int p>
static inline void lay_out_path(const PathRow& row, int64_t k, Entry<S::P>& entry) {
    const bool hif4 = row.format == Fp4Format::hif4;
    uint64_t packed[2];
    if (!row.meta) std::memcpy(packed, row.codes + k / 2, 16);
    else if (hif4) spread_elements(row.codes + k / 4, row.meta + k / 8, packed);
    else spread_pairs(row.codes + k / 4, row.meta + k / 16, packed);
    int8_t* x = entry.x[p];
    integers_of(packed, hif4 ? kS1p2Integers : kE2m1Integers, x);
    if (hif4) apply_micro_exponents(row.scale_of(k), static_cast<int>(k / 32 & 1), x);
    constexpr int groups = S::groups(p), offset = S::Weights::kOffset;
    const float times = (hif4 ? 0.25f : 0.5f) * S::Weights::kUnit;
    const int32_t sums[2] = {sum_of_16(x), sum_of_16(x + 16)};
    for (int h = 0; h < groups; ++h) {
        entry.unit[p][h] = row.decode_scale(k + 16 * h, times);
        entry.start[p][h] = -offset * (groups == 1 ? sums[0] + sums[1] : sums[h]);
    }
}

// entries [K / 32][rows]
template <class S>
void lay_out(const Fp4Operand& a, int64_t row, int64_t rows, Entry<S::P>* entries) {
    for (int64_t r = 0; r < rows; ++r) {
        const PathRow first = path_row(a, 0, row + r), second = path_row(a, S::P - 1, row + r);
        for (int64_t step = 0; step < a.K / kStepK; ++step) {
            Entry<S::P>& entry = entries[step * rows + r];
            lay_out_path<S, 0>(first, step * kStepK, entry);
            if constexpr (S::P == 2) lay_out_path<S, 1>(second, step * kStepK, entry);
        }
    }
}

// ---- the loops ------------------------------------------------------------------------------------------------------

// `rows` rows in near-equal blocks, `first` of them on.
struct RowBlocks {
    int64_t rows, count;
    int64_t begin(int64_t block) const { return rows * block / count; }
    int64_t size(int64_t block) const { return begin(block + 1) - begin(block); }
};

template <class S>
void multiply_chunk(const Fp4LinearArgs& a, int64_t first_row, RowBlocks blocks, Entry<S::P>* entries,
                    ThreadPool& pool) {
    const int64_t steps = a.x.K / kStepK, tiles = fp4_num_tiles(a.to.N);
    const int64_t bytes = fp4_tile_bytes(a.x.K, a.x.format, a.w_block);
    pool.parallel_for(blocks.count, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t b = begin; b < end; ++b)
            lay_out<S>(a.x, first_row + blocks.begin(b), blocks.size(b), entries + blocks.begin(b) * steps);
    });
    // In an order that keeps a block of rows in the cache while the tiles go by.
    const int64_t grain = blocks.rows <= kFewRows ? pool.stream_grain(tiles) : 1;
    pool.parallel_streams(tiles * blocks.count, grain, [&](int64_t begin, int64_t end, int) {
        alignas(64) float sums[kMaxBlockRows * kFp4TileColumns];
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t b = piece / tiles, tile = piece % tiles;
            const uint8_t* w = static_cast<const uint8_t*>(a.w) + tile * bytes;
            multiply<S>(w, entries + blocks.begin(b) * steps, steps, blocks.size(b), sums);
            finish_tile(a.to, a.x.g, a.w_g, sums, first_row + blocks.begin(b), blocks.size(b),
                        tile * kFp4TileColumns);
        }
    });
}

template <class S>
void multiply_all(const Fp4LinearArgs& a, ThreadPool& pool, Scratch& scratch) {
    using E = Entry<S::P>;
    const int64_t row_bytes = a.x.K / kStepK * static_cast<int64_t>(sizeof(E));
    const int64_t block_rows = max_of(8, min_of(kMaxBlockRows, kBlockBytes / row_bytes));
    const int64_t chunk_rows = min_of(a.x.T, max_of(1, kChunkBytes / row_bytes / block_rows) * block_rows);
    E* entries = static_cast<E*>(scratch.reserve(static_cast<size_t>(chunk_rows * row_bytes)));
    for (int64_t row = 0; row < a.x.T; row += chunk_rows) {
        const int64_t rows = min_of(chunk_rows, a.x.T - row);
        multiply_chunk<S>(a, row, {rows, ceil_div(rows, block_rows)}, entries, pool);
    }
}

template <class W>
void multiply_per_32(const Fp4LinearArgs& a, ThreadPool& pool, Scratch& scratch) {
    if (a.x.paths == 1) return multiply_all<Shape<W, 1, 1, 1>>(a, pool, scratch);
    return multiply_all<Shape<W, 2, 1, 1>>(a, pool, scratch);
}

template <class W>
void multiply_per_16(const Fp4LinearArgs& a, ThreadPool& pool, Scratch& scratch) {
    if (a.x.paths == 1) return multiply_all<Shape<W, 1, 2, 2>>(a, pool, scratch);
    return multiply_all<Shape<W, 2, 2, 2>>(a, pool, scratch);
}

}  // namespace

void fp4_linear(const Fp4LinearArgs& a, ThreadPool& pool, Scratch& scratch) {
    if (a.x.format == Fp4Format::mxfp4) return multiply_per_32<Mxfp4Weights>(a, pool, scratch);
    if (a.x.format == Fp4Format::hif4) return multiply_per_32<Hif4Weights>(a, pool, scratch);
    if (a.w_block == 16) return multiply_per_16<Nvfp4Weights<16>>(a, pool, scratch);
    if (a.x.block[0] == 16) return multiply_per_16<Nvfp4Weights<32>>(a, pool, scratch);
    if (a.x.paths == 1) return multiply_all<Shape<Nvfp4Weights<32>, 1, 1, 1>>(a, pool, scratch);
    return multiply_all<Shape<Nvfp4Weights<32>, 2, 1, 2>>(a, pool, scratch);
}

}  // namespace ENGINE_ISA
}  // namespace engine
