// One launch: all blocks one after another, under a watchdog. The C interface that the launcher calls.
#include "launch.h"

#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <iterator>
#include <mutex>

#include "block.h"
#include "checker.h"
#include "image.h"
#include "report.h"
#include "shared.h"

namespace emu {

namespace {

/// Where a signal interrupted the kernel's own code; null if it was elsewhere.
const void* interrupted_kernel(void* context) {
#if defined(__x86_64__)
    auto pc = reinterpret_cast<std::byte*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
    if (current && kernel_image.contains(pc)) return pc + 1;  // as if a call returned behind it
#endif
    return nullptr;
}

/// A wild or misaligned access in a kernel ends the launch with a report instead of the process.
void on_fault(int signal, siginfo_t* info, void* context) {
    const char* what = signal == SIGFPE ? "integer division by zero or overflow, at" : "access to address";
    fail_in_kernel(interrupted_kernel(context), "fault: %s %p (no such memory, misaligned, or a full stack)", what,
                   info->si_addr);
}

/// Sets the flag that every switch looks at, and ends the launch from here if the kernel's own code is running: a loop
/// without a switch would never look. The runtime's code is not interrupted, it may hold malloc's lock.
void on_watchdog(int, siginfo_t*, void* context) {
    watchdog_expired = true;
    if (const void* pc = interrupted_kernel(context)) report_time_limit(pc);
}

/// Signal handlers and the timer for the duration of one launch. Whoever had them before gets them back.
class Watch {
public:
    explicit Watch(double time_limit) {
        static std::byte stack[64 * 1024];  // a fault may mean a full stack, so handlers get one of their own
        stack_t own{};
        own.ss_sp = stack;
        own.ss_size = sizeof stack;
        sigaltstack(&own, &old_stack_);
        for (size_t i = 0; i < std::size(kFaults); ++i) install(kFaults[i], on_fault, old_faults_[i]);
        install(kWatchdog, on_watchdog, old_watchdog_);
        watchdog_expired = false;
        start_timer(time_limit);
    }
    ~Watch() {
        timer_delete(timer_);
        sigaction(kWatchdog, &old_watchdog_, nullptr);
        for (size_t i = 0; i < std::size(kFaults); ++i) sigaction(kFaults[i], &old_faults_[i], nullptr);
        sigaltstack(&old_stack_, nullptr);
    }

private:
    static constexpr int kFaults[] = {SIGSEGV, SIGBUS, SIGFPE};
    const int kWatchdog = SIGRTMIN + 5;

    static void install(int signal, void (*handler)(int, siginfo_t*, void*), struct sigaction& old) {
        struct sigaction action {};
        action.sa_sigaction = handler;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER | SA_RESTART;  // left by a switch: the mask must not change
        sigaction(signal, &action, &old);
    }

    void start_timer(double seconds) {
        sigevent event{};
        event.sigev_notify = SIGEV_THREAD_ID;
        event.sigev_signo = kWatchdog;
        event._sigev_un._tid = pid_t(syscall(SYS_gettid));
        if (timer_create(CLOCK_MONOTONIC, &event, &timer_)) std::abort();
        double whole = std::floor(seconds);
        itimerspec when{};
        when.it_value = {time_t(whole), long((seconds - whole) * 1e9)};
        when.it_interval = {0, 50'000'000};  // again, until it meets the kernel's code
        timer_settime(timer_, 0, &when, nullptr);
    }

    stack_t old_stack_{};
    struct sigaction old_faults_[std::size(kFaults)], old_watchdog_;
    timer_t timer_;
};

bool run_blocks(const Launch& launch) {
    const uint3& g = launch.grid;
    launched.grid_dim = {g.x, g.y, g.z};
    launched.block_dim = {launch.block.x, launch.block.y, launch.block.z};
    unsigned linear = 0;
    for (unsigned z = 0; z < g.z; ++z) {
        for (unsigned y = 0; y < g.y; ++y) {
            for (unsigned x = 0; x < g.x; ++x) {
                launched.block_index = {x, y, z};
                if (!block.run(launch, linear++)) return false;
            }
        }
    }
    return true;
}

} // namespace

} // namespace emu

int emu_launch(const emu::Launch* launch) {
    static std::mutex one_at_a_time;  // the runtime's state is the process's
    std::lock_guard<std::mutex> lock(one_at_a_time);
    using namespace emu;
    begin_report(*launch);
    shared_memory.locate(*launch);
    kernel_image = image_of(launch->module);
    checker.begin_launch(*launch);
    bool complete;
    {
        Watch watch(launch->time_limit);
        complete = run_blocks(*launch);
    }
    checker.end_launch();
    return complete ? 0 : 1;
}
