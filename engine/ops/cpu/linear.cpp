// linear: out [T, N] = x [T, K] · wᵀ + bias + residual, in fp32, rounded once.
//
// The work: rows of x are cut into blocks of at most kMaxRows and re-laid as panels, k outermost, so that a step of
// the micro-kernel finds its rows' elements side by side; weights lie in tiles of 32 columns (weight_tiles.h). One call
// of a micro-kernel multiplies one row block by the C vectors of 16 columns that registers allow, over the whole of K,
// with all rows × C accumulators in registers. Threads share out the tiles, so a weight is read from memory once per
// kChunkRows rows.
//
// Order: each output element is one lane of one accumulator that starts at 0 and takes k (for bf16 dot products: pairs
// of k) in ascending order. That depends neither on T and C, nor on the block a row falls into, nor on the thread: a
// row's bits are the same alone and in any batch, by construction.
//
// Arithmetic: bf16 · bf16 on avx512-bf16 is vdpbf16ps (fp32 accumulation; subnormal inputs and results count as 0).
// Everything else converts both sides to fp32, exactly, and uses FMA (portable: multiply, then add).

#include "kernels.h"
#include "simd.h"
#include "weight_tiles.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

// Rows × vectors of accumulators must leave registers for the weights and a broadcast.
constexpr int kTileVectors = kTileColumns / kLanes;
#if ENGINE_ISA_LEVEL >= 2
constexpr int kMaxRows = 12;  // 32 registers
constexpr int vectors_at_once(int /*rows*/) { return 2; }
#elif ENGINE_ISA_LEVEL == 1
constexpr int kMaxRows = 6;  // 16 registers, two per accumulator
constexpr int vectors_at_once(int rows) { return rows <= 2 ? 2 : 1; }
#else
constexpr int kMaxRows = 3;  // SSE2: 16 registers, four per accumulator
constexpr int vectors_at_once(int rows) { return rows == 1 ? 2 : 1; }
#endif

constexpr int kMaxSums = kMaxRows * kTileColumns;
constexpr int kMinTransposedRows = 6;     // rows from which a 16 × 16 transpose beats copying element by element
constexpr int64_t kChunkRows = 512;       // rows re-laid at a time: bounds scratch memory
constexpr int64_t kFewBlocks = 4;         // row blocks up to which memory is the limit, not arithmetic
constexpr int64_t kGroupBlocks = 8;       // row blocks in a piece of work: 30 µs at K = 1024, so threads end alike
constexpr int64_t kPrefetchAhead = 8192;  // bytes, of a tile's stream

// ---- formats: what one step of a micro-kernel multiplies -----------------------------------------------------------
// X: element of a panel, kXPerStep of them per row and step; kStepK: k per step; kVectorBytes: bytes of 16 columns per
// step. step: acc[r][c] += x[k][r] · w[k][c] for the step's k, ascending, and C vectors of columns.

template <class W>  // float or f16: one k per step
struct Fma {
    using X = float;
    static constexpr bool kPairs = false;
    static constexpr int kXPerStep = 1;
    static constexpr int kStepK = 1;
    static constexpr int64_t kVectorBytes = kLanes * sizeof(W);

    template <int R, int C>
    static inline void step(const X* x, const char* w, F32x16 (&acc)[R][C]) {
        F32x16 columns[C];
        for (int c = 0; c < C; ++c) columns[c] = load(reinterpret_cast<const W*>(w + c * kVectorBytes));
        add_products<R, C>(x, columns, acc);
    }

    template <int R, int C>
    static inline void add_products(const X* x, const F32x16 (&columns)[C], F32x16 (&acc)[R][C]) {
        for (int r = 0; r < R; ++r) {
            const F32x16 row = broadcast(x[r]);
            for (int c = 0; c < C; ++c) acc[r][c] = mul_add(row, columns[c], acc[r][c]);
        }
    }
};

template <>  // a pair of k per step: the even one is the low half of a 32-bit word, the odd one the high half
struct Fma<bf16> {
    using X = float;
    static constexpr bool kPairs = false;
    static constexpr int kXPerStep = 2;
    static constexpr int kStepK = 2;
    static constexpr int64_t kVectorBytes = 64;

    template <int R, int C>
    static inline void step(const X* x, const char* w, F32x16 (&acc)[R][C]) {
        F32x16 columns[C];
        for (int c = 0; c < C; ++c) columns[c] = bits_to_float(shift_left<16>(load_i32(w + c * kVectorBytes)));
        Fma<float>::add_products<R, C>(x, columns, acc);
        // Two shifts, not a mask: on AVX2 its register would be the one too many.
        for (int c = 0; c < C; ++c)
            columns[c] = bits_to_float(shift_left<16>(shift_right_signed<16>(load_i32(w + c * kVectorBytes))));
        Fma<float>::add_products<R, C>(x + R, columns, acc);
    }
};

#if ENGINE_ISA_LEVEL >= 3
struct DotBf16 {
    using X = uint32_t;  // the pair of x that belongs to a step, even k in the low half
    static constexpr bool kPairs = true;
    static constexpr int kXPerStep = 1;
    static constexpr int kStepK = 2;
    static constexpr int64_t kVectorBytes = 64;

    template <int R, int C>
    static inline void step(const X* x, const char* w, F32x16 (&acc)[R][C]) {
        __m512bh columns[C];
        for (int c = 0; c < C; ++c) columns[c] = (__m512bh)_mm512_load_si512(w + c * kVectorBytes);
        for (int r = 0; r < R; ++r) {
            const __m512bh row = (__m512bh)_mm512_set1_epi32(static_cast<int32_t>(x[r]));
            for (int c = 0; c < C; ++c) acc[r][c].v = _mm512_dpbf16_ps(acc[r][c].v, columns[c], row);
        }
    }
};
#endif

// ---- micro-kernel --------------------------------------------------------------------------------------------------

// sums [R][16·C] = panel [steps][kXPerStep][R] · C vectors of columns of one tile
template <class Format, int R, int C>
void multiply(const typename Format::X* x, const char* w, int64_t steps, float* sums) {
    constexpr int64_t kStepBytes = kTileVectors * Format::kVectorBytes;
    F32x16 acc[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) acc[r][c] = zero();
    for (int64_t s = 0; s < steps; ++s) {
        // A few rows over whole tiles: the CPU looks far enough ahead by itself. Otherwise a request 8 KB ahead into L2
        // makes the first row block up to twice as fast (measured; a nearer one, or one into L1, does less).
        if (R > 4 || C < kTileVectors)
            for (int64_t line = 0; line < kStepBytes; line += 64) __builtin_prefetch(w + kPrefetchAhead + line, 0, 2);
        Format::template step<R, C>(x, w, acc);
        x += R * Format::kXPerStep;
        w += kStepBytes;
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store(sums + (r * C + c) * kLanes, acc[r][c]);
}

template <class Format>
struct MicroKernels {
    void (*of[kMaxRows + 1])(const typename Format::X* panel, const char* w, int64_t steps, float* sums);  // by rows
};

template <class Format, int R = kMaxRows>
constexpr MicroKernels<Format> micro_kernels(MicroKernels<Format> table = {}) {
    table.of[R] = &multiply<Format, R, vectors_at_once(R)>;
    if constexpr (R > 1) return micro_kernels<Format, R - 1>(table);
    return table;
}

// ---- panels: `rows` rows of x, k outermost, zero where K is not a whole number of steps ----------------------------

// Elements of a panel are 32 bits wide: an fp32 k, or a pair of bf16. 16 of one row, from x[k]; n = elements of x left.
template <class Format, class In>
I32x16 panel_elements(const In* x, int64_t n) {
    if constexpr (Format::kPairs) {
        if (n >= 2 * kLanes) return load_i32(x);
        bf16 pairs[2 * kLanes] = {};
        std::memcpy(pairs, x, static_cast<size_t>(n) * sizeof(bf16));
        return load_i32(pairs);
    } else {
        return float_to_bits(load_n(x, min_of(n, kLanes)));
    }
}

// panel [count][rows] from `rows` rows of K elements, `stride` apart. Many rows: 16 × 16 elements are turned around in
// registers at a time; few: that would turn mostly zeros.
template <class Format, class In>
void lay_out_panel(const In* x, int64_t stride, int64_t rows, int64_t K, int64_t count, void* panel) {
    constexpr int64_t kElementK = Format::kPairs ? 2 : 1;
    int32_t* out = static_cast<int32_t*>(panel);
    for (int64_t first = 0, k = 0; first < count; first += kLanes, k += kLanes * kElementK, out += kLanes * rows) {
        const int64_t n = min_of(kLanes, count - first);
        const auto elements = [&](int64_t r) {
            return k < K ? panel_elements<Format>(x + r * stride + k, K - k) : broadcast_i32(0);
        };
        if (rows >= kMinTransposedRows) {
            I32x16 square[kLanes];
            for (int64_t r = 0; r < kLanes; ++r) square[r] = r < rows ? elements(r) : broadcast_i32(0);
            transpose(square);
            for (int64_t i = 0; i < n; ++i) store_n(out + i * rows, square[i], rows);
        } else {
            for (int64_t r = 0; r < rows; ++r) {
                int32_t row[kLanes];
                store_n(row, elements(r), kLanes);
                for (int64_t i = 0; i < n; ++i) out[i * rows + r] = row[i];
            }
        }
    }
}

// ---- epilogue: bias, residual, rounding -----------------------------------------------------------------------------

// sums [rows][width] belong at out[row…][column…]; only the first n columns exist.
template <class In, class Out>
void finish(const LinearArgs& a, const float* sums, int64_t row, int64_t rows, int64_t column, int64_t width,
            int64_t n) {
    for (int64_t r = row; r < row + rows; ++r, sums += width) {
        Out* out = static_cast<Out*>(a.out) + r * a.out_stride + column;
        const In* residual = a.residual ? static_cast<const In*>(a.residual) + r * a.residual_stride + column : nullptr;
        for (int64_t j = 0; j < n; j += kLanes) {
            const int64_t left = min_of(kLanes, n - j);
            F32x16 y = load(sums + j);
            if (a.bias) y = y + load_n(a.bias + column + j, left);
            if (residual) y = y + load_n(residual + j, left);
            store_n(out + j, y, left);
        }
    }
}

// ---- the loops ------------------------------------------------------------------------------------------------------

// `rows` rows in near-equal blocks of at most kMaxRows (13 rows make 6 + 7, not 12 + 1).
struct RowBlocks {
    int64_t rows, count;
    explicit RowBlocks(int64_t n) : rows(n), count(ceil_div(n, kMaxRows)) {}
    int64_t begin(int64_t block) const { return rows * block / count; }
};

template <class Format, class In, class Out>
void multiply_chunk(const LinearArgs& a, int64_t first_row, int64_t num_rows, ThreadPool& pool, Scratch& scratch) {
    using X = typename Format::X;
    static constexpr MicroKernels<Format> micro = micro_kernels<Format>();
    const RowBlocks blocks(num_rows);
    const int64_t steps = ceil_div(a.K, Format::kStepK), row_xs = steps * Format::kXPerStep;
    const int64_t tiles = num_tiles(a.N), bytes = tile_bytes(a.K, a.w_type);
    X* panels = static_cast<X*>(scratch.reserve(static_cast<size_t>(num_rows * row_xs) * sizeof(X)));

    pool.parallel_for(blocks.count, 1, [&](int64_t begin, int64_t end, int) {
        for (int64_t b = begin; b < end; ++b) {
            const int64_t row = blocks.begin(b), rows = blocks.begin(b + 1) - row;
            const In* x = static_cast<const In*>(a.x) + (first_row + row) * a.x_stride;
            lay_out_panel<Format>(x, a.x_stride, rows, a.K, row_xs, panels + row * row_xs);
        }
    });

    const auto multiply_block = [&](int64_t tile, int64_t row, int64_t rows) {
        alignas(64) float sums[kMaxSums];
        const int vectors = vectors_at_once(static_cast<int>(rows)), width = vectors * kLanes;
        const char* w = static_cast<const char*>(a.w) + tile * bytes;
        const int64_t stop = min_of((tile + 1) * kTileColumns, a.N);
        for (int64_t column = tile * kTileColumns; column < stop; column += width) {
            micro.of[rows](panels + row * row_xs, w, steps, sums);
            finish<In, Out>(a, sums, first_row + row, rows, column, width, min_of(width, stop - column));
            w += vectors * Format::kVectorBytes;
        }
    };
    // Few row blocks: memory-bound, and one long range of tiles per thread keeps the prefetchers going (short ones cost
    // 10 to 30 %). Many: compute-bound, and small pieces of work (tens of µs) let the threads finish together.
    const int64_t groups = ceil_div(blocks.count, kGroupBlocks);
    const int64_t grain = blocks.count <= kFewBlocks ? ceil_div(tiles, pool.threads()) : 1;
    pool.parallel_for(tiles * groups, grain, [&](int64_t begin, int64_t end, int) {
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t tile = piece / groups, group = piece % groups;
            for (int64_t b = blocks.count * group / groups; b < blocks.count * (group + 1) / groups; ++b)
                multiply_block(tile, blocks.begin(b), blocks.begin(b + 1) - blocks.begin(b));
        }
    });
}

template <class Format, class In, class Out>
void multiply_all(const LinearArgs& a, ThreadPool& pool, Scratch& scratch) {
    for (int64_t row = 0; row < a.T; row += kChunkRows)
        multiply_chunk<Format, In, Out>(a, row, min_of(kChunkRows, a.T - row), pool, scratch);
}

template <class Format, class In>
void choose_output(const LinearArgs& a, ThreadPool& pool, Scratch& scratch) {
    if (a.out_type == DType::f32) return multiply_all<Format, In, float>(a, pool, scratch);
    return multiply_all<Format, In, In>(a, pool, scratch);
}

template <class Format>
void choose_input(const LinearArgs& a, ThreadPool& pool, Scratch& scratch) {
    if (a.x_type == DType::f32) return choose_output<Format, float>(a, pool, scratch);
    if (a.x_type == DType::f16) return choose_output<Format, f16>(a, pool, scratch);
    return choose_output<Format, bf16>(a, pool, scratch);
}

}  // namespace

void linear(const LinearArgs& a, ThreadPool& pool, Scratch& scratch) {
#if ENGINE_ISA_LEVEL >= 3
    if (a.x_type == DType::bf16 && a.w_type == DType::bf16) return choose_output<DotBf16, bf16>(a, pool, scratch);
#endif
    if (a.w_type == DType::f32) return choose_input<Fma<float>>(a, pool, scratch);
    if (a.w_type == DType::f16) return choose_input<Fma<f16>>(a, pool, scratch);
    return choose_input<Fma<bf16>>(a, pool, scratch);
}

}  // namespace ENGINE_ISA
}  // namespace engine
