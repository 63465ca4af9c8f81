// rope_and_cache: per head RMSNorm over D where a norm is given, then rotation by the token's position, in fp32,
// rounded once; q goes to out, k and v to the cache (kv_cache.cuh).
//
//   qkv [T, (H + 2·KVH)·D] = q | k | v, rows qkv_stride elements apart;  out [T, H·D], rows out_stride apart
//   rope_table [P, D] float32 = cos [D/2] | sin [D/2];  positions, slot_mapping [T] int32
//   q_norm, k_norm [D] float32 or null;  k_cache, v_cache of this layer, of qkv's type or E4M3
//   E4M3: k_scales, v_scales [KVH] float32, what a head's k and v are divided by before they are rounded; *invalid
//   becomes 1 + the row of one that is NaN or infinite (or stays at a larger one)
//   out_i = x_i·cos_i − x_{i+D/2}·sin_i,  out_{i+D/2} = x_{i+D/2}·cos_i + x_i·sin_i
//
// D is a multiple of 8, at most 256. A group of G lanes, the power of two from D/8 on, owns a head of a token; lane j
// holds elements 4j … 4j + 3 of both halves, so that rotating needs no other lane. Grid: (T, ceil((H + 2·KVH)·G /
// threads)), blocks of a multiple of 32 threads, 128 for speed. No shared memory. Moves 4·(H + 2·KVH)·D bytes a token
// in 16-bit types, 2·KVH·D fewer with E4M3. Reference: ReferenceOps.rope_and_cache, bit for bit.
#include "fp4.cuh"
#include "kv_cache.cuh"
#include "mma.cuh"

struct Four {
    float v[4];
};

// Four elements at a multiple of four from where `vectors` says a row is 16-byte aligned: 8 bytes, of float 16.
template <class T>
__device__ __forceinline__ Four load_four(const T* from, bool vectors) {
    Four x;
    if (vectors) {
        const uint2 raw = *reinterpret_cast<const uint2*>(from);
        x.v[0] = Word<T>::low(raw.x), x.v[1] = Word<T>::high(raw.x);
        x.v[2] = Word<T>::low(raw.y), x.v[3] = Word<T>::high(raw.y);
    } else {
        for (int i = 0; i < 4; ++i) x.v[i] = to_float(from[i]);
    }
    return x;
}
template <>
__device__ __forceinline__ Four load_four<float>(const float* from, bool vectors) {
    if (!vectors) return {from[0], from[1], from[2], from[3]};
    const float4 raw = *reinterpret_cast<const float4*>(from);
    return {raw.x, raw.y, raw.z, raw.w};
}

template <class T>
__device__ __forceinline__ void store_four(T* to, const Four& x, bool vectors) {
    if (vectors)
        *reinterpret_cast<uint2*>(to) = make_uint2(Word<T>::pack(x.v[0], x.v[1]), Word<T>::pack(x.v[2], x.v[3]));
    else
        for (int i = 0; i < 4; ++i) to[i] = from_float<T>(x.v[i]);
}
template <>
__device__ __forceinline__ void store_four<float>(float* to, const Four& x, bool vectors) {
    if (vectors)
        *reinterpret_cast<float4*>(to) = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
    else
        for (int i = 0; i < 4; ++i) to[i] = x.v[i];
}

// x / scale as codes; 4-byte aligned.
__device__ __forceinline__ void store_codes(u8* to, const Four& x, float scale) {
    u32 word = 0;
    for (int i = 0; i < 4; ++i) word |= e4m3_code(__fdiv_rn(x.v[i], scale)) << 8 * i;
    *reinterpret_cast<u32*>(to) = word;
}

__device__ __forceinline__ bool is_finite(const Four& x) {
    u32 largest = 0;
    for (int i = 0; i < 4; ++i) largest = max(largest, __float_as_uint(x.v[i]) & 0x7fffffffu);
    return largest < kInfinityBits;
}

__device__ __forceinline__ float sum_of_squares(const Four& x) {
    float s[4];
    for (int i = 0; i < 4; ++i) s[i] = __fmul_rn(x.v[i], x.v[i]);
    return __fadd_rn(__fadd_rn(s[0], s[1]), __fadd_rn(s[2], s[3]));
}

// reference.inverse_rms of a head: its tree over neighbours, of which the lanes hold sums of four. Four number q is low
// half's of lane q, or high half's of lane q − D/8; lane l takes numbers 2l and 2l + 1 to begin the tree with.
__device__ __forceinline__ float inverse_rms_of_head(const Four& low, const Four& high, int j, int G, int D,
                                                     float eps) {
    const int fours = D / 4, lanes = D / 8;
    const float sum_low = sum_of_squares(low), sum_high = sum_of_squares(high);
    float neighbours[2];
    for (int i = 0; i < 2; ++i) {
        const int q = 2 * j + i;
        const float from_low = __shfl_sync(kAllLanes, sum_low, q & (G - 1), G);
        const float from_high = __shfl_sync(kAllLanes, sum_high, (q - lanes) & (G - 1), G);
        neighbours[i] = q < lanes ? from_low : q < fours ? from_high : 0.0f;
    }
    return inverse_root(sum_of_lanes(__fadd_rn(neighbours[0], neighbours[1]), G), D, eps);
}

__device__ __forceinline__ void normalise(Four& x, const float* weight, float scale) {
    for (int i = 0; i < 4; ++i) x.v[i] = normalised(x.v[i], scale, weight[i]);
}

__device__ __forceinline__ void rotate(Four& low, Four& high, const Four& cos, const Four& sin) {
    for (int i = 0; i < 4; ++i) {
        const float a = low.v[i], b = high.v[i], c = cos.v[i], s = sin.v[i];
        low.v[i] = __fmaf_rn(a, c, -__fmul_rn(b, s));
        high.v[i] = __fmaf_rn(b, c, __fmul_rn(a, s));
    }
}

// What an E4M3 cache needs besides.
struct Codes {
    const float *k_scales, *v_scales;
    int* invalid;
};

template <class T, class KV>
__device__ __forceinline__ void rope_and_cache(const T* qkv, i64 qkv_stride, const float* rope_table,
                                               const int* positions, const int* slot_mapping, const float* q_norm,
                                               const float* k_norm, float eps, T* out, i64 out_stride, KV* k_cache,
                                               KV* v_cache, int H, int KVH, int D, const Codes& codes = {}) {
    ptx::wait_for_earlier_kernels();
    const int half = D / 2, lanes = D / 8;
    const int G = lanes <= 1 ? 1 : 1 << (32 - __clz(lanes - 1));
    const int t = blockIdx.x, index = blockIdx.y * blockDim.x + threadIdx.x;
    const int head = index / G, j = index % G;  // G is a power of two below 64: groups lie within a warp
    const bool active = head < H + 2 * KVH && j < lanes;
    const bool is_q = head < H, is_v = head >= H + KVH;

    const T* x = qkv + t * qkv_stride + static_cast<i64>(head) * D + 4 * j;
    const bool load_vectors = is_aligned(qkv + t * qkv_stride);
    Four low = {}, high = {};
    if (active) low = load_four(x, load_vectors), high = load_four(x + half, load_vectors);

    const float* norm = is_q ? q_norm : is_v ? nullptr : k_norm;
    if (q_norm || k_norm) {  // all lanes meet in the shuffles
        const float scale = inverse_rms_of_head(low, high, j, G, D, eps);
        if (active && norm) normalise(low, norm + 4 * j, scale), normalise(high, norm + half + 4 * j, scale);
    }
    if (!active) return;
    if (!is_v) {
        const float* cos = rope_table + static_cast<i64>(positions[t]) * D + 4 * j;
        const bool vectors = is_aligned(rope_table);
        rotate(low, high, load_four(cos, vectors), load_four(cos + half, vectors));
    }
    T* to = out + t * out_stride + static_cast<i64>(head) * D;
    bool store_vectors = is_aligned(out + t * out_stride);
    if (!is_q) {
        const int kv_head = (head - H) % KVH;
        KV* row = (is_v ? v_cache : k_cache) + kv_row(slot_mapping[t], kv_head, KVH, D);
        if constexpr (sizeof(KV) == 1) {
            const float scale = (is_v ? codes.v_scales : codes.k_scales)[kv_head];
            store_codes(row + 4 * j, low, scale);
            store_codes(row + half + 4 * j, high, scale);
            if (!is_finite(low) || !is_finite(high)) atomicMax(codes.invalid, t + 1);
            return;
        } else {
            to = row, store_vectors = is_aligned(row);
        }
    }
    store_four(to + 4 * j, low, store_vectors);
    store_four(to + half + 4 * j, high, store_vectors);
}

#define PARAMETERS(T, KV)                                                                                              \
    const T *qkv, i64 qkv_stride, const float *rope_table, const int *positions, const int *slot_mapping,              \
        const float *q_norm, const float *k_norm, float eps, T *out, i64 out_stride, KV *k_cache, KV *v_cache, int H,  \
        int KVH, int D
#define ARGUMENTS                                                                                                      \
    qkv, qkv_stride, rope_table, positions, slot_mapping, q_norm, k_norm, eps, out, out_stride, k_cache, v_cache, H,   \
        KVH, D
extern "C" __global__ void rope_and_cache_bf16(PARAMETERS(bf16, bf16)) { rope_and_cache(ARGUMENTS); }
extern "C" __global__ void rope_and_cache_f16(PARAMETERS(f16, f16)) { rope_and_cache(ARGUMENTS); }
extern "C" __global__ void rope_and_cache_f32(PARAMETERS(float, float)) { rope_and_cache(ARGUMENTS); }
extern "C" __global__ void rope_and_cache_bf16_e4m3(PARAMETERS(bf16, u8), const float* k_scales, const float* v_scales,
                                                    int* invalid) {
    rope_and_cache(ARGUMENTS, Codes{k_scales, v_scales, invalid});
}
