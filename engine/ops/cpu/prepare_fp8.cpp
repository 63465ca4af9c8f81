// prepare_fp8: rows of activations into E4M3 with a scale each, bit for bit what engine/ops/fp8.py defines.

#include "kernels.h"
#include "operand_rows.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

// The low bytes of sixteen lanes.
static inline void store_bytes(uint8_t* p, I32x16 a, int64_t n) {
#if ENGINE_ISA_LEVEL >= 2
    _mm512_mask_cvtepi32_storeu_epi8(p, static_cast<__mmask16>((1u << n) - 1), a.v);
#else
    int32_t lanes[kLanes];
    uint8_t bytes[kLanes];
    std::memcpy(lanes, &a, sizeof lanes);
    for (int i = 0; i < kLanes; ++i) bytes[i] = static_cast<uint8_t>(lanes[i]);
    std::memcpy(p, bytes, static_cast<size_t>(n));
#endif
}

// Nearest E4M3 code of y, ties to even, saturating. A number in [2^e, 2^(e+1)) has steps of 2^(e−3), one below 2^−6
// those of e = −6; adding 2^(20+e), whose last bit is worth just that, makes the addition round and leaves y / step, n,
// in the low bits. Then code = n + 8 · (e + 6).
static inline I32x16 encode_e4m3(F32x16 y) {
    const F32x16 magnitude = min(abs(y), broadcast(448.0f));
    const I32x16 exponent = float_to_bits(magnitude) & broadcast_i32(0x7f800000);
    const I32x16 power = float_to_bits(max(bits_to_float(exponent), broadcast(0x1p-6f)));
    const I32x16 aligner = power + broadcast_i32(20 << 23);
    const I32x16 n = float_to_bits(magnitude + bits_to_float(aligner)) - aligner;
    const I32x16 eights = shift_right_signed<20>(power) - broadcast_i32((127 - 6) * 8);
    return (n + eights) | (shift_right_signed<24>(sign_bits(y)) & broadcast_i32(0x80));
}

}  // namespace

bool prepare_fp8(const PrepareFp8Args& a, ThreadPool& pool, Scratch& scratch) {
    const int64_t K = a.rows.K;
    return for_each_row(a.rows, first_refused(a.rows), pool, scratch, [&](int64_t t, const float* row, float amax) {
        const float rule = amax / 448.0f, scale = rule > 1e-9f ? rule : 1e-9f;
        a.scale[t] = scale;
        for (int64_t k = 0; k < K; k += kLanes)
            store_bytes(a.codes + t * K + k, encode_e4m3(load(row + k) / broadcast(scale)), min_of(kLanes, K - k));
    });
}

}  // namespace ENGINE_ISA
}  // namespace engine
