// Best-fit packing of segments of documents into samples of a fixed number of tokens, with few cuts and little padding.
//
// Best-fit decreasing, as in "Fewer Truncations Improve Language Modeling" (Ding et al. 2024, arXiv 2404.10830): from
// the longest segment to the shortest, each goes into the fullest sample that still has room for it, else into a new
// one.
#pragma once

#include <cstdint>
#include <vector>

namespace neox::data {

// Segments order[starts[i]] to order[starts[i + 1] - 1] are sample i. Each segment occurs once; the longest comes first
// in a sample.
struct Packing {
    std::vector<int64_t> order, starts;
};

// Packs `count` segments of sizes[i] tokens, 1 to `capacity` each, in O(count + capacity). Segments of equal size keep
// their order, so the result is a function of the arguments alone. Throws Fault for a size out of range.
Packing best_fit(const int32_t* sizes, int64_t count, int64_t capacity);

}  // namespace neox::data
