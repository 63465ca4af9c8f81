// What a failed launch says. emu::fail (warp.h) ends the launch; these name the parts of its sentences.
#pragma once

#include <string>

#include "block.h"

namespace emu {

/// Set while a meeting's model runs: where its accesses are reported.
extern const Site* model_site;

/// Set by the watchdog's signal. Whoever switches threads looks at it.
extern volatile bool watchdog_expired;
[[noreturn]] void report_time_limit();

std::string name_of(const Thread& thread);       // "thread (3, 0, 0)"
std::string describe_wait(const Thread& thread); // "waits at __syncthreads, norm.cu:31"

/// A place in the kernel's machine code, "{pc 0x12f4}"; the launcher replaces it by file and line.
std::string name_of_pc(const void* pc);

/// Starts the report of one launch in the caller's buffer.
void begin_report(const Launch& launch);
bool has_report();

} // namespace emu
