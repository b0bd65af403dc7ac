// Runs a small kernel with injected bugs, one at a time. Each must be found, and the kernel without a bug must pass.
#pragma once

#include <cstring>
#include <string>

#include "expect.h"

namespace emu_test {

struct Outcome {
    std::string error;
    bool right = true;  // the results, if there is no error
};

template <class Bug>
struct Planted {
    Bug bug;
    const char* name;
    const char* error;           // in the report of the race checker or the emulator; empty: wrong results
    bool needs_checker = false;  // otherwise the emulator reports it, or results are wrong in some schedule
};

// Calls run() in several schedules until it fails. The checker needs one schedule.
template <class Run>
bool found(const char* error, std::string* message, const Run& run) {
    using simt::Order;
    for (int schedule = 0; schedule < 8; ++schedule) {
        simt::config().order = schedule == 0 ? Order::kRoundRobin : schedule == 1 ? Order::kReverse : Order::kRandom;
        simt::config().seed = static_cast<uint64_t>(schedule);
        const Outcome outcome = run();
        *message = outcome.error;
        if (!outcome.error.empty()) return !simt::check::kEnabled || outcome.error.find(error) != std::string::npos;
        if (!outcome.right) return !simt::check::kEnabled || !*error;
        if (simt::check::kEnabled) return false;
    }
    return false;
}

// The main function of a test: run(bug) for all bugs that the build can find, or for the one that is named, and for
// Bug::kNone.
template <class Bug, size_t kCount, class Run>
int run_planted(int argc, char** argv, const Planted<Bug> (&bugs)[kCount], const Run& run) {
    for (const Planted<Bug>& planted : bugs) {
        if (argc > 1 && std::strcmp(argv[1], planted.name)) continue;
        if (argc == 1 && planted.needs_checker && !simt::check::kEnabled) continue;
        std::string message;
        const bool is_found = found(planted.error, &message, [&] { return run(planted.bug); });
        tally.check(is_found, planted.name, __FILE__, __LINE__, message);
        if (argc > 1) std::printf("%s\n", message.c_str());
    }
    for (const auto order : {simt::Order::kRoundRobin, simt::Order::kReverse, simt::Order::kRandom}) {
        simt::config().order = order;
        const Outcome clean = run(Bug::kNone);
        tally.check(clean.error.empty() && clean.right, "the kernel without a bug passes", __FILE__, __LINE__,
                    clean.error);
    }
    return tally.finish();
}

}  // namespace emu_test
