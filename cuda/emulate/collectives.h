// Barriers, shuffles, votes, matches and reductions: thin layers over warp.h's warp_collective.
#pragma once

// --- Barriers and fences ---------------------------------------------------------------------------------------------
inline void __syncthreads(emu::Site site = emu::Site::here()) { emu::sync_block(false, site); }
inline int __syncthreads_count(int predicate, emu::Site site = emu::Site::here()) {
    return int(emu::sync_block(predicate != 0, site));
}
inline int __syncthreads_and(int predicate, emu::Site site = emu::Site::here()) {
    return emu::sync_block(predicate != 0, site) == emu::block_threads();
}
inline int __syncthreads_or(int predicate, emu::Site site = emu::Site::here()) {
    return emu::sync_block(predicate != 0, site) != 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, emu::Site site = emu::Site::here()) { emu::sync_lanes(mask, site); }
inline void __threadfence_block() { emu::fence(); }
inline void __threadfence() { emu::fence(); }
inline void __threadfence_system() { emu::fence(); }
inline unsigned __activemask() { return emu::warp_lanes(); } // all that exist: kernels must not rely on less

namespace emu {

// --- Shuffles --------------------------------------------------------------------------------------------------------
enum class Shuffle { index, up, down, exclusive_or };

template <class T>
struct ShuffleLane {
    T value;
    unsigned operand, width;  // source lane, delta or lane mask, by the kind
    T result;
};

/// Where a lane takes its value from, by the CUDA C++ Guide: within its segment of `width` lanes, else from itself.
template <Shuffle kind>
unsigned shuffle_source(unsigned lane, unsigned operand, unsigned width) {
    unsigned first = lane & ~(width - 1), last = first + width - 1;
    switch (kind) {
        case Shuffle::index: return first + (operand & (width - 1));
        case Shuffle::up: return lane - first >= operand ? lane - operand : lane;
        case Shuffle::down: return last - lane >= operand ? lane + operand : lane;
        case Shuffle::exclusive_or: return (lane ^ operand) <= last ? lane ^ operand : lane;
    }
    __builtin_unreachable();
}

template <Shuffle kind, class T>
__attribute__((no_sanitize("thread"))) void shuffle_model(void* const lanes[32]) {
    for (unsigned lane = 0; lane < 32; ++lane) {
        auto* mine = static_cast<ShuffleLane<T>*>(lanes[lane]);
        if (!mine) continue;
        auto* source = static_cast<ShuffleLane<T>*>(lanes[shuffle_source<kind>(lane, mine->operand, mine->width)]);
        if (!source) fail("shuffle: lane %u reads a lane that is not in the mask", lane);
        mine->result = source->value;
    }
}

template <Shuffle kind, class T>
__attribute__((no_sanitize("thread"))) T shuffle(unsigned mask, T value, unsigned operand, int width, Site site) {
    if (width < 1 || width > 32 || (width & (width - 1))) fail_at(site, "shuffle: width %d", width);
    ShuffleLane<T> mine{value, operand, unsigned(width), value};
    warp_collective(mask, &mine, shuffle_model<kind, T>, site);
    return mine.result;
}

// --- Votes, matches, reductions: every lane of the mask gets a function of all lanes' values --------------------------
template <class T, class R>
struct VoteLane {
    T value;
    R result;
};

/// Rule::of(own value, own lane, lanes) for each lane.
template <class Rule, class T, class R>
__attribute__((no_sanitize("thread"))) void vote_model(void* const lanes[32]) {
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (auto* mine = static_cast<VoteLane<T, R>*>(lanes[lane])) mine->result = Rule::template of<T, R>(mine->value, lanes);
    }
}

template <class Rule, class R, class T>
__attribute__((no_sanitize("thread"))) R vote(unsigned mask, T value, Site site) {
    VoteLane<T, R> mine{value, R{}};
    warp_collective(mask, &mine, vote_model<Rule, T, R>, site);
    return mine.result;
}

struct Ballot {
    template <class T, class R>
    static R of(T, void* const lanes[32]) {
        R bits = 0;
        for (unsigned i = 0; i < 32; ++i) {
            if (auto* lane = static_cast<VoteLane<T, R>*>(lanes[i])) bits |= R(lane->value != 0) << i;
        }
        return bits;
    }
};

/// Lanes with the caller's value.
struct MatchAny {
    template <class T, class R>
    static R of(T own, void* const lanes[32]) {
        R bits = 0;
        for (unsigned i = 0; i < 32; ++i) {
            auto* lane = static_cast<VoteLane<T, R>*>(lanes[i]);
            if (lane && !std::memcmp(&lane->value, &own, sizeof own)) bits |= R(1) << i;
        }
        return bits;
    }
};

template <class Operation>
struct Reduce {
    template <class T, class R>
    static R of(T, void* const lanes[32]) {
        bool first = true;
        R total{};
        for (unsigned i = 0; i < 32; ++i) {
            auto* lane = static_cast<VoteLane<T, R>*>(lanes[i]);
            if (lane) total = first ? lane->value : Operation::apply(total, lane->value);
            first = first && !lane;
        }
        return total;
    }
};
struct Add { template <class T> static T apply(T a, T b) { return T(std::make_unsigned_t<T>(a) + std::make_unsigned_t<T>(b)); } };
struct Min { template <class T> static T apply(T a, T b) { return a < b ? a : b; } };
struct Max { template <class T> static T apply(T a, T b) { return a > b ? a : b; } };
struct And { template <class T> static T apply(T a, T b) { return a & b; } };
struct Or { template <class T> static T apply(T a, T b) { return a | b; } };
struct Xor { template <class T> static T apply(T a, T b) { return a ^ b; } };

} // namespace emu

#define EMU_SITE emu::Site site = emu::Site::here()

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMU_SITE) {
    return emu::shuffle<emu::Shuffle::index>(mask, value, unsigned(lane), width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_SITE) {
    return emu::shuffle<emu::Shuffle::up>(mask, value, delta, width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, EMU_SITE) {
    return emu::shuffle<emu::Shuffle::down>(mask, value, delta, width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, EMU_SITE) {
    return emu::shuffle<emu::Shuffle::exclusive_or>(mask, value, unsigned(lane_mask), width, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EMU_SITE) {
    return emu::vote<emu::Ballot, unsigned>(mask, unsigned(predicate != 0), site);
}
inline int __any_sync(unsigned mask, int predicate, EMU_SITE) { return __ballot_sync(mask, predicate, site) != 0; }
inline int __all_sync(unsigned mask, int predicate, EMU_SITE) { return __ballot_sync(mask, !predicate, site) == 0; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value, EMU_SITE) {
    return emu::vote<emu::MatchAny, unsigned>(mask, value, site);
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* all, EMU_SITE) {
    *all = (emu::vote<emu::MatchAny, unsigned>(mask, value, site) | ~(mask & emu::warp_lanes())) == 0xffffffffu;
    return *all ? mask : 0;
}
#define EMU_REDUCE(name, Rule, T)                                                                                     \
    inline T name(unsigned mask, T value, EMU_SITE) { return emu::vote<emu::Reduce<emu::Rule>, T>(mask, value, site); }
EMU_REDUCE(__reduce_add_sync, Add, unsigned)
EMU_REDUCE(__reduce_add_sync, Add, int)
EMU_REDUCE(__reduce_min_sync, Min, unsigned)
EMU_REDUCE(__reduce_min_sync, Min, int)
EMU_REDUCE(__reduce_max_sync, Max, unsigned)
EMU_REDUCE(__reduce_max_sync, Max, int)
EMU_REDUCE(__reduce_and_sync, And, unsigned)
EMU_REDUCE(__reduce_or_sync, Or, unsigned)
EMU_REDUCE(__reduce_xor_sync, Xor, unsigned)
#undef EMU_REDUCE
