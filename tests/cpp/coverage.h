// The edges between basic blocks that the instrumented code has taken.
#pragma once

#include <cstddef>
#include <cstdint>

namespace data_test {

constexpr size_t kSteps = size_t{1} << 13;
extern uint8_t steps_taken[kSteps];  // since the last clear, by hash; all zero without instrumentation

}  // namespace data_test
