#include "fibers.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emu {

#if defined(__x86_64__)

// void emu_switch(void** save_to, void* load_from): the System V ABI's callee-saved registers go onto the old stack.
asm(R"(
    .text
    .globl emu_switch
    .hidden emu_switch
    .type emu_switch, @function
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emu_switch, .-emu_switch
)");
extern "C" void emu_switch(void** save_to, void* load_from);

void fiber_switch(Fiber& from, Fiber& to) { emu_switch(&from.stack_pointer, to.stack_pointer); }

void fiber_prepare(Fiber& fiber, std::byte* stack, size_t bytes, void (*entry)()) {
    auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t(63);
    auto* frame = reinterpret_cast<void**>(top) - 8;  // r15 r14 r13 r12 rbx rbp, entry, a null return address
    std::memset(frame, 0, 8 * sizeof(void*));
    frame[6] = reinterpret_cast<void*>(entry);  // entered with the stack pointer 8 below a multiple of 16, as after a call
    fiber.stack_pointer = frame;
}

#else

void fiber_switch(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

void fiber_prepare(Fiber& fiber, std::byte* stack, size_t bytes, void (*entry)()) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
}

#endif

StackPool::StackPool() {
    void* memory = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
        std::fprintf(stderr, "emulator: no address space for %zu MiB of thread stacks\n", bytes() >> 20);
        std::abort();
    }
    base_ = static_cast<std::byte*>(memory);
    for (unsigned i = 0; i < kStacks; ++i) mprotect(base_ + i * kStackBytes, kGuardBytes, PROT_NONE);
}

void StackPool::prepare(Fiber& fiber, unsigned index, void (*entry)()) {
    // Tops at different offsets within a page: stacks a power of two apart would share the same few cache sets.
    size_t stagger = index % 61 * 192;
    fiber_prepare(fiber, base_ + index * kStackBytes, kStackBytes - stagger, entry);
}

} // namespace emu
