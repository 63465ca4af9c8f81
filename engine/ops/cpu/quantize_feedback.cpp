// quantize_feedback: a weight's codes chosen along K against each other's errors, bit for bit what
// engine/ops/fp4/feedback.py defines.
//
// A lane is a row. A thread takes kRows rows through all passes: their errors stay in its cache, and the matrices M
// stream by in panels of one block's columns. Nearly all the work is the sum over earlier errors: kColumns · kVectors
// accumulators, one broadcast of M for kVectors products.

#include "fp4_quantize.h"
#include "kernels.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

constexpr int kVectors = ENGINE_ISA_LEVEL >= 2 ? 2 : 1;
constexpr int kColumns = ENGINE_ISA_LEVEL >= 2 ? 8 : 4;
constexpr int kRows = kVectors * kLanes;


// target −= errors · M for `count` errors; M and target point at kColumns columns of a panel B wide.
template <int B>
static inline void subtract_products(const float* errors, const float* M, int64_t count, F32x16 (*target)[kVectors]) {
    F32x16 sum[kColumns][kVectors];
    for (int c = 0; c < kColumns; ++c)
        for (int v = 0; v < kVectors; ++v) sum[c][v] = target[c][v];
    for (int64_t j = 0; j < count; ++j) {
        F32x16 error[kVectors];
        for (int v = 0; v < kVectors; ++v) error[v] = load(errors + j * kRows + v * kLanes);
        for (int c = 0; c < kColumns; ++c) {
            const F32x16 m = broadcast(M[j * B + c]);
            for (int v = 0; v < kVectors; ++v) sum[c][v] = sum[c][v] - error[v] * m;
        }
    }
    for (int c = 0; c < kColumns; ++c)
        for (int v = 0; v < kVectors; ++v) target[c][v] = sum[c][v];
}

// One vector of rows within a block: codes, errors and the scale's cost, the targets moving as errors change.
template <int B>
static inline F32x16 round_block(F32x16 (&target)[B], const F32x16 (&x)[B], F32x16 (&error)[B], const float* M,
                                 const float* weight, const Scales& scale, I32x16 (&code)[B]) {
    F32x16 cost = zero();
    for (int k = 0; k < B; ++k) {
        F32x16 value;
        code[k] = encode_e2m1(target[k] * scale.inverse, value);
        value = value * scale.value;
        const F32x16 miss = target[k] - value, now = value - x[k], change = now - error[k];
        cost = cost + broadcast(weight[k]) * (miss * miss);
        error[k] = now;
        for (int j = k + 1; j < B; ++j) target[j] = target[j] - change * broadcast(M[k * B + j]);
    }
    return cost;
}

template <class Format, int B>
static I32x16 best_byte(const F32x16 (&target)[B], const F32x16 (&x)[B], const float* M, const float* weight) {
    F32x16 amax = abs(target[0]);
    for (int k = 1; k < B; ++k) amax = max(amax, abs(target[k]));
    const I32x16 first = Format::scales(amax * broadcast(0.65f)).byte;
    const I32x16 last = Format::scales(min(amax, broadcast(2e38f)) * broadcast(1.6f)).byte;
    const int32_t steps = largest_lane(last - first);
    I32x16 best = first;
    F32x16 smallest = zero();
    for (int32_t step = 0; step <= steps; ++step) {
        const I32x16 byte = min(first + broadcast_i32(step), last);
        F32x16 t[B], error[B];
        I32x16 code[B];
        for (int k = 0; k < B; ++k) t[k] = target[k], error[k] = zero();
        const F32x16 cost = round_block<B>(t, x, error, M, weight, Format::of_byte(byte), code);
        const uint32_t better = step == 0 ? 0xffffu : greater(smallest, cost);
        best = select(better, byte, best);
        smallest = bits_to_float(select(better, float_to_bits(cost), float_to_bits(smallest)));
    }
    return best;
}

template <class T, class Format, int B>
struct Rows {
    const QuantizeFeedbackArgs& a;
    int64_t first, count;  // of the weight's rows; missing ones repeat the last
    float* errors;         // [K, kRows]
    int32_t* scales;       // [K/B, kRows]

    void load_x(int64_t block, int v, F32x16 (&x)[B]) const {
        for (int k = 0; k < B; k += kLanes) {
            I32x16 rows[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) {
                const int64_t row = min_of(first + v * kLanes + lane, a.N - 1);
                const T* from = static_cast<const T*>(a.w) + row * a.w_stride + block * B + k;
                rows[lane] = float_to_bits(rounded_to_bf16(load(from) / broadcast(a.g)));
            }
            transpose(rows);
            for (int i = 0; i < kLanes; ++i) x[k + i] = bits_to_float(rows[i]);
        }
    }

    void store(int64_t block, int v, const I32x16 (&code)[B], I32x16 scale) const {
        int32_t words[B / 8][kLanes], bytes[kLanes];
        for (int j = 0; j < B / 8; ++j) {
            I32x16 word = broadcast_i32(0);
            for (int k = 8 * j + 7; k >= 8 * j; --k) word = shift_left<4>(word) | code[k];
            std::memcpy(words[j], &word, sizeof word);
        }
        std::memcpy(bytes, &scale, sizeof scale);
        for (int lane = 0; lane < min_of(kLanes, count - v * kLanes); ++lane) {
            const int64_t row = first + v * kLanes + lane;
            uint8_t* to = a.codes + row * (a.K / 2) + block * (B / 2);
            for (int j = 0; j < B / 8; ++j) std::memcpy(to + 4 * j, &words[j][lane], 4);
            a.scale[row * (a.K / B) + block] = static_cast<uint8_t>(bytes[lane]);
        }
    }

    void pass(const float* panels, bool is_first) const {
        for (int64_t block = 0; block < a.K / B; ++block) {
            const float* M = panels + block * a.K * B;
            const float* within = M + block * B * B;
            const float* weight = a.weight + block * B;
            F32x16 x[kVectors][B], target[B][kVectors];
            for (int v = 0; v < kVectors; ++v) {
                load_x(block, v, x[v]);
                for (int k = 0; k < B; ++k) target[k][v] = x[v][k];
            }
            for (int c = 0; c < B; c += kColumns)
                subtract_products<B>(errors, M + c, is_first ? block * B : a.K, target + c);
            for (int v = 0; v < kVectors; ++v) {
                float* own = errors + block * B * kRows + v * kLanes;
                F32x16 t[B], error[B];
                I32x16 code[B];
                for (int k = 0; k < B; ++k) t[k] = target[k][v], error[k] = is_first ? zero() : load(own + k * kRows);
                int32_t* kept = scales + block * kRows + v * kLanes;
                if (is_first) store_n(kept, best_byte<Format, B>(t, x[v], within, weight), kLanes);
                const I32x16 byte = load_i32(kept);
                round_block<B>(t, x[v], error, within, weight, Format::of_byte(byte), code);
                for (int k = 0; k < B; ++k) engine::ENGINE_ISA::store(own + k * kRows, error[k]);
                store(block, v, code, byte);
            }
        }
    }
};

template <class T, class Format, int B>
void quantize_rows(const QuantizeFeedbackArgs& a, ThreadPool& pool, Scratch& scratch) {
    const int64_t of_errors = a.K * kRows, of_scales = a.K / B * kRows;
    float* memory = static_cast<float*>(scratch.reserve(static_cast<size_t>(pool.threads() * (of_errors + of_scales)) * 4));
    pool.parallel_for(ceil_div(a.N, kRows), 1, [&](int64_t begin, int64_t end, int thread) {
        float* errors = memory + thread * (of_errors + of_scales);
        int32_t* scales = reinterpret_cast<int32_t*>(errors + of_errors);
        for (int64_t group = begin; group < end; ++group) {
            const Rows<T, Format, B> rows{a, group * kRows, min_of(kRows, a.N - group * kRows), errors, scales};
            rows.pass(a.first, true);
            for (int i = 0; i < a.refinements; ++i) rows.pass(a.later, false);
        }
    });
}

template <class T>
void quantize_rows(const QuantizeFeedbackArgs& a, ThreadPool& pool, Scratch& scratch) {
    if (a.format == Fp4Format::mxfp4) return quantize_rows<T, Mxfp4, 32>(a, pool, scratch);
    if (a.block == 16) return quantize_rows<T, Nvfp4, 16>(a, pool, scratch);
    return quantize_rows<T, Nvfp4, 32>(a, pool, scratch);
}

}  // namespace

void quantize_feedback(const QuantizeFeedbackArgs& a, ThreadPool& pool, Scratch& scratch) {
    if (a.w_type == DType::f32) return quantize_rows<float>(a, pool, scratch);
    return a.w_type == DType::bf16 ? quantize_rows<bf16>(a, pool, scratch) : quantize_rows<f16>(a, pool, scratch);
}

}  // namespace ENGINE_ISA
}  // namespace engine
