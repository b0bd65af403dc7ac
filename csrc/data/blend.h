// Blending of datasets, as in GPT-NeoX and Megatron-LM: sample i comes from dataset argmax_k weight[k] x max(i, 1) -
// taken[k], the first on a tie. A dataset of weight 0 never gives a sample.
#pragma once

#include <cstdint>

namespace neox::data {

// Writes samples [first, first + count) and advances `taken`, the number of samples taken from each dataset before
// `first`. `weights` must be finite and not negative, and sum to 1; else throws a Fault that names the dataset.
void blend(const double* weights, int64_t num_datasets, int64_t first, int64_t count, int64_t* taken, int32_t* dataset,
           int64_t* sample);

}  // namespace neox::data
