// quantize_weight: a weight into FP4 in any grade, bit for bit what engine/ops/fp4/grades.py defines.
//
// Two passes over the weight: its largest magnitude, from which the global scale follows, then sixteen blocks at a
// time, transposed so that a block is a lane. Every block then tries a scale of its own in the same instructions, and
// the sum over a block runs from register to register. Compute-bound: about a dozen scales are tried per block.

#include "fp4_quantize.h"
#include "kernels.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

constexpr int64_t kGrainElements = 1 << 15;  // elements a thread takes at a time
constexpr int32_t kInfinity = 0x7f800000;
constexpr int32_t kBeyondBf16 = 0x7f7f8000;  // fp32 numbers from here on round to bf16's infinity

// ---- the shard's scale ----------------------------------------------------------------------------------------------

template <class T>
int32_t largest_of_rows(const QuantizeWeightArgs& a, int64_t begin, int64_t end) {
    I32x16 largest = broadcast_i32(0);
    for (int64_t n = begin; n < end; ++n) {
        const T* row = static_cast<const T*>(a.w) + n * a.w_stride;
        for (int64_t k = 0; k < a.K; k += kLanes) largest = max(largest, float_to_bits(abs(load(row + k))));
    }
    return largest_lane(largest);
}

// As bits, in which infinity and NaN are larger than any number.
template <class T>
int32_t largest_magnitude(const QuantizeWeightArgs& a, ThreadPool& pool) {
    int32_t result = 0;
    pool.parallel_for(a.N, max_of(1, kGrainElements / a.K), [&](int64_t begin, int64_t end, int) {
        const int32_t mine = largest_of_rows<T>(a, begin, end);
        int32_t seen = __atomic_load_n(&result, __ATOMIC_RELAXED);
        constexpr int relaxed = __ATOMIC_RELAXED;
        while (seen < mine && !__atomic_compare_exchange_n(&result, &seen, mine, true, relaxed, relaxed)) continue;
    });
    return result;
}

static inline float global_scale(const QuantizeWeightArgs& a, float amax) {
    if (a.format != Fp4Format::nvfp4) return 1.0f;
    const float g = amax / (a.grade == WeightGrade::four_over_six ? 1536.0f : 2688.0f);  // 6 · 256, 6 · 448
    return g > 1e-9f ? g : 1e-9f;
}

// ---- sixteen blocks, one a lane -------------------------------------------------------------------------------------

// Blocks are counted through the whole weight; beyond the last one it is repeated. x[k] holds element k of each.
template <class T, int B>
static inline void load_blocks(const QuantizeWeightArgs& a, int64_t first, int64_t last, float g, F32x16 (&x)[B]) {
    const int64_t per_row = a.K / B;
    const T* block[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t b = min_of(first + lane, last);
        block[lane] = static_cast<const T*>(a.w) + b / per_row * a.w_stride + b % per_row * B;
    }
    for (int k = 0; k < B; k += kLanes) {
        I32x16 rows[kLanes];
        for (int lane = 0; lane < kLanes; ++lane)
            rows[lane] = float_to_bits(rounded_to_bf16(load(block[lane] + k) / broadcast(g)));
        transpose(rows);
        for (int i = 0; i < kLanes; ++i) x[k + i] = bits_to_float(rows[i]);
    }
}

// The blocks under one scale each: encode() gives an element's codes and the values they stand for.
struct E2m1Blocks {
    Scales scale;

    template <int B>
    E2m1Blocks(const F32x16 (&)[B], const Scales& s) : scale(s) {}
    I32x16 stored() const { return scale.byte; }
    I32x16 encode(F32x16 x, int, F32x16& value) const {
        const I32x16 code = encode_e2m1(x * scale.inverse, value);
        value = value * scale.value;
        return code;
    }
};

struct Hif4Blocks {
    F32x16 step[16];  // of each four k
    I32x16 word;

    Hif4Blocks(const F32x16 (&x)[64], const Scales& s) : word(s.byte) {
        for (int eight = 0; eight < 8; ++eight) {
            F32x16 of_4[2];
            for (int half = 0; half < 2; ++half) {
                const F32x16* four = x + 8 * eight + 4 * half;
                of_4[half] = max(max(abs(four[0]), abs(four[1])), max(abs(four[2]), abs(four[3])));
            }
            const uint32_t e8 = at_least(max(of_4[0], of_4[1]), broadcast(4.0f) * s.value);
            const F32x16 step_of_8 = s.value + keep(e8, s.value);
            set_bit(8 + eight, e8);
            for (int half = 0; half < 2; ++half) {
                const uint32_t e16 = at_least(of_4[half], step_of_8 + step_of_8);
                step[2 * eight + half] = step_of_8 + keep(e16, step_of_8);
                set_bit(16 + 2 * eight + half, e16);
            }
        }
    }
    void set_bit(int bit, uint32_t lanes) {
        const F32x16 one = bits_to_float(broadcast_i32(static_cast<int32_t>(1u << bit)));
        word = word | float_to_bits(keep(lanes, one));
    }
    I32x16 stored() const { return word; }
    I32x16 encode(F32x16 x, int k, F32x16& value) const {
        const I32x16 code = encode_s1p2(x / step[k / 4], value);
        value = value * step[k / 4];
        return code;
    }
};

template <class Format>
struct BlocksOf {
    using type = E2m1Blocks;
};
template <>
struct BlocksOf<Hif4> {
    using type = Hif4Blocks;
};

// What the blocks lose, from element k on in steps of `stride`, summed by halves.
template <int count, int stride, class Blocks>
__attribute__((always_inline)) static inline F32x16 squared_error(const F32x16* x, const Blocks& blocks, int k) {
    if constexpr (count == 1) {
        F32x16 value;
        blocks.encode(x[k], k, value);
        const F32x16 error = x[k] - value;
        return error * error;
    } else {
        return squared_error<count / 2, 2 * stride>(x, blocks, k)
               + squared_error<count / 2, 2 * stride>(x, blocks, k + stride);
    }
}

template <class Format, int B>
static F32x16 error_under(const F32x16 (&x)[B], I32x16 byte) {
    const typename BlocksOf<Format>::type blocks(x, Format::of_byte(byte));
    return squared_error<B, 1>(x, blocks, 0);
}

// ---- the grades -----------------------------------------------------------------------------------------------------

// The first scale to try and the last; `sweep` tries the bytes between as well.
template <class Format>
static inline void ends_of_search(WeightGrade grade, F32x16 amax, I32x16& first, I32x16& last) {
    if (grade == WeightGrade::sweep) {
        first = Format::scales(amax * broadcast(0.65f)).byte;
        last = Format::scales(min(amax, broadcast(2e38f)) * broadcast(1.6f)).byte;  // still finite
        return;
    }
    first = last = Format::scales(amax).byte;
    if constexpr (Format::kGlobalScale) {
        if (grade == WeightGrade::four_over_six) last = Format::rounded(amax / broadcast(4.0f)).byte;
    }
}

// The byte with the smallest error of each block, the first of equals.
template <class Format, int B>
static I32x16 best_byte(const F32x16 (&x)[B], WeightGrade grade) {
    F32x16 amax = abs(x[0]);
    for (int k = 1; k < B; ++k) amax = max(amax, abs(x[k]));
    I32x16 best, last;
    ends_of_search<Format>(grade, amax, best, last);
    const I32x16 first = best;
    const int32_t distance = largest_lane(max(last - first, first - last));
    if (distance == 0) return best;
    F32x16 smallest = error_under<Format>(x, first);
    const int32_t steps = grade == WeightGrade::sweep ? distance : 1;
    for (int32_t step = 1; step <= steps; ++step) {
        const I32x16 byte = grade == WeightGrade::sweep ? min(first + broadcast_i32(step), last) : last;
        const F32x16 error = error_under<Format>(x, byte);
        const uint32_t better = greater(smallest, error);
        best = select(better, byte, best);
        smallest = min(error, smallest);
    }
    return best;
}

// ---- results --------------------------------------------------------------------------------------------------------

// Lane i of parts[j] is the j-th word of block i: the first `blocks` of them, to where they lie.
template <class Word, int count>
static inline void store_words(const I32x16 (&parts)[count], int64_t blocks, Word* to) {
    int32_t lanes[count][kLanes];
    std::memcpy(lanes, parts, sizeof lanes);
    for (int64_t b = 0; b < blocks; ++b)
        for (int j = 0; j < count; ++j) to[b * count + j] = static_cast<Word>(lanes[j][b]);
}

template <class T, class Format, int B>
void quantize_blocks(const QuantizeWeightArgs& a, float g, ThreadPool& pool) {
    const int64_t blocks = a.N * (a.K / B);
    pool.parallel_for(ceil_div(blocks, kLanes), kGrainElements / (kLanes * B), [&](int64_t begin, int64_t end, int) {
        for (int64_t first = begin * kLanes; first < min_of(end * kLanes, blocks); first += kLanes) {
            F32x16 x[B], value;
            load_blocks<T>(a, first, blocks - 1, g, x);
            const typename BlocksOf<Format>::type best(x, Format::of_byte(best_byte<Format>(x, a.grade)));
            I32x16 words[B / 8];
            for (int j = 0; j < B / 8; ++j) {
                words[j] = broadcast_i32(0);
                for (int k = 8 * j + 7; k >= 8 * j; --k)
                    words[j] = shift_left<4>(words[j]) | best.encode(x[k], k, value);
            }
            const int64_t count = min_of(kLanes, blocks - first);
            store_words(words, count, reinterpret_cast<int32_t*>(a.codes) + first * (B / 8));
            const I32x16 stored[1] = {best.stored()};
            store_words(stored, count, static_cast<typename Format::Scale*>(a.scale) + first);
        }
    });
}

template <class T>
void quantize_blocks(const QuantizeWeightArgs& a, float g, ThreadPool& pool) {
    if (a.format == Fp4Format::mxfp4) return quantize_blocks<T, Mxfp4, 32>(a, g, pool);
    if (a.format == Fp4Format::hif4) return quantize_blocks<T, Hif4, 64>(a, g, pool);
    return a.block == 16 ? quantize_blocks<T, Nvfp4, 16>(a, g, pool) : quantize_blocks<T, Nvfp4, 32>(a, g, pool);
}

template <class T>
float quantize_weight_of(const QuantizeWeightArgs& a, ThreadPool& pool) {
    const int32_t largest = largest_magnitude<T>(a, pool);
    const float amax = bits_float(static_cast<uint32_t>(largest));
    if (largest >= (a.format == Fp4Format::nvfp4 ? kInfinity : kBeyondBf16)) return amax;
    const float g = global_scale(a, amax);
    for (int64_t n = 0; n < a.N; ++n) a.g[n] = g;
    quantize_blocks<T>(a, g, pool);
    return amax;
}

}  // namespace

float quantize_weight(const QuantizeWeightArgs& a, ThreadPool& pool) {
    if (a.w_type == DType::f32) return quantize_weight_of<float>(a, pool);
    return a.w_type == DType::bf16 ? quantize_weight_of<bf16>(a, pool) : quantize_weight_of<f16>(a, pool);
}

}  // namespace ENGINE_ISA
}  // namespace engine
