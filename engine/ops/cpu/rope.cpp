// rope_and_cache: per head RMSNorm over D where asked for, then rotation, in fp32, bit for bit what
// engine/ops/reference.py defines; q goes to `out`, k and v to the cache's tiles (kv_cache.h). False where K or V that
// are to become E4M3 hold NaN or infinity.

#include "attention_args.h"
#include "e4m3_lanes.h"
#include "kernels.h"
#include "simd.h"
#include "fp32_math.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

constexpr int64_t kGrainElements = 8192;  // a thread's share at least; see rows.cpp

// out = rotation of x [D], normalised first if norm [D] is given.
template <class T, class Out>
void rotate(const T* x, const float* norm, float eps, const float* cos, const float* sin, Out* out, int64_t D) {
    const int64_t half = D / 2;
    const F32x16 scale = norm ? broadcast(inverse_rms(x, D, eps)) : zero();
    for (int64_t i = 0; i < half; i += kLanes) {
        const int64_t n = min_of(kLanes, half - i);
        F32x16 low = load_up_to(x + i, n), high = load_up_to(x + half + i, n);
        if (norm) {
            low = (low * scale) * load_up_to(norm + i, n);
            high = (high * scale) * load_up_to(norm + half + i, n);
        }
        const F32x16 c = load_up_to(cos + i, n), s = load_up_to(sin + i, n);
        store_up_to(out + i, fma(low, c, negate(high * s)), n);
        store_up_to(out + half + i, fma(high, c, low * s), n);
    }
}

// One token's k [D] becomes a column of the K tile; Unit is what lies together: an element, for bf16 a pair.
template <class Unit>
void write_column(const void* k, int64_t units, void* tile, int64_t token) {
    const char* from = static_cast<const char*>(k);
    Unit* to = static_cast<Unit*>(tile) + token;
    for (int64_t i = 0; i < units; ++i) std::memcpy(to + i * kBlockTokens, from + i * sizeof(Unit), sizeof(Unit));
}

void write_k(const float* k, int64_t D, void* tile, int64_t token) { write_column<uint32_t>(k, D, tile, token); }
void write_k(const f16* k, int64_t D, void* tile, int64_t token) { write_column<uint16_t>(k, D, tile, token); }
void write_k(const bf16* k, int64_t D, void* tile, int64_t token) { write_column<uint32_t>(k, D / 2, tile, token); }

// x [D] / scale to codes [D]. False where x holds NaN or infinity.
template <class T>
bool encode_row(const T* x, float scale, uint8_t* codes, int64_t D) {
    I32x16 largest = broadcast_i32(0);
    for (int64_t d = 0; d < D; d += kLanes) {
        const int64_t n = min_of(kLanes, D - d);
        const F32x16 v = load_up_to(x + d, n);
        largest = max(largest, float_to_bits(abs(v)));
        store_bytes(codes + d, encode_e4m3(v / broadcast(scale)), n);
    }
    return largest_lane(largest) < 0x7f800000;
}

// The same of a token's k, rotated, and v, into E4M3 tiles.
template <class T>
bool write_codes(const float* k, const T* v, const RopeArgs& a, int64_t block, int64_t head, int64_t token) {
    const int64_t D = a.cache.D;
    alignas(64) uint8_t codes[2][kMaxHeadDim];
    const bool finite = encode_row(k, a.cache.k_scale, codes[0], D) & encode_row(v, a.cache.v_scale, codes[1], D);
    char* to_k = k_tile(a.cache, block, head);
    char* to_v = v_tile(a.cache, block, head);
    for (int64_t d = 0; d < D; ++d) {
        to_k[code_place((d / 2 * kBlockTokens + token) * 2 + d % 2)] = static_cast<char>(codes[0][d]);
        to_v[code_place(token * value_stride(D) + d)] = static_cast<char>(codes[1][d]);
    }
    return finite;
}

template <class T>
bool rope_row(const RopeArgs& a, int64_t t) {
    const int64_t D = a.cache.D, KVH = a.cache.KVH;
    const float* cos = a.rope_table + a.positions[t] * D;
    const float* sin = cos + D / 2;
    const T* q = static_cast<const T*>(a.qkv) + t * a.qkv_stride;
    const T* k = q + a.H * D;
    const T* v = k + KVH * D;
    T* out = static_cast<T*>(a.out) + t * a.out_stride;
    for (int64_t h = 0; h < a.H; ++h) rotate(q + h * D, a.q_norm, a.eps, cos, sin, out + h * D, D);

    const int64_t block = a.slot_mapping[t] / kBlockTokens, token = a.slot_mapping[t] % kBlockTokens;
    bool finite = true;
    for (int64_t h = 0; h < KVH; ++h) {
        if (a.cache.type == DType::e4m3) {
            alignas(64) float unrounded[kMaxHeadDim];
            rotate(k + h * D, a.k_norm, a.eps, cos, sin, unrounded, D);
            finite &= write_codes(unrounded, v + h * D, a, block, h, token);
            continue;
        }
        alignas(64) T rotated[kMaxHeadDim];
        rotate(k + h * D, a.k_norm, a.eps, cos, sin, rotated, D);
        write_k(rotated, D, k_tile(a.cache, block, h), token);
        T* row = reinterpret_cast<T*>(v_tile(a.cache, block, h)) + token * value_stride(D);
        std::memcpy(row, v + h * D, static_cast<size_t>(D) * sizeof(T));
    }
    return finite;
}

}  // namespace

bool rope_and_cache(const RopeArgs& a, ThreadPool& pool) {
    const int64_t grain = max_of(1, kGrainElements / ((a.H + 2 * a.cache.KVH) * a.cache.D));
    int bad = 0;  // only ever set to 1, by any thread, and read after the loop
    with_type(a.type, [&](auto element) {
        using T = typename decltype(element)::type;
        pool.parallel_for(a.T, grain, [&](int64_t begin, int64_t end, int) {
            for (int64_t t = begin; t < end; ++t)
                if (!rope_row<T>(a, t)) __atomic_store_n(&bad, 1, __ATOMIC_RELAXED);
        });
    });
    return !bad;
}

}  // namespace ENGINE_ISA
}  // namespace engine
