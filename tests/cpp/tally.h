// Counts the checks of a test executable and prints "N passed, N failed" at the end.
#pragma once

#include <cstdio>
#include <string>

namespace native_test {

struct Tally {
    int passed = 0, failed = 0;
    void (*on_failure)(const std::string& message) = nullptr;  // called instead of counting a failure
    void check(bool holds, const char* text, const char* file, int line, const std::string& detail = "") {
        if (!holds && on_failure) return on_failure(std::string(text) + ": " + detail);
        ++(holds ? passed : failed);
        if (!holds) std::printf("FAIL %s:%d %s%s%s\n", file, line, text, detail.empty() ? "" : " -- ", detail.c_str());
    }
    int finish() const {
        std::printf("%d passed, %d failed\n", passed, failed);
        return failed != 0;
    }
};

inline Tally tally;

}  // namespace native_test

#define EXPECT(condition) native_test::tally.check((condition), #condition, __FILE__, __LINE__)
