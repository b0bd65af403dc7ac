// One pass over the tokens of a dataset: what ids occur, how documents end, and a hash of each document.
#pragma once

#include <cstdint>

#include "data/indexed_dataset.h"

namespace neox::data {

struct Survey {
    int64_t smallest = INT64_MAX, largest = INT64_MIN;  // as they are without tokens
    uint64_t eod_tokens = 0;                            // tokens that are the end-of-document token
    uint64_t ended = 0;                                 // documents whose last token it is
};

// Documents [first, last) of a dataset. hashes[i] is of document first + i: XXH64 over its ids, the same for every token type, a last `eod` left out.
// eod -1: there is none. Throws Fault where the data are damaged.
Survey survey(const IndexedDataset& dataset, uint64_t first, uint64_t last, int64_t eod, uint64_t* hashes);

}  // namespace neox::data
