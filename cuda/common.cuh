// What the kernels share: element types, vector loads and stores, reductions over a block, and the fp32 arithmetic that
// engine/ops/reference.py fixes to the last bit (inverse_rms, exp32, silu).
//
// Where bits are fixed, every step is an intrinsic that says how it rounds (__fadd_rn, __fmul_rn, __fmaf_rn, …): nvcc
// would otherwise contract a product and a sum. A block is one-dimensional and a multiple of 32 threads throughout.
// Offsets into arrays are 64-bit, sizes 32-bit.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "mma.cuh"

using bf16 = __nv_bfloat16;
using f16 = __half;
using u8 = unsigned char;
using u32 = unsigned int;
using i64 = long long;

constexpr u32 kAllLanes = 0xffffffffu;
constexpr u32 kInfinityBits = 0x7f800000u;

__device__ __forceinline__ int lane_of_warp() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp_of_block() { return threadIdx.x >> 5; }
__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// ---- elements -------------------------------------------------------------------------------------------------------

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }

// Nearest, ties to even, subnormals kept, too large becomes infinite.
template <class T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }

// Two 16-bit elements as the word they are in memory, the first in the low half.
template <class T> struct Word;
template <> struct Word<bf16> {
    static __device__ __forceinline__ u32 pack(float low, float high) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return reinterpret_cast<const u32&>(pair);
    }
    static __device__ __forceinline__ float low(u32 word) { return __uint_as_float(word << 16); }
    static __device__ __forceinline__ float high(u32 word) { return __uint_as_float(word & 0xffff0000u); }
};
template <> struct Word<f16> {
    static __device__ __forceinline__ u32 pack(float low, float high) {
        const __half2 pair = __floats2half2_rn(low, high);
        return reinterpret_cast<const u32&>(pair);
    }
    static __device__ __forceinline__ float low(u32 word) { return __low2float(reinterpret_cast<__half2&>(word)); }
    static __device__ __forceinline__ float high(u32 word) { return __high2float(reinterpret_cast<__half2&>(word)); }
};

// ---- vectors of eight -----------------------------------------------------------------------------------------------
// 16 bytes of a 16-bit type, 32 of float. `vectors` says that x, and every eighth element after it, is 16-byte aligned.

__device__ __forceinline__ bool is_aligned(const void* pointer) {
    return (reinterpret_cast<unsigned long long>(pointer) & 15) == 0;
}

template <class T>
__device__ __forceinline__ void load_vector(const T* x, float (&v)[8]) {
    const uint4 raw = *reinterpret_cast<const uint4*>(x);
    const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        v[2 * i] = Word<T>::low(words[i]);
        v[2 * i + 1] = Word<T>::high(words[i]);
    }
}
template <>
__device__ __forceinline__ void load_vector<float>(const float* x, float (&v)[8]) {
    const float4 a = reinterpret_cast<const float4*>(x)[0], b = reinterpret_cast<const float4*>(x)[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
    v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

template <class T>
__device__ __forceinline__ void store_vector(T* x, const float (&v)[8]) {
    *reinterpret_cast<uint4*>(x) = make_uint4(Word<T>::pack(v[0], v[1]), Word<T>::pack(v[2], v[3]),
                                              Word<T>::pack(v[4], v[5]), Word<T>::pack(v[6], v[7]));
}
template <>
__device__ __forceinline__ void store_vector<float>(float* x, const float (&v)[8]) {
    reinterpret_cast<float4*>(x)[0] = make_float4(v[0], v[1], v[2], v[3]);
    reinterpret_cast<float4*>(x)[1] = make_float4(v[4], v[5], v[6], v[7]);
}

// The first n of eight; what is missing is 0. n may be 8 or more.
template <class T>
__device__ __forceinline__ void load_eight(const T* x, int n, bool vectors, float (&v)[8]) {
    if (vectors && n >= 8) return load_vector(x, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = i < n ? to_float(x[i]) : 0.0f;
}
template <class T>
__device__ __forceinline__ void store_eight(T* x, int n, bool vectors, const float (&v)[8]) {
    if (vectors && n >= 8) return store_vector(x, v);
#pragma unroll
    for (int i = 0; i < 8; ++i)
        if (i < n) x[i] = from_float<T>(v[i]);
}

// ---- reductions -----------------------------------------------------------------------------------------------------

// The sum over groups of `width` neighbouring lanes (a power of two), neighbours first: lanes 2i and 2i + 1, then pairs
// of those, …. Every lane of a group gets it. All lanes of the warp take part.
__device__ __forceinline__ float sum_of_lanes(float x, int width = 32) {
    for (int distance = 1; distance < width; distance *= 2)
        x = __fadd_rn(x, __shfl_xor_sync(kAllLanes, x, distance));
    return x;
}

template <int width>
__device__ __forceinline__ float max_of_lanes(float x) {
#pragma unroll
    for (int distance = 1; distance < width; distance *= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
    return x;
}

// The largest over the block, for every thread. maxima [32] is shared memory that nobody else uses meanwhile.
__device__ __forceinline__ u32 max_of_block(u32 x, u32* maxima) {
    x = __reduce_max_sync(kAllLanes, x);
    if (lane_of_warp() == 0) maxima[warp_of_block()] = x;
    __syncthreads();
    return __reduce_max_sync(kAllLanes, lane_of_warp() < blockDim.x / 32 ? maxima[lane_of_warp()] : 0);
}

// ---- arithmetic fixed by reference.py -------------------------------------------------------------------------------

constexpr int kPartials = 1024;  // reference.NUM_PARTIALS

__device__ __forceinline__ float sum_of_eight(const float (&v)[8]) {
    const float low = __fadd_rn(__fadd_rn(v[0], v[1]), __fadd_rn(v[2], v[3]));
    return __fadd_rn(low, __fadd_rn(__fadd_rn(v[4], v[5]), __fadd_rn(v[6], v[7])));
}

__device__ __forceinline__ float inverse_root(float sum, int K, float eps) {
    return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(sum, static_cast<float>(K)), eps)));
}

// reference.inverse_rms of x [K], for every thread of the block. Of the 1024 partial sums a thread takes eight
// neighbours at a time, which are one vector in every 1024 elements; it adds those, the warps add the 128 sums of
// eight. `sums` [kPartials / 8] is shared memory that nobody else uses meanwhile. whole_vectors: x is aligned and K a
// multiple of 8.
template <bool whole_vectors = false, class T>
__device__ __forceinline__ float inverse_rms(const T* x, int K, float eps, float4* sums) {
    const bool vectors = whole_vectors || is_aligned(x);
    for (int first = 8 * threadIdx.x; first < kPartials; first += 8 * blockDim.x) {
        float partial[8] = {};
#pragma unroll 4
        for (int k = first; k < K; k += kPartials) {
            float v[8];
            load_eight(x + k, whole_vectors ? 8 : K - k, vectors, v);
#pragma unroll
            for (int i = 0; i < 8; ++i) partial[i] = __fmaf_rn(v[i], v[i], partial[i]);
        }
        reinterpret_cast<float*>(sums)[first / 8] = sum_of_eight(partial);
    }
    __syncthreads();
    const float4 four = sums[lane_of_warp()];  // every warp for itself: that saves a barrier
    const float sum = __fadd_rn(__fadd_rn(four.x, four.y), __fadd_rn(four.z, four.w));
    return inverse_root(sum_of_lanes(sum), K, eps);
}

__device__ __forceinline__ float normalised(float x, float inverse_rms, float weight) {
    return __fmul_rn(__fmul_rn(x, inverse_rms), weight);
}

// e^x = p · 2^n for x in [-104, 89].
struct Exponential {
    float p;
    int n;

    __device__ __forceinline__ explicit Exponential(float x) {
        const float aligner = 12582912.0f;  // 1.5 * 2^23: a sum with it is rounded to a whole number, in the low bits
        const float aligned = __fadd_rn(__fmul_rn(x, 1.44269504f), aligner);
        const float whole = __fadd_rn(aligned, -aligner);
        const float r = __fmaf_rn(1.90465421e-9f, whole, __fmaf_rn(-0.693147182f, whole, x));
        p = 0x1.6a23cep-10f;
        p = __fmaf_rn(p, r, 0x1.123a2p-7f);
        p = __fmaf_rn(p, r, 0x1.5558f2p-5f);
        p = __fmaf_rn(p, r, 0x1.555492p-3f);
        p = __fmaf_rn(p, r, 0x1.fffffcp-2f);
        p = __fmaf_rn(p, r, 1.0f);
        p = __fmaf_rn(p, r, 1.0f);
        n = __float_as_int(aligned) - __float_as_int(aligner);
    }
};

// reference.exp32, except that NaN gives e^-104: callers have NaN elsewhere in their formula.
__device__ __forceinline__ float exp32(float x) {
    const Exponential e(fminf(fmaxf(x, -104.0f), 89.0f));
    // times 2^n in two factors, since 2^n itself may not be an fp32
    const int half = e.n >> 1;
    const float first = __int_as_float((half + 127) << 23), second = __int_as_float((e.n - half + 127) << 23);
    return __fmul_rn(__fmul_rn(e.p, first), second);
}

__device__ __forceinline__ float silu_mul(float gate, float up) {
    return __fmul_rn(__fdiv_rn(gate, __fadd_rn(1.0f, exp32(-gate))), up);
}

// gate becomes silu(gate) · up. Gates up to 80, and NaN, are done without what only others need: e^-gate is then
// normal, and the divisor between 1 and 2^116. A quotient of g by d, with r near 1/d, is q = g · r corrected by
// (d·q − g) · −r: correctly rounded, since the remainder is exact (for |g| < 2^-25 d is 2), and −0 stays −0.
template <int N>
__device__ __forceinline__ void silu_mul(float (&gate)[N], const float (&up)[N]) {
    bool large = false;
#pragma unroll
    for (int i = 0; i < N; ++i) large |= fabsf(gate[i]) > 80.0f;
    if (large) {
#pragma unroll
        for (int i = 0; i < N; ++i) gate[i] = silu_mul(gate[i], up[i]);
        return;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
        const float g = gate[i];
        const Exponential e(-g);
        const float d = __fadd_rn(1.0f, __int_as_float(__float_as_int(e.p) + (e.n << 23)));
        const float guess = ptx::reciprocal(d), r = __fmaf_rn(__fmaf_rn(-d, guess, 1.0f), guess, guess);
        const float q = __fmul_rn(g, r);
        gate[i] = __fmul_rn(__fmaf_rn(__fmaf_rn(d, q, -g), -r, q), up[i]);
    }
}
