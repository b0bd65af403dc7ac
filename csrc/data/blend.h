// Mixing of datasets: sample i goes to the dataset that lags its share most, the first on a tie:
// argmax_k weight[k] x max(i, 1) - taken[k]  (GPT-NeoX and Megatron-LM). Datasets of weight 0 never get one.
#pragma once

#include <cstdint>

namespace neox::data {

// Writes samples [first, first + count) and advances `taken` (samples each dataset has given before `first`).
// `weights` are finite, not negative and sum to 1: the caller normalises. Throws Fault otherwise, naming the dataset.
void blend(const double* weights, int64_t num_datasets, int64_t first, int64_t count, int64_t* taken, int32_t* dataset, int64_t* sample);

}  // namespace neox::data
