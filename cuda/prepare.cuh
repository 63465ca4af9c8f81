// Rows on their way into FP4 and FP8 operands: loaded, normalised, or silu(gate) · up; their largest magnitude; their
// division by the global scale. What prepare_sharq.cu, prepare_fp4.cu and prepare_fp8.cu share.
//
// A block of a multiple of 32 threads owns a row [K]. A fused row is made once and kept in shared memory as bf16, 2K
// bytes; a plain row is read twice, from memory and then from L1. Threads take tiles of 16 neighbours: those a thread
// makes are those it quantises, so there is no barrier between, and neighbouring lanes have neighbouring tiles.
//
// What bounds them, estimated (no GPU has run them): instructions for an element of bf16 on sm_90a, counted in machine
// code (tests/test_cuda_prepare_sass.py), about half of them for the integer units, which take one every other cycle:
//     SharQ         NVFP4 sparse 26.3, dense 26.4; MXFP4 22.3, 23.4; HiF4 49, 39
//     others        one path in NVFP4 13.9, MXFP4 11.3, HiF4 20; FP8 4.9
//     before that   1.4 for a plain row, 8.1 with a norm, 26.2 with silu; and about 170 for each thread of a row
// An H200's schedulers have 27.8 for 70 % of its bandwidth on plain and normalised rows of SharQ, 47 with silu: plain
// rows can reach that, normalised ones 57 %, those with silu 62 %.
//
// Few rows: a row of K = 18944 with silu is 37 warps' tiles of 830 instructions, on one SM 4.5 µs at least, where the
// 132 of an H200 would need less than a launch. The largest magnitude keeps them from sharing it: what would help is a
// cluster of blocks (sm_90), or two launches with the row in memory between, which saves about 2 µs of 5. Neither is
// here.
#pragma once

#include "fp4.cuh"
#include "mma.cuh"

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

__device__ __forceinline__ __nv_bfloat162 magnitudes(u32 word) {
    return __habs2(reinterpret_cast<const __nv_bfloat162&>(word));
}

// ---- making a row ---------------------------------------------------------------------------------------------------

// Shared memory of a block beside the made row.
struct RowScratch {
    float4 sums[kPartials / 32];
    u32 maxima[32];
};

// Has `make(k, words)` make the thread's tiles, keeps them in `made` where that is not null, and returns the bits of
// their largest magnitude.
template <class Make>
__device__ __forceinline__ u32 make_tiles(int K, uint4* made, const Make& make) {
    __nv_bfloat162 most = __floats2bfloat162_rn(0.0f, 0.0f);
    for (int k = kTile * threadIdx.x; k < K; k += kTile * blockDim.x) {
        u32 words[8];
        make(k, words);
        if (made) {
            made[k / 8] = make_uint4(words[0], words[1], words[2], words[3]);
            made[k / 8 + 1] = make_uint4(words[4], words[5], words[6], words[7]);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) most = __hmax2_nan(most, magnitudes(words[i]));
    }
    return max(word_of(most) << 16, word_of(most) & 0xffff0000u);
}

// Makes the block's row into `made` [K rounded up to 16] where it is fused (null: it is only looked at), and returns
// the bits of its largest magnitude, for every thread; those of infinity and NaN are larger than any number's.
template <class Source>
__device__ __forceinline__ u32 make_row(const Source& from, uint4* made, RowScratch& scratch) {
    ptx::wait_for_earlier_kernels();
    const auto* row = from.row();
    const bool vectors = from.vectors(row);
    u32 most = 0;
    if (from.norm_weight) {
        const float scale = inverse_rms<Source::kWholeVectors>(row, from.K, from.eps, scratch.sums);
        const bool weight_vectors = from.vectors(from.norm_weight);
        most = make_tiles(from.K, made, [&](int k, u32 (&words)[8]) {
            float x[kTile], weight[kTile];
            load_tile(row + k, from.left(k), vectors, x);
            load_tile(from.norm_weight + k, from.left(k), weight_vectors, weight);
#pragma unroll
            for (int i = 0; i < kTile; ++i) x[i] = normalised(x[i], scale, weight[i]);
            pack_tile(x, words);
        });
    } else if (from.silu) {
        const auto* up = row + from.K;
        const bool up_vectors = from.vectors(up);
        most = make_tiles(from.K, made, [&](int k, u32 (&words)[8]) {
            float x[kTile], other[kTile];
            load_tile(row + k, from.left(k), vectors, x);
            load_tile(up + k, from.left(k), up_vectors, other);
            silu_mul(x, other);
            pack_tile(x, words);
        });
    } else if constexpr (kIsBf16<typename Source::Element>) {
        const auto load = [&](int k, u32 (&words)[8]) { load_tile(row + k, from.left(k), vectors, words); };
        most = make_tiles(from.K, nullptr, load);
    } else {
        for (int k = kTile * threadIdx.x; k < from.K; k += kTile * blockDim.x) {
            float x[kTile];
            load_tile(row + k, from.left(k), vectors, x);
#pragma unroll
            for (int i = 0; i < kTile; ++i) most = max(most, __float_as_uint(x[i]) & 0x7fffffffu);
        }
    }
    return max_of_block(most, scratch.maxima);
}

// ---- dividing it ----------------------------------------------------------------------------------------------------

// A row's divisor. `quotient` of a bf16 number x by g is x · high + x · low, the two together 1/g: over all 2^30
// pairs of mantissas (tests/test_cuda_prepare.py) it rounds to the bf16 and to the E4M3 that x / g rounds to, while
// nothing on the way is subnormal: g is `ordinary` and the quotient 2^-100 or more. low is not negative, so that zeros
// keep their sign.
struct Divisor {
    float g, high, low;

    __device__ __forceinline__ explicit Divisor(float g) : g(g) {
        const float inverse = __frcp_rn(g);
        high = __fmaf_rn(-g, inverse, 1.0f) < 0 ? __uint_as_float(__float_as_uint(inverse) - 1) : inverse;
        low = __fmul_rn(__fmaf_rn(-g, high, 1.0f), inverse);
    }
    __device__ __forceinline__ bool ordinary() const { return g < 0x1p64f; }  // nor is it ever below 1e-9
    __device__ __forceinline__ float quotient(float x) const { return __fmaf_rn(x, high, __fmul_rn(x, low)); }
};
constexpr float kLeastQuotient = 0x1p-100f;

// A tile of the row make_row made or looked at, 0 beyond K.
template <class Source>
__device__ __forceinline__ void row_tile(const Source& from, const uint4* made, int k, float (&x)[kTile]) {
    if (kIsBf16<typename Source::Element> || from.fused()) {
        u32 words[8] = {};
        const bf16* row = reinterpret_cast<const bf16*>(from.row());
        if (from.fused()) row = reinterpret_cast<const bf16*>(made);
        const int left = from.fused() ? kTile : from.left(k);
        if (k < from.K) load_tile(row + k, left, from.fused() || from.vectors(row), words);
        unpack_tile(words, x);
    } else if (k < from.K) {
        load_tile(from.row() + k, from.left(k), from.vectors(from.row()), x);
    } else {
#pragma unroll
        for (int i = 0; i < kTile; ++i) x[i] = 0.0f;
    }
}

// The same over g. exact: as it must be for rows that are not bf16, or where `quotient` would not do.
template <class Source>
__device__ __forceinline__ void divided_tile(const Source& from, const uint4* made, int k, const Divisor& divisor,
                                             bool exact, float (&x)[kTile]) {
    row_tile(from, made, k, x);
    if (exact || !(kIsBf16<typename Source::Element> || from.fused())) {
#pragma unroll
        for (int i = 0; i < kTile; ++i) x[i] = __fdiv_rn(x[i], divisor.g);
    } else {
#pragma unroll
        for (int i = 0; i < kTile; ++i) x[i] = divisor.quotient(x[i]);
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

// The one lane of a block's lanes that stores its scale; 0 beyond K.
template <int block, class Scale>
__device__ __forceinline__ void store_scale(Scale* scales, int tile, bool valid, u32 stored) {
    constexpr int lanes = block / kTile;
    if (tile % lanes == 0) scales[tile / lanes] = static_cast<Scale>(valid ? stored : 0);
}
