// The only CUDA file with inline PTX: one typed wrapper per instruction. Emulated instruction by instruction from these
// very strings (cuda/emulate/ptx.h); fragment layouts are those of the PTX ISA, restated in cuda/emulate/ptx_mma.h.
//
// Vocabulary: lane l, g = l >> 2, q = l & 3. Shared-memory addresses are 32-bit (shared_address). A wrapper that needs a
// newer architecture than the one being compiled for does not exist there, so using it is a compile error; kernels
// choose with the macros below. On nvcc's host pass everything exists and nothing is compiled.
//
//     PTX_ARCH >= 89    this architecture or newer (of __CUDA_ARCH__ / 10)
//     PTX_SM90A         wgmma: Hopper's sm_90a alone
//     PTX_SM120A        block-scaled FP4 mma, E2M1 and UE8M0 conversions: sm_120a, sm_121a
//
// Every statement is `asm volatile`; those that touch or order memory have the "memory" clobber (the emulator insists).
#pragma once

#if defined(__CUDACC_RTC__)
typedef unsigned int uint32_t;  // NVRTC has no <cstdint>
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
#if defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL)
#define PTX_SM120A 1
#else
#define PTX_SM120A 0
#endif
#endif

namespace ptx {

// --- Addresses --------------------------------------------------------------------------------------------------------

// The 32-bit shared-window address that ldmatrix, cp.async and mbarriers take.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- cp.async (sm_80): global to shared without registers ---------------------------------------------------------------

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
// With an L2 policy from a createpolicy_* below.
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

// --- ldmatrix (sm_75), stmatrix (sm_90): 8 × 8 matrices of 16-bit elements ----------------------------------------------
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

// --- mma (sm_80): c += A B, A 16 × k row-major, B k × 8 column-major ------------------------------------------------------
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

}  // namespace ptx
