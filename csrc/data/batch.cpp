#include "data/batch.h"

#include "data/clones.h"

namespace neox::data {
namespace {

// Without an early exit, so that the loop vectorizes: nearly all batches are valid.
NEOX_CLONES bool any_outside(const int64_t* tokens, int64_t count, int64_t vocab_size) {
    bool bad = false;
    for (int64_t i = 0; i < count; ++i) bad |= static_cast<uint64_t>(tokens[i]) >= static_cast<uint64_t>(vocab_size);
    return bad;
}

}  // namespace

int64_t first_outside(const int64_t* tokens, int64_t count, int64_t vocab_size) {
    if (!any_outside(tokens, count, vocab_size)) return -1;
    for (int64_t i = 0; i < count; ++i)
        if (tokens[i] < 0 || tokens[i] >= vocab_size) return i;
    return -1;
}

// Segment by segment. The end of a segment is searched in groups of tokens, because most segments are long.
NEOX_CLONES void positions_in_segments(const int32_t* segments, int64_t count, int64_t* positions) {
    constexpr int64_t kGroup = 32;
    for (int64_t i = 0; i < count;) {
        const int64_t start = i;
        const int32_t segment = segments[start];
        for (; i + kGroup <= count; i += kGroup) {
            int32_t differ = 0;
            for (int64_t j = 0; j < kGroup; ++j) differ |= segments[i + j] ^ segment;
            if (differ) break;
        }
        while (i < count && segments[i] == segment) ++i;
        for (int64_t j = start; j < i; ++j) positions[j] = j - start;
    }
}

}  // namespace neox::data
