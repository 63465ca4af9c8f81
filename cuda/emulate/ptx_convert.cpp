#include "ptx_convert.h"

#include <cmath>

namespace emu {
namespace ptx {

namespace {

struct Format {
    int mantissa_bits, least_exponent;  // of normal values
    float largest;
    uint32_t sign, largest_code;
};

// Codes count the magnitudes upward, so the code is the number of steps of 2^(exponent − mantissa_bits) plus an offset.
uint32_t nearest(float value, const Format& format) {
    const uint32_t sign = std::signbit(value) ? format.sign : 0;
    const float magnitude = std::fabs(value);
    if (magnitude >= format.largest) return sign | format.largest_code;
    int exponent = magnitude == 0 ? format.least_exponent : std::ilogb(magnitude);
    exponent = exponent < format.least_exponent ? format.least_exponent : exponent;
    const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, format.mantissa_bits - exponent)));
    return sign | (steps + (static_cast<uint32_t>(exponent - format.least_exponent) << format.mantissa_bits));
}

// A small binary format with `mantissa_bits` and bias `bias` as fp16 bits; every value of both formats fits.
uint32_t f16_of(uint32_t sign, uint32_t magnitude, int mantissa_bits, int bias) {
    uint32_t field = magnitude >> mantissa_bits, mantissa = magnitude & ((1u << mantissa_bits) - 1);
    if (!magnitude) return sign << 15;
    int exponent = field ? static_cast<int>(field) - bias : 1 - bias;
    if (!field)
        while (!(mantissa >> mantissa_bits)) mantissa <<= 1, --exponent;
    mantissa &= (1u << mantissa_bits) - 1;
    return sign << 15 | static_cast<uint32_t>(exponent + 15) << 10 | mantissa << (10 - mantissa_bits);
}

}  // namespace

uint32_t e2m1_of(float value) {
    if (std::isnan(value)) return 7;
    return nearest(value, {1, 0, 6.0f, 8, 7});
}

uint32_t e4m3_of(float value) {
    if (std::isnan(value)) return 0x7F;
    return nearest(value, {3, -6, 448.0f, 0x80, 0x7E});
}

uint32_t ue8m0_of(float value) {
    if (std::isnan(value)) return 0xFF;
    const float magnitude = std::fabs(value);
    if (magnitude <= 0x1p-127f) return 0;
    if (magnitude > 0x1p127f) return 254;
    int exponent;
    const float fraction = std::frexp(magnitude, &exponent);  // magnitude = fraction · 2^exponent, .5 ≤ fraction < 1
    return static_cast<uint32_t>(exponent + 127 - (fraction == 0.5f));
}

uint32_t f16_of_e2m1(uint32_t code) { return f16_of(code >> 3 & 1, code & 7, 1, 1); }

uint32_t f16_of_e4m3(uint32_t code) {
    if ((code & 0x7F) == 0x7F) return 0x7FFF;
    return f16_of(code >> 7 & 1, code & 0x7F, 3, 7);
}

}  // namespace ptx
}  // namespace emu
