// w4a16_linear: out [T, N] = x [T, K] · (values of an FP4 weight)ᵀ · g_w + bias + residual, activations as they are.
//
// The work: the codes of 32 k of a tile (fp4_tiles.h) become small whole numbers in a type that the multiplication
// takes (bf16 on avx512-bf16 where x is bf16, else fp32: exact either way) and are multiplied with up to kMaxRows rows
// in registers; the sums over 32 k (16 where weights have scales per 16), times the scale, are added to accumulators in
// memory. A weight's value and scale are thus exact.
//
// Order: within a sum k in one fixed order (ascending in fp32), sums ascending: a function of K alone, not of T, blocks
// of rows or threads. In bf16 dot products subnormal x count as 0.

#include "fp4_dot.h"
#include "fp4_tiles.h"
#include "kernels.h"
#include "product_epilogue.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

constexpr int kMaxRows = ENGINE_ISA_LEVEL >= 2 ? 8 : 4;
constexpr int64_t kBlockRows = 64, kFewRows = 8;

// ---- fp32: any x, any format, any instruction set ------------------------------------------------------------------

// values [32 k][16] of one vector of columns, as whole numbers
template <class W>
void expand_to_float(const uint8_t* lines, const uint8_t* scales, int half, int c, float* values) {
    Bytes bytes[8];
    W::expand(lines, scales, half, c, bytes);
    const I32x16 offset = broadcast_i32(W::kOffset), byte = broadcast_i32(0xff);
    for (int s = 0; s < 8; ++s, values += 4 * kLanes) {
        I32x16 four;
        std::memcpy(&four, &bytes[s], sizeof four);
        store(values, to_float((four & byte) - offset));
        store(values + kLanes, to_float((shift_right_signed<8>(four) & byte) - offset));
        store(values + 2 * kLanes, to_float((shift_right_signed<16>(four) & byte) - offset));
        store(values + 3 * kLanes, to_float(shift_right_signed<24>(four) - offset));  // no byte is above 127
    }
}

// R rows: sums [.., 32 apart][16] += x · values · scale, 32 k
template <class W, int R>
static inline void add_floats(const float* values, const float* x, int64_t stride, const F32x16* scale, float* sums) {
    constexpr int count = 32 / W::kScalesPerHalf;
    for (int s = 0; s < W::kScalesPerHalf; ++s) {
        F32x16 sum[R];
        for (int r = 0; r < R; ++r) sum[r] = zero();
        for (int k = s * count; k < (s + 1) * count; ++k) {
            const F32x16 column = load(values + k * kLanes);
            for (int r = 0; r < R; ++r) sum[r] = mul_add(broadcast(x[r * stride + k]), column, sum[r]);
        }
        for (int r = 0; r < R; ++r) store(sums + r * 32, mul_add(sum[r], scale[s], load(sums + r * 32)));
    }
}

template <class W, int R = kMaxRows>
static inline void add_floats(int64_t rows, const float* values, const float* x, int64_t stride, const F32x16* scale,
                              float* sums) {
    if (rows == R) return add_floats<W, R>(values, x, stride, scale, sums);
    if constexpr (R > 1) add_floats<W, R - 1>(rows, values, x, stride, scale, sums);
}

// sums [rows][32] = x · one tile; rows of x `stride` apart
template <class W>
void multiply_floats(const uint8_t* w, const float* x, int64_t stride, int64_t steps, int64_t rows, float* sums) {
    for (int64_t i = 0; i < rows * 2; ++i) store(sums + i * kLanes, zero());
    for (int64_t step = 0; step < steps; ++step) {
        const int half = static_cast<int>(step & 1);
        const uint8_t* block = w + step / 2 * W::kBlockBytes;
        const uint8_t *lines = block + half * (kFp4CodeBytes / 2), *scales = block + kFp4CodeBytes;
        prefetch_weights<W>(block, half);
        for (int c = 0; c < 2; ++c) {
            alignas(64) float values[32 * kLanes];
            F32x16 scale[W::kScalesPerHalf];
            expand_to_float<W>(lines + c * 256, scales, half, c, values);
            for (int s = 0; s < W::kScalesPerHalf; ++s) scale[s] = W::scale(scales, half, s, c) * broadcast(W::kUnit);
            for (int64_t r = 0; r < rows; r += kMaxRows)
                add_floats<W>(min_of(kMaxRows, rows - r), values, x + r * stride + step * 32, stride, scale,
                              sums + r * 32 + c * kLanes);
        }
    }
}

#if ENGINE_ISA_LEVEL >= 3

// ---- bf16 dot products: x in bf16, E2M1 weights ---------------------------------------------------------------------
// A line (fp4_tiles.h) read as 16-bit words has four nibbles in each: nibble i of a column's two words are the codes of
// k = 8p + kFirst[i] and that + 2. Looked up as they are, they make the pair of bf16 that a dot product takes from a
// 32-bit lane. So x is laid out with the k of every eight in the order 0 2 4 6 1 3 5 7.

constexpr int kFirst[4] = {0, 4, 1, 5};

// 2 · value in bf16, twice: a lookup takes five bits, the fifth is another code's.
constexpr uint16_t kBf16[32] = {0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40c0, 0x4100, 0x4140, 0,      0xbf80, 0xc000,
                                0xc040, 0xc080, 0xc0c0, 0xc100, 0xc140, 0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40c0,
                                0x4100, 0x4140, 0,      0xbf80, 0xc000, 0xc040, 0xc080, 0xc0c0, 0xc100, 0xc140};

template <int i>
static inline __m512bh values_of(__m512i line) {
    const __m512i table = _mm512_loadu_si512(kBf16);
    return (__m512bh)_mm512_permutexvar_epi16(i ? _mm512_srli_epi16(line, 4 * i) : line, table);
}

template <int R>
static inline void add_values(const __m512bh (&columns)[2], const uint32_t* x, int64_t stride, F32x16 (&sum)[R][2]) {
    for (int r = 0; r < R; ++r) {
        const __m512bh pair = (__m512bh)_mm512_set1_epi32(static_cast<int32_t>(x[r * stride]));
        for (int c = 0; c < 2; ++c) sum[r][c].v = _mm512_dpbf16_ps(sum[r][c].v, columns[c], pair);
    }
}

// R rows: sums [R][32] += x · 32 columns · scale, 32 k. x: pairs, rows `stride` pairs apart.
template <class W, int R>
static inline void add_pairs(const uint8_t* lines, const uint32_t* x, int64_t stride,
                             const F32x16 (&scale)[W::kScalesPerHalf][2], float* sums) {
    constexpr int count = 4 / W::kScalesPerHalf;
    for (int s = 0; s < W::kScalesPerHalf; ++s) {
        F32x16 sum[R][2];
        for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = zero();
        for (int p = s * count; p < (s + 1) * count; ++p) {
            const __m512i a = _mm512_load_si512(lines + 64 * p), b = _mm512_load_si512(lines + 256 + 64 * p);
            const __m512bh columns[4][2] = {{values_of<0>(a), values_of<0>(b)},
                                            {values_of<1>(a), values_of<1>(b)},
                                            {values_of<2>(a), values_of<2>(b)},
                                            {values_of<3>(a), values_of<3>(b)}};
            for (int i = 0; i < 4; ++i) add_values<R>(columns[i], x + 4 * p + i, stride, sum);
        }
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < 2; ++c) {
                float* at = sums + r * 32 + c * kLanes;
                store(at, mul_add(sum[r][c], scale[s][c], load(at)));
            }
    }
}

template <class W, int R = kMaxRows>
static inline void add_pairs(int64_t rows, const uint8_t* lines, const uint32_t* x, int64_t stride,
                             const F32x16 (&scale)[W::kScalesPerHalf][2], float* sums) {
    if (rows == R) return add_pairs<W, R>(lines, x, stride, scale, sums);
    if constexpr (R > 1) add_pairs<W, R - 1>(rows, lines, x, stride, scale, sums);
}

// sums [rows][32] = x · one tile
template <class W>
void multiply_pairs(const uint8_t* w, const uint32_t* x, int64_t stride, int64_t steps, int64_t rows, float* sums) {
    for (int64_t i = 0; i < rows * 2; ++i) store(sums + i * kLanes, zero());
    for (int64_t step = 0; step < steps; ++step) {
        const int half = static_cast<int>(step & 1);
        const uint8_t* block = w + step / 2 * W::kBlockBytes;
        const uint8_t *lines = block + half * (kFp4CodeBytes / 2), *scales = block + kFp4CodeBytes;
        prefetch_weights<W>(block, half);
        F32x16 scale[W::kScalesPerHalf][2];
        for (int s = 0; s < W::kScalesPerHalf; ++s)
            for (int c = 0; c < 2; ++c) scale[s][c] = W::scale(scales, half, s, c) * broadcast(W::kUnit);
        for (int64_t r = 0; r < rows; r += kMaxRows)
            add_pairs<W>(min_of(kMaxRows, rows - r), lines, x + r * stride + step * 16, stride, scale, sums + r * 32);
    }
}

// Pairs of x [T][K / 2] in the order above.
static inline void lay_out_pairs(const bf16* x, int64_t K, uint32_t* pairs) {
    for (int64_t k = 0; k < K; k += 8, pairs += 4)
        for (int i = 0; i < 4; ++i)
            pairs[i] = x[k + kFirst[i]].bits | static_cast<uint32_t>(x[k + kFirst[i] + 2].bits) << 16;
}

#endif

// ---- the loops ------------------------------------------------------------------------------------------------------

// multiply_tile(a tile's weights, first row, rows, sums) for every tile and block of rows.
template <class F>
void for_all_tiles(const W4a16Args& a, ThreadPool& pool, F&& multiply_tile) {
    const int64_t tiles = fp4_num_tiles(a.to.N), blocks = ceil_div(a.T, kBlockRows);
    const int64_t bytes = fp4_tile_bytes(a.K, a.w_format, a.w_block);
    const int64_t grain = a.T <= kFewRows ? pool.stream_grain(tiles) : 1;
    pool.parallel_streams(tiles * blocks, grain, [&](int64_t begin, int64_t end, int) {
        alignas(64) float sums[kBlockRows * kFp4TileColumns];
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t tile = piece % tiles, first = piece / tiles * kBlockRows;
            const int64_t rows = min_of(kBlockRows, a.T - first);
            multiply_tile(static_cast<const uint8_t*>(a.w) + tile * bytes, first, rows, sums);
            finish_tile(a.to, nullptr, a.w_g, sums, first, rows, tile * kFp4TileColumns);
        }
    });
}

template <class T>
void convert_rows(const W4a16Args& a, float* out, ThreadPool& pool) {
    pool.parallel_for(a.T, max_of(1, 8192 / a.K), [&](int64_t begin, int64_t end, int) {
        for (int64_t t = begin; t < end; ++t) {
            const T* x = static_cast<const T*>(a.x) + t * a.x_stride;
            for (int64_t k = 0; k < a.K; k += kLanes) store(out + t * a.K + k, load(x + k));
        }
    });
}

template <class W>
void multiply_in_fp32(const W4a16Args& a, ThreadPool& pool, Scratch& scratch) {
    const float* x = static_cast<const float*>(a.x);
    int64_t stride = a.x_stride;
    if (a.x_type != DType::f32) {
        float* converted = static_cast<float*>(scratch.reserve(static_cast<size_t>(a.T * a.K) * sizeof(float)));
        a.x_type == DType::f16 ? convert_rows<f16>(a, converted, pool) : convert_rows<bf16>(a, converted, pool);
        x = converted;
        stride = a.K;
    }
    for_all_tiles(a, pool, [&](const uint8_t* w, int64_t row, int64_t rows, float* sums) {
        multiply_floats<W>(w, x + row * stride, stride, a.K / 32, rows, sums);
    });
}

// W has E2M1 elements.
template <class W>
void multiply_e2m1(const W4a16Args& a, ThreadPool& pool, Scratch& scratch) {
#if ENGINE_ISA_LEVEL >= 3
    if (a.x_type == DType::bf16) {
        const int64_t stride = a.K / 2;
        uint32_t* x = static_cast<uint32_t*>(scratch.reserve(static_cast<size_t>(a.T * stride) * sizeof(uint32_t)));
        pool.parallel_for(a.T, max_of(1, 16384 / a.K), [&](int64_t begin, int64_t end, int) {
            for (int64_t t = begin; t < end; ++t)
                lay_out_pairs(static_cast<const bf16*>(a.x) + t * a.x_stride, a.K, x + t * stride);
        });
        return for_all_tiles(a, pool, [&](const uint8_t* w, int64_t row, int64_t rows, float* sums) {
            multiply_pairs<W>(w, x + row * stride, stride, a.K / 32, rows, sums);
        });
    }
#endif
    multiply_in_fp32<W>(a, pool, scratch);
}

}  // namespace

void w4a16_linear(const W4a16Args& a, ThreadPool& pool, Scratch& scratch) {
    if (a.w_format == Fp4Format::mxfp4) return multiply_e2m1<Mxfp4Weights>(a, pool, scratch);
    if (a.w_format == Fp4Format::hif4) return multiply_in_fp32<Hif4Weights>(a, pool, scratch);
    if (a.w_block == 16) return multiply_e2m1<Nvfp4Weights<16>>(a, pool, scratch);
    return multiply_e2m1<Nvfp4Weights<32>>(a, pool, scratch);
}

}  // namespace ENGINE_ISA
}  // namespace engine
