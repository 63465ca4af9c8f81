// linear: out [T, N] = x [T, K] · wᵀ + bias + residual, in fp32, rounded once.
//
// The work: rows of x are cut into blocks of at most kMaxRows and re-laid as panels; weights lie in tiles of 32 columns
// (weight_tiles.h). One call of a micro-kernel (micro_kernels.h) multiplies one row block by one tile, or half of it,
// over the whole of K. Threads share out the tiles, so a weight is read from memory once per kChunkRows rows.
//
// Order: each output element is one lane of one accumulator that starts at 0 and takes k (for bf16 dot products: pairs
// of k) in ascending order. That depends neither on T and C, nor on the block a row falls into, nor on the thread: a
// row's bits are the same alone and in any batch, by construction.
//
// Arithmetic: bf16 · bf16 on avx512-bf16 is vdpbf16ps (fp32 accumulation; subnormal inputs and results count as 0).
// Everything else converts both sides to fp32, exactly, and uses FMA (portable: multiply, then add).

#include "kernels.h"
#include "micro_kernels.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

constexpr int64_t kChunkRows = 512;  // rows re-laid at a time: bounds scratch memory
constexpr int64_t kFewBlocks = 4;    // row blocks up to which memory is the limit, not arithmetic
constexpr int64_t kGroupBlocks = 8;  // row blocks in a piece of work: 30 µs at K = 1024, so threads end alike

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
    // Few row blocks: memory-bound. Many: compute-bound, and small pieces of work (tens of µs) let the threads finish
    // together.
    const int64_t groups = ceil_div(blocks.count, kGroupBlocks);
    const int64_t grain = blocks.count <= kFewBlocks ? pool.stream_grain(tiles) : 1;
    pool.parallel_streams(tiles * groups, grain, [&](int64_t begin, int64_t end, int) {
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
