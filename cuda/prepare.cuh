// Rows on their way into FP4 and FP8 operands: loaded, normalised, or silu(gate) · up; their largest magnitude; their
// division by the global scale. What prepare_sharq.cu, prepare_fp4.cu and prepare_fp8.cu share.
//
// A block of a multiple of 32 threads owns a row [K]. A fused row is made once and kept in shared memory as bf16, 2K
// bytes; a plain row is read twice, from memory and then from L1. Threads take tiles of 16 neighbours: those a thread
// makes are those it quantises, so there is no barrier between, and neighbouring lanes have neighbouring tiles.
#pragma once

#include "fp4.cuh"

constexpr u32 kBeyondBf16 = 0x7f7f8000u;  // fp32 numbers from here on round to bf16's infinity

template <class T> constexpr bool kIsBf16 = false;
template <> constexpr bool kIsBf16<bf16> = true;

// What to prepare: x [T, K], or with a norm bf16(rms_norm(x)), or with silu bf16(silu(gate) · up) of x = gate | up.
// whole_vectors: K is a multiple of 16, and rows, their second halves and the norm's weight begin at 16 bytes.
template <class T, bool whole_vectors>
struct RowSource {
    const T* x;  // [T, K], silu [T, 2K]; rows `stride` elements apart
    i64 stride;
    const float* norm_weight;  // [K], or null
    float eps;
    int silu;  // 0 or 1; not together with a norm
    int K;     // at most 32768

    using Element = T;
    static constexpr bool kWholeVectors = whole_vectors;
    __device__ __forceinline__ int left(int k) const { return whole_vectors ? kTile : K - k; }
    __device__ __forceinline__ bool fused() const { return norm_weight || silu; }
    __device__ __forceinline__ const T* row() const { return x + blockIdx.x * stride; }
    __device__ __forceinline__ bool vectors(const void* from) const { return whole_vectors || is_aligned(from); }
};

// ---- tiles: sixteen neighbours as fp32, or as eight words of two bf16. n may be 16 or more, what is missing is 0. ---

template <class T>
__device__ __forceinline__ void load_tile(const T* from, int n, bool vectors, float (&x)[kTile]) {
#pragma unroll
    for (int first = 0; first < kTile; first += 8) {
        float v[8];
        load_eight(from + first, n - first, vectors, v);
#pragma unroll
        for (int i = 0; i < 8; ++i) x[first + i] = v[i];
    }
}

__device__ __forceinline__ void load_tile(const bf16* from, int n, bool vectors, u32 (&words)[8]) {
    if (vectors && n >= kTile) {
        const uint4 a = reinterpret_cast<const uint4*>(from)[0], b = reinterpret_cast<const uint4*>(from)[1];
        words[0] = a.x, words[1] = a.y, words[2] = a.z, words[3] = a.w;
        words[4] = b.x, words[5] = b.y, words[6] = b.z, words[7] = b.w;
        return;
    }
    const unsigned short* elements = reinterpret_cast<const unsigned short*>(from);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const u32 low = 2 * i < n ? elements[2 * i] : 0, high = 2 * i + 1 < n ? elements[2 * i + 1] : 0;
        words[i] = low | high << 16;
    }
}

__device__ __forceinline__ void pack_tile(const float (&x)[kTile], u32 (&words)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) words[i] = Word<bf16>::pack(x[2 * i], x[2 * i + 1]);
}
__device__ __forceinline__ void unpack_tile(const u32 (&words)[8], float (&x)[kTile]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[2 * i] = Word<bf16>::low(words[i]), x[2 * i + 1] = Word<bf16>::high(words[i]);
}

__device__ __forceinline__ __nv_bfloat162 magnitudes(u32 word) {
    return __habs2(reinterpret_cast<const __nv_bfloat162&>(word));
}

// ---- making a row ---------------------------------------------------------------------------------------------------

// Shared memory of a block beside the made row.
struct RowScratch {
    float4 sums[kPartials / 32];
    u32 maxima[32];
};

template <class Source>
__device__ __forceinline__ void make_tile(const Source& from, int k, float inverse_rms, u32 (&words)[8]) {
    float x[kTile], other[kTile];
    load_tile(from.row() + k, from.left(k), from.vectors(from.row()), x);
    if (from.silu) {
        const auto* up = from.row() + from.K;
        load_tile(up + k, from.left(k), from.vectors(up), other);
#pragma unroll
        for (int i = 0; i < kTile; ++i) x[i] = silu_mul(x[i], other[i]);
    } else {
        load_tile(from.norm_weight + k, from.left(k), from.vectors(from.norm_weight), other);
#pragma unroll
        for (int i = 0; i < kTile; ++i) x[i] = normalised(x[i], inverse_rms, other[i]);
    }
    pack_tile(x, words);
}

// Makes the block's row into `made` [K rounded up to 16] where it is fused (null: it is only looked at), and returns
// the bits of its largest magnitude, for every thread; those of infinity and NaN are larger than any number's.
template <class Source>
__device__ __forceinline__ u32 make_row(const Source& from, uint4* made, RowScratch& scratch) {
    const bool fused = from.fused(), vectors = from.vectors(from.row());
    float scale = 0.0f;
    if (from.norm_weight) scale = inverse_rms<Source::kWholeVectors>(from.row(), from.K, from.eps, scratch.sums);
    __nv_bfloat162 most_of_words = __floats2bfloat162_rn(0.0f, 0.0f);
    u32 most = 0;
    for (int k = kTile * threadIdx.x; k < from.K; k += kTile * blockDim.x) {
        u32 words[8];
        if (fused) {
            make_tile(from, k, scale, words);
            if (made) {
                made[k / 8] = make_uint4(words[0], words[1], words[2], words[3]);
                made[k / 8 + 1] = make_uint4(words[4], words[5], words[6], words[7]);
            }
        } else if constexpr (kIsBf16<typename Source::Element>) {
            load_tile(from.row() + k, from.left(k), vectors, words);
        } else {
            float x[kTile];
            load_tile(from.row() + k, from.left(k), vectors, x);
#pragma unroll
            for (int i = 0; i < kTile; ++i) most = max(most, __float_as_uint(x[i]) & 0x7fffffffu);
            continue;
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) most_of_words = __hmax2_nan(most_of_words, magnitudes(words[i]));
    }
    const u32 word = reinterpret_cast<const u32&>(most_of_words);
    return max_of_block(max(most, max(word << 16, word & 0xffff0000u)), scratch.maxima);
}

// ---- dividing it ----------------------------------------------------------------------------------------------------

// A row's divisor. The quotient of a bf16 number x by g is fma(fma(−q, g, x), 1/g, q) with q = x · (1/g): all 2^30
// pairs of mantissas agree with x / g, as long as nothing on the way is 0 or subnormal, which `least` ensures.
struct Divisor {
    float g, inverse, least;

    __device__ __forceinline__ explicit Divisor(float g)
        : g(g), inverse(__frcp_rn(g)), least(fmaxf(0x1p-102f, __fmul_rn(0x1p-125f, g))) {}

    __device__ __forceinline__ void divide(const u32 (&words)[8], float (&x)[kTile]) const {
        unpack_tile(words, x);
        __nv_bfloat162 small = magnitudes(words[0]);
#pragma unroll
        for (int i = 1; i < 8; ++i) small = __hmin2(small, magnitudes(words[i]));
        if (fminf(__low2float(small), __high2float(small)) < least) return divide(x);
#pragma unroll
        for (int i = 0; i < kTile; ++i) {
            const float q = __fmul_rn(x[i], inverse);
            x[i] = __fmaf_rn(__fmaf_rn(-q, g, x[i]), inverse, q);
        }
    }
    __device__ __forceinline__ void divide(float (&x)[kTile]) const {
#pragma unroll
        for (int i = 0; i < kTile; ++i) x[i] = __fdiv_rn(x[i], g);
    }
};

// A tile of the row make_row made or looked at: as it is for g = 1 (`divided` false), else over g.
template <bool divided, class Source>
__device__ __forceinline__ void row_tile(const Source& from, const uint4* made, int k, const Divisor& divisor,
                                         float (&x)[kTile]) {
    if (kIsBf16<typename Source::Element> || from.fused()) {
        u32 words[8];
        if (from.fused()) load_tile(reinterpret_cast<const bf16*>(made) + k, kTile, true, words);
        else load_tile(reinterpret_cast<const bf16*>(from.row()) + k, from.left(k), from.vectors(from.row()), words);
        if constexpr (divided) divisor.divide(words, x);
        else unpack_tile(words, x);
    } else {
        load_tile(from.row() + k, from.left(k), from.vectors(from.row()), x);
        if constexpr (divided) divisor.divide(x);
    }
}

// ---- rows of FP4 and FP8 --------------------------------------------------------------------------------------------

// Whether a row of this largest magnitude can be prepared, for every thread. If not, *invalid becomes 1 + the row (or
// stays at a larger one), and the row is to be left unwritten.
__device__ __forceinline__ bool is_valid_row(u32 largest, u32 limit, int* invalid) {
    if (largest >= limit && threadIdx.x == 0) atomicMax(invalid, static_cast<int>(blockIdx.x) + 1);
    return largest < limit;
}

// max(largest / largest_code, 1e-9): what the row is divided by.
__device__ __forceinline__ float row_scale(u32 largest, float largest_code) {
    return fmaxf(__fdiv_rn(__uint_as_float(largest), largest_code), 1e-9f);
}

// FP4: makes the row and finds its g (NVFP4's; 1 for the others), which thread 0 writes. False, for every thread, where
// it holds NaN or infinity, or does so rounded to bf16. tensor_amax: null, or the largest magnitude of all rows.
template <class Format, class Source>
__device__ __forceinline__ bool begin_fp4_row(const Source& from, const float* tensor_amax, uint4* made,
                                              RowScratch& scratch, float* g, int* invalid, float& scale) {
    const u32 largest = make_row(from, made, scratch);
    if (!is_valid_row(largest, Format::kGlobalScale ? kInfinityBits : kBeyondBf16, invalid)) return false;
    const u32 amax = tensor_amax ? __float_as_uint(*tensor_amax) : largest;
    scale = Format::kGlobalScale ? row_scale(amax, 6.0f * 448.0f) : 1.0f;
    if (threadIdx.x == 0) g[blockIdx.x] = scale;
    return true;
}

// A tile of the row to quantise: bf16 values, 0 beyond K.
template <class Format, class Source>
__device__ __forceinline__ void fp4_tile(const Source& from, const uint4* made, int k, const Divisor& divisor,
                                         float (&x)[kTile]) {
    if (k >= from.K) {
#pragma unroll
        for (int i = 0; i < kTile; ++i) x[i] = 0.0f;
        return;
    }
    row_tile<Format::kGlobalScale>(from, made, k, divisor, x);
    u32 words[8];
    pack_tile(x, words);  // exact where nothing was divided and the row is bf16 already
    unpack_tile(words, x);
}

// The one lane of a block's lanes that stores its scale; 0 beyond K.
template <int block, class Scale>
__device__ __forceinline__ void store_scale(Scale* scales, int tile, bool valid, u32 stored) {
    constexpr int lanes = block / kTile;
    if (tile % lanes == 0) scales[tile / lanes] = static_cast<Scale>(valid ? stored : 0);
}
