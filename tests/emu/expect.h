// Checks of launches on the emulator.
#pragma once

#include <string>

#include "../cpp/tally.h"
#include "simt.h"

// A launch that ends with an error abandons its threads without unwinding, so that their allocations leak.
extern "C" inline __attribute__((used, visibility("default"))) const char* __asan_default_options() {
    return "detect_leaks=0";
}

namespace emu_test {

using native_test::tally;

// The error message of a launch, empty if it succeeds.
template <class Launch>
std::string error_of(const Launch& run) {
    try {
        run();
    } catch (const simt::Error& error) {
        return error.what();
    }
    return "";
}

}  // namespace emu_test

#define EXPECT_ERROR(run, word)                                                                                        \
    do {                                                                                                               \
        const std::string message = emu_test::error_of(run);                                                           \
        emu_test::tally.check(message.find(word) != std::string::npos, "error names \"" word "\"", __FILE__, __LINE__, \
                              message);                                                                                \
    } while (0)
