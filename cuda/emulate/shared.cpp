// Shared memory: see shared.h.
#include "shared.h"

#include <cxxabi.h>
#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace emu {

SharedMemory shared_memory;

namespace {

struct Search {
    const void* inside;
    std::byte* base;
    size_t bytes;
};

int visit(dl_phdr_info* module, size_t, void* data) {
    auto* search = static_cast<Search*>(data);
    for (int i = 0; i < module->dlpi_phnum; ++i) {
        const auto& header = module->dlpi_phdr[i];
        auto* base = static_cast<std::byte*>(module->dlpi_tls_data);
        if (header.p_type != PT_TLS || size_t(static_cast<const std::byte*>(search->inside) - base) >= header.p_memsz) continue;
        search->base = base;
        search->bytes = header.p_memsz;
        return 1;
    }
    return 0;
}

/// kernel<float>(…)::tile -> tile
std::string plain_name(const char* symbol) {
    int status = 0;
    char* demangled = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
    std::string name = status == 0 ? demangled : symbol;
    std::free(demangled);
    size_t scope = name.rfind("::");
    return scope == std::string::npos ? name : name.substr(scope + 2);
}

} // namespace

void SharedMemory::locate(const Launch& launch) {
    Search search{launch.module->arena(), nullptr, 0};
    dl_iterate_phdr(visit, &search);
    base_ = search.base;
    bytes_ = search.bytes;
    arena_ = {"", offset(search.inside), launch.shared_bytes};
    arena_capacity_ = launch.module->arena_bytes;
    arrays_ = launch.arrays;
    arrays_end_ = launch.arrays + launch.array_count;
}

void SharedMemory::poison(uint32_t value) {
    for (Range range : used()) std::memset(base_ + range.begin, int(value), range.end - range.begin);
}

const SharedArray* SharedMemory::array_at(size_t offset, size_t bytes) const {
    auto holds = [=](const SharedArray& a) { return offset >= a.offset && offset + bytes <= a.offset + a.bytes; };
    if (holds(arena_)) return &arena_;
    auto above = [](size_t value, const SharedArray& a) { return value < a.offset; };
    auto next = std::upper_bound(arrays_, arrays_end_, offset, above);
    return next != arrays_ && holds(next[-1]) ? &next[-1] : nullptr;
}

std::string SharedMemory::describe(size_t offset) const {
    auto sized = [](const std::string& name, size_t at, size_t bytes) {
        return name + ", byte " + std::to_string(at) + " of " + std::to_string(bytes);
    };
    if (offset >= arena_.offset && offset < arena_.offset + arena_capacity_) {
        return sized("dynamic shared memory", offset - arena_.offset, arena_.bytes);
    }
    const SharedArray* below = nullptr;
    for (const SharedArray* array = arrays_; array != arrays_end_ && array->offset <= offset; ++array) below = array;
    if (!below) return "shared memory, byte " + std::to_string(offset);
    return sized("shared array " + plain_name(below->name), offset - below->offset, below->bytes);
}

} // namespace emu
