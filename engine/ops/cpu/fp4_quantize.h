// The block quantisers of engine/ops/fp4/blocks.py on vectors of sixteen, bit for bit. Include in kernel files only.
//
// Two steps, so that scales are found for sixteen blocks at once: Format::scales turns largest magnitudes into scale
// bytes and what encoding needs; Format::encode takes one block of 16 · B elements and gives its stored scale, its
// codes (one a lane, sign in bit 3) and the values they stand for, without the global scale. Format::of_byte is the
// second half of Format::scales, for scales that are not the rule's.
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
template <int bits>
static inline I32x16 rounded_mantissa(F32x16 s) {
    constexpr int dropped = 23 - bits;
    const I32x16 raw = float_to_bits(s), last = shift_right_signed<dropped>(raw) & broadcast_i32(1);
    return shift_right_signed<dropped>(raw + last + broadcast_i32((1 << (dropped - 1)) - 1));
}

static inline F32x16 clamp(F32x16 a, float low, float high) { return max(min(a, broadcast(high)), broadcast(low)); }

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

// Of sixteen blocks: the scale's (leading) byte, and two numbers encode() broadcasts.
struct Scales {
    I32x16 byte;
    F32x16 inverse, value;
};

template <int B>
static inline void encode_scaled_e2m1(const F32x16 (&x)[B], float inverse, float scale, I32x16 (&code)[B],
                                      F32x16 (&value)[B]) {
    for (int v = 0; v < B; ++v) {
        code[v] = encode_e2m1(x[v] * broadcast(inverse), value[v]);
        value[v] = value[v] * broadcast(scale);
    }
}

struct Nvfp4 {
    using Scale = uint8_t;
    static constexpr bool kGlobalScale = true;

    static inline Scales scales(F32x16 amax) { return rounded(amax / broadcast(6.0f)); }
    static inline Scales of_byte(I32x16 byte) {  // a scale is a UE4M3 number already
        const F32x16 multiple = bits_to_float(byte | broadcast_i32(0x4b000000)) - broadcast(0x1p23f);  // of 2^-9
        const I32x16 normal = shift_left<20>(byte + broadcast_i32(120 << 3));
        const uint32_t is_normal = at_least(multiple, broadcast(8.0f));
        const F32x16 value = bits_to_float(
            select(is_normal, normal, float_to_bits(multiple * broadcast(0x1p-9f))));
        return {byte, broadcast(1.0f) / value, value};
    }
    static inline Scales rounded(F32x16 scale) {
        const F32x16 s = clamp(scale, 0x1p-9f, 448.0f);
        const uint32_t is_normal = at_least(s, broadcast(0x1p-6f));
        const I32x16 rounded = rounded_mantissa<3>(s);
        const F32x16 multiple = s * broadcast(512.0f) + broadcast(0x1p23f);  // of 2^-9; the addition rounds
        const F32x16 small = (multiple - broadcast(0x1p23f)) * broadcast(0x1p-9f);
        const F32x16 value = bits_to_float(select(is_normal, shift_left<20>(rounded), float_to_bits(small)));
        const I32x16 normal_byte = rounded - broadcast_i32(120 << 3);
        const I32x16 small_byte = float_to_bits(multiple) & broadcast_i32(0xff);
        return {select(is_normal, normal_byte, small_byte), broadcast(1.0f) / value, value};
    }
    template <int B>
    static inline Scale encode(const F32x16 (&x)[B], int32_t byte, float inverse, float scale, I32x16 (&code)[B],
                               F32x16 (&value)[B]) {
        encode_scaled_e2m1(x, inverse, scale, code, value);
        return static_cast<Scale>(byte);
    }
};

struct Mxfp4 {
    using Scale = uint8_t;
    static constexpr bool kGlobalScale = false;

    static inline Scales scales(F32x16 amax) {
        return of_byte(max(shift_right_signed<23>(float_to_bits(amax)) - broadcast_i32(2), broadcast_i32(0)));
    }
    static inline Scales of_byte(I32x16 byte) {  // below 254
        const I32x16 value = max(shift_left<23>(byte), broadcast_i32(0x00400000));  // byte 0 is 2^-127, subnormal
        return {byte, bits_to_float(shift_left<23>(broadcast_i32(254) - byte)), bits_to_float(value)};
    }
    template <int B>
    static inline Scale encode(const F32x16 (&x)[B], int32_t byte, float inverse, float scale, I32x16 (&code)[B],
                               F32x16 (&value)[B]) {
        encode_scaled_e2m1(x, inverse, scale, code, value);
        return static_cast<Scale>(byte);
    }
};

struct Hif4 {
    using Scale = uint32_t;
    static constexpr bool kGlobalScale = false;

    static inline Scales scales(F32x16 amax) {
        const I32x16 rounded = rounded_mantissa<2>(clamp(amax * broadcast(1.0f / 7.0f), 0x1p-48f, 0x1.8p15f));
        return of_byte(rounded - broadcast_i32((127 - 48) << 2));
    }
    static inline Scales of_byte(I32x16 byte) {
        const F32x16 E = bits_to_float(shift_left<21>(byte + broadcast_i32((127 - 48) << 2)));
        return {byte, E, E};
    }
    static inline Scale encode(const F32x16 (&x)[4], int32_t byte, float, float scale, I32x16 (&code)[4],
                               F32x16 (&value)[4]) {
        uint32_t word = static_cast<uint32_t>(byte);
        const F32x16 E = broadcast(scale);
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
