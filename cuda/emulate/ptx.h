// What a rewritten `asm volatile(...)` becomes under emulation: a call of the interpreter with the same string.
//
// engine/ops/gpu/ptx_rewrite.py turns
//     asm volatile("mma… {%0,…}, …;" : "+f"(d[0]), … : "r"(a[0]), … : "memory");
// into
//     do { static ::emu::ptx::Instruction emu_asm{"mma… {%0,…}, …;", "+f,…|r,…|memory", "mma.cuh", 12, …};
//          emu_asm({::emu::ptx::inout<'f'>(d[0]), …, ::emu::ptx::in<'r'>(a[0]), …}); } while (0);
// so the strings that ptxas will read are what the tests run. ptx_program.h parses them, ptx_instructions.cpp holds the
// table of mnemonics and operands (anything not in it is an error that shows the string), and the arithmetic lives in
// pure functions over 32 lanes' registers: ptx_mma.h, ptx_fp4.h, ptx_convert.h, ptx_wgmma.h.
//
// The instruction must be a constant-initialised static: one per place (and template instantiation), parsed once, which
// is also how lanes of a warp that meet in different places are told apart.
//
// What is modelled, where the PTX ISA describes it, and how far the model is known to be right:
//     cp.async, commit_group, wait_group, wait_all  "cp.async"                                 sure; hints ignored
//     ldmatrix, stmatrix                            "ldmatrix", "stmatrix"                     sure
//     ld.global.nc, createpolicy, prefetch          the same                                   sure; hints ignored
//     bar.sync, bar.arrive                          "bar"                                      sure
//     griddepcontrol, fence, setmaxnreg             the same                                   matter to the checker alone
//     mma bf16, f16, e4m3                           "Matrix Fragments for mma.m16n8k16", k32   fragments sure; rounding
//                                                   as third parties measured it, by architecture
//     mma s8                                        the same                                   sure, exact
//     mma.sp bf16, f16 k32; s8 k64                  "Matrix Fragments for sparse mma"          metadata as CUTLASS
//                                                   arranges it; rounding derived
//     mma.sp s8 k32                                 the same                                   metadata derived
//     mma … block_scale, dense and sparse           "Block Scaling for mma.sync"               CuTe's layouts, third
//                                                   parties' rounding; selectors unseen on hardware
//     cvt e4m3x2, e2m1x2, ue8m0x2                   "cvt"                                      sure; NaN, and the sign
//                                                   of UE8M0's source, as in CUDA's headers
//     mbarrier, cp.async.bulk                       the same                                   sure
//     wgmma                                         "Asynchronous Warpgroup Level Matrix"      layouts as in CUTLASS;
//                                                   rounding as measured; runs where it is issued
//     wgmma sp bf16 k32                             the same, "wgmma.mma_async.sp"             metadata as CUTLASS's
//                                                   ELayout_64x32; rounding derived
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

namespace emu {
namespace ptx {

struct Program;

// One asm operand: its register's bits, and where to store them after each instruction that writes it.
struct Operand {
    mutable uint64_t bits;
    void* target;  // null: input
    uint8_t bytes;
};

struct Instruction {
    const char* text;
    const char* constraints;  // outputs | inputs | clobbers, comma-separated
    const char* file;
    int line;
    int arch;  // __CUDA_ARCH__, for the models that differ
    const Program* program = nullptr;
    void operator()(std::initializer_list<Operand> operands);
};

// The sizes nvcc demands of each constraint letter.
template <char letter, class T>
constexpr bool fits() {
    constexpr bool whole = std::is_integral_v<T> || std::is_enum_v<T>;
    if (letter == 'h') return whole && sizeof(T) == 2;
    if (letter == 'r') return whole && sizeof(T) == 4;
    if (letter == 'l') return (whole || std::is_pointer_v<T>)&&sizeof(T) == 8;
    if (letter == 'f') return std::is_same_v<T, float>;
    if (letter == 'd') return std::is_same_v<T, double>;
    return letter == 'n' && whole;
}

template <char letter, class T>
inline Operand in(const T& value) {
    static_assert(fits<letter, std::decay_t<T>>(), "asm operand's type does not match its constraint");
    Operand operand{0, nullptr, sizeof(T)};
    if constexpr (letter == 'n') {
        operand.bits = static_cast<uint64_t>(static_cast<int64_t>(value));
    } else {
        std::memcpy(&operand.bits, &value, sizeof(T));
    }
    return operand;
}
template <char letter, class T>
inline Operand out(T& value) {
    static_assert(letter != 'n' && fits<letter, T>(), "asm operand's type does not match its constraint");
    return {0, &value, sizeof(T)};
}
// Handing a register to the interpreter is no access of the kernel's: the checking build's compiler leaves it out.
template <char letter, class T>
__attribute__((no_sanitize("thread"))) inline Operand inout(T& value) {
    static_assert(letter != 'n' && fits<letter, T>(), "asm operand's type does not match its constraint");
    Operand operand{0, &value, sizeof(T)};
    std::memcpy(&operand.bits, &value, sizeof(T));
    return operand;
}

}  // namespace ptx
}  // namespace emu
