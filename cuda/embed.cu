// embed: out[t] = table[token_ids[t]], converted to out's type.
//
//   table [V, C] bf16, f16 or f32, rows table_stride elements apart; token_ids [T] int32, checked by the caller
//   out   [T, C] bf16, f16 or f32, rows out_stride apart
//
// Grid: T blocks of any multiple of 32 threads; a block owns a row, a thread eight neighbours at a time. No shared
// memory. Moves C elements in and C out per token; rows that do not start at 16 bytes go element by element.
// Reference: ReferenceOps.embed.
#include "common.cuh"
#include "mma.cuh"

template <class In, class Out>
__device__ __forceinline__ void embed(const In* table, i64 table_stride, const int* token_ids, Out* out,
                                      i64 out_stride, int C) {
    ptx::wait_for_earlier_kernels();
    const In* from = table + token_ids[blockIdx.x] * table_stride;
    Out* to = out + blockIdx.x * out_stride;
    const bool vectors = is_aligned(from) && is_aligned(to);
    for (int c = 8 * threadIdx.x; c < C; c += 8 * blockDim.x) {
        float v[8];
        load_eight(from + c, C - c, vectors, v);
        store_eight(to + c, C - c, vectors, v);
    }
}

// embed_<table's type>_<out's type>
#define PARAMETERS(In, Out) \
    const In *table, i64 table_stride, const int *token_ids, Out *out, i64 out_stride, int C
#define ARGUMENTS table, table_stride, token_ids, out, out_stride, C
extern "C" __global__ void embed_bf16_bf16(PARAMETERS(bf16, bf16)) { embed(ARGUMENTS); }
extern "C" __global__ void embed_bf16_f16(PARAMETERS(bf16, f16)) { embed(ARGUMENTS); }
extern "C" __global__ void embed_bf16_f32(PARAMETERS(bf16, float)) { embed(ARGUMENTS); }
extern "C" __global__ void embed_f16_bf16(PARAMETERS(f16, bf16)) { embed(ARGUMENTS); }
extern "C" __global__ void embed_f16_f16(PARAMETERS(f16, f16)) { embed(ARGUMENTS); }
extern "C" __global__ void embed_f16_f32(PARAMETERS(f16, float)) { embed(ARGUMENTS); }
extern "C" __global__ void embed_f32_bf16(PARAMETERS(float, bf16)) { embed(ARGUMENTS); }
extern "C" __global__ void embed_f32_f16(PARAMETERS(float, f16)) { embed(ARGUMENTS); }
extern "C" __global__ void embed_f32_f32(PARAMETERS(float, float)) { embed(ARGUMENTS); }
