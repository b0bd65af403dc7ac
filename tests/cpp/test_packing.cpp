// Best-fit packing: edge cases, and equality with its rule, the fullest sample that still has room.
#include <algorithm>
#include <map>
#include <numeric>

#include "data/packing.h"
#include "expect.h"

using namespace data_test;
using neox::data::best_fit;
using neox::data::Packing;

namespace {

// The fill of the samples, computed from the rule.
std::vector<int64_t> reference(std::vector<int32_t> sizes, int64_t capacity) {
    std::sort(sizes.rbegin(), sizes.rend());
    std::multimap<int64_t, int> rooms;
    for (const int32_t size : sizes) {
        const auto found = rooms.lower_bound(size);
        const int64_t room = found == rooms.end() ? capacity : found->first;
        if (found != rooms.end()) rooms.erase(found);
        rooms.emplace(room - size, 0);
    }
    std::vector<int64_t> full;
    for (const auto& [room, unused] : rooms) full.push_back(capacity - room);
    return full;  // in descending order
}

void equals_its_rule() {
    uint64_t state = 1;
    for (const int64_t capacity : {1, 2, 63, 64, 65, 4096, 4097, 300'000}) {
        std::vector<int32_t> sizes(5000);
        for (auto& size : sizes) {
            state = state * 6364136223846793005u + 1442695040888963407u;
            const auto bits = static_cast<int64_t>(state >> 33);
            size = static_cast<int32_t>(1 + (bits % 3 == 0 ? bits % capacity : bits % capacity / 7));
        }
        const Packing packing = best_fit(sizes.data(), static_cast<int64_t>(sizes.size()), capacity);
        std::vector<int64_t> full, seen = packing.order;
        for (size_t i = 0; i + 1 < packing.starts.size(); ++i) {
            int64_t total = 0;
            for (int64_t k = packing.starts[i]; k < packing.starts[i + 1]; ++k)
                total += sizes[static_cast<size_t>(packing.order[static_cast<size_t>(k)])];
            full.push_back(total);
        }
        std::sort(full.rbegin(), full.rend());
        EXPECT(full == reference(sizes, capacity));
        std::sort(seen.begin(), seen.end());
        std::vector<int64_t> all(sizes.size());
        std::iota(all.begin(), all.end(), 0);
        EXPECT(seen == all);
    }
}

void edges() {
    EXPECT_EQ(best_fit(nullptr, 0, 8).starts.size(), size_t{1});
    const int32_t largest = INT32_MAX;
    EXPECT_FAULT(best_fit(&largest, 1, 8), "segment does not fit a sample");
    const int32_t none = 0, negative = -1;
    EXPECT_FAULT(best_fit(&none, 1, 8), "segment does not fit a sample");
    EXPECT_FAULT(best_fit(&negative, 1, 8), "segment does not fit a sample");
    EXPECT_FAULT(best_fit(&none, 1, 0), "capacity");
    EXPECT_FAULT(best_fit(&none, 1, int64_t{1} << 31), "capacity");
}

}  // namespace

int main() {
    equals_its_rule();
    edges();
    return tally.finish();
}
