// E4M3 codes on vectors: numbers to codes, and codes to pairs of bf16, which all of them are exactly. Include in kernel
// files only.
//
// Codes that are to be expanded lie in lines of 64: interleaving a line's bytes with those of another register, 16 by 16
// (what x86 calls unpacking), then gives two lines of bf16 (kv_cache.h and fp8_tiles.h say which element lies where).
#pragma once

#include "fp4_lanes.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

// ---- to codes -------------------------------------------------------------------------------------------------------

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

// ---- from codes to bf16 ---------------------------------------------------------------------------------------------

struct Bf16Table {
    uint16_t of[128];  // bf16 of the codes without their sign
};

constexpr Bf16Table bf16_table() {
    Bf16Table t{};
    for (int code = 8; code < 128; ++code) t.of[code] = static_cast<uint16_t>((code << 4) + (120 << 7));
    for (int m = 1; m < 8; ++m) {  // m · 2^-9
        const int e = m >= 4 ? 2 : m >= 2 ? 1 : 0;
        t.of[m] = static_cast<uint16_t>(((127 - 9 + e) << 7) + ((m << (7 - e)) & 0x7f));
    }
    return t;
}

// One byte of every number of the table.
struct ByteTable {
    alignas(64) uint8_t of[128];
};

constexpr ByteTable byte_table(int shift) {
    ByteTable t{};
    for (int code = 0; code < 128; ++code) t.of[code] = static_cast<uint8_t>(bf16_table().of[code] >> shift);
    return t;
}

constexpr ByteTable kLow = byte_table(0), kHigh = byte_table(8);

#if ENGINE_ISA_LEVEL >= 3

// A line to its two lines of bf16.
struct Expander {
    const __m512i low[2] = {_mm512_load_si512(kLow.of), _mm512_load_si512(kLow.of + 64)};
    const __m512i high[2] = {_mm512_load_si512(kHigh.of), _mm512_load_si512(kHigh.of + 64)};
    const __m512i sign = _mm512_set1_epi8(-128);

    inline void operator()(const char* line, __m512i& first, __m512i& second) const {
        const __m512i codes = load_in_order(line);
        const __m512i l = _mm512_permutex2var_epi8(low[0], codes, low[1]);  // by seven bits: the sign falls away
        const __m512i h = _mm512_permutex2var_epi8(high[0], codes, high[1]);
        const __m512i signed_h = _mm512_ternarylogic_epi32(h, codes, sign, 0xf8);  // h | (codes & sign)
        first = _mm512_unpacklo_epi8(l, signed_h);
        second = _mm512_unpackhi_epi8(l, signed_h);
    }
    inline void store(const char* line, char* first, char* second) const {
        __m512i a, b;
        (*this)(line, a, b);
        _mm512_store_si512(first, a);
        _mm512_store_si512(second, b);
    }
};

#elif ENGINE_ISA_LEVEL >= 1

// Tables of sixteen: of exponents' upper three bits for most codes, of the lower four bits for those of 0 … 15, among
// them all that are subnormal.
struct Expander {
    __m256i high_of_upper, low_of_small, high_of_small;

    Expander() {
        alignas(16) uint8_t by_upper[16];
        for (int i = 0; i < 16; ++i) by_upper[i] = kHigh.of[i % 8 * 16 + 8];  // that of 0 is not used
        high_of_upper = twice(by_upper);
        low_of_small = twice(kLow.of);
        high_of_small = twice(kHigh.of);
    }
    static inline __m256i twice(const uint8_t* table) {
        return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
    }
    inline void store(const char* line, char* first, char* second) const {
        for (int half = 0; half < 64; half += 32) {
            const __m256i codes = _mm256_load_si256(reinterpret_cast<const __m256i*>(line + half));
            const __m256i nibble = _mm256_set1_epi8(15), lower = _mm256_and_si256(codes, nibble);
            const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble);
            const __m256i is_small = _mm256_cmpeq_epi8(_mm256_and_si256(upper, _mm256_set1_epi8(7)),
                                                       _mm256_setzero_si256());
            const __m256i l = _mm256_blendv_epi8(_mm256_slli_epi16(lower, 4), _mm256_shuffle_epi8(low_of_small, lower),
                                                 is_small);
            const __m256i h = _mm256_blendv_epi8(_mm256_shuffle_epi8(high_of_upper, upper),
                                                 _mm256_shuffle_epi8(high_of_small, lower), is_small);
            const __m256i signed_h = _mm256_or_si256(h, _mm256_and_si256(codes, _mm256_set1_epi8(-128)));
            _mm256_store_si256(reinterpret_cast<__m256i*>(first + half), _mm256_unpacklo_epi8(l, signed_h));
            _mm256_store_si256(reinterpret_cast<__m256i*>(second + half), _mm256_unpackhi_epi8(l, signed_h));
        }
    }
};

#else

struct Expander {
    inline void store(const char* line, char* first, char* second) const {
        const uint8_t* codes = reinterpret_cast<const uint8_t*>(line);
        for (int quarter = 0; quarter < 4; ++quarter, codes += 16, first += 16, second += 16) {
            uint16_t pairs[16];
            for (int i = 0; i < 16; ++i) {
                const uint32_t code = codes[i];
                pairs[i] = static_cast<uint16_t>(kLow.of[code & 127] | (kHigh.of[code & 127] | (code & 128)) << 8);
            }
            std::memcpy(first, pairs, 16);
            std::memcpy(second, pairs + 8, 16);
        }
    }
};

#endif

}  // namespace
}  // namespace ENGINE_ISA
}  // namespace engine
