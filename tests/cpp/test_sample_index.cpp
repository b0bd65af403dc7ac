// Sample index, epochs and epoch order against 128-bit arithmetic, around 2^31 and 2^32 and beyond.
#include <algorithm>
#include <cstring>
#include <limits>
#include <random>

#include "data/sample_index.h"
#include "expect.h"

using namespace data_test;
using namespace neox::data;

namespace {

using Wide = unsigned __int128;

const std::vector<int64_t> kBorders = {INT32_MAX - 1,  INT32_MAX,  int64_t{1} << 31, (int64_t{1} << 31) + 1,
                                       UINT32_MAX - 1, UINT32_MAX, int64_t{1} << 32, (int64_t{1} << 32) + 1};

// A stream of `count` documents of `size` tokens each, in closed form.
StreamPosition closed_form(int64_t token, int64_t size) { return {token / size, token % size}; }

void positions_beyond_32_bits() {
    for (const int64_t border : kBorders) {
        for (const int64_t size : {1, 2, 3, 1000}) {
            const auto tokens = [&](int64_t) { return size; };
            for (int64_t before = 0; before < 5; ++before) {  // crosses the border by document number
                StreamPosition at{border - before, 0};
                EXPECT(advance(at, 4 * size + size / 2, int64_t{1} << 40, tokens));
                const StreamPosition want = closed_form((border - before) * size + 4 * size + size / 2, size);
                EXPECT(at.document == want.document && at.offset == want.offset);
            }
        }
        for (const int64_t step : {border - 1, border, border + 1}) {  // by offset in one long document, and by tokens moved at a time
            StreamPosition at{0, 0};
            const auto tokens = [&](int64_t document) { return document == 0 ? 3 * border : border; };
            for (int64_t moved = step; moved <= 6 * border; moved += step) {
                EXPECT(advance(at, step, 1000, tokens));
                const StreamPosition want = moved < 3 * border ? StreamPosition{0, moved} : StreamPosition{1 + (moved - 3 * border) / border, moved % border};
                EXPECT(at.document == want.document && at.offset == want.offset);
            }
        }
        StreamPosition at{0, 0};
        EXPECT(!advance(at, border, 1, [&](int64_t) { return border; }));  // a stream of exactly that many tokens has none further
        at = {0, 0};
        EXPECT(advance(at, border - 1, 1, [&](int64_t) { return border; }));
    }
}

template <typename Doc, typename Row>
void rows_equal_their_definition(std::mt19937_64& random) {
    const auto below = [&](int64_t bound) { return static_cast<int64_t>(random() % static_cast<uint64_t>(bound)); };
    for (int round = 0; round < 60; ++round) {
        std::vector<int32_t> sizes(static_cast<size_t>(1 + below(30)));
        for (auto& size : sizes) size = static_cast<int32_t>(round % 3 == 0 ? below(INT32_MAX) : below(20));
        std::vector<Doc> order(static_cast<size_t>(1 + below(90)));
        for (auto& document : order) document = static_cast<Doc>(below(static_cast<int64_t>(sizes.size())));
        int64_t total = 0;
        for (const Doc document : order) total += sizes[static_cast<size_t>(document)];
        const int64_t seq_length = round % 3 == 0 ? 1 + below(int64_t{1} << 33) : 1 + below(40);
        if (total < 2) continue;
        const int64_t rows = (total - 1) / seq_length + 1;
        std::vector<uint8_t> raw(4 * sizes.size() + 1);  // unaligned, as in a mapped index
        std::memcpy(raw.data() + 1, sizes.data(), 4 * sizes.size());
        std::vector<Row> out(static_cast<size_t>(2 * rows));
        const auto fill = [&](int64_t count) {
            fill_sample_index(raw.data() + 1, static_cast<int64_t>(sizes.size()), order.data(), static_cast<int64_t>(order.size()), seq_length, out.data(),
                              count);
        };
        if (sizeof(Row) == 4 && seq_length > INT32_MAX) continue;
        fill(rows);
        int64_t start = 0;
        size_t position = 0;
        for (int64_t row = 0; row < rows; ++row) {
            while (row * seq_length >= start + sizes[static_cast<size_t>(order[position])]) start += sizes[static_cast<size_t>(order[position++])];
            EXPECT_EQ(static_cast<int64_t>(out[static_cast<size_t>(2 * row)]), static_cast<int64_t>(position));
            EXPECT_EQ(static_cast<int64_t>(out[static_cast<size_t>(2 * row + 1)]), row * seq_length - start);
        }
        out.resize(out.size() + 2);
        EXPECT_FAULT(fill(rows + 1), "documents end before the samples do");
    }
}

void hostile_arrays() {
    const std::vector<int32_t> sizes = {5, 5}, negative = {5, -5};
    const auto fill = [&](const std::vector<int32_t>& lengths, std::vector<int64_t> order, int64_t seq_length, int64_t rows) {
        std::vector<int64_t> out(20);
        fill_sample_index(reinterpret_cast<const uint8_t*>(lengths.data()), static_cast<int64_t>(lengths.size()), order.data(),
                          static_cast<int64_t>(order.size()), seq_length, out.data(), rows);
    };
    EXPECT_FAULT(fill(sizes, {0, 2}, 4, 3), "document number out of range; where=position 1");
    EXPECT_FAULT(fill(sizes, {-1}, 4, 1), "got=-1");
    EXPECT_FAULT(fill(sizes, {INT64_MIN, INT64_MAX}, 4, 1), "document number out of range");
    EXPECT_FAULT(fill(sizes, {INT64_MAX}, 4, 1), "document number out of range");
    EXPECT_FAULT(fill({}, {0}, 4, 1), "document number out of range");
    EXPECT_FAULT(fill(negative, {0, 1}, 4, 3), "negative document size; where=document 1");
    EXPECT_FAULT(fill(sizes, {}, 4, 1), "documents end");
    EXPECT_FAULT(fill(sizes, {0, 1}, 0, 2), "seq_length must be positive");
    EXPECT_FAULT(fill(sizes, {0, 1}, INT64_MAX, 2), "documents end");
    fill(sizes, {0, 1}, 4, 0);
}

void epochs() {
    std::vector<int64_t> tokens = kBorders, lengths = kBorders, samples = kBorders;
    for (auto* list : {&tokens, &lengths, &samples}) list->insert(list->end(), {1, 2, 7, 2048, int64_t{1} << 45});
    samples.push_back(0);
    for (const int64_t t : tokens)
        for (const int64_t s : lengths)
            for (const int64_t n : samples) {
                int64_t got = 0;
                const std::string fault = fault_of([&] { got = epochs_needed(t, s, n); });
                const auto enough = [&](Wide e) { return (e * static_cast<Wide>(t) - 1) / static_cast<Wide>(s) >= static_cast<Wide>(n); };
                if (fault.empty())
                    EXPECT(got >= 1 && enough(static_cast<Wide>(got)) && (got == 1 || !enough(static_cast<Wide>(got) - 1)));
                else
                    EXPECT(fault.find("2^63") != std::string::npos && !enough(static_cast<Wide>(INT64_MAX) / static_cast<Wide>(t)));
            }
    EXPECT_FAULT(epochs_needed(0, 1, 1), "no tokens");
    EXPECT_FAULT(epochs_needed(-5, 1, 1), "no tokens");
    EXPECT_FAULT(epochs_needed(1, 0, 1), "seq_length");
    EXPECT_FAULT(epochs_needed(1, 1, -1), "num_samples");
    EXPECT_FAULT(epochs_needed(1, INT64_MAX, INT64_MAX), "2^63");
}

void permutations() {
    for (uint64_t size = 1; size <= 300; ++size) {
        std::vector<uint64_t> seen;
        for (uint64_t i = 0; i < size; ++i) seen.push_back(permute(size * 77, size, i));
        std::sort(seen.begin(), seen.end());
        for (uint64_t i = 0; i < size; ++i) EXPECT_EQ(seen[i], i);
    }
    std::vector<uint64_t> sizes = {uint64_t{1} << 62, INT64_MAX};
    sizes.insert(sizes.end(), kBorders.begin(), kBorders.end());
    for (const uint64_t size : sizes) {
        std::vector<uint64_t> seen;
        uint64_t low = 0;
        for (uint64_t i = 0; i < 1000; ++i) {
            seen.push_back(permute(1234, size, i < 500 ? i : size - 1 - (i - 500)));
            EXPECT(seen.back() < size);
            low += seen.back() < size / 2;
        }
        EXPECT(low > 400 && low < 600);  // 500 +- 6 sigma
        std::sort(seen.begin(), seen.end());
        EXPECT(std::adjacent_find(seen.begin(), seen.end()) == seen.end());
    }
}

void epoch_order() {
    for (const uint64_t tokens : {uint64_t{2049}, (uint64_t{1} << 31) + 1, (uint64_t{1} << 32) - 1, (uint64_t{1} << 45) + 12345}) {
        const EpochOrder order{99, tokens, 2048};
        const uint64_t per_epoch = order.samples_per_epoch();
        EXPECT_EQ(per_epoch, (tokens - 1) / 2048);
        for (const uint64_t sample : {uint64_t{0}, per_epoch - 1, per_epoch, (uint64_t{1} << 32) + 1, uint64_t{1} << 62}) {
            const uint64_t first = order.first_token(sample);
            EXPECT(first <= tokens - 2049);
            const uint64_t again = order.first_token(sample / per_epoch * per_epoch);  // one phase per epoch
            EXPECT_EQ(first % 2048, again % 2048);
        }
    }
    EXPECT_EQ((EpochOrder{1, 0, 5}).samples_per_epoch(), 0u);
}

}  // namespace

int main() {
    std::mt19937_64 random(20240501);
    positions_beyond_32_bits();
    rows_equal_their_definition<int32_t, int32_t>(random);
    rows_equal_their_definition<int32_t, int64_t>(random);
    rows_equal_their_definition<int64_t, int64_t>(random);
    rows_equal_their_definition<int64_t, int32_t>(random);
    hostile_arrays();
    epochs();
    permutations();
    epoch_order();
    return tally.finish();
}
