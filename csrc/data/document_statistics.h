// One pass over the tokens of a dataset: range of ids, how documents end, and a hash of each document.
#pragma once

#include <cstdint>

#include "data/indexed_dataset.h"

namespace neox::data {

struct DocumentStatistics {
    int64_t smallest = INT64_MAX, largest = INT64_MIN;  // these values if there are no tokens
    uint64_t eod_tokens = 0;                            // occurrences of the end-of-document token
    uint64_t ended = 0;                                 // documents that end in it
};

// Statistics of documents [first, last) of a dataset. hashes[i] is XXH64 over the ids of document first + i, without a
// final `eod`; it does not depend on the token type. `eod` is -1 if there is none. Throws Fault if the data is damaged.
DocumentStatistics document_statistics(const IndexedDataset& dataset, uint64_t first, uint64_t last, int64_t eod,
                                       uint64_t* hashes);

}  // namespace neox::data
