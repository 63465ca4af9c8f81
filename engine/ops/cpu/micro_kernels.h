// The inner loops of products with weights in tiles of 32 columns: what `linear` and the FP8 products share. Include in
// kernel files only.
//
// Rows of x are re-laid as panels, k outermost, so that a step of a micro-kernel finds its rows' elements side by side.
// One call of a micro-kernel multiplies one block of rows by the C vectors of 16 columns that registers allow, over a
// range of k, with all rows × C accumulators in registers: each is a sum that starts at 0 and takes k (for bf16 dot
// products: pairs of k) in ascending order.
#pragma once

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
constexpr int kMinTransposedRows = 6;  // rows from which a 16 × 16 transpose beats copying element by element

// ---- formats: what one step of a micro-kernel multiplies -----------------------------------------------------------
// X: element of a panel, kXPerStep of them per row and step; kStepK: k per step; kVectorBytes: bytes of 16 columns per
// step. step: acc[r][c] += x[k][r] · w[k][c] for the step's k, ascending, and C vectors of columns. prefetch_ahead:
// bytes of the tile's stream, 0 for none.

struct FromMemory {
    // A few rows over whole tiles: the CPU looks far enough ahead by itself. Otherwise a request 8 KB ahead into L2
    // makes the first row block up to twice as fast (measured; a nearer one, or one into L1, does less).
    static constexpr int64_t prefetch_ahead(int rows, int vectors) {
        return rows > 4 || vectors < kTileVectors ? 8192 : 0;
    }
};

template <class Format>
struct FromCache : Format {
    static constexpr int64_t prefetch_ahead(int, int) { return 0; }
};

template <class W>  // float or f16: one k per step
struct Fma : FromMemory {
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
struct Fma<bf16> : FromMemory {
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
struct DotBf16 : FromMemory {
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
    constexpr int64_t kStepBytes = kTileVectors * Format::kVectorBytes, kAhead = Format::prefetch_ahead(R, C);
    F32x16 acc[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) acc[r][c] = zero();
    for (int64_t s = 0; s < steps; ++s) {
        if constexpr (kAhead > 0)
            for (int64_t line = 0; line < kStepBytes; line += 64) __builtin_prefetch(w + kAhead + line, 0, 2);
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
        bf16 pairs[2 * kLanes] = {};
        if constexpr (sizeof(In) == sizeof(bf16)) {
            if (n >= 2 * kLanes) return load_i32(x);
            std::memcpy(pairs, x, static_cast<size_t>(n) * sizeof(bf16));
        } else {  // e4m3: exact in bf16
            store(pairs, load_n(x, min_of(n, kLanes)));
            if (n > kLanes) store(pairs + kLanes, load_n(x + kLanes, min_of(n - kLanes, kLanes)));
        }
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
        } else if (rows == 1) {
            store_n(out, elements(0), n);
        } else {
            for (int64_t r = 0; r < rows; ++r) {
                int32_t row[kLanes];
                store_n(row, elements(r), kLanes);
                for (int64_t i = 0; i < n; ++i) out[i * rows + r] = row[i];
            }
        }
    }
}

// `rows` rows in near-equal blocks of at most kMaxRows (13 rows make 6 + 7, not 12 + 1).
struct RowBlocks {
    int64_t rows, count;
    explicit RowBlocks(int64_t n) : rows(n), count(ceil_div(n, kMaxRows)) {}
    int64_t begin(int64_t block) const { return rows * block / count; }
};

}  // namespace
}  // namespace ENGINE_ISA
}  // namespace engine
