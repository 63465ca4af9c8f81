// What the compiler calls in a checking build. -fsanitize=thread puts a call before every load and store of the kernels,
// -fsanitize=alignment,bounds one where a pointer or an index breaks its type's promise. Neither libtsan nor libubsan is
// linked: these functions take the calls.
#if EMU_CHECKED

#include <cstddef>
#include <cstdint>

#include "block.h"
#include "checker.h"
#include "report.h"

namespace {

/// A load or store by the compiler's choice of type is aligned, or the GPU faults. Of 16 bytes GCC knows no more than that
/// they are aligned to 8 (it may have joined four floats of a local array); that float4 is, -fsanitize=alignment checks.
inline void access(void* pointer, size_t bytes, size_t alignment, emu::Access kind, const void* pc) {
    if (!emu::current) return;
    auto& thread = *static_cast<emu::Thread*>(emu::current);
    if (reinterpret_cast<uintptr_t>(pointer) % alignment) {
        emu::fail("misaligned: %zu bytes at address %p", bytes, pointer);
    }
    emu::checker.access(pointer, bytes, kind, thread.id, pc);
}

} // namespace

#define EMU_PC __builtin_return_address(0)
#define EMU_HOOKS(bytes)                                                                                              \
    void __tsan_read##bytes(void* p) { access(p, bytes, bytes < 8 ? bytes : 8, emu::Access::read, EMU_PC); }          \
    void __tsan_write##bytes(void* p) { access(p, bytes, bytes < 8 ? bytes : 8, emu::Access::write, EMU_PC); }        \
    void __tsan_unaligned_read##bytes(void* p) { access(p, bytes, 1, emu::Access::read, EMU_PC); }                    \
    void __tsan_unaligned_write##bytes(void* p) { access(p, bytes, 1, emu::Access::write, EMU_PC); }                  \
    void __tsan_volatile_read##bytes(void* p) { access(p, bytes, bytes, emu::Access::read, EMU_PC); }                 \
    void __tsan_volatile_write##bytes(void* p) { access(p, bytes, bytes, emu::Access::write, EMU_PC); }               \
    void __tsan_unaligned_volatile_read##bytes(void* p) { access(p, bytes, 1, emu::Access::read, EMU_PC); }           \
    void __tsan_unaligned_volatile_write##bytes(void* p) { access(p, bytes, 1, emu::Access::write, EMU_PC); }

extern "C" {
EMU_HOOKS(1)
EMU_HOOKS(2)
EMU_HOOKS(4)
EMU_HOOKS(8)
EMU_HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) { access(p, bytes, 1, emu::Access::read, EMU_PC); }
void __tsan_write_range(void* p, size_t bytes) { access(p, bytes, 1, emu::Access::write, EMU_PC); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}

// -fsanitize=alignment,bounds: what the types promise of a pointer, and the sizes of arrays within arrays.
struct Place {
    const char* file;
    uint32_t line, column;
};
struct Type {
    uint16_t kind, information;
    char name[1];
};
void __ubsan_handle_type_mismatch_v1_abort(const Place* place, uintptr_t pointer) {
    if (!emu::current) return;
    const Type* type = *reinterpret_cast<const Type* const*>(place + 1);
    emu::fail_at({place->file, int(place->line)}, "misaligned: %s at address 0x%zx", type->name, size_t(pointer));
}
void __ubsan_handle_out_of_bounds_abort(const Place* place, uintptr_t index) {
    const Type* array = *reinterpret_cast<const Type* const*>(place + 1);
    emu::fail_at({place->file, int(place->line)}, "out of bounds: index %zd of %s", ptrdiff_t(index), array->name);
}
}

#endif
