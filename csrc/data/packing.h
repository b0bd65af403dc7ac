// Best-fit packing: pieces of documents into samples of a fixed number of tokens, so that few pieces are cut and little is padded.
//
// Best-fit decreasing, as in "Fewer Truncations Improve Language Modeling" (Ding et al. 2024, arXiv 2404.10830): the pieces from the longest to
// the shortest, each into the fullest sample that still has room for it, else into a new one.
#pragma once

#include <cstdint>
#include <vector>

namespace neox::data {

// Pieces order[starts[i]] to order[starts[i + 1] - 1] are sample i. Each piece occurs once; in a sample the longest comes first.
struct Packing {
    std::vector<int64_t> order, starts;
};

// Packs `count` pieces of sizes[i] tokens, 1 to `capacity` each, in O(count + capacity). Pieces of one size are taken in their order, so that the
// result is a function of the arguments alone. Throws Fault for a size out of range.
Packing best_fit(const int32_t* sizes, int64_t count, int64_t capacity);

}  // namespace neox::data
