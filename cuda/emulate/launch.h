// What the launcher hands over: kernels' signatures, the launch itself. Shared by the kernels' translation unit, the
// runtime and (as ctypes structures of the same layout) engine/ops/gpu/emulator.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include <vector_types.h>

namespace emu {

struct ArgumentType {
    char kind;  // 'p' pointer, 'c' pointer to const, 'i' signed, 'u' unsigned, 'f' floating, 's' anything else
    uint32_t bytes;
};

struct KernelEntry {
    const char* name;
    void (*call)(void* const* arguments);
    const ArgumentType* types;
    uint32_t arguments;
    uint32_t max_threads;  // from __launch_bounds__; 0 where there are none
};

/// An array argument's memory; arrays that overlap are one region.
struct Region {
    const char* name;
    std::byte* base;
    uint64_t bytes;
    uint32_t writable;
    uint32_t early;  // may be read before griddepcontrol.wait: no kernel writes it
};

/// A __shared__ array: its place in the module's thread-local segment.
struct SharedArray {
    const char* name;
    uint64_t offset, bytes;
};

struct Schedule {
    enum Order : uint32_t { ascending, descending, random };
    uint32_t order;
    uint32_t lazy_copies;  // asynchronous copies land at the wait; otherwise at once
    uint64_t seed;
};

/// What a compiled module exports as `emu_module`; the launcher writes it behind the kernels' source.
struct Module {
    const KernelEntry* kernels;
    uint32_t kernel_count;
    uint32_t arena_bytes;
    void* (*arena)();  // dynamic shared memory of the operating-system thread that asks
};

struct Launch {
    const Module* module;
    const KernelEntry* kernel;
    uint3 grid, block;
    uint32_t shared_bytes;
    uint32_t poison;  // byte that fills shared memory before each block
    Schedule schedule;
    double time_limit;  // seconds
    void* const* arguments;
    const Region* regions;
    const SharedArray* arrays;  // the static ones, by offset
    uint32_t region_count, array_count;
    uint32_t report_bytes;
    uint32_t dependent;  // launched while kernels before may still run (programmatic dependent launch)
    char* report;
};

struct ThreadIndex {
    uint3 index;
};
struct LaunchIndex {
    uint3 block_index;
    dim3 block_dim, grid_dim;
};
extern ThreadIndex* current;  // the thread that runs
extern LaunchIndex launched;  // the block that runs

/// A kernel's signature, read off its type.
template <class T>
constexpr ArgumentType argument_type() {
    if (std::is_pointer_v<T>) return {std::is_const_v<std::remove_pointer_t<T>> ? 'c' : 'p', sizeof(T)};
    if (std::is_floating_point_v<T>) return {'f', sizeof(T)};
    if (std::is_integral_v<T>) return {std::is_signed_v<T> ? 'i' : 'u', sizeof(T)};
    return {'s', sizeof(T)};
}

template <class... A>
struct Signature {
    static constexpr ArgumentType types[sizeof...(A) + 1] = {argument_type<A>()..., {}};

    template <void (*kernel)(A...), std::size_t... I>
    __attribute__((no_sanitize("thread"))) static void call(void* const* arguments, std::index_sequence<I...>) {
        kernel(*static_cast<std::remove_cv_t<A>*>(arguments[I])...);
    }
};

template <auto kernel, class... A>
__attribute__((no_sanitize("thread"))) void call_kernel(void* const* arguments) {
    Signature<A...>::template call<kernel>(arguments, std::index_sequence_for<A...>{});
}

template <auto kernel, class... A>
constexpr KernelEntry entry_of(const char* name, uint32_t max_threads, void (*)(A...)) {
    return {name, call_kernel<kernel, A...>, Signature<A...>::types, sizeof...(A), max_threads};
}

/// __launch_bounds__(threads, …)
template <class... Rest>
constexpr uint32_t first_of(uint32_t max_threads, Rest...) { return max_threads; }

template <auto kernel>
constexpr KernelEntry entry(const char* name, uint32_t max_threads = 0) {
    return entry_of<kernel>(name, max_threads, kernel);
}

} // namespace emu

extern "C" int emu_launch(const emu::Launch* launch);  // 0, or 1 with a report written
