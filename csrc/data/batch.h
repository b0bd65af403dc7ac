// Passes over the tokens of a batch: vocabulary check and position ids.
#pragma once

#include <cstdint>

namespace neox::data {

// Index of the first token outside [0, vocab_size); -1 if there is none. Reads 8 bytes per token.
int64_t first_outside(const int64_t* tokens, int64_t count, int64_t vocab_size);

// positions[i]: how many tokens directly before token i have the same segment id. Reads 4 and writes 8 bytes per token.
void positions_in_segments(const int32_t* segments, int64_t count, int64_t* positions);

}  // namespace neox::data
