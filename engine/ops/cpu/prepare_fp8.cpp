// prepare_fp8: rows of activations into E4M3 with a scale each, bit for bit what engine/ops/fp8.py defines.

#include "e4m3_lanes.h"
#include "kernels.h"
#include "operand_rows.h"

namespace engine {
namespace ENGINE_ISA {

bool prepare_fp8(const PrepareFp8Args& a, ThreadPool& pool, Scratch& scratch) {
    const int64_t K = a.rows.K;
    return for_each_row(a.rows, first_refused(a.rows), pool, scratch, [&](int64_t t, const float* row, float amax) {
        const float rule = amax / 448.0f, scale = rule > 1e-9f ? rule : 1e-9f;
        a.scale[t] = scale;
        for (int64_t k = 0; k < K; k += kLanes)
            store_bytes(a.codes + t * K + k, encode_e4m3(load(row + k) / broadcast(scale)), min_of(kLanes, K - k));
    });
}

}  // namespace ENGINE_ISA
}  // namespace engine
