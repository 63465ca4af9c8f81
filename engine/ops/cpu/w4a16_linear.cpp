// w4a16_linear: out [T, N] = x [T, K] · (values of an FP4 weight)ᵀ · g_w + bias + residual, activations as they are.
//
// The work: the codes of 32 k of a tile (fp4_tiles.h) become small whole numbers in a type that the multiplication takes
// (bf16 on avx512-bf16 where x is bf16, else fp32: exact either way) and are multiplied with up to kMaxRows rows in
// registers; the sums over 32 k (16 where weights have scales per 16), times the scale, are added to accumulators in
// memory. A weight's value and scale are thus exact.
//
// Order: k ascending within a sum, sums ascending: a function of K alone, not of T, blocks of rows or threads. With bf16
// dot products a column has two accumulators, of the k ≡ 0, 1 and of the k ≡ 2, 3 (mod 4), added at the very end;
// subnormal x count as 0 there.

#include "fp4_dot.h"
#include "fp4_epilogue.h"
#include "fp4_tiles.h"
#include "kernels.h"

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
static inline void add_floats(int64_t rows, const float* values, const float* x, int64_t stride, const F32x16* scale, float* sums) {
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
        for (int c = 0; c < 2; ++c) {
            alignas(64) float values[32 * kLanes];
            F32x16 scale[W::kScalesPerHalf];
            expand_to_float<W>(lines + c * 256, scales, half, c, values);
            for (int s = 0; s < W::kScalesPerHalf; ++s) scale[s] = W::scale(scales, half, s, c) * broadcast(W::kUnit);
            for (int64_t r = 0; r < rows; r += kMaxRows)
                add_floats<W>(min_of(kMaxRows, rows - r), values, x + r * stride + step * 32, stride, scale, sums + r * 32 + c * kLanes);
        }
    }
}

#if ENGINE_ISA_LEVEL >= 3

// ---- bf16 dot products: x in bf16, E2M1 weights ----------------------------------------------------------------------
// Interleaving low and high bytes of the looked-up numbers leaves a column's four k in two neighbouring lanes: lanes 2i
// and 2i + 1 of register h belong to column 4 (i / 2) + 2h + i % 2. Accumulators stay in that order to the end.

// Low and high bytes of 2 · value in bf16.
constexpr uint8_t kBf16Low[16] = {0, 0x80, 0, 0x40, 0x80, 0xc0, 0, 0x40, 0, 0x80, 0, 0x40, 0x80, 0xc0, 0, 0x40};
constexpr uint8_t kBf16High[16] = {0, 0x3f, 0x40, 0x40, 0x40, 0x40, 0x41, 0x41, 0, 0xbf, 0xc0, 0xc0, 0xc0, 0xc0, 0xc1, 0xc1};

static inline void expand_to_bf16(const uint8_t* lines, int s, Table low, Table high, __m512bh (&columns)[2]) {
    const __m512i line = _mm512_load_si512(lines + s / 2 * 64);
    const __m512i codes = _mm512_and_si512(s % 2 ? _mm512_srli_epi16(line, 4) : line, _mm512_set1_epi8(15));
    const __m512i l = _mm512_shuffle_epi8(low.v, codes), h = _mm512_shuffle_epi8(high.v, codes);
    columns[0] = (__m512bh)_mm512_unpacklo_epi8(l, h);
    columns[1] = (__m512bh)_mm512_unpackhi_epi8(l, h);
}

// R rows: acc [.., 64 apart][2][16] += x · 16 columns · scale, 32 k
template <class W, int R>
static inline void add_bf16(const uint8_t* lines, const bf16* x, int64_t stride, const F32x16 (&scale)[W::kScalesPerHalf][2], float* acc) {
    const Table low = table_of(kBf16Low), high = table_of(kBf16High);
    constexpr int steps = 8 / W::kScalesPerHalf;
    for (int b = 0; b < W::kScalesPerHalf; ++b) {
        F32x16 sum[R][2];
        for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = zero();
        for (int s = b * steps; s < (b + 1) * steps; ++s) {
            __m512bh columns[2];
            expand_to_bf16(lines, s, low, high, columns);
            for (int r = 0; r < R; ++r) {
                int64_t four;
                std::memcpy(&four, x + r * stride + 4 * s, 8);
                for (int h = 0; h < 2; ++h) sum[r][h].v = _mm512_dpbf16_ps(sum[r][h].v, columns[h], (__m512bh)_mm512_set1_epi64(four));
            }
        }
        for (int r = 0; r < R; ++r)
            for (int h = 0; h < 2; ++h) store(acc + r * 64 + h * kLanes, mul_add(sum[r][h], scale[b][h], load(acc + r * 64 + h * kLanes)));
    }
}

template <class W, int R = kMaxRows>
static inline void add_bf16(int64_t rows, const uint8_t* lines, const bf16* x, int64_t stride, const F32x16 (&scale)[W::kScalesPerHalf][2],
                            float* acc) {
    if (rows == R) return add_bf16<W, R>(lines, x, stride, scale, acc);
    if constexpr (R > 1) add_bf16<W, R - 1>(rows, lines, x, stride, scale, acc);
}

// Sixteen columns' numbers to where the accumulators have them, and back, neighbours added.
static inline void to_pairs(F32x16 scale, F32x16 (&pairs)[2]) {
    const __m512i first = _mm512_setr_epi32(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13);
    pairs[0].v = _mm512_permutexvar_ps(first, scale.v);
    pairs[1].v = _mm512_permutexvar_ps(_mm512_add_epi32(first, _mm512_set1_epi32(2)), scale.v);
}
static inline F32x16 from_pairs(F32x16 first, F32x16 second) {
    const __m512i order = _mm512_setr_epi32(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
    return {_mm512_permutexvar_ps(order, add_neighbours(first, second).v)};
}

template <class W>
void multiply_bf16(const uint8_t* w, const bf16* x, int64_t stride, int64_t steps, int64_t rows, float* sums) {
    alignas(64) float acc[kBlockRows * 64];  // [rows][2 vectors of columns][2][16]
    for (int64_t i = 0; i < rows * 4; ++i) store(acc + i * kLanes, zero());
    for (int64_t step = 0; step < steps; ++step) {
        const int half = static_cast<int>(step & 1);
        const uint8_t* block = w + step / 2 * W::kBlockBytes;
        const uint8_t *lines = block + half * (kFp4CodeBytes / 2), *scales = block + kFp4CodeBytes;
        for (int c = 0; c < 2; ++c) {
            F32x16 scale[W::kScalesPerHalf][2];
            for (int s = 0; s < W::kScalesPerHalf; ++s) to_pairs(W::scale(scales, half, s, c) * broadcast(W::kUnit), scale[s]);
            for (int64_t r = 0; r < rows; r += kMaxRows)
                add_bf16<W>(min_of(kMaxRows, rows - r), lines + c * 256, x + r * stride + step * 32, stride, scale, acc + r * 64 + c * 32);
        }
    }
    for (int64_t i = 0; i < rows * 2; ++i) store(sums + i * kLanes, from_pairs(load(acc + 2 * i * kLanes), load(acc + (2 * i + 1) * kLanes)));
}

#endif

// ---- the loops -------------------------------------------------------------------------------------------------------

// multiply_tile(a tile's weights, first row, rows, sums) for every tile and block of rows.
template <class F>
void for_all_tiles(const W4a16Args& a, ThreadPool& pool, F&& multiply_tile) {
    const Fp4LinearArgs& p = a.product;
    const int64_t tiles = fp4_num_tiles(p.N), blocks = ceil_div(a.T, kBlockRows), bytes = fp4_tile_bytes(a.K, a.w_format, p.w_block);
    const int64_t grain = a.T <= kFewRows ? ceil_div(tiles, pool.threads()) : 1;
    pool.parallel_for(tiles * blocks, grain, [&](int64_t begin, int64_t end, int) {
        alignas(64) float sums[kBlockRows * kFp4TileColumns];
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t tile = piece % tiles, first = piece / tiles * kBlockRows, rows = min_of(kBlockRows, a.T - first);
            multiply_tile(static_cast<const uint8_t*>(p.w) + tile * bytes, first, rows, sums);
            finish_tile(p, nullptr, sums, first, rows, tile * kFp4TileColumns);
        }
    });
}

template <class T>
void convert_rows(const W4a16Args& a, float* out, ThreadPool& pool) {
    pool.parallel_for(a.T, max_of(1, 8192 / a.K), [&](int64_t begin, int64_t end, int) {
        for (int64_t t = begin; t < end; ++t)
            for (int64_t k = 0; k < a.K; k += kLanes) store(out + t * a.K + k, load(static_cast<const T*>(a.x) + t * a.x_stride + k));
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
    if (a.x_type == DType::bf16)
        return for_all_tiles(a, pool, [&](const uint8_t* w, int64_t row, int64_t rows, float* sums) {
            multiply_bf16<W>(w, static_cast<const bf16*>(a.x) + row * a.x_stride, a.x_stride, a.K / 32, rows, sums);
        });
#endif
    multiply_in_fp32<W>(a, pool, scratch);
}

}  // namespace

void w4a16_linear(const W4a16Args& a, ThreadPool& pool, Scratch& scratch) {
    if (a.w_format == Fp4Format::mxfp4) return multiply_e2m1<Mxfp4Weights>(a, pool, scratch);
    if (a.w_format == Fp4Format::hif4) return multiply_in_fp32<Hif4Weights>(a, pool, scratch);
    if (a.product.w_block == 16) return multiply_e2m1<Nvfp4Weights<16>>(a, pool, scratch);
    return multiply_e2m1<Nvfp4Weights<32>>(a, pool, scratch);
}

}  // namespace ENGINE_ISA
}  // namespace engine
