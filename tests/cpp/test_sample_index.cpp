// Sample index, epochs and epoch order against 128-bit arithmetic, around 2^31 and 2^32 and beyond. Arguments: see
// budget.h (default: 240 rounds, 80 under sanitizers).
#include <algorithm>
#include <cstring>
#include <limits>
#include <random>
#include <utility>

#include "budget.h"
#include "data/sample_index.h"
#include "expect.h"

using namespace data_test;
using namespace neox::data;

namespace {

using Wide = unsigned __int128;

const std::vector<int64_t> kBorders = {INT32_MAX - 1,  INT32_MAX,  int64_t{1} << 31, (int64_t{1} << 31) + 1,
                                       UINT32_MAX - 1, UINT32_MAX, int64_t{1} << 32, (int64_t{1} << 32) + 1};

// Documents of one size whose positions, tokens or row numbers cross 2^31 and 2^32: position and offset have a closed
// form.
template <typename Row>
void positions_beyond_32_bits() {
    for (const int64_t border : kBorders) {
        for (const int32_t size : {1, 2, 3, 1000}) {
            for (const int64_t seq_length : {1, 2, 5, 1700}) {
                const std::vector<int32_t> sizes(10, size);
                // by position, and by token
                const int64_t first = sizeof(Row) == 4 ? 7 : border - 4, start = first * size;
                const int64_t first_row = (start + seq_length - 1) / seq_length,
                              end_row = (start + 10 * size + seq_length - 1) / seq_length;
                std::vector<Row> out(static_cast<size_t>(2 * (end_row - first_row + 2)), Row{-1});
                write_rows(sizes.data(), first, 10, start, seq_length,
                           RowRange<Row>{out.data(), first_row, end_row + 1});
                for (int64_t row = first_row; row < end_row; ++row) {
                    EXPECT_EQ(static_cast<int64_t>(out[static_cast<size_t>(2 * (row - first_row))]),
                              row * seq_length / size);
                    EXPECT_EQ(static_cast<int64_t>(out[static_cast<size_t>(2 * (row - first_row) + 1)]),
                              row * seq_length % size);
                }
                for (size_t i = static_cast<size_t>(2 * (end_row - first_row)); i < out.size(); ++i)
                    EXPECT(out[i] == Row{-1});
            }
        }
        // One long document at a late position, and rows that are far apart.
        const std::vector<int32_t> sizes = {INT32_MAX, INT32_MAX, 5};
        std::vector<int64_t> out(8, -1);
        write_rows(sizes.data(), int64_t{0}, 3, 2 * border, border, RowRange<int64_t>{out.data(), 2, 6});
        const int64_t total = 2 * border + 2 * int64_t{INT32_MAX} + 5;
        for (int64_t row = 2; row < 6 && row * border < total; ++row) {
            const int64_t token = row * border - 2 * border, document = std::min<int64_t>(token / INT32_MAX, 2);
            EXPECT_EQ(out[static_cast<size_t>(2 * (row - 2))], document);
            EXPECT_EQ(out[static_cast<size_t>(2 * (row - 2) + 1)], token - document * INT32_MAX);
        }
    }
}

// The largest orders under sanitizers are shorter, and only the most threads fill them, fewer times: an access out of
// bounds depends on neither.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif

std::vector<int> counts_of_threads(std::vector<int> all) { return kSanitized ? std::vector<int>{all.back()} : all; }

void threads_give_the_same_rows(std::mt19937_64& random) {
    std::vector<int32_t> sizes(5000), order(kSanitized ? 300'000 : 1'100'000);
    // half of them empty
    for (auto& size : sizes) size = static_cast<int32_t>(random() % 40) * static_cast<int32_t>(random() % 2);
    for (auto& document : order) document = static_cast<int32_t>(random() % sizes.size());
    int64_t total = 0;
    for (const int32_t document : order) total += sizes[static_cast<size_t>(document)];
    for (const int64_t seq_length : {1, 7, 100, 3'000'000}) {
        const int64_t rows = (total - 1) / seq_length + 1;
        std::vector<int64_t> want(static_cast<size_t>(2 * rows)), got(want.size());
        const auto fill = [&](std::vector<int64_t>& out, int64_t count, int threads) {
            fill_sample_index(reinterpret_cast<const uint8_t*>(sizes.data()), static_cast<int64_t>(sizes.size()),
                              order.data(), static_cast<int64_t>(order.size()), seq_length, out.data(), count, threads);
        };
        fill(want, rows, 1);
        for (const int threads : counts_of_threads({2, 3, 8})) {
            std::fill(got.begin(), got.end(), -1);
            fill(got, rows, threads);
            EXPECT(got == want);
            got.resize(want.size() + 2);
            EXPECT_FAULT(fill(got, rows + 1, threads), "documents have fewer tokens than the samples need");
            got.resize(want.size());
        }
        // the first fault in the order is reported, whichever thread finds one first; documents that no row needs are
        // not read
        const int64_t needed = want[static_cast<size_t>(2 * rows - 2)], early = std::max<int64_t>(0, needed - 40'000);
        const std::vector<int32_t> right = order;
        order.back() = 5000;
        if (needed < static_cast<int64_t>(order.size()) - 20'000) {
            fill(got, rows, 2);
            EXPECT(got == want);
        }
        order[static_cast<size_t>(needed)] = 5000;
        for (const int threads : {2, 8})
            EXPECT_FAULT(fill(got, rows, threads), "position " + std::to_string(needed) + " ");
        order[static_cast<size_t>(early)] = -1;
        for (const int threads : {2, 8})
            EXPECT_FAULT(fill(got, rows, threads), "position " + std::to_string(early) + " ");
        order = right;
        std::vector<int64_t> half(static_cast<size_t>(rows / 2 * 2));
        fill(half, rows / 2, 2);  // and fewer rows than exist
        EXPECT(std::equal(half.begin(), half.end(), want.begin()));
    }
}

// An order of many segments: documents of more than 2^16 tokens, many empty ones, and some that are visited far more
// often than others.
template <typename Doc>
void segments_give_the_same_rows(std::mt19937_64& random) {
    const size_t documents = 1'200'001;
    std::vector<int32_t> sizes(documents);
    for (auto& size : sizes)
        size = static_cast<int32_t>(random() % 3 == 0 ? 0 : random() % 100 == 0 ? random() % 200'000 : random() % 900);
    std::vector<Doc> order(1'400'000);
    for (size_t i = 0; i < order.size(); ++i)
        order[i] = static_cast<Doc>(i % 5 == 0 ? 300'000 + random() % 1000 : random() % documents);
    const int64_t seq_length = 512;
    std::vector<int64_t> want;
    int64_t start = 0, next = 0;
    for (size_t i = 0; i < order.size(); ++i) {
        const int64_t end = start + sizes[static_cast<size_t>(order[i])];
        for (; next < end; next += seq_length) want.push_back(static_cast<int64_t>(i)), want.push_back(next - start);
        start = end;
    }
    std::vector<int64_t> got;
    const auto fill = [&](size_t rows, int threads) {
        got.assign(2 * rows, -1);
        fill_sample_index(reinterpret_cast<const uint8_t*>(sizes.data()), static_cast<int64_t>(documents), order.data(),
                          static_cast<int64_t>(order.size()), seq_length, got.data(), static_cast<int64_t>(rows),
                          threads);
    };
    for (const int threads : counts_of_threads({1, 2, 5})) {
        for (const size_t rows : {want.size() / 2, want.size() / 5, size_t{1}}) {
            fill(rows, threads);
            EXPECT(std::equal(got.begin(), got.end(), want.begin()));
        }
        EXPECT_FAULT(fill(want.size() / 2 + 1, threads), "documents have fewer tokens than the samples need");
        const auto at = static_cast<size_t>(random() % order.size());
        for (const int64_t number : {static_cast<int64_t>(documents), int64_t{1'310'720}, int64_t{INT32_MAX},
                                     int64_t{-1}, int64_t{INT32_MIN}}) {
            const Doc before = std::exchange(order[at], static_cast<Doc>(number));
            EXPECT_FAULT(fill(want.size() / 2, threads),
                         "document number out of range; where=position " + std::to_string(at) + " of");
            order[at] = before;
        }
        const int32_t before = std::exchange(sizes[static_cast<size_t>(order[at])], -7);
        EXPECT_FAULT(fill(want.size() / 2, threads), "negative document size");
        sizes[static_cast<size_t>(order[at])] = before;
    }
}

// Faults in segments that are gathered at the same time: the first in the order is reported, whichever is found first.
// Faults in segments that no row needs are not reported.
void the_first_of_several_faults_is_reported() {
    constexpr size_t kSegment = 16384;  // documents, as in sample_index.cpp
    const std::vector<int32_t> sizes(100, 3);
    std::vector<int64_t> out(2000);
    const auto fill = [&](const std::vector<int32_t>& order, int64_t rows, int threads) {
        fill_sample_index(reinterpret_cast<const uint8_t*>(sizes.data()), static_cast<int64_t>(sizes.size()),
                          order.data(), static_cast<int64_t>(order.size()), 1000, out.data(), rows, threads);
    };
    std::vector<int32_t> everywhere(17 * kSegment + 1, 1), at_the_end = everywhere;
    for (size_t segment = 2; segment < 17; ++segment) everywhere[segment * kSegment + 5 * segment] = 100;
    // the last segment has one document, so its fault is found first
    at_the_end[17 * kSegment - 1] = 100, at_the_end.back() = -1;
    // rows for which the segments before the first fault of `everywhere` suffice
    const int64_t before = 2 * kSegment * 3 / 1000;
    for (int round = 0; round < (kSanitized ? 10 : 100); ++round) {
        for (const int threads : {2, 3, 8}) {
            EXPECT_FAULT(fill(everywhere, 1000, threads), "position " + std::to_string(2 * kSegment + 10) + " ");
            EXPECT_FAULT(fill(at_the_end, 1000, threads), "position " + std::to_string(17 * kSegment - 1) + " ");
            EXPECT_EQ(fault_of([&] { fill(everywhere, before, threads); }), "");
        }
    }
}

// A random order: its rows equal their definition, and a document number out of range is refused.
template <typename Doc, typename Row>
void rows_equal_their_definition(std::mt19937_64& random) {
    const auto below = [&](int64_t bound) { return static_cast<int64_t>(random() % static_cast<uint64_t>(bound)); };
    const bool large = below(3) == 0;
    std::vector<int32_t> sizes(static_cast<size_t>(1 + below(30)));
    for (auto& size : sizes) size = static_cast<int32_t>(large ? below(INT32_MAX) : below(20));
    std::vector<Doc> order(static_cast<size_t>(1 + below(90)));
    for (auto& document : order) document = static_cast<Doc>(below(static_cast<int64_t>(sizes.size())));
    int64_t total = 0;
    for (const Doc document : order) total += sizes[static_cast<size_t>(document)];
    const int64_t seq_length = large ? 1 + below(int64_t{1} << 33) : 1 + below(40);
    if (total < 2) return;
    const int64_t rows = (total - 1) / seq_length + 1;
    std::vector<uint8_t> raw(4 * sizes.size() + 1);  // unaligned, as in a mapped index
    std::memcpy(raw.data() + 1, sizes.data(), 4 * sizes.size());
    std::vector<Row> out(static_cast<size_t>(2 * rows));
    const auto fill = [&](int64_t count) {
        fill_sample_index(raw.data() + 1, static_cast<int64_t>(sizes.size()), order.data(),
                          static_cast<int64_t>(order.size()), seq_length, out.data(), count, 1);
    };
    if (sizeof(Row) == 4 && seq_length > INT32_MAX) return;
    fill(rows);
    int64_t start = 0;
    size_t position = 0;
    for (int64_t row = 0; row < rows; ++row) {
        while (row * seq_length >= start + sizes[static_cast<size_t>(order[position])])
            start += sizes[static_cast<size_t>(order[position++])];
        EXPECT_EQ(static_cast<int64_t>(out[static_cast<size_t>(2 * row)]), static_cast<int64_t>(position));
        EXPECT_EQ(static_cast<int64_t>(out[static_cast<size_t>(2 * row + 1)]), row * seq_length - start);
    }
    out.resize(out.size() + 2);
    EXPECT_FAULT(fill(rows + 1), "documents have fewer tokens than the samples need");
    const auto at = static_cast<size_t>(below(static_cast<int64_t>(order.size())));
    const Doc before = std::exchange(
        order[at],
        static_cast<Doc>(below(2) == 0 ? -1 - below(1 << 30) : static_cast<int64_t>(sizes.size()) + below(1 << 30)));
    EXPECT_FAULT(fill(rows), "document number out of range; where=position " + std::to_string(at) + " of");
    order[at] = before;
    const int32_t negative = -1 - static_cast<int32_t>(below(INT32_MAX));
    std::memcpy(raw.data() + 1 + 4 * static_cast<size_t>(before), &negative, sizeof negative);
    EXPECT_FAULT(fill(rows), "negative document size");
}

void hostile_arrays() {
    const std::vector<int32_t> sizes = {5, 5}, negative = {5, -5};
    const auto fill = [&](const std::vector<int32_t>& lengths, std::vector<int64_t> order, int64_t seq_length,
                          int64_t rows) {
        std::vector<int64_t> out(20);
        fill_sample_index(reinterpret_cast<const uint8_t*>(lengths.data()), static_cast<int64_t>(lengths.size()),
                          order.data(), static_cast<int64_t>(order.size()), seq_length, out.data(), rows, 1);
    };
    EXPECT_FAULT(fill(sizes, {0, 2}, 4, 3), "document number out of range; where=position 1");
    EXPECT_FAULT(fill(sizes, {-1}, 4, 1), "got=-1");
    EXPECT_FAULT(fill(sizes, {INT64_MIN, INT64_MAX}, 4, 1), "document number out of range");
    EXPECT_FAULT(fill(sizes, {INT64_MAX}, 4, 1), "document number out of range");
    EXPECT_FAULT(fill({}, {0}, 4, 1), "document number out of range");
    EXPECT_FAULT(fill(negative, {0, 1}, 4, 3), "negative document size; where=document 1");
    EXPECT_FAULT(fill(sizes, {}, 4, 1), "documents have fewer tokens");
    EXPECT_FAULT(fill(sizes, {0, 1}, 0, 2), "seq_length must be positive");
    EXPECT_FAULT(fill(sizes, {0, 1}, INT64_MAX, 2), "documents have fewer tokens");
    // the first sample whose first token is missing: token 12, and token 10
    EXPECT_FAULT(fill(sizes, {0, 1}, 4, 5), "where=sample 3; got=; want=5 rows");
    EXPECT_FAULT(fill(sizes, {0, 1}, 5, 3), "where=sample 2; got=; want=3 rows");
    fill(sizes, {0, 1}, 5, 2);
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
                const auto enough = [&](Wide e) {
                    return (e * static_cast<Wide>(t) - 1) / static_cast<Wide>(s) >= static_cast<Wide>(n);
                };
                if (fault.empty())
                    EXPECT(got >= 1 && enough(static_cast<Wide>(got)) &&
                           (got == 1 || !enough(static_cast<Wide>(got) - 1)));
                else
                    EXPECT(fault.find("2^63") != std::string::npos &&
                           !enough(static_cast<Wide>(INT64_MAX) / static_cast<Wide>(t)));
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
    for (const uint64_t tokens :
         {uint64_t{2049}, (uint64_t{1} << 31) + 1, (uint64_t{1} << 32) - 1, (uint64_t{1} << 45) + 12345}) {
        const EpochOrder order{99, tokens, 2048};
        const uint64_t per_epoch = order.samples_per_epoch();
        EXPECT_EQ(per_epoch, (tokens - 1) / 2048);
        for (const uint64_t sample :
             {uint64_t{0}, per_epoch - 1, per_epoch, (uint64_t{1} << 32) + 1, uint64_t{1} << 62}) {
            const uint64_t first = order.first_token(sample);
            EXPECT(first <= tokens - 2049);
            const uint64_t again = order.first_token(sample / per_epoch * per_epoch);  // one phase per epoch
            EXPECT_EQ(first % 2048, again % 2048);
        }
    }
    EXPECT_EQ((EpochOrder{1, 0, 5}).samples_per_epoch(), 0u);
}

}  // namespace

int main(int count, char** arguments) {
    Budget budget(count, arguments, kSanitized ? 80 : 240);
    std::mt19937_64 random(20240500 + budget.seed());
    positions_beyond_32_bits<int32_t>();
    positions_beyond_32_bits<int64_t>();
    the_first_of_several_faults_is_reported();
    threads_give_the_same_rows(random);
    segments_give_the_same_rows<int32_t>(random);
    segments_give_the_same_rows<int64_t>(random);
    while (budget.next()) {
        rows_equal_their_definition<int32_t, int32_t>(random);
        rows_equal_their_definition<int32_t, int64_t>(random);
        rows_equal_their_definition<int64_t, int64_t>(random);
        rows_equal_their_definition<int64_t, int32_t>(random);
    }
    hostile_arrays();
    epochs();
    permutations();
    epoch_order();
    return tally.finish();
}
