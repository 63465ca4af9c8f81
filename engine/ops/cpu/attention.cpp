// attention: softmax(scale · q·kᵀ) · v of every row over its own sequence's cached tokens, in fp32 ("online softmax").
//
// A row (one query head of one token) walks over chunks of 64 tokens that begin at absolute positions 0, 64, 128 …:
//   scores   s_t = scale · Σ_d q_d k_td     d ascending, one lane per token; unseen tokens become −inf
//   maximum  m' = max(m, max_t s_t)
//   weights  p_t = exp32(s_t − m'), sum = sum · c + Σ p_t, c = exp32(m − m')
//   output   o = o · c, then o += p_t · v_t for the seen tokens t, ascending
// and ends with o / sum. All of it follows from the row's own position and window, so its bits are the same in a decode
// step, in a prefill chunk of any size and in any batch, on any number of threads. What is shared is only loads: a tile
// of rows reads each K and V vector once. Rows of a tile see different tokens at the edges; there the sum runs over the
// rows that see a token, so that no row ever touches a value it should not see (a stale NaN, another row's future).
//
// bf16 on avx512-bf16: scores by vdpbf16ps (fp32 accumulation; subnormal inputs and results count as 0). Everything else
// converts to fp32, exactly. Weights are not rounded.

#include "attention_args.h"
#include "kernels.h"
#include "simd.h"
#include "fp32_math.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

constexpr int kChunk = 64;                              // tokens
constexpr int kChunkBlocks = kChunk / kBlockTokens;
constexpr float kLowest = -3.40282347e38f;  // not −inf: the difference of two maxima must not be NaN

// Rows of a tile × vectors per row is what accumulates in registers: at most 16 of 32, for AVX2 6 pairs of 16.
#if ENGINE_ISA_LEVEL == 1
constexpr int kTileRows = 6;
constexpr int kAccumulators = 6;
#else
constexpr int kTileRows = 8;
constexpr int kAccumulators = 16;
#endif
constexpr int vectors_per_row(int rows) { return kAccumulators / rows < 4 ? kAccumulators / rows : 4; }

// The state of an item's rows, in one thread's scratch memory.
struct Rows {
    float* q;         // tiles, see pack_queries
    float* output;    // [rows] [DV]
    F32x16* sum;      // [rows], sixteen partial sums of the weights
    float* maximum;   // [rows]
    float* rescale;   // [rows], what `output` is still to be multiplied by
    float* weights;   // [kTileRows] [kChunk], scores first
    float* wide_v;    // [kChunk] [DV], V as fp32
};

// The tokens [begin, end) of a chunk that a row sees.
struct Seen {
    int begin, end;
};

// A chunk's tiles; the first and last may be unused.
template <class T>
struct Chunk {
    const T* k[kChunkBlocks];
    const T* v[kChunkBlocks];
};

static inline F32x16 keep_lanes(F32x16 a, int begin, int end, float other) {
    alignas(64) float lanes[kLanes];
    store(lanes, a);
    for (int i = 0; i < kLanes; ++i)
        if (i < begin || i >= end) lanes[i] = other;
    return load(lanes);
}

// ---- queries ----

// q of a tile's rows, element by element: [D] [rows] fp32. For the bf16 dot product [D / 2] [rows] pairs.
template <class T>
struct Query {
    using Unit = float;
    static constexpr int kElements = 1;
    static float unit(const T* p) {
        return first_lane(load_n(p, 1));
    }
};

}  // namespace
}  // namespace ENGINE_ISA
}  // namespace engine
