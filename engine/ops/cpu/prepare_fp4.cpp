// prepare_fp4: rows of activations into FP4 operands, bit for bit what engine/ops/fp4/split.py defines.
//
// A row is made once into a thread's buffer, which the cache keeps (operand_rows.h). Groups of 16 chunks of 32 k
// (HiF4: 64) then go from there to their codes in five loops (scaling, backbone scales, mask and backbone, residual
// scales, residual), whose iterations do not wait for one another: chunk by chunk, the way from a block to its scale
// and back would take twice the time.

#include "fp4_quantize.h"
#include "kernels.h"
#include "operand_rows.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

// ---- the mask -------------------------------------------------------------------------------------------------------

// Which of each four neighbouring scores are among the best two, the first of equals winning.
static inline uint32_t best_two_of_four(F32x16 score) {
    const F32x16 next = rotate_in_fours<1>(score), opposite = rotate_in_fours<2>(score);
    const F32x16 last = rotate_in_fours<3>(score);
    // Where the rotation wrapped around, the other score comes first and wins a tie.
    const uint32_t a = greater(next, score) | (at_least(next, score) & 0x8888);
    const uint32_t b = greater(opposite, score) | (at_least(opposite, score) & 0xcccc);
    const uint32_t c = greater(last, score) | (at_least(last, score) & 0xeeee);
    return ~((a & b) | (a & c) | (b & c)) & 0xffff;
}

// Bits of four candidates, two of them set, to i0 | i1 << 2.
constexpr uint8_t kMeta[16] = {0, 0, 0, 0x4, 0, 0x8, 0x9, 0, 0, 0xc, 0xd, 0, 0xe, 0, 0, 0};

// Every bit of the 16 twice.
static inline uint32_t doubled(uint32_t bits) {
    bits = (bits | bits << 8) & 0x00ff00ff;
    bits = (bits | bits << 4) & 0x0f0f0f0f;
    bits = (bits | bits << 2) & 0x33333333;
    bits = (bits | bits << 1) & 0x55555555;
    return bits | bits << 1;
}

// ---- chunks ---------------------------------------------------------------------------------------------------------

constexpr int kGroup = 16;  // chunks

// The blocks of one path of a group: at most two a chunk.
struct GroupScales {
    float amax[2 * kGroup], inverse[2 * kGroup], value[2 * kGroup];
    int32_t byte[2 * kGroup];

    template <class Format>
    void find(int64_t count) {
        for (int64_t i = 0; i < count; i += kLanes) {
            const Scales s = Format::scales(load(amax + i));
            store_n(byte + i, s.byte, kLanes);
            store(inverse + i, s.inverse);
            store(value + i, s.value);
        }
    }
};

template <int V, int B>
static inline void find_largest(const F32x16 (&x)[V], float* amax) {
    for (int first = 0; first < V; first += B) {
        F32x16 block[B];
        for (int i = 0; i < B; ++i) block[i] = x[first + i];
        amax[first / B] = largest_magnitude(block);
    }
}

// One path of a chunk of V vectors with a scale every B: values, payload (one word per vector) and stored scales.
template <class Format, int V, int B>
static inline void encode_chunk(const F32x16 (&x)[V], const GroupScales& scales, int64_t block, F32x16 (&value)[V],
                                uint64_t (&payload)[V], typename Format::Scale* stored) {
    for (int first = 0; first < V; first += B, ++block, ++stored) {
        F32x16 in[B], decoded[B];
        I32x16 code[B];
        for (int i = 0; i < B; ++i) in[i] = x[first + i];
        *stored = Format::encode(in, scales.byte[block], scales.inverse[block], scales.value[block], code, decoded);
        for (int i = 0; i < B; ++i) {
            value[first + i] = decoded[i];
            payload[first + i] = nibbles(code[i]);
        }
    }
}

// Pairs of neighbours are bytes of the payload: a chunk of eight k keeps two of four bytes. 16 k here.
static inline void store_kept_pairs(uint64_t payload, uint32_t kept, uint8_t* codes, uint8_t* meta) {
    const uint32_t first = kMeta[kept & 15], second = kMeta[kept >> 4 & 15];
    const uint64_t low = payload & 0xffffffff, high = payload >> 32;
    codes[0] = static_cast<uint8_t>(low >> 8 * (first & 3));
    codes[1] = static_cast<uint8_t>(low >> 8 * (first >> 2));
    codes[2] = static_cast<uint8_t>(high >> 8 * (second & 3));
    codes[3] = static_cast<uint8_t>(high >> 8 * (second >> 2));
    *meta = static_cast<uint8_t>(first | second << 4);
}

// HiF4: a chunk of four k keeps two of four nibbles. 16 k here.
static inline void store_kept_elements(uint64_t payload, uint32_t kept, uint8_t* codes, uint8_t* meta) {
    for (int c = 0; c < 4; ++c) {
        const uint32_t chosen = kMeta[kept >> 4 * c & 15], chunk = static_cast<uint32_t>(payload >> 16 * c);
        codes[c] = static_cast<uint8_t>((chunk >> 4 * (chosen & 3) & 15) | (chunk >> 4 * (chosen >> 2) & 15) << 4);
        meta[c / 2] = static_cast<uint8_t>(c % 2 ? meta[c / 2] | chosen << 4 : chosen);
    }
}

// Where the next chunk's results go.
template <class Format>
struct RowOut {
    uint8_t *codes[2], *meta;
    typename Format::Scale* scale[2];

    RowOut(const Fp4Operand& to, int64_t t) {
        for (int p = 0; p < to.paths; ++p) {
            const int64_t row_codes = p == 0 && to.sparse ? to.K / 4 : to.K / 2;
            codes[p] = const_cast<uint8_t*>(to.codes[p]) + t * row_codes;
            scale[p] = static_cast<typename Format::Scale*>(const_cast<void*>(to.scale[p])) + t * (to.K / to.block[p]);
        }
        if (to.sparse) meta = const_cast<uint8_t*>(to.meta) + t * (to.K / (to.format == Fp4Format::hif4 ? 8 : 16));
    }
    template <int V>
    void put_payload(int p, const uint64_t (&payload)[V]) {
        std::memcpy(codes[p], payload, sizeof payload);
        codes[p] += sizeof payload;
    }
};

enum class Mode { single, dense, sparse };

// Step 2 for a chunk: what is kept of x, and which candidates those are (16 bits a vector of candidates).
template <class Format, int V>
static inline void mask_chunk(const F32x16 (&x)[V], F32x16 (&kept_x)[V], uint32_t (&kept)[V]) {
    if constexpr (V == 2) {  // candidates are pairs
        const uint32_t pairs = best_two_of_four(max_of_neighbours(abs(x[0]), abs(x[1]))), elements = doubled(pairs);
        for (int v = 0; v < 2; ++v) {
            kept[v] = pairs >> 8 * v & 0xff;
            kept_x[v] = keep(elements >> 16 * v & 0xffff, x[v]);
        }
    } else {  // elements
        for (int v = 0; v < V; ++v) {
            kept[v] = best_two_of_four(abs(x[v]));
            kept_x[v] = keep(kept[v], x[v]);
        }
    }
}

// The kept codes of a chunk and their numbers.
template <class Format, int V>
static inline void put_kept(const uint64_t (&payload)[V], const uint32_t (&kept)[V], RowOut<Format>& out) {
    constexpr int meta_bytes = V == 2 ? 1 : 2;  // of 16 k
    for (int v = 0; v < V; ++v, out.codes[0] += 4, out.meta += meta_bytes)
        V == 2 ? store_kept_pairs(payload[v], kept[v], out.codes[0], out.meta)
               : store_kept_elements(payload[v], kept[v], out.codes[0], out.meta);
}

template <int V>
static inline void load_chunk(const float* from, F32x16 (&x)[V]) {
    for (int v = 0; v < V; ++v) x[v] = load(from + v * kLanes);
}

// `chunks` chunks of V vectors; scales every B0 vectors in path 0, every B1 in path 1. x is scaled in place, then
// becomes the residual.
template <class Format, Mode mode, int V, int B0, int B1>
static inline void split_group(float* x, F32x16 divisor, int64_t chunks, RowOut<Format>& out) {
    constexpr int64_t kChunk = V * kLanes, kBlocks0 = V / B0, kBlocks1 = V / B1;
    GroupScales scales{};
    F32x16 chunk[V], value[V], kept_x[V];
    uint64_t payload[V];
    uint32_t kept[V];
    for (int64_t c = 0; c < chunks; ++c) {
        load_chunk(x + c * kChunk, chunk);
        for (int v = 0; v < V; ++v) {
            chunk[v] = rounded_to_bf16(Format::kGlobalScale ? chunk[v] / divisor : chunk[v]);
            store(x + c * kChunk + v * kLanes, chunk[v]);
        }
        find_largest<V, B0>(chunk, scales.amax + c * kBlocks0);  // what is kept includes the largest
    }
    scales.find<Format>(chunks * kBlocks0);
    for (int64_t c = 0; c < chunks; ++c, out.scale[0] += kBlocks0) {
        load_chunk(x + c * kChunk, chunk);
        if constexpr (mode == Mode::sparse) mask_chunk<Format, V>(chunk, kept_x, kept);
        const F32x16 (&in)[V] = mode == Mode::sparse ? kept_x : chunk;
        encode_chunk<Format, V, B0>(in, scales, c * kBlocks0, value, payload, out.scale[0]);
        if constexpr (mode == Mode::sparse) put_kept<Format, V>(payload, kept, out);
        else out.put_payload(0, payload);
        if constexpr (mode != Mode::single) {
            for (int v = 0; v < V; ++v) {
                chunk[v] = chunk[v] - value[v];
                store(x + c * kChunk + v * kLanes, chunk[v]);
            }
            find_largest<V, B1>(chunk, scales.amax + c * kBlocks1);
        }
    }
    if constexpr (mode == Mode::single) return;
    scales.find<Format>(chunks * kBlocks1);
    for (int64_t c = 0; c < chunks; ++c, out.scale[1] += kBlocks1) {
        load_chunk(x + c * kChunk, chunk);
        encode_chunk<Format, V, B1>(chunk, scales, c * kBlocks1, value, payload, out.scale[1]);
        out.put_payload(1, payload);
    }
}

template <class Format, Mode mode, int V, int B0, int B1>
void split_row(float* row, float g, const Fp4Operand& to, int64_t t) {
    RowOut<Format> out(to, t);
    const int64_t chunks = to.K / (V * kLanes);
    for (int64_t c = 0; c < chunks; c += kGroup)
        split_group<Format, mode, V, B0, B1>(row + c * V * kLanes, broadcast(g), min_of(kGroup, chunks - c), out);
}

using SplitRow = void (*)(float* row, float g, const Fp4Operand& to, int64_t t);

template <class Format, int V, int B>
SplitRow split_with_one_block(const Fp4Operand& to) {
    if (to.paths == 1) return &split_row<Format, Mode::single, V, B, B>;
    return to.sparse ? &split_row<Format, Mode::sparse, V, B, B> : &split_row<Format, Mode::dense, V, B, B>;
}

SplitRow split_of(const Fp4Operand& to) {
    if (to.format == Fp4Format::mxfp4) return split_with_one_block<Mxfp4, 2, 2>(to);
    if (to.format == Fp4Format::hif4) return split_with_one_block<Hif4, 4, 4>(to);
    if (to.paths == 1) return &split_row<Nvfp4, Mode::single, 2, 1, 1>;
    return to.sparse ? &split_row<Nvfp4, Mode::sparse, 2, 2, 1> : &split_row<Nvfp4, Mode::dense, 2, 1, 1>;
}

static inline float global_scale(const PrepareArgs& a, float amax) {
    if (a.to.format != Fp4Format::nvfp4) return 1.0f;
    if (a.fixed_g != 0) return a.fixed_g;
    const float g = amax / 2688.0f;  // 6 · 448: the row's largest magnitude becomes the format's
    return g > 1e-9f ? g : 1e-9f;
}

}  // namespace

bool prepare_fp4(const PrepareArgs& a, ThreadPool& pool, Scratch& scratch) {
    const Fp4Operand& to = a.to;
    const SplitRow split = split_of(to);
    const int32_t limit = to.format == Fp4Format::nvfp4 ? first_refused(a.rows) : kBeyondBf16;
    return for_each_row(a.rows, limit, pool, scratch, [&](int64_t t, float* row, float amax) {
        const float g = global_scale(a, amax);
        const_cast<float*>(to.g)[t] = g;
        split(row, g, to, t);
    });
}

}  // namespace ENGINE_ISA
}  // namespace engine
