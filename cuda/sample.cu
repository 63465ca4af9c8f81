// sample: from rows of logits to the next tokens, as engine/sampler.py defines it (its steps are numbered there).
//
//     row_maxima      grid (chunks, S): the largest logit of every row and its lowest id            steps 1, 5
//     adjust_logits   grid S: masks, bias and penalties, in place, of the few tokens concerned      steps 2 to 4
//     token_weights   grid (chunks, S): exp(−(max x − x) / temperature) in float64                  step 6
//     sample_rows     grid S: top-k, min-p, top-p, the draw; greedy rows take the maximum           steps 5, 7 to 10
//
// A step launches row_maxima, then adjust_logits and row_maxima again (into other keys) if any row asks for it, then
// the last two, or sample_rows alone if all rows are greedy. V below 2^31; blocks of any multiple of 32 threads.
//
//   logits [S, V] float32, rows `stride` elements apart;  weights [S, V] float64, scratch
//   keys [S] uint64, 0 before row_maxima: order_key(largest) << 32 | ~id
//
// All that survives top-k, min-p and top-p is a beginning of one ranking (largest first, the lower id of equals
// first), kept here as the last one's key and id. It is found by three rounds of histograms of 11, 11 and 10 bits of
// the key, of tokens or of their mass. Histograms add whole numbers, hence the same result in every run; where a mass
// decides, it is then summed in float64 and the place corrected, so that fixed point never decides.
//
// Bytes moved per row: 4V for each row_maxima, 12V for token_weights, up to about 40V from L2 for top-k and top-p.
// Differs from engine/sampler.py by the last bits of exp and of sums only: another token where u·mass comes within
// about 1e-15 of a token's border. Log-probabilities are not computed here. Reference: engine.sampler.sample.
#include "common.cuh"
#include "mma.cuh"

using u64 = unsigned long long;

constexpr double kGreedyBelow = 1e-5;  // sampler.GREEDY_BELOW
constexpr double kFixedPoint = 0x1p44;  // of a mass in a histogram: 2^18 weights of at most 1 stay below 2^63
constexpr int kBins = 2048;

// Ordered as the numbers are; zeros are equal, NaN is above all.
__device__ __forceinline__ u32 order_key(float x) {
    if (x != x) return 0xffffffffu;
    const u32 bits = __float_as_uint(x + 0.0f);  // −0 becomes +0
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
constexpr u32 kKeyOfInfinity = 0xff800000u, kKeyOfMinusInfinity = 0x007fffffu;

__device__ __forceinline__ bool is_finite_key(u64 key) {
    const u32 top = static_cast<u32>(key >> 32);
    return top > kKeyOfMinusInfinity && top < kKeyOfInfinity;
}
__device__ __forceinline__ int id_of(u64 key) { return static_cast<int>(~static_cast<u32>(key)); }

extern "C" __global__ void row_maxima(const float* logits, i64 stride, u64* keys, int V) {
    ptx::wait_for_earlier_kernels();
    const float* row = logits + blockIdx.y * stride;
    u64 most = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < V; i += gridDim.x * blockDim.x)
        most = max(most, static_cast<u64>(order_key(row[i])) << 32 | ~static_cast<u32>(i));
    for (int distance = 1; distance < 32; distance *= 2) most = max(most, __shfl_xor_sync(kAllLanes, most, distance));
    if (lane_of_warp() == 0) atomicMax(keys + blockIdx.y, most);
}

// Row s: ids mask_ids[mask_start[s] … mask_start[s + 1]) become −inf; bias and penalties likewise. Ids of a row's list
// are different from each other. counts: of the token in the answer.
extern "C" __global__ void adjust_logits(float* logits, i64 stride, const int* mask_start, const int* mask_ids,
                                         const int* bias_start, const int* bias_ids, const double* bias,
                                         const int* penalty_start, const int* penalty_ids, const int* counts,
                                         const double* repetition, const double* presence, const double* frequency) {
    ptx::wait_for_earlier_kernels();
    const int s = blockIdx.x;
    float* row = logits + s * stride;
    for (int i = mask_start[s] + threadIdx.x; i < mask_start[s + 1]; i += blockDim.x)
        row[mask_ids[i]] = __uint_as_float(0xff800000u);
    __syncthreads();
    for (int i = bias_start[s] + threadIdx.x; i < bias_start[s + 1]; i += blockDim.x) {
        float& x = row[bias_ids[i]];
        x = static_cast<float>(__dadd_rn(x, bias[i]));
    }
    __syncthreads();
    for (int i = penalty_start[s] + threadIdx.x; i < penalty_start[s + 1]; i += blockDim.x) {
        float& x = row[penalty_ids[i]];
        const double scaled = x > 0 ? __ddiv_rn(x, repetition[s]) : __dmul_rn(x, repetition[s]);
        const double once = counts[i] > 0 ? presence[s] : 0.0;
        x = static_cast<float>(__dadd_rn(scaled, -__dadd_rn(__dmul_rn(frequency[s], counts[i]), once)));
    }
}

extern "C" __global__ void token_weights(const float* logits, i64 stride, const u64* keys, const double* temperature,
                                         double* weights, int V) {
    ptx::wait_for_earlier_kernels();
    const int s = blockIdx.y;
    if (temperature[s] < kGreedyBelow || !is_finite_key(keys[s])) return;
    const float* row = logits + s * stride;
    const double top = row[id_of(keys[s])];
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < V; i += gridDim.x * blockDim.x)
        weights[static_cast<i64>(s) * V + i] = exp(__ddiv_rn(__dadd_rn(row[i], -top), temperature[s]));
}

// ---- sample_rows ----------------------------------------------------------------------------------------------------

struct Scratch {
    u64 bins[kBins];
    double sums[1024];
    double group_sums[32];
    u64 totals[32];
    u64 found;  // what one thread found for all
    u64 before;
};

// A beginning of the ranking: keys larger than `key`, and of equal ones the ids up to `last`.
struct Cut {
    u32 key;
    int last;
    __device__ __forceinline__ bool keeps(u32 k, int id) const { return k > key || (k == key && id <= last); }
};

struct Row {
    const float* x;
    const double* weight;  // w[i], null where only counts are asked for
    int V;
};

// The sum of the block's numbers, the same order in every run, for every thread.
__device__ __forceinline__ double sum_of_block(double x, double* warps) {
    for (int distance = 1; distance < 32; distance *= 2) x = __dadd_rn(x, __shfl_xor_sync(kAllLanes, x, distance));
    __syncthreads();
    if (lane_of_warp() == 0) warps[warp_of_block()] = x;
    __syncthreads();
    double sum = 0.0;
    for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) sum = __dadd_rn(sum, warps[w]);
    return sum;
}

__device__ __forceinline__ u64 amount(const Row& row, int i, bool by_mass) {
    return by_mass ? static_cast<u64>(row.weight[i] * kFixedPoint) : 1;
}

// The key at which the amounts of the kept tokens, largest key first, reach `need` (at least 1; all of them, if they
// never do); scratch.before becomes the amount of larger keys.
__device__ __forceinline__ u32 key_that_reaches(const Row& row, const Cut& cut, u64 need, bool by_mass,
                                                Scratch& scratch) {
    u32 prefix = 0;
    u64 before = 0;
    for (int round = 0; round < 3; ++round) {
        const int shift = round == 0 ? 21 : round == 1 ? 10 : 0, above = round == 0 ? 32 : round == 1 ? 21 : 10;
        const u32 mask = round == 2 ? 1023 : 2047;
        __syncthreads();
        for (int b = threadIdx.x; b < kBins; b += blockDim.x) scratch.bins[b] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < row.V; i += blockDim.x) {
            const u32 key = order_key(row.x[i]);
            if (static_cast<u64>(key) >> above == prefix && cut.keeps(key, i))
                atomicAdd(&scratch.bins[key >> shift & mask], amount(row, i, by_mass));
        }
        __syncthreads();
        if (threadIdx.x == 0) {  // at most 2048 additions
            int bin = static_cast<int>(mask), lowest = bin;
            u64 sum = before;
            for (; bin >= 0 && sum < need; --bin) {
                if (scratch.bins[bin]) lowest = bin, scratch.before = sum;
                sum += scratch.bins[bin];
            }
            scratch.found = lowest;
        }
        __syncthreads();
        before = scratch.before;
        prefix = prefix << (round == 2 ? 10 : 11) | static_cast<u32>(scratch.found);
    }
    return prefix;
}

// The id of the m-th (from 1) kept token with this key in order of ids, or the last of them if there are fewer.
__device__ __forceinline__ int mth_of_equals(const Row& row, const Cut& cut, u32 key, u64 m, Scratch& scratch) {
    u64 seen = 0;
    int found = -1;
    for (int first = 0; first < row.V && found < 0; first += blockDim.x) {
        const int i = first + threadIdx.x;
        const bool equal = i < row.V && order_key(row.x[i]) == key && cut.keeps(key, i);
        const u32 lanes = __ballot_sync(kAllLanes, equal);
        __syncthreads();
        if (lane_of_warp() == 0) scratch.totals[warp_of_block()] = __popc(lanes);
        if (threadIdx.x == 0) scratch.found = 0;
        __syncthreads();
        u64 rank = seen + __popc(lanes & ((2u << lane_of_warp()) - 1));
        for (int w = 0; w < warp_of_block(); ++w) rank += scratch.totals[w];
        for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) seen += scratch.totals[w];
        if (equal && rank == m) scratch.found = static_cast<u64>(i) + 1;
        __syncthreads();
        found = static_cast<int>(scratch.found) - 1;
    }
    return found < 0 ? row.V : found;
}

// Step 7.
__device__ __forceinline__ void keep_top_k(const Row& row, int k, Cut& cut, Scratch& scratch) {
    if (k <= 0 || k >= row.V) return;
    const u32 key = key_that_reaches(row, cut, k, false, scratch);
    cut = {key, mth_of_equals(row, cut, key, k - scratch.before, scratch)};
}

// Step 8: the beginning of the ranking whose weights are at least min_p. The largest weight is 1.
__device__ __forceinline__ void keep_min_p(const Row& row, double min_p, Cut& cut, Scratch& scratch) {
    if (min_p <= 0.0) return;
    u32 least = 0xffffffffu;
    for (int i = threadIdx.x; i < row.V; i += blockDim.x)
        if (row.weight[i] >= min_p) least = min(least, order_key(row.x[i]));
    least = ~max_of_block(~least, reinterpret_cast<u32*>(scratch.totals));
    if (least > cut.key) cut = {least, row.V};
    __syncthreads();
}

struct Masses {
    double above, equal;  // of kept tokens with larger keys, and with this key
    u32 next_above, next_below;  // the kept keys beside it
};

__device__ __forceinline__ Masses masses_at(const Row& row, const Cut& cut, u32 key, Scratch& scratch) {
    double above = 0.0, equal = 0.0;
    u32 next_above = 0xffffffffu, next_below = 0;
    for (int i = threadIdx.x; i < row.V; i += blockDim.x) {
        const u32 k = order_key(row.x[i]);
        if (!cut.keeps(k, i)) continue;
        if (k > key) above = __dadd_rn(above, row.weight[i]), next_above = min(next_above, k);
        else if (k == key) equal = __dadd_rn(equal, row.weight[i]);
        else next_below = max(next_below, k);
    }
    u32* maxima = reinterpret_cast<u32*>(scratch.totals);
    Masses m;
    m.above = sum_of_block(above, scratch.group_sums);
    m.equal = sum_of_block(equal, scratch.group_sums);
    m.next_above = ~max_of_block(~next_above, maxima);
    __syncthreads();
    m.next_below = max_of_block(next_below, maxima);
    __syncthreads();
    return m;
}

// Step 9. The histograms give the key up to their rounding, the sums in float64 move it to where it belongs.
__device__ __forceinline__ void keep_top_p(const Row& row, double top_p, Cut& cut, Scratch& scratch) {
    if (top_p >= 1.0) return;
    const Masses all = masses_at(row, cut, 0, scratch);  // no finite number has key 0: `above` is everything
    const double need = __dmul_rn(top_p, all.above);
    const u64 fixed_need = max(static_cast<u64>(need * kFixedPoint), 1ull);
    u32 key = key_that_reaches(row, cut, fixed_need, true, scratch);
    Masses m = masses_at(row, cut, key, scratch);
    while (m.above >= need && m.next_above != 0xffffffffu) m = masses_at(row, cut, key = m.next_above, scratch);
    while (__dadd_rn(m.above, m.equal) < need && m.next_below != 0)
        m = masses_at(row, cut, key = m.next_below, scratch);
    if (threadIdx.x == 0) scratch.found = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < row.V; i += blockDim.x)
        if (order_key(row.x[i]) == key)  // they have one weight
            atomicMax(&scratch.found, static_cast<u64>(__double_as_longlong(row.weight[i])));
    __syncthreads();
    const double weight = __longlong_as_double(scratch.found);
    u64 count = 1;
    if (weight > 0.0) count = max(static_cast<u64>(ceil((need - m.above) / weight)), 1ull);
    __syncthreads();
    cut = {key, mth_of_equals(row, cut, key, count, scratch)};
}

// Step 10: threads sum segments of neighbouring ids, thread 0 walks to the group of segments, segment and token in
// which the running sum passes u · total.
__device__ __forceinline__ int draw(const Row& row, const Cut& cut, double u, Scratch& scratch) {
    const int threads = blockDim.x, length = ceil_div(row.V, threads), groups = threads / 32;
    const auto weight = [&](int i) { return cut.keeps(order_key(row.x[i]), i) ? row.weight[i] : 0.0; };
    double sum = 0.0;
    for (int i = threadIdx.x * length; i < min(static_cast<int>(threadIdx.x + 1) * length, row.V); ++i)
        sum = __dadd_rn(sum, weight(i));
    __syncthreads();
    scratch.sums[threadIdx.x] = sum;
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < groups) {
        double group = 0.0;
        for (int i = 0; i < 32; ++i) group = __dadd_rn(group, scratch.sums[32 * threadIdx.x + i]);
        scratch.group_sums[threadIdx.x] = group;
    }
    __syncthreads();
    if (threadIdx.x != 0) return 0;
    double total = 0.0, running = 0.0;
    for (int g = 0; g < groups; ++g) total = __dadd_rn(total, scratch.group_sums[g]);
    const double target = __dmul_rn(u, total);
    int g = 0, segment = 0, last = 0;
    for (; g < groups - 1 && __dadd_rn(running, scratch.group_sums[g]) <= target; ++g)
        running = __dadd_rn(running, scratch.group_sums[g]);
    for (segment = 32 * g; segment < threads - 1 && __dadd_rn(running, scratch.sums[segment]) <= target; ++segment)
        running = __dadd_rn(running, scratch.sums[segment]);
    for (int i = segment * length; i < row.V; ++i) {  // beyond the segment only where sums differ in their last bits
        const double w = weight(i);
        running = __dadd_rn(running, w);
        if (w > 0.0) last = i;
        if (running > target) return i;
    }
    return last;
}

// u of step 10: the first word of Philox4x64-10.
__device__ __forceinline__ double uniform(u64 key0, u64 key1, u64 counter) {
    u64 c0 = counter, c1 = 0, c2 = 0, c3 = 0;
    for (int round = 0; round < 10; ++round) {
        const u64 a = 0xd2e7470ee14c6c93ull, b = 0xca5a826395121157ull;
        const u64 high0 = __umul64hi(a, c0), low0 = a * c0, high1 = __umul64hi(b, c2), low1 = b * c2;
        c0 = high1 ^ c1 ^ key0, c1 = low1, c2 = high0 ^ c3 ^ key1, c3 = low0;
        key0 += 0x9e3779b97f4a7c15ull, key1 += 0xbb67ae8584caa73bull;
    }
    return static_cast<double>(c0 >> 11) * 0x1p-53;
}

// token_ids [S]; status [S]: 0, 1 where the raw row's maximum is not finite, 2 where the adjusted row's is not.
// raw_keys, keys [S]: of the rows before and after adjust_logits (the same array if it was not launched). seed, index:
// the key of the request's random numbers and which of its samples; position: answer tokens so far.
extern "C" __global__ void __launch_bounds__(1024, 1)  // one block per SM: there are few rows, and it needs registers
    sample_rows(const float* logits, i64 stride, const double* weights, const u64* raw_keys, const u64* keys,
                const double* temperature, const int* top_k, const double* top_p, const double* min_p, const u64* seed,
                const u64* index, const int* position, int* token_ids, int* status, int V) {
    __shared__ Scratch scratch;
    ptx::wait_for_earlier_kernels();
    const int s = blockIdx.x;
    const bool is_usable = is_finite_key(raw_keys[s]), is_choosable = is_finite_key(keys[s]);
    int token = id_of(keys[s]);
    if (is_usable && is_choosable && temperature[s] >= kGreedyBelow) {
        const Row row = {logits + s * stride, weights + static_cast<i64>(s) * V, V};
        Cut cut = {0, V};
        keep_top_k(row, top_k[s], cut, scratch);
        keep_min_p(row, min_p[s], cut, scratch);
        keep_top_p(row, top_p[s], cut, scratch);
        token = draw(row, cut, uniform(seed[s], index[s], static_cast<u64>(position[s]) + 1), scratch);
    }
    if (threadIdx.x != 0) return;
    token_ids[s] = token;
    status[s] = !is_usable ? 1 : !is_choosable ? 2 : 0;
}
