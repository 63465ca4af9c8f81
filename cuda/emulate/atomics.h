// Atomics on shared and global memory. One thread runs at a time, so the operations are plain; the runtime is told of
// them (emu::begin_atomic), for the race check and so that a spinning thread lets the others run.
#pragma once

namespace emu {

/// Replaces *address by next(old) and returns the old value.
template <class T, class Next>
__attribute__((no_sanitize("thread"))) T atomic_update(T* address, Next next) {
    begin_atomic(address, sizeof(T));
    T old = *address;
    *address = next(old);
    return old;
}

} // namespace emu

#define EMU_ATOMIC(name, expression)                                                                                  \
    template <class T, class V>                                                                                       \
    T name(T* address, V operand) {                                                                                   \
        T value = T(operand);                                                                                         \
        return emu::atomic_update(address, [=](T old) __attribute__((no_sanitize("thread"))) -> T { return expression; }); \
    }                                                                                                                 \
    template <class T, class V>                                                                                       \
    T name##_block(T* address, V operand) { return name(address, operand); }
EMU_ATOMIC(atomicAdd, old + value)
EMU_ATOMIC(atomicSub, old - value)
EMU_ATOMIC(atomicExch, (void(old), value))
EMU_ATOMIC(atomicMin, value < old ? value : old)
EMU_ATOMIC(atomicMax, value > old ? value : old)
EMU_ATOMIC(atomicAnd, old & value)
EMU_ATOMIC(atomicOr, old | value)
EMU_ATOMIC(atomicXor, old ^ value)
EMU_ATOMIC(atomicInc, old >= value ? T(0) : T(old + 1))
EMU_ATOMIC(atomicDec, old == 0 || old > value ? value : T(old - 1))
#undef EMU_ATOMIC

template <class T, class C, class V>
T atomicCAS(T* address, C compare, V replacement) {
    T expected = T(compare), value = T(replacement);
    return emu::atomic_update(address, [=](T old) __attribute__((no_sanitize("thread"))) { return old == expected ? value : old; });
}
