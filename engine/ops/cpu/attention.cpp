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
// bf16 on avx512-bf16: scores by vdpbf16ps (fp32 accumulation; subnormal inputs and results count as 0). Everything
// else converts to fp32, exactly. Weights are not rounded. Of an E4M3 cache each item expands a chunk at a time to tiles
// of bf16, which its rows then share; K's scale is a factor of the scores', V's one of the result.

#include "attention_args.h"
#include "e4m3_lanes.h"
#include "kernels.h"

namespace engine {
namespace ENGINE_ISA {
namespace {

constexpr int kChunk = 64;  // tokens
constexpr int kChunkBlocks = kChunk / kBlockTokens;
constexpr float kLowest = -3.40282347e38f;  // not −inf: a difference of two maxima must not be NaN

// Rows of a tile, and how many sums of sixteen lanes a kernel keeps in registers: there are 32 of sixteen lanes, with
// AVX2 16 of eight, elsewhere at least 16 of four.
#if ENGINE_ISA_LEVEL >= 2
constexpr int kTileRows = 8, kSums = 16;
#elif ENGINE_ISA_LEVEL == 1
constexpr int kTileRows = 6, kSums = 6;
#else
constexpr int kTileRows = 2, kSums = 2;
#endif

template <int n>
struct Count {
    static constexpr int value = n;
};

// Calls f(Count<rows>{}) for rows in 1..n.
template <int n, class F>
static inline void with_count(int rows, F&& f) {
    if (rows == n) return f(Count<n>{});
    if constexpr (n > 1) with_count<n - 1>(rows, f);
}

// The tiles of a chunk. Blocks with no token that any row sees repeat a neighbour.
template <class T>
struct Tiles {
    const T* k[kChunkBlocks];
    const T* v[kChunkBlocks];
};

// Kernels ask for the next chunk's lines while they read this one's: blocks lie scattered, so the processor cannot
// guess. Into the second-level cache, which can wait for more lines at a time than the first: 1.6 times the bandwidth
// on a Zen 4 core, where the same into the first gains nothing.
static inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// ---- scores ---------------------------------------------------------------------------------------------------------

// One step through a K tile: what it loads for 16 tokens, and the query units of a row it meets. Queries of a tile of
// rows lie in the order of use, [step] [unit] [rows]. T: of the queries; K: of the tile, T or bf16.
template <class T, class K>  // float, f16: one element
struct Keys {
    using Query = float;
    static constexpr int kElements = 1, kUnits = 1;
    F32x16 k;

    explicit Keys(const K* tile) : k(load(tile)) {}
    F32x16 add(F32x16 sum, const float* q, int) const { return mul_add(k, broadcast(*q), sum); }
};

template <class T>
struct Keys<T, bf16> {  // a pair, widened to two fp32
    using Query = float;
    static constexpr int kElements = 2, kUnits = 2;
    F32x16 even, odd;

    explicit Keys(const bf16* tile)
        : even(bits_to_float(shift_left<16>(load_i32(tile)))),
          odd(bits_to_float(load_i32(tile) & broadcast_i32(static_cast<int32_t>(0xffff0000)))) {}
    F32x16 add(F32x16 sum, const float* q, int rows) const {
        return mul_add(odd, broadcast(q[rows]), mul_add(even, broadcast(*q), sum));
    }
};

#if ENGINE_ISA_LEVEL >= 3
template <>
struct Keys<bf16, bf16> {  // a pair, by the dot product instruction
    using Query = int32_t;
    static constexpr int kElements = 2, kUnits = 1;
    I32x16 k;

    explicit Keys(const bf16* tile) : k(load_i32(tile)) {}
    F32x16 add(F32x16 sum, const int32_t* q, int) const {
        return {_mm512_dpbf16_ps(sum.v, (__m512bh)k.v, (__m512bh)_mm512_set1_epi32(*q))};
    }
};
#endif

// Row `row` of `rows` into a tile of queries.
template <class T>
void pack_query(const T* q, int64_t D, float* tile, int row, int rows) {
    alignas(64) float wide[kLanes];
    for (int64_t d = 0; d < D; d += kLanes) {
        const int64_t n = min_of(kLanes, D - d);
        store(wide, load_up_to(q + d, n));
        for (int64_t i = 0; i < n; ++i) tile[(d + i) * rows + row] = wide[i];
    }
}
template <class T>
void pack_query(const T* q, int64_t D, int32_t* tile, int row, int rows) {
    for (int64_t pair = 0; pair < D / 2; ++pair) std::memcpy(tile + pair * rows + row, q + 2 * pair, 4);
}

// Unscaled scores [rows, kChunk] of `blocks` neighbouring blocks.
template <class T, class K, int rows, int blocks>
void score(const typename Keys<T, K>::Query* q, const K* const* k, const K* const* next, int64_t D, float* scores) {
    F32x16 sums[rows][blocks];
    for (int r = 0; r < rows; ++r)
        for (int b = 0; b < blocks; ++b) sums[r][b] = zero();
    for (int64_t at = 0; at < D * kLanes; at += Keys<T, K>::kElements * kLanes) {
        for (int b = 0; b < blocks; ++b) {
            const Keys<T, K> keys(k[b] + at);
            prefetch(next[b] + at);
            for (int r = 0; r < rows; ++r) sums[r][b] = keys.add(sums[r][b], q + r, rows);
        }
        q += Keys<T, K>::kUnits * rows;
    }
    for (int r = 0; r < rows; ++r)
        for (int b = 0; b < blocks; ++b) store(scores + r * kChunk + b * kLanes, sums[r][b]);
}

// Blocks [begin, end) at least, as many at a time as there are registers for: 1, 2 or 4.
template <class T, class K, int rows>
void score_chunk(const typename Keys<T, K>::Query* q, const Tiles<K>& now, const Tiles<K>& next, int begin, int end,
                 int64_t D, float* scores) {
    constexpr int step = kSums / rows >= 4 ? 4 : kSums / rows >= 2 ? 2 : 1;
    for (int b = begin / step * step; b < end; b += step)
        score<T, K, rows, step>(q, now.k + b, next.k + b, D, scores + b * kLanes);
}

// ---- weights --------------------------------------------------------------------------------------------------------

// The tokens [begin, end) of a chunk that a row sees.
struct Seen {
    int begin, end;
};

static inline int64_t clamp_lane(int64_t lane) { return min_of(kLanes, max_of(0, lane)); }

// −inf in the lanes outside [begin, end), whatever they held; NaN inside becomes +inf, which ends as NaN all the same.
static inline F32x16 hide_unseen(F32x16 scores, int64_t begin, int64_t end) {
    constexpr float hide = -__builtin_inff(), keep = __builtin_inff();
    static const float limits[3 * kLanes] = {
        hide, hide, hide, hide, hide, hide, hide, hide, hide, hide, hide, hide, hide, hide, hide, hide,
        keep, keep, keep, keep, keep, keep, keep, keep, keep, keep, keep, keep, keep, keep, keep, keep,
        hide, hide, hide, hide, hide, hide, hide, hide, hide, hide, hide, hide, hide, hide, hide, hide,
    };
    const F32x16 from_begin = load(limits + kLanes - clamp_lane(begin));
    const F32x16 to_end = load(limits + 2 * kLanes - clamp_lane(end));
    return min(min(scores, from_begin), to_end);  // min gives its second argument where one is NaN
}

// What a row carries from chunk to chunk, besides its output.
struct RowState {
    F32x16 sum;      // of weights, sixteen partial sums
    float maximum;   // of scores
    float rescale;   // what the output is still to be multiplied by
};

// Turns a row's scores [kChunk] into weights.
static inline void weigh(float* scores, float scale, Seen seen, RowState& row) {
    const bool partial = seen.begin > 0 || seen.end < kChunk;
    F32x16 s[kChunkBlocks];
    F32x16 largest = broadcast(row.maximum);
    for (int b = 0; b < kChunkBlocks; ++b) {
        s[b] = load(scores + b * kLanes) * broadcast(scale);
        if (partial) s[b] = hide_unseen(s[b], seen.begin - b * kLanes, seen.end - b * kLanes);
        largest = max(largest, s[b]);
    }
    const float maximum = largest_lane(largest);
    for (int b = 0; b < kChunkBlocks; ++b) {
        s[b] = exp32(s[b] - broadcast(maximum));
        store(scores + b * kLanes, s[b]);
    }
    const F32x16 rescale = exp32(broadcast(row.maximum - maximum));
    row.sum = row.sum * rescale + ((s[0] + s[1]) + (s[2] + s[3]));
    row.rescale = first_lane(rescale);
    row.maximum = maximum;
}

// ---- values ---------------------------------------------------------------------------------------------------------

// A stretch of tokens of a chunk and the rows that see it.
struct Stretch {
    float* output;         // [rows, DV]
    RowState* states;      // [rows]
    const float* weights;  // [rows, kChunk]
    int begin, end;        // tokens
    int64_t DV;
};

// output[r] = output[r] · rescale[r] + Σ_t weights[r][t] · v[t], elements [d, d + 16 · vectors) of DV.
template <class T, int rows, int vectors>
void add_values(const Stretch& s, const T* const* v, const T* const* next, int64_t d) {
    constexpr int kVectorsPerLine = 64 / (kLanes * static_cast<int>(sizeof(T)));
    F32x16 sums[rows][vectors];
    for (int r = 0; r < rows; ++r)
        for (int i = 0; i < vectors; ++i)
            sums[r][i] = load(s.output + r * s.DV + d + i * kLanes) * broadcast(s.states[r].rescale);
    for (int t = s.begin; t < s.end;) {
        const int64_t block = t / kBlockTokens, stop = min_of(s.end, (block + 1) * kBlockTokens);
        for (int64_t at = t % kBlockTokens * s.DV + d; t < stop; ++t, at += s.DV) {
            for (int i = 0; i < vectors; i += kVectorsPerLine) prefetch(next[block] + at + i * kLanes);
            for (int i = 0; i < vectors; ++i) {
                const F32x16 value = load(v[block] + at + i * kLanes);
                for (int r = 0; r < rows; ++r)
                    sums[r][i] = mul_add(broadcast(s.weights[r * kChunk + t]), value, sums[r][i]);
            }
        }
    }
    for (int r = 0; r < rows; ++r)
        for (int i = 0; i < vectors; ++i) store(s.output + r * s.DV + d + i * kLanes, sums[r][i]);
}

template <class T, int rows>
void add_all_values(const Stretch& s, const Tiles<T>& now, const Tiles<T>& next) {
    constexpr int vectors = kSums / rows >= 4 ? 4 : kSums / rows >= 2 ? 2 : 1;
    int64_t d = 0;
    for (; d + vectors * kLanes <= s.DV; d += vectors * kLanes) add_values<T, rows, vectors>(s, now.v, next.v, d);
    for (; d < s.DV; d += kLanes) add_values<T, rows, 1>(s, now.v, next.v, d);
    for (int r = 0; r < rows; ++r) s.states[r].rescale = 1.0f;
}

// Cuts a chunk into stretches that the same rows see; these are neighbours, because `seen` only moves forward.
template <class T>
void add_seen_values(const Stretch& all, const Seen* seen, int rows, const Tiles<T>& now, const Tiles<T>& next) {
    for (int t = seen[0].begin; t < seen[rows - 1].end;) {
        int first = 0, last = rows;
        while (seen[first].end <= t) ++first;
        while (seen[last - 1].begin > t) --last;
        const int stop = last < rows && seen[last].begin < seen[first].end ? seen[last].begin : seen[first].end;
        const Stretch part{all.output + first * all.DV, all.states + first, all.weights + first * kChunk,
                           t, stop, all.DV};
        with_count<kTileRows>(last - first, [&](auto count) { add_all_values<T, count.value>(part, now, next); });
        t = stop;
    }
}

// ---- an item --------------------------------------------------------------------------------------------------------

// One thread's memory for one item.
template <class T, class K>
struct Workspace {
    typename Keys<T, K>::Query* queries;  // per tile of rows, see Keys
    float* output;                        // [rows, DV]
    RowState* states;                     // [rows]
    float* weights;                       // [kTileRows, kChunk]
    char* expanded;                       // a chunk's blocks of E4M3 in bf16, K and V tile each
};

// Of one block, K and V.
static inline int64_t expanded_bytes(const KVLayer& kv) { return kv.type == DType::e4m3 ? 2 * tile_pair_bytes(kv) : 0; }

static inline int64_t workspace_bytes(const KVLayer& kv) {
    const int64_t D = kv.D, DV = value_stride(D);
    const int64_t bytes = 4 * (kItemRows * (D + DV) + kTileRows * kChunk) + kItemRows * int64_t{sizeof(RowState)};
    return ceil_div(bytes, 64) * 64 + kChunkBlocks * expanded_bytes(kv);
}

template <class T, class K>
Workspace<T, K> carve(char* memory, const KVLayer& kv) {
    Workspace<T, K> w;
    w.expanded = memory;  // whole lines of the cache
    w.states = reinterpret_cast<RowState*>(memory + kChunkBlocks * expanded_bytes(kv));
    w.weights = reinterpret_cast<float*>(w.states + kItemRows);
    w.output = w.weights + kTileRows * kChunk;
    w.queries = reinterpret_cast<typename Keys<T, K>::Query*>(w.output + kItemRows * value_stride(kv.D));
    return w;
}

// What rows read of a cache of this type.
template <class Stored>
struct Expanded {
    using type = Stored;
};
template <>
struct Expanded<e4m3> {
    using type = bf16;
};

// bytes of codes to bf16; those of the next chunk, which will then be at `next`, are asked for meanwhile.
static inline void expand(const e4m3* codes, const e4m3* next, int64_t bytes, char* to) {
    const Expander expander;
    for (int64_t at = 0; at < bytes; at += 64) {
        prefetch(next + at);
        expander.store(reinterpret_cast<const char*>(codes + at), to + 2 * at, to + 2 * at + 64);
    }
}

// Whole groups where they fit: rows of one token see the same, which leaves no edges.
static inline int rows_per_tile(int64_t G) {
    return static_cast<int>(G <= kTileRows ? kTileRows / G * G : ceil_div(G, ceil_div(G, kTileRows)));
}

// T: of q and out; Stored: of the cache.
template <class T, class Stored>
class ItemRun {
    using K = typename Expanded<Stored>::type;
    static constexpr bool kExpands = sizeof(K) != sizeof(Stored);

public:
    ItemRun(const AttentionArgs& args, const AttentionItem& item, char* memory)
        : a(args), item(item), w(carve<T, K>(memory, args.cache)), D(args.cache.D), DV(value_stride(D)),
          G(args.H / args.cache.KVH), rows(item.row_end - item.row_begin), tile_rows(rows_per_tile(G)),
          tiles(static_cast<int>(ceil_div(rows, tile_rows))) {}

    void run() {
        start();
        const int64_t last = position(rows - 1);
        lowest_block = max_of(0, position(0) - a.window + 1) / kBlockTokens;
        highest_block = last / kBlockTokens;
        int64_t token = lowest_block / kChunkBlocks * kChunk;
        Tiles<Stored> now, next = tiles_at(token);
        for (; token <= last; token += kChunk) {
            now = next;
            next = tiles_at(token + kChunk);
            if constexpr (kExpands) {
                const Tiles<K> wide = expanded(now, next);
                for (int tile = 0; tile < tiles; ++tile) attend(tile, token, wide, wide);
            } else {
                for (int tile = 0; tile < tiles; ++tile) attend(tile, token, now, next);
            }
        }
        finish();
    }

private:
    int64_t token_of(int row) const { return item.first_token + (item.row_begin + row) / G; }
    int64_t element_of(int row) const { return (item.kv_head * G + (item.row_begin + row) % G) * D; }
    int64_t position(int row) const { return a.positions[token_of(row)]; }
    int tile_begin(int tile) const { return static_cast<int>(min_of(rows, tile * tile_rows)); }

    // Queries into tiles, states and outputs to nothing seen yet.
    void start() {
        for (int tile = 0; tile < tiles; ++tile) {
            const int begin = tile_begin(tile), count = tile_begin(tile + 1) - begin;
            for (int r = 0; r < count; ++r) {
                const T* q = static_cast<const T*>(a.q) + token_of(begin + r) * a.q_stride + element_of(begin + r);
                pack_query(q, D, queries(tile), r, count);
            }
        }
        for (int r = 0; r < rows; ++r) w.states[r] = {zero(), kLowest, 1.0f};
        std::memset(w.output, 0, static_cast<size_t>(rows * DV) * sizeof(float));
    }

    typename Keys<T, K>::Query* queries(int tile) const {
        return w.queries + tile_begin(tile) * D * Keys<T, K>::kUnits / Keys<T, K>::kElements;
    }

    Tiles<Stored> tiles_at(int64_t token) const {
        Tiles<Stored> t;
        for (int b = 0; b < kChunkBlocks; ++b) {
            const int64_t index = min_of(highest_block, max_of(lowest_block, token / kBlockTokens + b));
            const int64_t block = item.block_table[index];
            t.k[b] = reinterpret_cast<const Stored*>(k_tile(a.cache, block, item.kv_head));
            t.v[b] = reinterpret_cast<const Stored*>(v_tile(a.cache, block, item.kv_head));
        }
        return t;
    }

    // Of E4M3 tiles; V lies behind K.
    Tiles<K> expanded(const Tiles<Stored>& now, const Tiles<Stored>& next) const {
        Tiles<K> t;
        for (int b = 0; b < kChunkBlocks; ++b) {
            if (b && now.k[b] == now.k[b - 1]) {
                t.k[b] = t.k[b - 1], t.v[b] = t.v[b - 1];
                continue;
            }
            char* to = w.expanded + b * expanded_bytes(a.cache);
            expand(now.k[b], next.k[b], tile_pair_bytes(a.cache), to);
            t.k[b] = reinterpret_cast<const K*>(to);
            t.v[b] = reinterpret_cast<const K*>(to + 2 * k_tile_bytes(a.cache));
        }
        return t;
    }

    void attend(int tile, int64_t token, const Tiles<K>& now, const Tiles<K>& next) {
        const int begin = tile_begin(tile), count = tile_begin(tile + 1) - begin;
        Seen seen[kTileRows];
        for (int r = 0; r < count; ++r) {
            const int64_t past_last = position(begin + r) + 1 - token;
            seen[r].begin = static_cast<int>(min_of(kChunk, max_of(0, past_last - a.window)));
            seen[r].end = static_cast<int>(min_of(kChunk, max_of(0, past_last)));
        }
        if (seen[0].begin == kChunk || seen[count - 1].end == 0) return;
        const int first_block = seen[0].begin / kLanes;
        const int past_block = static_cast<int>(ceil_div(seen[count - 1].end, kLanes));
        with_count<kTileRows>(count, [&](auto n) {
            score_chunk<T, K, n.value>(queries(tile), now, next, first_block, past_block, D, w.weights);
        });
        for (int r = 0; r < count; ++r)
            if (seen[r].begin < seen[r].end) weigh(w.weights + r * kChunk, scale, seen[r], w.states[begin + r]);
        const Stretch all{w.output + begin * DV, w.states + begin, w.weights, 0, kChunk, DV};
        add_seen_values(all, seen, count, now, next);
    }

    void finish() {
        for (int r = 0; r < rows; ++r) {
            T* out = static_cast<T*>(a.out) + token_of(r) * a.out_stride + element_of(r);
            const F32x16 sum = broadcast(sum_of_lanes(w.states[r].sum)), v_scale = broadcast(a.cache.v_scale);
            for (int64_t d = 0; d < D; d += kLanes)
                store_up_to(out + d, load(w.output + r * DV + d) / sum * v_scale, min_of(kLanes, D - d));
        }
    }

    const AttentionArgs& a;
    const AttentionItem& item;
    const Workspace<T, K> w;
    const int64_t D, DV, G;
    const float scale = a.scale * a.cache.k_scale;
    const int rows, tile_rows, tiles;
    int64_t lowest_block = 0, highest_block = 0;  // of the sequence, that any row sees
};

}  // namespace

void attention(const AttentionArgs& a, ThreadPool& pool, Scratch& scratch) {
    const int64_t bytes = workspace_bytes(a.cache);
    char* memory = static_cast<char*>(scratch.reserve(static_cast<size_t>(pool.threads() * bytes)));
    with_type(a.type, [&](auto element) {
        using T = typename decltype(element)::type;
        const bool narrow = a.cache.type == DType::e4m3;
        pool.parallel_for(a.num_items, 1, [&](int64_t begin, int64_t end, int thread) {
            char* own = memory + thread * bytes;
            for (int64_t i = begin; i < end; ++i)
                narrow ? ItemRun<T, e4m3>(a, a.items[i], own).run() : ItemRun<T, T>(a, a.items[i], own).run();
        });
    });
}

}  // namespace ENGINE_ISA
}  // namespace engine
