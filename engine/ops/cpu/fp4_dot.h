// Dot products of unsigned weight bytes with signed activation bytes, four k per 32-bit lane, sixteen columns at once;
// and the expansion of FP4 codes to such bytes. Include in kernel files only. Everything here is exact.
//
//   Bytes   64 bytes: 16 columns × 4 k
//   Dots    sums under way: begin(start), add() per 4 k, then to_float(total(start))
#pragma once

#include "fp4_lanes.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

#if ENGINE_ISA_LEVEL >= 2

struct Bytes {
    __m512i v;
};
struct Table {  // 16 bytes, looked up by a nibble
    __m512i v;
};

static inline Table table_of(const uint8_t (&entries)[16]) {
    return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)))};
}
static inline void expand_line(const uint8_t* line, Table table, Bytes& low, Bytes& high) {
    const __m512i codes = load_in_order(line), shifted = _mm512_srli_epi16(codes, 4);
#if ENGINE_ISA_LEVEL >= 3  // looked up by six bits in four copies of the table: the upper two may be anything
    low.v = _mm512_permutexvar_epi8(codes, table.v);
    high.v = _mm512_permutexvar_epi8(shifted, table.v);
#else
    const __m512i nibble = _mm512_set1_epi8(15);
    low.v = _mm512_shuffle_epi8(table.v, _mm512_and_si512(codes, nibble));
    high.v = _mm512_shuffle_epi8(table.v, _mm512_and_si512(shifted, nibble));
#endif
}
static inline Bytes operator+(Bytes a, Bytes b) { return {_mm512_add_epi8(a.v, b.v)}; }
static inline Bytes operator-(Bytes a, Bytes b) { return {_mm512_sub_epi8(a.v, b.v)}; }
// Doubles the bytes of some 32-bit lanes; none may be above 127.
static inline Bytes doubled_where(uint32_t lanes, Bytes a) {
    return {_mm512_mask_add_epi32(a.v, static_cast<__mmask16>(lanes), a.v, a.v)};
}
static inline Bytes broadcast_byte(uint8_t a) { return {_mm512_set1_epi8(static_cast<char>(a))}; }
static inline uint32_t lanes_with(I32x16 a, int32_t bit) { return _mm512_test_epi32_mask(a.v, _mm512_set1_epi32(bit)); }

static inline __m512i four_bytes(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
}

#if ENGINE_ISA_LEVEL >= 3
struct Dots {
    __m512i v;
    static inline Dots begin(int32_t start) { return {_mm512_set1_epi32(start)}; }
    inline void add(Bytes w, __m512i x) { v = _mm512_dpbusd_epi32(v, w.v, x); }
    inline I32x16 total(int32_t) const { return {v}; }
};
#else
struct Dots {
    __m512i v;  // 16-bit sums of pairs: at most 16 · 56 · 28 in magnitude
    static inline Dots begin(int32_t) { return {_mm512_setzero_si512()}; }
    inline void add(Bytes w, __m512i x) { v = _mm512_add_epi16(v, _mm512_maddubs_epi16(w.v, x)); }
    inline I32x16 total(int32_t start) const {
        return {_mm512_add_epi32(_mm512_madd_epi16(v, _mm512_set1_epi16(1)), _mm512_set1_epi32(start))};
    }
};
#endif

static inline F32x16 to_float(I32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
static inline I32x16 load_bytes(const uint8_t* bytes) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)))};
}
static inline F32x16 ue4m3_over_256(const uint8_t* bytes) {  // read as fp16, whose exponent bias is larger by 8
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    return {_mm512_cvtph_ps(_mm256_slli_epi16(wide, 7))};
}

#elif ENGINE_ISA_LEVEL == 1

struct Bytes {
    __m256i a, b;
};
struct Table {
    __m256i v;
};

static inline Table table_of(const uint8_t (&entries)[16]) {
    return {_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(entries)))};
}
static inline void expand_half_line(const uint8_t* line, Table table, __m256i& low, __m256i& high) {
    const __m256i codes = _mm256_load_si256(reinterpret_cast<const __m256i*>(line)), nibble = _mm256_set1_epi8(15);
    low = _mm256_shuffle_epi8(table.v, _mm256_and_si256(codes, nibble));
    high = _mm256_shuffle_epi8(table.v, _mm256_and_si256(_mm256_srli_epi16(codes, 4), nibble));
}
static inline void expand_line(const uint8_t* line, Table table, Bytes& low, Bytes& high) {
    expand_half_line(line, table, low.a, high.a);
    expand_half_line(line + 32, table, low.b, high.b);
}
static inline Bytes operator+(Bytes x, Bytes y) { return {_mm256_add_epi8(x.a, y.a), _mm256_add_epi8(x.b, y.b)}; }
static inline Bytes operator-(Bytes x, Bytes y) { return {_mm256_sub_epi8(x.a, y.a), _mm256_sub_epi8(x.b, y.b)}; }
static inline Bytes doubled_where(uint32_t lanes, Bytes x) {
    const __m256i a = _mm256_castps_si256(lanes_of_bits(lanes)), b = _mm256_castps_si256(lanes_of_bits(lanes >> 8));
    return {_mm256_add_epi32(x.a, _mm256_and_si256(x.a, a)), _mm256_add_epi32(x.b, _mm256_and_si256(x.b, b))};
}
static inline Bytes broadcast_byte(uint8_t x) {
    const __m256i all = _mm256_set1_epi8(static_cast<char>(x));
    return {all, all};
}
static inline uint32_t lanes_with(I32x16 x, int32_t bit) {
    const __m256i bits = _mm256_set1_epi32(bit);
    return bits_of_lanes(_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(x.a, bits), bits)),
                         _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(x.b, bits), bits)));
}
static inline __m256i four_bytes(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm256_set1_epi32(four);
}

struct Dots {
    __m256i a, b;  // 16-bit sums of pairs: at most 16 · 56 · 28 in magnitude
    static inline Dots begin(int32_t) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    inline void add(Bytes w, __m256i x) {
        a = _mm256_add_epi16(a, _mm256_maddubs_epi16(w.a, x));
        b = _mm256_add_epi16(b, _mm256_maddubs_epi16(w.b, x));
    }
    inline I32x16 total(int32_t start) const {
        const __m256i ones = _mm256_set1_epi16(1), all = _mm256_set1_epi32(start);
        return {_mm256_add_epi32(_mm256_madd_epi16(a, ones), all), _mm256_add_epi32(_mm256_madd_epi16(b, ones), all)};
    }
};

static inline F32x16 to_float(I32x16 x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
static inline I32x16 load_bytes(const uint8_t* bytes) {
    const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    return {_mm256_cvtepu8_epi32(all), _mm256_cvtepu8_epi32(_mm_srli_si128(all, 8))};
}
static inline F32x16 ue4m3_over_256(const uint8_t* bytes) {
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m256i halves = _mm256_slli_epi16(wide, 7);
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}

#else

struct Bytes {
    uint8_t v[64];
};
struct Table {
    uint8_t v[16];
};

static inline Table table_of(const uint8_t (&entries)[16]) {
    Table t;
    std::memcpy(t.v, entries, 16);
    return t;
}
static inline void expand_line(const uint8_t* line, const Table& table, Bytes& low, Bytes& high) {
    for (int i = 0; i < 64; ++i) {
        low.v[i] = table.v[line[i] & 15];
        high.v[i] = table.v[line[i] >> 4];
    }
}
static inline Bytes operator+(Bytes a, const Bytes& b) {
    for (int i = 0; i < 64; ++i) a.v[i] = static_cast<uint8_t>(a.v[i] + b.v[i]);
    return a;
}
static inline Bytes operator-(Bytes a, const Bytes& b) {
    for (int i = 0; i < 64; ++i) a.v[i] = static_cast<uint8_t>(a.v[i] - b.v[i]);
    return a;
}
static inline Bytes doubled_where(uint32_t lanes, Bytes a) {
    for (int i = 0; i < 64; ++i) a.v[i] = static_cast<uint8_t>(a.v[i] << (lanes >> i / 4 & 1));
    return a;
}
static inline Bytes broadcast_byte(uint8_t a) {
    Bytes r;
    std::memset(r.v, a, 64);
    return r;
}
static inline uint32_t lanes_with(I32x16 a, int32_t bit) {
    uint32_t lanes = 0;
    for (int i = 0; i < kLanes; ++i) lanes |= static_cast<uint32_t>((a.v[i] & bit) != 0) << i;
    return lanes;
}
static inline const int8_t* four_bytes(const int8_t* x) { return x; }

static inline F32x16 to_float(I32x16 a) { return {__builtin_convertvector(a.v, RawF32x16)}; }

struct Dots {
    F32x16 v;  // whole numbers below 2^24: SSE2 multiplies floats four at a time, but not 32-bit integers
    static inline Dots begin(int32_t start) { return {broadcast(static_cast<float>(start))}; }
    inline void add(const Bytes& w, const int8_t* x) {
        const I32x16 four = load_i32(w.v), byte = broadcast_i32(0xff);
        v = v + to_float(four & byte) * broadcast(x[0]);
        v = v + to_float(shift_right_signed<8>(four) & byte) * broadcast(x[1]);
        v = v + to_float(shift_right_signed<16>(four) & byte) * broadcast(x[2]);
        v = v + to_float(shift_right_signed<24>(four)) * broadcast(x[3]);  // no byte is above 127
    }
    inline F32x16 total(int32_t) const { return v; }
};
static inline F32x16 to_float(F32x16 total) { return total; }

static inline I32x16 load_bytes(const uint8_t* bytes) {
    I32x16 r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = bytes[i];
    return r;
}
static inline F32x16 ue4m3_over_256(const uint8_t* bytes) {
    return bits_to_float(shift_left<20>(load_bytes(bytes))) * broadcast(0x1p112f);
}

#endif

// ---- weights in tiles, see fp4_tiles.h ------------------------------------------------------------------------------
// Weights::expand gives 32 k of 16 columns (vector c) as bytes: a code's value as a whole number, plus kOffset.
// Weights::scale times kUnit is what the whole number 1 is worth, in sub-block `s` of the half.

constexpr uint8_t kE2m1Bytes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};  // 2 · value + 12
constexpr uint8_t kS1p2Bytes[16] = {7, 8, 9, 10, 11, 12, 13, 14, 7, 6, 5, 4, 3, 2, 1, 0};        // 4 · value + 7

static inline void expand_codes(const uint8_t* lines, const Table& table, Bytes (&w)[8]) {
    for (int p = 0; p < 4; ++p) expand_line(lines + 64 * p, table, w[2 * p], w[2 * p + 1]);
}

// Half a block of weights is used while another, this far ahead in the tile's stream, is fetched: into L1 (locality 3)
// or L2 (2).
template <class Weights, int64_t ahead = 3072, int locality = 3>
static inline void prefetch_weights(const uint8_t* block, int half) {
    constexpr int64_t bytes = Weights::kBlockBytes / 2;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(block + half * bytes + ahead + i, 0, locality);
}

template <int block>
struct Nvfp4Weights {
    static constexpr int kScalesPerHalf = 32 / block, kOffset = 12;
    static constexpr int64_t kBlockBytes = 1024 + 32 * (64 / block);
    static constexpr float kUnit = 0x1p7f;  // undoes ue4m3_over_256 and the 2 in 2 · value

    static inline void expand(const uint8_t* lines, const uint8_t*, int, int, Bytes (&w)[8]) {
        expand_codes(lines, table_of(kE2m1Bytes), w);
    }
    static inline F32x16 scale(const uint8_t* scales, int half, int s, int c) {
        return ue4m3_over_256(scales + (half * kScalesPerHalf + s) * 32 + c * 16);
    }
};

struct Mxfp4Weights {
    static constexpr int kScalesPerHalf = 1, kOffset = 12;
    static constexpr int64_t kBlockBytes = 1024 + 64;
    static constexpr float kUnit = 0.5f;

    static inline void expand(const uint8_t* lines, const uint8_t*, int, int, Bytes (&w)[8]) {
        expand_codes(lines, table_of(kE2m1Bytes), w);
    }
    static inline F32x16 scale(const uint8_t* scales, int half, int, int c) {  // byte 0 is 2^-127, subnormal
        const I32x16 exponent = shift_left<23>(load_bytes(scales + half * 32 + c * 16));
        return bits_to_float(max(exponent, broadcast_i32(0x00400000)));
    }
};

struct Hif4Weights {
    static constexpr int kScalesPerHalf = 1, kOffset = 28;
    static constexpr int64_t kBlockBytes = 1024 + 128;
    static constexpr float kUnit = 0.25f;

    // (4 · value + 7) · 2^e − 7 · 2^e + 28 with a lane's own e: a lane is four k of a column, which share it.
    static inline void expand(const uint8_t* lines, const uint8_t* scales, int half, int c, Bytes (&w)[8]) {
        const I32x16 word = load_i32(scales + c * 64);
        expand_codes(lines, table_of(kS1p2Bytes), w);
        for (int s = 0; s < 8; ++s) {
            const uint32_t e8 = lanes_with(word, 1 << (8 + half * 4 + s / 2));
            const uint32_t e16 = lanes_with(word, static_cast<int32_t>(1u << (16 + half * 8 + s)));
            const Bytes seven = doubled_where(e16, doubled_where(e8, broadcast_byte(7)));
            w[s] = (doubled_where(e16, doubled_where(e8, w[s])) - seven) + broadcast_byte(28);
        }
    }
    static inline F32x16 scale(const uint8_t* scales, int, int, int c) {
        const I32x16 byte = load_i32(scales + c * 64) & broadcast_i32(0xff);
        return bits_to_float(shift_left<21>(byte) + broadcast_i32((127 - 48) << 23));
    }
};

}  // namespace
}  // namespace ENGINE_ISA
}  // namespace engine
