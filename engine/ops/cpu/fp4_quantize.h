// The block quantisers of engine/ops/fp4/blocks.py on vectors of sixteen, bit for bit. Include in kernel files only.
//
// Format::quantize takes one block of 16 · V elements and gives its stored scale, its codes (one a lane, sign in bit 3)
// and the values they stand for, without the global scale.
#pragma once

#include "fp4_lanes.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

template <int V>
static inline float largest_magnitude(const F32x16 (&x)[V]) {
    F32x16 largest = abs(x[0]);
    for (int v = 1; v < V; ++v) largest = max(largest, abs(x[v]));
    return largest_lane(largest);
}

// fp32's exponent and the top `bits` of its mantissa, nearest-even; s normal and positive.
static inline uint32_t rounded_mantissa(float s, int bits) {
    const int dropped = 23 - bits;
    const uint32_t raw = float_bits(s);
    return (raw + ((1u << (dropped - 1)) - 1) + (raw >> dropped & 1)) >> dropped;
}

// Nearest E2M1 code of y, ties to even, saturating. A number in [2^e, 2^(e+1)) has steps of 2^(e−1), one below 1 those
// of e = 0; adding 2^(22+e), whose last bit is worth just that, makes the addition round and leaves y / step, n, in the
// low bits. Then code = n + 2e.
static inline I32x16 encode_e2m1(F32x16 y, F32x16& value) {
    const I32x16 sign = sign_bits(y);
    const F32x16 magnitude = min(abs(y), broadcast(6.0f));
    const I32x16 exponent = float_to_bits(magnitude) & broadcast_i32(0x7f800000);
    const I32x16 power = float_to_bits(max(bits_to_float(exponent), broadcast(1.0f)));
    const I32x16 aligner = power + broadcast_i32(22 << 23);
    const F32x16 rounded = magnitude + bits_to_float(aligner);
    value = bits_to_float(float_to_bits(rounded - bits_to_float(aligner)) | sign);
    const I32x16 n = float_to_bits(rounded) - aligner, twice_e = shift_right_signed<22>(power) - broadcast_i32(254);
    return (n + twice_e) | (shift_right_signed<28>(sign) & broadcast_i32(8));
}

// Nearest S1P2 code of y, ties to even, saturating.
static inline I32x16 encode_s1p2(F32x16 y, F32x16& value) {
    const I32x16 sign = sign_bits(y);
    const F32x16 aligner = broadcast(0x1p23f), quarters = min(abs(y), broadcast(1.75f)) * broadcast(4.0f);
    const F32x16 rounded = quarters + aligner;
    value = bits_to_float(float_to_bits((rounded - aligner) * broadcast(0.25f)) | sign);
    return (float_to_bits(rounded) & broadcast_i32(7)) | (shift_right_signed<28>(sign) & broadcast_i32(8));
}

struct Ue4m3Table {
    float value[127], inverse[127];  // of byte 0, which no encoder writes: 0
};
constexpr Ue4m3Table ue4m3_table() {
    Ue4m3Table table{};
    for (int byte = 1; byte < 127; ++byte) {
        const int exponent = byte >> 3, mantissa = byte & 7;
        float value = static_cast<float>(exponent == 0 ? mantissa : 8 + mantissa) / 512.0f;
        for (int e = 1; e < exponent; ++e) value *= 2;
        table.value[byte] = value;
        table.inverse[byte] = 1.0f / value;
    }
    return table;
}
constexpr Ue4m3Table kUe4m3 = ue4m3_table();

struct Nvfp4 {
    using Scale = uint8_t;
    static constexpr bool kGlobalScale = true;

    static inline uint32_t encode_scale(float s) {
        s = s < 0x1p-9f ? 0x1p-9f : s > 448.0f ? 448.0f : s;
        if (s < 0x1p-6f) return float_bits(s * 512.0f + 0x1p23f) & 0xff;  // the addition rounds
        return rounded_mantissa(s, 3) - (120 << 3);
    }
    template <int V>
    static inline Scale quantize(const F32x16 (&x)[V], I32x16 (&code)[V], F32x16 (&value)[V]) {
        const uint32_t byte = encode_scale(largest_magnitude(x) / 6.0f);
        const F32x16 inverse = broadcast(kUe4m3.inverse[byte]), scale = broadcast(kUe4m3.value[byte]);
        for (int v = 0; v < V; ++v) {
            code[v] = encode_e2m1(x[v] * inverse, value[v]);
            value[v] = value[v] * scale;
        }
        return static_cast<Scale>(byte);
    }
};

struct Mxfp4 {
    using Scale = uint8_t;
    static constexpr bool kGlobalScale = false;

    template <int V>
    static inline Scale quantize(const F32x16 (&x)[V], I32x16 (&code)[V], F32x16 (&value)[V]) {
        const uint32_t exponent = float_bits(largest_magnitude(x)) >> 23, byte = exponent < 2 ? 0 : exponent - 2;
        const F32x16 inverse = broadcast(bits_float((254 - byte) << 23));
        const F32x16 scale = broadcast(bits_float(byte ? byte << 23 : 0x00400000));
        for (int v = 0; v < V; ++v) {
            code[v] = encode_e2m1(x[v] * inverse, value[v]);
            value[v] = value[v] * scale;
        }
        return static_cast<Scale>(byte);
    }
};

struct Hif4 {
    using Scale = uint32_t;
    static constexpr bool kGlobalScale = false;

    static inline uint32_t encode_scale(float s) {
        s = s < 0x1p-48f ? 0x1p-48f : s > 0x1.8p15f ? 0x1.8p15f : s;
        return rounded_mantissa(s, 2) - ((127 - 48) << 2);
    }
    static inline Scale quantize(const F32x16 (&x)[4], I32x16 (&code)[4], F32x16 (&value)[4]) {
        uint32_t word = encode_scale(largest_magnitude(x) * (1.0f / 7.0f));
        const F32x16 E = broadcast(bits_float((word << 21) + ((127 - 48) << 23)));
        for (int v = 0; v < 4; ++v) {
            const F32x16 of_2 = max(abs(x[v]), rotate_in_fours<1>(abs(x[v])));
            const F32x16 of_4 = max(of_2, rotate_in_fours<2>(of_2));
            const F32x16 of_8 = max(of_4, swap_fours(of_4));
            const uint32_t e8 = at_least(of_8, broadcast(4.0f) * E);
            F32x16 step = E + keep(e8, E);
            const uint32_t e16 = at_least(of_4, step + step);
            step = step + keep(e16, step);
            code[v] = encode_s1p2(x[v] / step, value[v]);
            value[v] = value[v] * step;
            word |= ((e8 & 1) | (e8 >> 7 & 2)) << (8 + 2 * v);  // all lanes of an eight agree, and of a four
            word |= ((e16 & 1) | (e16 >> 3 & 2) | (e16 >> 6 & 4) | (e16 >> 9 & 8)) << (16 + 4 * v);
        }
        return word;
    }
};

}  // namespace
}  // namespace ENGINE_ISA
}  // namespace engine
