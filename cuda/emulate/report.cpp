// Reports: see report.h.
#include "report.h"

#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace emu {

Image kernel_image;
volatile bool watchdog_expired = false;

namespace {

const Launch* reported = nullptr;

std::string triple(uint3 v) {
    return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

[[noreturn]] void finish(const std::string& where, const void* pc, const char* format, va_list arguments) {
    char sentence[3000];
    std::vsnprintf(sentence, sizeof sentence, format, arguments);
    if (!current) {  // a model used outside a launch: nobody to report to
        std::fprintf(stderr, "emulator: %s\n", sentence);
        std::abort();
    }
    auto& thread = *static_cast<Thread*>(current);
    std::string place = pc ? "\n  at " + name_of_pc(pc) : "";
    std::snprintf(reported->report, reported->report_bytes, "%s%s\n  in kernel %s, block %s, %s%s", where.c_str(), sentence,
                  reported->kernel->name, triple(launched.block_index).c_str(), name_of(thread).c_str(), place.c_str());
    block.leave();
}

} // namespace

void begin_report(const Launch& launch) {
    reported = &launch;
    launch.report[0] = 0;
}

void fail(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    finish("", kernel_pc(), format, arguments);
}

void fail_at(Site site, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    finish(std::string(site.file) + ":" + std::to_string(site.line) + ": ", kernel_pc(), format, arguments);
}

void fail_in_kernel(const void* pc, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    finish("", pc, format, arguments);
}

void report_time_limit(const void* pc) {
    fail_in_kernel(pc, "the time limit of %g s is over: the kernel never ends, or needs more", reported->time_limit);
}

/// The runtime is compiled with frame pointers: each frame starts with the caller's frame and the return address.
const void* kernel_pc() {
    auto* frame = static_cast<void* const*>(__builtin_frame_address(0));
    while (block.stacks().contains(frame)) {
        if (kernel_image.contains(frame[1])) return frame[1];
        auto* caller = static_cast<void* const*>(frame[0]);
        if (caller <= frame) break;
        frame = caller;
    }
    return nullptr;
}

std::string name_of(const Thread& thread) { return "thread " + triple(thread.index); }

std::string describe_wait(const Thread& thread) {
    std::string at = std::string(", ") + thread.site.file + ":" + std::to_string(thread.site.line);
    char mask[16];
    std::snprintf(mask, sizeof mask, "0x%08x", thread.waits_for);
    switch (thread.state) {
        case State::ready: return "ready";
        case State::meeting: return std::string("waits in a warp operation for lanes ") + mask + at;
        case State::block_barrier: return "waits at __syncthreads" + at;
        case State::named_barrier: return "waits at barrier " + std::to_string(thread.waits_for) + at;
        case State::polling: return "waits for a condition" + at;
        case State::resting: return "has yielded";
        case State::ended: return "has ended";
    }
    return "";
}

std::string name_of_pc(const void* pc) {
    Dl_info info{};
    dladdr(pc, &info);
    char text[40];  // the call's own address, not the one it returns to
    std::snprintf(text, sizeof text, "{pc 0x%zx}", size_t(pc) - 1 - size_t(info.dli_fbase));
    return text;
}

} // namespace emu
