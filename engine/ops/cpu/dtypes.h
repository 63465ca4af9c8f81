// Element types as they lie in memory. Nothing here is compiled differently per instruction set.
//
// Every function in a header that kernel files include is `static`: kernel files are compiled with AVX-512 enabled, and
// a plain `inline` function would be emitted as a weak symbol that the linker may share with code for older CPUs.
#pragma once

#include <cstdint>

namespace engine {

enum class DType : int32_t { f32, f16, bf16, e4m3 };  // e4m3: of a KV cache alone

struct f16 {
    uint16_t bits;
};
struct bf16 {
    uint16_t bits;
};
struct e4m3 {  // see engine/fp8_types.py
    uint8_t bits;
};

static inline int64_t size_of(DType type) { return type == DType::f32 ? 4 : type == DType::e4m3 ? 1 : 2; }

}  // namespace engine
