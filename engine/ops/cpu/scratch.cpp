#include "scratch.h"

#include <cstdlib>
#include <new>

namespace engine {

Scratch::~Scratch() { std::free(data_); }

void* Scratch::reserve(size_t bytes) {
    if (bytes > bytes_) {
        std::free(data_);
        bytes_ = 0;
        const size_t whole_lines = (bytes + 63) / 64 * 64;
        data_ = std::aligned_alloc(64, whole_lines);
        if (!data_) throw std::bad_alloc();
        bytes_ = whole_lines;
    }
    return data_;
}

}  // namespace engine
