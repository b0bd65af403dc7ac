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

// Of several samples with the same room, the one that got it last is filled first; samples are numbered as they were
// opened; in a sample, and among equal sizes, segments keep their order. A change would change the data of resumed
// runs.
void every_choice_is_fixed() {
    const std::vector<int32_t> sizes = {6, 2, 6, 7, 2, 7, 6, 1, 10, 3, 4};
    const Packing packing = best_fit(sizes.data(), static_cast<int64_t>(sizes.size()), 10);
    // {10}; {7}, {7}; {6}, {6}, {6}; the 4 into the last of 6; the 3 into the last of 7; a 2 into the first of 7,
    // a 2 into the second of 6; the 1 next to the first 2
    EXPECT(packing.order == (std::vector<int64_t>{8, 3, 1, 7, 5, 9, 0, 2, 4, 6, 10}));
    EXPECT(packing.starts == (std::vector<int64_t>{0, 1, 4, 6, 7, 9, 11}));
    std::vector<int32_t> many;
    for (int32_t i = 0; i < 500; ++i) many.push_back(1 + i * 7919 % 64);
    const Packing packed = best_fit(many.data(), 500, 64);
    int32_t first_of_sample = 64;
    for (size_t sample = 0; sample + 1 < packed.starts.size(); ++sample) {
        const auto size = [&](int64_t k) { return many[static_cast<size_t>(packed.order[static_cast<size_t>(k)])]; };
        EXPECT(size(packed.starts[sample]) <= first_of_sample);
        first_of_sample = size(packed.starts[sample]);
        for (int64_t k = packed.starts[sample] + 1; k < packed.starts[sample + 1]; ++k)
            EXPECT(size(k) < size(k - 1) || (size(k) == size(k - 1) && packed.order[static_cast<size_t>(k)] >
                                                                           packed.order[static_cast<size_t>(k) - 1]));
    }
}

void edges() {
    EXPECT_EQ(best_fit(nullptr, 0, 8).starts.size(), size_t{1});
    const int32_t largest = INT32_MAX;
    EXPECT_FAULT(best_fit(&largest, 1, 8),
                 "segment does not fit a sample; where=segment 0; got=2147483647; want=1 to 8");
    const int32_t fits[] = {8, 9};
    EXPECT_EQ(best_fit(fits, 1, 8).order.size(), size_t{1});
    EXPECT_FAULT(best_fit(fits, 2, 8), "segment 1; got=9");
    const int32_t none = 0, negative = -1;
    EXPECT_FAULT(best_fit(&none, 1, 8), "segment does not fit a sample");
    EXPECT_FAULT(best_fit(&negative, 1, 8), "segment does not fit a sample");
    EXPECT_FAULT(best_fit(&none, 1, 0), "capacity");
    EXPECT_FAULT(best_fit(&none, 1, int64_t{1} << 31), "capacity");
}

}  // namespace

int main() {
    equals_its_rule();
    every_choice_is_fixed();
    edges();
    return tally.finish();
}
