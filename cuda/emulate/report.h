// What a failed launch says. emu::fail (warp.h) ends the launch; these name the parts of its sentences.
#pragma once

#include <string>

#include "block.h"
#include "image.h"

namespace emu {

/// The module of the launch's kernels.
extern Image kernel_image;

/// Where the running thread's kernel called the runtime: the innermost return address in its own code, or null.
const void* kernel_pc();

/// Set by the watchdog's signal. Whoever switches threads looks at it.
extern volatile bool watchdog_expired;
[[noreturn]] void report_time_limit(const void* pc);

std::string name_of(const Thread& thread);       // "thread (3, 0, 0)"
std::string describe_wait(const Thread& thread); // "waits at __syncthreads, norm.cu:31"

/// A place in the kernel's machine code, "{pc 0x12f4}"; the launcher replaces it by file and line.
/// `pc` is the address that a call in it returns to.
std::string name_of_pc(const void* pc);

/// Ends the launch like fail, for trouble at a known place in the kernel's code (null: unknown).
[[noreturn]] void fail_in_kernel(const void* pc, const char* format, ...) __attribute__((format(printf, 2, 3)));

/// Starts the report of one launch in the caller's buffer.
void begin_report(const Launch& launch);

} // namespace emu
