// Collects the compiled variants and lists those this CPU can run.

#include "kernels.h"

#include "cpu_features.h"

namespace engine {

#define ENGINE_ADDRESS(result, name, parameters) &name,
#define ENGINE_VARIANT(isa_namespace, isa_name)               \
    namespace isa_namespace {                                 \
    ENGINE_KERNEL_LIST(ENGINE_DECLARATION)                    \
    const Kernels table{isa_name, ENGINE_KERNEL_LIST(ENGINE_ADDRESS)}; \
    }

#ifdef ENGINE_HAVE_avx512_bf16
ENGINE_VARIANT(avx512_bf16, "avx512-bf16")
#endif
#ifdef ENGINE_HAVE_avx512
ENGINE_VARIANT(avx512, "avx512")
#endif
#ifdef ENGINE_HAVE_avx2
ENGINE_VARIANT(avx2, "avx2")
#endif
ENGINE_VARIANT(portable, "portable")

const Kernels* const* available_kernels() {
    static const Kernels* list[5] = {};
    if (list[0]) return list;
    const Kernels** end = list;
#ifdef ENGINE_HAVE_avx512_bf16
    if (cpu_has_avx512_bf16()) *end++ = &avx512_bf16::table;
#endif
#ifdef ENGINE_HAVE_avx512
    if (cpu_has_avx512()) *end++ = &avx512::table;
#endif
#ifdef ENGINE_HAVE_avx2
    if (cpu_has_avx2()) *end++ = &avx2::table;
#endif
    *end = &portable::table;
    return list;
}

}  // namespace engine
