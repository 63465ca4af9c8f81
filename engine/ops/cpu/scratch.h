// Working memory of the kernels.
#pragma once

#include <cstddef>

namespace engine {

// Memory that only grows, 64-byte aligned, reused by every operation; contents do not survive the next reserve().
class Scratch {
public:
    Scratch() = default;
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    void* reserve(size_t bytes);

private:
    void* data_ = nullptr;
    size_t bytes_ = 0;
};

}  // namespace engine
