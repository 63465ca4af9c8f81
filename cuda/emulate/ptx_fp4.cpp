#include "ptx_fp4.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "ptx_bits.h"
#include "ptx_mma.h"

namespace emu {
namespace ptx {

namespace {

constexpr int stored = 64;  // elements of A per row and instruction, dense or sparse
constexpr int dots = 4;     // summed in one step, of 16 elements each
constexpr int lowest_lsb = -174;

// Codes' values, doubled.
constexpr int16_t doubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

struct Scale {
    int mantissa, exponent;
    bool nan;
};

Scale scale_of(ScaleType type, uint32_t byte) {
    if (type == ScaleType::ue8m0) return {8, static_cast<int>(byte) - 130, byte == 0xFF};
    const auto field = static_cast<int>(byte >> 3 & 15), mantissa = static_cast<int>(byte & 7);
    return {field ? 8 + mantissa : mantissa, (field ? field : 1) - 10, (byte & 0x7F) == 0x7F};
}

uint32_t scale_byte(uint32_t word, int byte, int index) { return word >> (8 * (byte + index)) & 0xFF; }

// The scales of dot 0 … 3 of one row or column.
void scales_of(const BlockScales& scales, uint32_t word, ScaleSelector from, Scale (&result)[dots]) {
    for (int i = 0; i < dots; ++i)
        result[i] = scale_of(scales.type, scale_byte(word, from.byte, i * scales.count / dots));
}

struct Addend {
    int64_t significand;
    int exponent;
};

// significand · 2^exponent in units of 2^lsb, toward zero.
int64_t aligned(Addend addend, int lsb) {
    const int shift = addend.exponent - lsb;
    if (shift >= 0) return addend.significand * (int64_t{1} << shift);  // at most 2^46: exponent − lsb ≤ 27
    if (shift < -62) return 0;
    const int64_t magnitude = std::llabs(addend.significand) >> -shift;
    return addend.significand < 0 ? -magnitude : magnitude;
}

// One element: its dots, which of them had a product at all, and its scales.
float element(const int16_t (&dot)[dots], const bool (&live)[dots], const Scale (&a)[dots], const Scale (&b)[dots],
              float c) {
    bool nan = std::isnan(c);
    for (int i = 0; i < dots; ++i) nan = nan || a[i].nan || b[i].nan;
    if (nan) return float_of(nan_bits);
    if (std::isinf(c)) return c;
    Addend addends[dots + 1];
    int count = 0, lsb = lowest_lsb;
    for (int i = 0; i < dots; ++i) {
        const int scale = a[i].mantissa * b[i].mantissa;
        if (!live[i] || !scale) continue;
        addends[count] = {int64_t{dot[i]} * scale, a[i].exponent + b[i].exponent - 2};
        lsb = std::max(lsb, addends[count++].exponent - 27);
    }
    if (c != 0) {
        const int exponent = exponent_of(c);
        addends[count++] = {static_cast<int64_t>(c * power_of_two(23 - exponent)), exponent - 23};
        lsb = std::max(lsb, exponent - 35);
    }
    int64_t sum = 0;
    for (int i = 0; i < count; ++i) sum += aligned(addends[i], lsb);
    return toward_zero(sum, power_of_two(lsb));  // 2^49 at most
}

template <int K>
void product(const uint8_t (&a)[16][stored], const uint8_t (&b)[8][K], const uint8_t (*picked)[stored],
             const BlockScales& scales, float (&c)[32][4]) {
    int16_t b_values[K][8];
    for (int k = 0; k < K; ++k)
        for (int n = 0; n < 8; ++n) b_values[k][n] = doubled[b[n][k]];
    Scale b_scales[8][dots];
    for (int n = 0; n < 8; ++n) scales_of(scales, scales.b[4 * n + scales.b_from.thread], scales.b_from, b_scales[n]);
    for (int m = 0; m < 16; ++m) {
        int16_t dot[dots][8] = {}, live[dots][8] = {};
        for (int s = 0; s < stored; ++s) {
            const int16_t value = doubled[a[m][s]];
            const int16_t* values = b_values[picked ? picked[m][s] : s];
            for (int n = 0; n < 8; ++n) {
                const auto one = static_cast<int16_t>(value * values[n]);
                dot[s / 16][n] = static_cast<int16_t>(dot[s / 16][n] + one);
                live[s / 16][n] = static_cast<int16_t>(live[s / 16][n] | one);
            }
        }
        Scale a_scales[dots];
        scales_of(scales, scales.a[4 * (m % 8) + 2 * scales.a_from.thread + m / 8], scales.a_from, a_scales);
        for (int n = 0; n < 8; ++n) {
            int16_t dot_of[dots];
            bool live_of[dots];
            for (int i = 0; i < dots; ++i) dot_of[i] = dot[i][n], live_of[i] = live[i][n] != 0;
            float& value = c[4 * (m % 8) + n / 2][2 * (m / 8) + n % 2];
            value = element(dot_of, live_of, a_scales, b_scales[n], value);
        }
    }
}

}  // namespace

void mma_fp4(const uint32_t (&a)[32][4], const uint32_t (&b)[32][2], const BlockScales& scales, float (&c)[32][4]) {
    uint8_t a_codes[16][stored], b_codes[8][64];
    unpack_a<8>(a, a_codes);
    unpack_b<8>(b, b_codes);
    product(a_codes, b_codes, nullptr, scales, c);
}

bool mma_sp_fp4(const uint32_t (&a)[32][4], const uint32_t (&b)[32][4], const uint32_t (&metadata)[32],
                const BlockScales& scales, float (&c)[32][4]) {
    uint8_t a_codes[16][stored], b_codes[8][128], picked[16][stored];
    unpack_a<8>(a, a_codes);
    unpack_b<8>(b, b_codes);
    for (int lane = 0; lane < 32; ++lane)
        for (int chunk = 0; chunk < 8; ++chunk) {
            const uint32_t nibble = metadata[lane] >> (4 * chunk) & 15, first = nibble & 3, second = nibble >> 2;
            if (first >= second) return false;
            const int row = lane / 4 + 8 * (lane & 1), half = lane >> 1 & 1;
            uint8_t* at = &picked[row][32 * half + 4 * chunk];
            for (int i = 0; i < 4; ++i)
                at[i] = static_cast<uint8_t>(64 * half + 8 * chunk + 2 * (i < 2 ? first : second) + i % 2);
        }
    product(a_codes, b_codes, picked, scales, c);
    return true;
}

}  // namespace ptx
}  // namespace emu
