// Passes over a batch against their definitions, at lengths around the group size and with tokens at the limits of the
// vocabulary.
#include <random>
#include <vector>

#include "data/batch.h"
#include "expect.h"

using namespace data_test;
using neox::data::first_outside;
using neox::data::positions_in_segments;

namespace {

void first_token_outside() {
    for (const int64_t count : {1, 7, 8, 63, 64, 65, 1000}) {
        std::vector<int64_t> tokens(static_cast<size_t>(count), 9);
        EXPECT_EQ(first_outside(tokens.data(), count, 10), -1);
        for (const int64_t bad : {int64_t{10}, int64_t{-1}, INT64_MAX, INT64_MIN}) {
            for (int64_t at = 0; at < count; ++at) {
                tokens[static_cast<size_t>(at)] = bad;
                EXPECT_EQ(first_outside(tokens.data(), count, 10), at);
                tokens[static_cast<size_t>(at)] = 0;
            }
            tokens[static_cast<size_t>(count) - 1] = tokens[0] = bad;
            EXPECT_EQ(first_outside(tokens.data(), count, 10), 0);
            tokens[static_cast<size_t>(count) - 1] = tokens[0] = 0;
        }
    }
    EXPECT_EQ(first_outside(nullptr, 0, 10), -1);
}

void positions_restart_at_each_segment(std::mt19937_64& random) {
    for (int round = 0; round < 300; ++round) {
        std::vector<int32_t> segments(random() % 300);
        int32_t id = 0;
        // ascending as in a batch; else an id may come back, after one token or many
        const int32_t step = round % 2 == 0 ? 1 : -3;
        for (auto& segment : segments) {
            id += step * static_cast<int32_t>(random() % (1 + random() % 100) == 0);
            segment = step == 1 ? id : id % 2;
            if (step != 1 && random() % 20 == 0) segment = INT32_MIN;
        }
        std::vector<int64_t> positions(segments.size(), -1), wanted(segments.size());
        for (size_t i = 0; i < segments.size(); ++i)
            wanted[i] = i > 0 && segments[i] == segments[i - 1] ? wanted[i - 1] + 1 : 0;
        positions_in_segments(segments.data(), static_cast<int64_t>(segments.size()), positions.data());
        EXPECT(positions == wanted);
    }
}

}  // namespace

int main() {
    std::mt19937_64 random(1);
    first_token_outside();
    positions_restart_at_each_segment(random);
    return tally.finish();
}
