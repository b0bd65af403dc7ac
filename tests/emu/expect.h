// Counts checks of a test executable and prints "N passed, N failed" at the end.
#pragma once

#include <cstdio>
#include <string>

#include "simt.h"

// A launch that ends with an error abandons its threads without unwinding, so that their allocations leak.
extern "C" inline __attribute__((used, visibility("default"))) const char* __asan_default_options() {
    return "detect_leaks=0";
}

namespace emu_test {

struct Tally {
    int passed = 0, failed = 0;
    bool throws = false;  // whether check() throws instead of counting a failure, for planted faults
    void check(bool holds, const char* text, const char* file, int line, const std::string& detail = "") {
        if (!holds && throws) simt::fail(std::string(text) + ": " + detail);
        ++(holds ? passed : failed);
        if (!holds) std::printf("FAIL %s:%d %s%s%s\n", file, line, text, detail.empty() ? "" : " -- ", detail.c_str());
    }
    int finish() const {
        std::printf("%d passed, %d failed\n", passed, failed);
        return failed != 0;
    }
};

inline Tally tally;

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

#define EXPECT(condition) emu_test::tally.check((condition), #condition, __FILE__, __LINE__)
#define EXPECT_ERROR(run, word)                                                                                        \
    do {                                                                                                               \
        const std::string message = emu_test::error_of(run);                                                           \
        emu_test::tally.check(message.find(word) != std::string::npos, "error names \"" word "\"", __FILE__, __LINE__, \
                              message);                                                                                \
    } while (0)
