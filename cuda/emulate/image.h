// A loaded module's place in memory.
#pragma once

#include <link.h>

#include <algorithm>
#include <cstddef>

namespace emu {

struct Image {
    const std::byte *begin = nullptr, *end = nullptr;
    bool contains(const void* pointer) const { return pointer >= begin && pointer < end; }
};

/// The image of the module that `inside` lies in.
inline Image image_of(const void* inside) {
    struct Search {
        const void* inside;
        Image found;
    } search{inside, {}};
    auto visit = [](dl_phdr_info* module, size_t, void* data) {
        auto& search = *static_cast<Search*>(data);
        Image image;
        for (int i = 0; i < module->dlpi_phnum; ++i) {
            const auto& header = module->dlpi_phdr[i];
            if (header.p_type != PT_LOAD) continue;
            auto* at = reinterpret_cast<const std::byte*>(module->dlpi_addr + header.p_vaddr);
            image.begin = image.begin ? std::min(image.begin, at) : at;
            image.end = std::max(image.end, at + header.p_memsz);
        }
        if (!image.contains(search.inside)) return 0;
        search.found = image;
        return 1;
    };
    dl_iterate_phdr(visit, &search);
    return search.found;
}

} // namespace emu
