// Fibres: stacks and the switch between them. They know nothing of CUDA.
//
// On x86-64 the switch is nine instructions (the callee-saved registers and the stack pointer); elsewhere it is
// ucontext's swapcontext, some thirty times slower. Floating-point control words are not saved: kernels do not set them.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {

struct Fiber {
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
};

/// Leaves `from` where it is and goes on in `to`; returns when somebody switches back to `from`.
void fiber_switch(Fiber& from, Fiber& to);

/// Makes `fiber` start in entry() (which must never return) on the stack [stack, stack + bytes).
void fiber_prepare(Fiber& fiber, std::byte* stack, size_t bytes, void (*entry)());

/// One mapping that holds a stack for each of 1024 threads, made at the first launch and kept. Pages are touched on use.
class StackPool {
public:
    static constexpr size_t kStackBytes = 256 * 1024;  // kernels' own arrays are small; the PTX models need some KB
    static constexpr unsigned kStacks = 1024;          // most threads a block can have
    static constexpr size_t kGuardBytes = 16 * 1024;   // below each stack, no access: an overflow faults

    StackPool();
    void prepare(Fiber& fiber, unsigned index, void (*entry)());
    bool contains(const void* pointer) const { return size_t(static_cast<const std::byte*>(pointer) - base_) < bytes(); }

private:
    static constexpr size_t bytes() { return kStackBytes * kStacks; }
    std::byte* base_;
};

} // namespace emu
