#include "data/document_statistics.h"

#include <algorithm>
#include <vector>

#include "data/checksum.h"

namespace neox::data {
namespace {

constexpr uint64_t kPart = 1 << 18;  // tokens read and hashed at a time

}  // namespace

DocumentStatistics document_statistics(const IndexedDataset& dataset, uint64_t first, uint64_t last, int64_t eod,
                                       uint64_t* hashes) {
    const Index& index = dataset.index();
    std::vector<int64_t> tokens(kPart);
    std::vector<uint32_t> narrow(kPart);
    // `tokens` holds tokens [have, end) of the dataset
    uint64_t have = index.first_token_of_document(first), end = have;
    const uint64_t all = index.first_token_of_document(last);
    DocumentStatistics out;
    for (uint64_t document = first; document < last; ++document) {
        uint64_t at = index.first_token_of_document(document), stop = index.first_token_of_document(document + 1),
                 hash = 0;
        while (at < stop) {
            const uint64_t take = std::min(stop - at, kPart);
            // parts are aligned to the start of a document, so that its hash does not depend on its position
            if (at + take > end) {
                have = at;
                end = at + std::min(all - at, kPart);
                dataset.read(have, end - have, tokens.data(), nullptr);
            }
            const int64_t* from = tokens.data() + (at - have);
            uint64_t hashed = take;
            for (uint64_t i = 0; i < take; ++i) {
                out.smallest = std::min(out.smallest, from[i]);
                out.largest = std::max(out.largest, from[i]);
                out.eod_tokens += from[i] == eod;
                narrow[i] = static_cast<uint32_t>(from[i]);
            }
            at += take;
            if (at == stop && eod >= 0 && from[take - 1] == eod) {
                ++out.ended;
                --hashed;
            }
            if (hashed > 0) hash = checksum(narrow.data(), hashed * sizeof(uint32_t), hash);
        }
        hashes[document - first] = hash;
    }
    return out;
}

}  // namespace neox::data
