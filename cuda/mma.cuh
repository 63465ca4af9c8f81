// The only CUDA file with inline PTX: one typed wrapper per instruction. Emulated instruction by instruction from these
// very strings (cuda/emulate/ptx.h); fragment layouts are those of the PTX ISA, restated in cuda/emulate/ptx_mma.h.
//
// Vocabulary: lane l, g = l >> 2, q = l & 3. Shared-memory addresses are 32-bit (shared_address). A wrapper that needs
// a newer architecture than the one being compiled for does not exist there, so using it is a compile error; kernels
// choose with the macros below. On nvcc's host pass everything exists and nothing is compiled.
//
//     PTX_ARCH >= 89    this architecture or newer (of __CUDA_ARCH__ / 10)
//     PTX_SM90A         wgmma: Hopper's sm_90a alone
//     PTX_SM120A        block-scaled FP4 mma, E2M1 and UE8M0 conversions: sm_120a, sm_121a
//
// Every statement is `asm volatile`; those that touch or order memory have the "memory" clobber (the emulator insists).
#pragma once

#if defined(__CUDACC_RTC__)
typedef unsigned short uint16_t;  // NVRTC has no <cstdint>
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
#else
#include <cstdint>
#endif

#if !defined(__CUDA_ARCH__)
#define PTX_ARCH 9999
#define PTX_SM90A 1
#define PTX_SM120A 1
#else
#define PTX_ARCH (__CUDA_ARCH__ / 10)
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PTX_SM90A 1
#else
#define PTX_SM90A 0
#endif
// NVRTC has no feature macro for sm_121a, only the target's number.
#if defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL) || \
    (defined(__CUDA_ARCH_SPECIFIC__) && __CUDA_ARCH_SPECIFIC__ == 1210)
#define PTX_SM120A 1
#else
#define PTX_SM120A 0
#endif
#endif

namespace ptx {

// --- Addresses -------------------------------------------------------------------------------------------------------

// The 32-bit shared-window address that ldmatrix, cp.async and mbarriers take.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- Loads of data read once (sm_80): past L1, and with a policy for L2 ----------------------------------------------
// The memory must not be written while the kernel runs. Aligned to the size.

__device__ __forceinline__ uint64_t l2_evict_first() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ uint64_t l2_evict_last() {
    uint64_t policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ void load_once_4(uint32_t (&r)[1], const void* global) {
    asm volatile("ld.global.nc.L1::no_allocate.b32 %0, [%1];" : "=r"(r[0]) : "l"(global));
}
__device__ __forceinline__ void load_once_8(uint32_t (&r)[2], const void* global) {
    asm volatile("ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "l"(global));
}
__device__ __forceinline__ void load_once_16(uint32_t (&r)[4], const void* global) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "l"(global));
}
__device__ __forceinline__ void load_once_16(uint32_t (&r)[4], const void* global, uint64_t policy) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.b32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "l"(global), "l"(policy));
}
__device__ __forceinline__ void prefetch_l2(const void* global) {
    asm volatile("prefetch.global.L2 [%0];" : : "l"(global) : "memory");
}

// --- Programmatic dependent launch (sm_90; elsewhere nothing) --------------------------------------------------------
// A kernel that waits so may be launched while those before it run (engine/ops/gpu/launch.py: WAITING): its blocks find
// their places and fetch what no kernel writes, its weights, meanwhile. Every thread waits, and before that it writes
// nothing and reads nothing else. As all kernels do so, one that has waited for the one before it has for all.

// Until the kernels before have finished and their writes are visible.
__device__ __forceinline__ void grid_dependency_wait() {
#if PTX_ARCH >= 90
    asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}
// Lets the next kernel be launched once all blocks have come here.
__device__ __forceinline__ void launch_dependents() {
#if PTX_ARCH >= 90
    asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
#endif
}
// How a kernel begins that fetches nothing before.
__device__ __forceinline__ void wait_for_earlier_kernels() {
    launch_dependents();
    grid_dependency_wait();
}

// --- cp.async (sm_80): global to shared without registers ------------------------------------------------------------

// 16 bytes past L1. Both addresses aligned to 16. `bytes_read` < 16: the rest is zeros, and 0 reads nothing.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(shared), "l"(global) : "memory");
}
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* global, uint32_t bytes_read) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared), "l"(global), "r"(bytes_read)
                 : "memory");
}
// With a policy of l2_evict_first or l2_evict_last.
__device__ __forceinline__ void cp_async_16_hint(uint32_t shared, const void* global, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;"
                 :
                 : "r"(shared), "l"(global), "l"(policy)
                 : "memory");
}
__device__ __forceinline__ void cp_async_16_hint(uint32_t shared, const void* global, uint32_t bytes_read,
                                                 uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;"
                 :
                 : "r"(shared), "l"(global), "r"(bytes_read), "l"(policy)
                 : "memory");
}
// 4 or 8 bytes through L1, aligned to their size.
template <int bytes>
__device__ __forceinline__ void cp_async_small(uint32_t shared, const void* global, uint32_t bytes_read = bytes) {
    static_assert(bytes == 4 || bytes == 8, "cp.async.ca: 4 or 8 bytes; 16 go through cp_async_16");
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                 :
                 : "r"(shared), "l"(global), "n"(bytes), "r"(bytes_read)
                 : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }
// Waits until at most `pending` of this thread's newest groups are under way; other threads' copies need a barrier too.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" : : "n"(pending) : "memory");
}
__device__ __forceinline__ void cp_async_wait_all() { asm volatile("cp.async.wait_all;" : : : "memory"); }

// --- ldmatrix (sm_75), stmatrix (sm_90): 8 × 8 matrices of 16-bit elements -------------------------------------------
// Lane 8 i + j gives the address of row j (16 bytes, aligned to 16) of matrix i; x1 uses lanes 0-7, x2 0-15. Register i
// of lane l holds elements (g, 2 q), (g, 2 q + 1) of matrix i; with _trans, elements (2 q, g), (2 q + 1, g).

__device__ __forceinline__ void ldmatrix_x1(uint32_t (&r)[1], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(row) : "memory");
}
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x1_trans(uint32_t (&r)[1], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(row) : "memory");
}
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

#if PTX_ARCH >= 90
__device__ __forceinline__ void stmatrix_x2(uint32_t row, const uint32_t (&r)[2]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};"
                 :
                 : "r"(row), "r"(r[0]), "r"(r[1])
                 : "memory");
}
__device__ __forceinline__ void stmatrix_x4(uint32_t row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :
                 : "r"(row), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 :
                 : "r"(row), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}
#endif

// --- mma (sm_80): c += A B, A 16 × k row-major, B k × 8 column-major -------------------------------------------------
// An element of 32/E bits: A register r holds row g + 8 (r & 1), k = E q + i + 4 E (r >> 1), i = 0 … E-1 from the low
// bits up; B register r column g, k = E q + i + 4 E r; C register r row g + 8 (r >> 1), column 2 q + (r & 1).
// So an ldmatrix_x4 of row-major A gives its registers when lanes 0-7, 8-15, 16-23, 24-31 point at the quarters
// (rows 0-7, first half of k), (8-15, first), (0-7, second), (8-15, second); row-major [N, K] weights give B by
// ldmatrix_x2 (rows n, halves of k).

__device__ __forceinline__ void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// fp8: sm_89.
#if PTX_ARCH >= 89
__device__ __forceinline__ void mma_m16n8k32_e4m3(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif
// s8 into s32, which wraps.
__device__ __forceinline__ void mma_m16n8k16_s8(int (&c)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}
__device__ __forceinline__ void mma_m16n8k32_s8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// --- mma.sp (sm_80): the same with 2:4 sparse A ----------------------------------------------------------------------
// k counts B's rows; A's registers hold the kept half, laid out as a dense A of k / 2. Metadata nibble i0 | i1 << 2,
// i0 < i1, of chunk c of a row: its kept elements 2 c, 2 c + 1 stand at k = 4 c + i0, 4 c + i1. Lane 4 g + j gives,
// with selector f (0 or 1), for
//     m16n8k32, 16 bits   if j = 2 f + h: bits 0-15 row g, bits 16-31 row g + 8, k in [16 h, + 16); else ignored
//     m16n8k32, s8        if j = 2 f + h: row g + 8 h, all k (derived, check on hardware); else ignored
//     m16n8k64, s8        row g + 8 (j & 1), k in [32 (j >> 1), + 32)

template <int selector>
__device__ __forceinline__ void mma_sp_m16n8k32_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                                     uint32_t metadata) {
    static_assert(selector == 0 || selector == 1, "the sparsity selector of k = 32 is 0 or 1");
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
          "n"(selector));
}
template <int selector>
__device__ __forceinline__ void mma_sp_m16n8k32_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                                    uint32_t metadata) {
    static_assert(selector == 0 || selector == 1, "the sparsity selector of k = 32 is 0 or 1");
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
          "n"(selector));
}
template <int selector>
__device__ __forceinline__ void mma_sp_m16n8k32_s8(int (&c)[4], const uint32_t (&a)[2], const uint32_t (&b)[2],
                                                   uint32_t metadata) {
    static_assert(selector == 0 || selector == 1, "the sparsity selector of k = 32 is 0 or 1");
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6, %7}, "
        "{%0, %1, %2, %3}, %8, %9;"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b[0]), "r"(b[1]), "r"(metadata), "n"(selector));
}
__device__ __forceinline__ void mma_sp_m16n8k64_s8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                                   uint32_t metadata) {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0;"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata));
}

// --- Block-scaled FP4 mma (sm_120a) ----------------------------------------------------------------------------------
// E2M1 elements, E = 8 per register in the layout above. Scales of A's row m come from lane 4 (m % 8) + 2 thread_a +
// m / 8, of B's column n from lane 4 n + thread_b. nvfp4: all four bytes (UE4M3), byte j for k in [16 j, + 16), sparse
// [32 j, + 32). mxfp4: two bytes (UE8M0) from byte_a or byte_b (0 or 2) on, one per 32 k, sparse 64.
// Sparse: metadata of lane l is row g + 8 (l & 1), k in [64 ((l >> 1) & 1), + 64); nibble c = i0 | i1 << 2 of the c-th
// 8 of them: stored codes 4 c, 4 c + 1 stand at k = 8 c + 2 i0 + {0, 1}, codes 4 c + 2, 4 c + 3 at 8 c + 2 i1 + {0, 1}.
// Its B registers are those of two dense k = 64 tiles, one after the other. Unproven on hardware: thread_a or thread_b
// other than 0 with sparse nvfp4.
#if PTX_SM120A
template <int thread_a = 0, int thread_b = 0>
__device__ __forceinline__ void mma_m16n8k64_nvfp4(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                   uint32_t scales_a, uint32_t scales_b) {
    asm volatile(
        "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, %10, {0, %12}, %11, {0, %13};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(scales_a), "r"(scales_b),
          "n"(thread_a), "n"(thread_b));
}
template <int byte_a = 0, int byte_b = 0, int thread_a = 0, int thread_b = 0>
__device__ __forceinline__ void mma_m16n8k64_mxfp4(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                   uint32_t scales_a, uint32_t scales_b) {
    asm volatile(
        "mma.sync.aligned.m16n8k64.row.col.kind::mxf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, %10, {%12, %13}, %11, {%14, %15};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(scales_a), "r"(scales_b), "n"(byte_a),
          "n"(thread_a), "n"(byte_b), "n"(thread_b));
}
template <int thread_a = 0, int thread_b = 0>
__device__ __forceinline__ void mma_sp_m16n8k128_nvfp4(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                                       uint32_t metadata, uint32_t scales_a, uint32_t scales_b) {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k128.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1."
        "e2m1.f32.ue4m3 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0, "
        "%13, {0, %15}, %14, {0, %16};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
          "r"(scales_a), "r"(scales_b), "n"(thread_a), "n"(thread_b));
}
template <int byte_a = 0, int byte_b = 0, int thread_a = 0, int thread_b = 0>
__device__ __forceinline__ void mma_sp_m16n8k128_mxfp4(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                                       uint32_t metadata, uint32_t scales_a, uint32_t scales_b) {
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k128.row.col.kind::mxf4.block_scale.scale_vec::2X.f32.e2m1.e2m1."
        "f32.ue8m0 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0, "
        "%13, {%15, %16}, %14, {%17, %18};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
          "r"(scales_a), "r"(scales_b), "n"(byte_a), "n"(thread_a), "n"(byte_b), "n"(thread_b));
}

// --- Conversions of sm_120a ------------------------------------------------------------------------------------------
// Nearest, ties to even, saturating. Eight values to E2M1 codes, x[0] in the lowest nibble.
__device__ __forceinline__ uint32_t e2m1x8(const float (&x)[8]) {
    uint32_t codes;
    asm volatile(
        "{.reg .b8 p0, p1, p2, p3;\n"
        "cvt.rn.satfinite.e2m1x2.f32 p0, %2, %1;\n"
        "cvt.rn.satfinite.e2m1x2.f32 p1, %4, %3;\n"
        "cvt.rn.satfinite.e2m1x2.f32 p2, %6, %5;\n"
        "cvt.rn.satfinite.e2m1x2.f32 p3, %8, %7;\n"
        "mov.b32 %0, {p0, p1, p2, p3};}"
        : "=r"(codes)
        : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "f"(x[4]), "f"(x[5]), "f"(x[6]), "f"(x[7]));
    return codes;
}
// Eight E2M1 codes to fp16 pairs: h[i] holds codes 2 i (low half) and 2 i + 1.
__device__ __forceinline__ void f16x8_of_e2m1(uint32_t (&h)[4], uint32_t codes) {
    asm volatile(
        "{.reg .b8 p0, p1, p2, p3;\n"
        "mov.b32 {p0, p1, p2, p3}, %4;\n"
        "cvt.rn.f16x2.e2m1x2 %0, p0;\n"
        "cvt.rn.f16x2.e2m1x2 %1, p1;\n"
        "cvt.rn.f16x2.e2m1x2 %2, p2;\n"
        "cvt.rn.f16x2.e2m1x2 %3, p3;}"
        : "=r"(h[0]), "=r"(h[1]), "=r"(h[2]), "=r"(h[3])
        : "r"(codes));
}
// UE8M0 (powers of two) of magnitudes, rounded upward: `low` in the low byte.
__device__ __forceinline__ uint16_t ue8m0x2(float low, float high) {
    uint16_t codes;
    asm volatile("cvt.rp.satfinite.ue8m0x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
    return codes;
}
#endif

// --- 1 / x to about a unit in the last place; subnormal x counts as 0, a subnormal result becomes 0 --------------------
__device__ __forceinline__ float reciprocal(float x) {
    float result;
    asm volatile("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// --- E4M3 conversions (sm_89): nearest, ties to even, saturating to ±448; `low` in the low byte ----------------------
#if PTX_ARCH >= 89
__device__ __forceinline__ uint16_t e4m3x2(float low, float high) {
    uint16_t codes;
    asm volatile("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
    return codes;
}
// The low code to the low half.
__device__ __forceinline__ uint32_t f16x2_of_e4m3(uint16_t codes) {
    uint32_t halves;
    asm volatile("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
    return halves;
}
#endif

// --- Named barriers: 16 per block, 0 is __syncthreads's; `threads` a multiple of 32 ----------------------------------
__device__ __forceinline__ void barrier_sync(uint32_t id, uint32_t threads) {
    asm volatile("bar.sync %0, %1;" : : "r"(id), "r"(threads) : "memory");
}
// Counts as having come, and goes on: producers that need not wait.
__device__ __forceinline__ void barrier_arrive(uint32_t id, uint32_t threads) {
    asm volatile("bar.arrive %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

// --- mbarrier, bulk copies (sm_90) -----------------------------------------------------------------------------------
// A barrier is 8 bytes of shared memory, aligned to 8. A phase ends when `count` arrivals have come and as many bytes
// have landed as were announced; the next begins at once. Phases are told apart by parity, 0 first.
#if PTX_ARCH >= 90
// By one thread; then fence_mbarrier_init and a block barrier before anyone uses it.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(barrier) : "memory");
}
// Arrives and announces bytes that bulk copies will bring.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(barrier), "r"(bytes) : "memory");
}
// Waits until the phase of this parity has ended.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
    uint32_t done;
    do {
        asm volatile(
            "{.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.b32 %0, 1, 0, p;}"
            : "=r"(done)
            : "r"(barrier), "r"(parity)
            : "memory");
    } while (!done);
}
// Contiguous bytes from global to shared memory by the copy engine; addresses and size multiples of 16.
__device__ __forceinline__ void bulk_copy(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :
                 : "r"(shared), "l"(global), "r"(bytes), "r"(barrier)
                 : "memory");
}
// Makes this thread's writes to shared memory visible to wgmma and bulk copies (then comes a barrier, then they start).
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }
#endif

// --- wgmma (sm_90a) --------------------------------------------------------------------------------------------------
// c += A B, or c = A B where `add` is false, for a warpgroup (128 threads, aligned): A 64 × 16, B 16 × N, bf16, fp32
// accumulators. Warp w of the group holds rows 16 w …: accumulator register 4 j + r row 16 w + g + 8 (r >> 1), column
// 8 j + 2 q + (r & 1). A as registers: mma_m16n8k16's fragment of the warp's rows. A and B in shared memory by
// descriptor: transpose 0: k contiguous (K-major); 1: rows of A or columns of B contiguous.
//
// The order is: wgmma_fence, the products, wgmma_commit, and wgmma_wait<pending groups> before accumulators are read or
// registers or shared memory they use are written. fence_async_proxy precedes, where threads wrote the shared memory.
#if PTX_SM90A
enum class Swizzle { none = 0, bytes_128 = 1, bytes_64 = 2, bytes_32 = 3 };

// Bytes; all multiples of 16. Canonical layouts in units of 16 bytes (8 elements), W units of swizzle:
//   K-major   none: rows of 8 at 1, groups of 8 rows at stride, the two halves of k at leading
//             else: rows of 8 at W, groups of 8 rows at stride, the halves of k side by side (leading unused)
//   MN-major  none: k at 1, 8 k at leading, groups of 8 rows at stride
//             else: k at W, 8 k at stride, W groups of 8 rows side by side, the next W at leading
// and swizzled: address bits 4-6 xor bits 7-9, of them log2 W. Tiles start at multiples of 8 · 16 W bytes; within a
// tile, the start may advance along k by 32 bytes per 16 k (K-major).
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t start, uint32_t leading, uint32_t stride,
                                                      Swizzle swizzle) {
    return static_cast<uint64_t>(start >> 4 & 0x3FFF) | static_cast<uint64_t>(leading >> 4 & 0x3FFF) << 16 |
           static_cast<uint64_t>(stride >> 4 & 0x3FFF) << 32 | static_cast<uint64_t>(swizzle) << 62;
}
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(pending) : "memory");
}
// Moves registers between warpgroups: multiples of 8 from 24 to 240, by all warps of a warpgroup.
template <int registers>
__device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(registers));
}
template <int registers>
__device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(registers));
}

template <int transpose_a = 0, int transpose_b = 0>
__device__ __forceinline__ void wgmma_m64n64k16_bf16(float (&c)[32], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{.reg .pred p;\n"
        "setp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, p, 1, 1, %35, %36;}"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
          "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
          "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
          "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])
        : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(transpose_a), "n"(transpose_b)
        : "memory");
}
template <int transpose_b = 0>
__device__ __forceinline__ void wgmma_m64n64k16_bf16(float (&c)[32], const uint32_t (&a)[4], uint64_t b, bool add) {
    asm volatile(
        "{.reg .pred p;\n"
        "setp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, p, 1, 1, %38;}"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
          "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
          "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
          "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), "n"(transpose_b)
        : "memory");
}
template <int transpose_a = 0, int transpose_b = 0>
__device__ __forceinline__ void wgmma_m64n128k16_bf16(float (&c)[64], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{.reg .pred p;\n"
        "setp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, p, 1, 1, %67, %68;}"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
          "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
          "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
          "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]),
          "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]),
          "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]),
          "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]),
          "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63])
        : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(transpose_a), "n"(transpose_b)
        : "memory");
}
template <int transpose_b = 0>
__device__ __forceinline__ void wgmma_m64n128k16_bf16(float (&c)[64], const uint32_t (&a)[4], uint64_t b, bool add) {
    asm volatile(
        "{.reg .pred p;\n"
        "setp.ne.b32 p, %69, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, p, 1, 1, %70;}"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
          "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
          "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
          "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]),
          "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]),
          "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]),
          "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]),
          "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), "n"(transpose_b)
        : "memory");
}
// Sparse: A 64 × 32, two of every four k kept, 64 × 16 as stored; B 32 × 128; both K-major. A warp's metadata and
// selector are those of mma_sp_m16n8k32 for its 16 rows (CUTLASS's ELayout_64x32; not seen on hardware).
template <int selector>
__device__ __forceinline__ void wgmma_sp_m64n128k32_bf16(float (&c)[64], uint64_t a, uint64_t b, uint32_t metadata,
                                                         bool add) {
    static_assert(selector == 0 || selector == 1, "the sparsity selector of k = 32 is 0 or 1");
    asm volatile(
        "{.reg .pred p;\n"
        "setp.ne.b32 p, %68, 0;\n"
        "wgmma.mma_async.sp.sync.aligned.m64n128k32.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, %66, %67, p, 1, 1, 0, 0;}"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
          "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
          "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
          "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]),
          "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]),
          "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]),
          "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]),
          "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63])
        : "l"(a), "l"(b), "r"(metadata), "n"(selector), "r"(static_cast<int>(add))
        : "memory");
}
template <int selector>
__device__ __forceinline__ void wgmma_sp_m64n128k32_bf16(float (&c)[64], const uint32_t (&a)[4], uint64_t b,
                                                         uint32_t metadata, bool add) {
    static_assert(selector == 0 || selector == 1, "the sparsity selector of k = 32 is 0 or 1");
    asm volatile(
        "{.reg .pred p;\n"
        "setp.ne.b32 p, %71, 0;\n"
        "wgmma.mma_async.sp.sync.aligned.m64n128k32.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, %69, %70, p, 1, 1, 0;}"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
          "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
          "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
          "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]),
          "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]),
          "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]),
          "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]),
          "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), "n"(selector),
          "r"(static_cast<int>(add))
        : "memory");
}
template <int transpose_a = 0, int transpose_b = 0>
__device__ __forceinline__ void wgmma_m64n256k16_bf16(float (&c)[128], uint64_t a, uint64_t b, bool add) {
    asm volatile(
        "{.reg .pred p;\n"
        "setp.ne.b32 p, %130, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "%128, %129, p, 1, 1, %131, %132;}"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
          "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
          "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
          "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]),
          "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]),
          "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]),
          "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]),
          "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63]),
          "+f"(c[64]), "+f"(c[65]), "+f"(c[66]), "+f"(c[67]), "+f"(c[68]), "+f"(c[69]), "+f"(c[70]), "+f"(c[71]),
          "+f"(c[72]), "+f"(c[73]), "+f"(c[74]), "+f"(c[75]), "+f"(c[76]), "+f"(c[77]), "+f"(c[78]), "+f"(c[79]),
          "+f"(c[80]), "+f"(c[81]), "+f"(c[82]), "+f"(c[83]), "+f"(c[84]), "+f"(c[85]), "+f"(c[86]), "+f"(c[87]),
          "+f"(c[88]), "+f"(c[89]), "+f"(c[90]), "+f"(c[91]), "+f"(c[92]), "+f"(c[93]), "+f"(c[94]), "+f"(c[95]),
          "+f"(c[96]), "+f"(c[97]), "+f"(c[98]), "+f"(c[99]), "+f"(c[100]), "+f"(c[101]), "+f"(c[102]), "+f"(c[103]),
          "+f"(c[104]), "+f"(c[105]), "+f"(c[106]), "+f"(c[107]),
          "+f"(c[108]), "+f"(c[109]), "+f"(c[110]), "+f"(c[111]),
          "+f"(c[112]), "+f"(c[113]), "+f"(c[114]), "+f"(c[115]),
          "+f"(c[116]), "+f"(c[117]), "+f"(c[118]), "+f"(c[119]),
          "+f"(c[120]), "+f"(c[121]), "+f"(c[122]), "+f"(c[123]), "+f"(c[124]), "+f"(c[125]), "+f"(c[126]), "+f"(c[127])
        : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(transpose_a), "n"(transpose_b)
        : "memory");
}
template <int transpose_b = 0>
__device__ __forceinline__ void wgmma_m64n256k16_bf16(float (&c)[128], const uint32_t (&a)[4], uint64_t b, bool add) {
    asm volatile(
        "{.reg .pred p;\n"
        "setp.ne.b32 p, %133, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
        "{%128, %129, %130, %131}, %132, p, 1, 1, %134;}"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
          "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
          "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
          "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]),
          "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]),
          "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]),
          "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]),
          "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63]),
          "+f"(c[64]), "+f"(c[65]), "+f"(c[66]), "+f"(c[67]), "+f"(c[68]), "+f"(c[69]), "+f"(c[70]), "+f"(c[71]),
          "+f"(c[72]), "+f"(c[73]), "+f"(c[74]), "+f"(c[75]), "+f"(c[76]), "+f"(c[77]), "+f"(c[78]), "+f"(c[79]),
          "+f"(c[80]), "+f"(c[81]), "+f"(c[82]), "+f"(c[83]), "+f"(c[84]), "+f"(c[85]), "+f"(c[86]), "+f"(c[87]),
          "+f"(c[88]), "+f"(c[89]), "+f"(c[90]), "+f"(c[91]), "+f"(c[92]), "+f"(c[93]), "+f"(c[94]), "+f"(c[95]),
          "+f"(c[96]), "+f"(c[97]), "+f"(c[98]), "+f"(c[99]), "+f"(c[100]), "+f"(c[101]), "+f"(c[102]), "+f"(c[103]),
          "+f"(c[104]), "+f"(c[105]), "+f"(c[106]), "+f"(c[107]),
          "+f"(c[108]), "+f"(c[109]), "+f"(c[110]), "+f"(c[111]),
          "+f"(c[112]), "+f"(c[113]), "+f"(c[114]), "+f"(c[115]),
          "+f"(c[116]), "+f"(c[117]), "+f"(c[118]), "+f"(c[119]),
          "+f"(c[120]), "+f"(c[121]), "+f"(c[122]), "+f"(c[123]), "+f"(c[124]), "+f"(c[125]), "+f"(c[126]), "+f"(c[127])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)), "n"(transpose_b)
        : "memory");
}
#endif

}  // namespace ptx
