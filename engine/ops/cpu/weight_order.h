// Which weight is multiplied after which, learnt from the products so far: a decoder's steps repeat one order.
//
// Only a hint comes of it, so a guess may be wrong, and addresses of weights long freed may stay in it.
#pragma once

#include <unordered_map>

#include "thread_pool.h"

namespace engine {

class WeightOrder {
public:
    // What followed this weight the last time, empty where nothing has yet. Notes that it follows the last one asked.
    Span after(Span weight) {
        following_[last_] = weight;
        last_ = weight.data;
        const auto found = following_.find(last_);
        return found == following_.end() ? Span{} : found->second;
    }

private:
    std::unordered_map<const char*, Span> following_;
    const char* last_ = nullptr;
};

}  // namespace engine
