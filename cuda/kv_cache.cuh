// The paged KV cache as the GPU kernels lay it out: blocks of 16 tokens, K and V apart.
//
//   k, v  [layers] [blocks] [KVH] [16] [D]      a kernel gets the pointers of its own layer
//
// A (block, head) tile [16, D] is contiguous: 4 KiB at D = 128 in 16 bits, so a decode warp streams it in 16-byte
// vectors along D, and every row starts at 16 bytes (D is a multiple of 8). For tensor cores the same tile is, as it
// lies, the B operand of both products: K with ldmatrix (n = token, D along k), V with ldmatrix.trans (k = token).
// A token's slot is block · 16 + offset. The element type is a parameter everywhere: an 8-bit cache is the same array
// of bytes.
#pragma once

#include "common.cuh"

constexpr int kBlockTokens = 16;

// Where the row [D] of a token begins, in elements from the layer's k or v.
__device__ __forceinline__ i64 kv_row(int slot, int head, int KVH, int D) {
    const i64 tile = static_cast<i64>(slot / kBlockTokens) * KVH + head;
    return (tile * kBlockTokens + slot % kBlockTokens) * D;
}
