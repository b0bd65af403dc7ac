#include "data/sample_index.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "data/fault.h"

namespace neox::data {

namespace {

using Wide = unsigned __int128;

constexpr int kRounds = 8;
constexpr int64_t kAhead = 32;              // documents whose size is fetched ahead: the order is random, every size is a cache miss
constexpr int64_t kBlock = 4096;            // documents whose sizes are gathered before they are looked at: 16 KiB
constexpr int64_t kWorthThreads = 1 << 20;  // documents from which on threads pay

// value x bound / 2^64: an even map of a 64-bit hash to [0, bound) without division.
uint64_t scale(uint64_t hash, uint64_t bound) { return static_cast<uint64_t>((static_cast<Wide>(hash) * bound) >> 64); }

uint64_t ceil_root(uint64_t value) {
    auto root = static_cast<uint64_t>(std::sqrt(static_cast<double>(value)));
    while (static_cast<Wide>(root) * root < value) ++root;
    while (root > 1 && static_cast<Wide>(root - 1) * (root - 1) >= value) --root;
    return root;
}

uint64_t add_modulo(uint64_t left, uint64_t right, uint64_t bound) { return left >= bound - right ? left - (bound - right) : left + right; }

template <typename Doc>
[[noreturn]] void refuse(const uint8_t* sizes, int64_t num_sizes, const Doc* order, int64_t first, int64_t last) {
    for (int64_t position = first; position < last; ++position) {
        const auto document = static_cast<int64_t>(order[position]);
        if (document < 0 || document >= num_sizes)
            throw Fault("document number out of range")
                .at("position " + std::to_string(position) + " of the document order")
                .found(std::to_string(document))
                .expected("0 to " + std::to_string(num_sizes - 1));
        int32_t size;
        std::memcpy(&size, sizes + 4 * document, sizeof size);
        if (size < 0) throw Fault("negative document size").at("document " + std::to_string(document)).found(std::to_string(size));
    }
    throw Fault("document order changed while it was read");
}

// Copies the sizes of the documents order[first, last), where every one is a cache miss of its own, and returns their sum.
template <typename Doc>
int64_t gather_sizes(const uint8_t* sizes, int64_t num_sizes, const Doc* order, int64_t length, int64_t first, int64_t last, int32_t* out) {
    int64_t sum = 0;
    uint32_t bad = 0;
    const auto bound = static_cast<uint64_t>(num_sizes);
    const auto one = [&](int64_t position) {
        const auto document = static_cast<uint64_t>(static_cast<int64_t>(order[position]));
        const bool inside = document < bound;
        int32_t size;
        std::memcpy(&size, sizes + 4 * (inside ? document : 0), sizeof size);
        bad |= static_cast<uint32_t>(!inside) | static_cast<uint32_t>(size) >> 31;
        out[position - first] = size;
        sum += size;
    };
    if (bound == 0 && first < last) refuse(sizes, num_sizes, order, first, last);
    const int64_t ahead = std::min(last, length - kAhead);
    int64_t position = first;
    for (; position < ahead; ++position) {
        const auto later = static_cast<uint64_t>(static_cast<int64_t>(order[position + kAhead]));
        __builtin_prefetch(sizes + 4 * (later < bound ? later : 0));
        one(position);
    }
    for (; position < last; ++position) one(position);
    if (bad != 0) refuse(sizes, num_sizes, order, first, last);
    return sum;
}

// One thread's share of the documents: gathered, and then, when all know how many tokens stand before theirs, turned into rows.
struct Share {
    int64_t first, last;
    std::unique_ptr<int32_t[]> sizes;
    int64_t tokens = 0;
    std::exception_ptr fault;
};

template <typename Work>
void on_threads(std::vector<Share>& shares, const Work& work) {
    const auto guarded = [&](Share& share) {
        try {
            work(share);
        } catch (...) {
            share.fault = std::current_exception();
        }
    };
    std::vector<std::thread> threads;
    for (size_t i = 1; i < shares.size(); ++i) threads.emplace_back(guarded, std::ref(shares[i]));
    guarded(shares[0]);
    for (std::thread& thread : threads) thread.join();
    for (const Share& share : shares)
        if (share.fault != nullptr) std::rethrow_exception(share.fault);
}

}  // namespace

template <typename Row>
void write_rows(const int32_t* sizes, int64_t first, int64_t count, int64_t start, int64_t seq_length, RowRange<Row> range) {
    int64_t row = start / seq_length + (start % seq_length != 0);
    int64_t next = row * seq_length;  // token at which that row starts
    int64_t total = start;
    for (int64_t i = 0; i < count; ++i) total += sizes[i];
    const int64_t rows = std::min(range.last, total / seq_length + (total % seq_length != 0));  // those after it belong to the next documents
    Row* out = range.out + 2 * (row - range.first);
    for (int64_t i = 0; i < count && row < rows; ++i) {
        const int64_t end = start + sizes[i];
        // Written before it is known whether the row starts here, so that nothing has to be guessed: the next document writes it again.
        out[0] = static_cast<Row>(first + i);
        out[1] = static_cast<Row>(next - start);
        const bool inside = next < end;
        row += inside;
        out += inside ? 2 : 0;
        next += inside ? seq_length : 0;
        for (; next < end && row < rows; ++row, next += seq_length, out += 2) {
            out[0] = static_cast<Row>(first + i);
            out[1] = static_cast<Row>(next - start);
        }
        start = end;
    }
}

template void write_rows(const int32_t*, int64_t, int64_t, int64_t, int64_t, RowRange<int32_t>);
template void write_rows(const int32_t*, int64_t, int64_t, int64_t, int64_t, RowRange<int64_t>);

template <typename Doc, typename Row>
void fill_sample_index(const uint8_t* sizes, int64_t num_sizes, const Doc* order, int64_t length, int64_t seq_length, Row* out, int64_t rows, int threads) {
    if (seq_length <= 0) throw Fault("seq_length must be positive").found(std::to_string(seq_length));
    const Wide last_token = rows > 0 ? static_cast<Wide>(rows - 1) * static_cast<Wide>(seq_length) : 0;  // at which the last row starts
    int64_t total = 0;
    if (threads <= 1 || length < kWorthThreads) {
        std::unique_ptr<int32_t[]> block(new int32_t[kBlock]);
        for (int64_t first = 0; first < length && rows > 0 && static_cast<Wide>(total) <= last_token; first += kBlock) {
            const int64_t last = std::min(length, first + kBlock);
            const int64_t tokens = gather_sizes(sizes, num_sizes, order, length, first, last, block.get());
            write_rows(block.get(), first, last - first, total, seq_length, RowRange<Row>{out, 0, rows});
            total += tokens;
        }
    } else {
        std::vector<Share> shares(static_cast<size_t>(threads));
        for (int i = 0; i < threads; ++i) shares[i] = {length / threads * i, i + 1 == threads ? length : length / threads * (i + 1), nullptr, 0, nullptr};
        on_threads(shares, [&](Share& share) {
            share.sizes.reset(new int32_t[share.last - share.first]);
            share.tokens = gather_sizes(sizes, num_sizes, order, length, share.first, share.last, share.sizes.get());
        });
        for (Share& share : shares) total += std::exchange(share.tokens, total);  // from now on: the tokens before it
        on_threads(shares, [&](Share& share) {
            write_rows(share.sizes.get(), share.first, share.last - share.first, share.tokens, seq_length, RowRange<Row>{out, 0, rows});
        });
    }
    if (rows > 0 && static_cast<Wide>(total) <= last_token)
        throw Fault("documents end before the samples do")
            .at("sample " + std::to_string(total / seq_length + (total % seq_length != 0)))
            .expected(std::to_string(rows) + " rows");
}

template void fill_sample_index(const uint8_t*, int64_t, const int32_t*, int64_t, int64_t, int32_t*, int64_t, int);
template void fill_sample_index(const uint8_t*, int64_t, const int32_t*, int64_t, int64_t, int64_t*, int64_t, int);
template void fill_sample_index(const uint8_t*, int64_t, const int64_t*, int64_t, int64_t, int32_t*, int64_t, int);
template void fill_sample_index(const uint8_t*, int64_t, const int64_t*, int64_t, int64_t, int64_t*, int64_t, int);

int64_t epochs_needed(int64_t tokens_per_epoch, int64_t seq_length, int64_t num_samples) {
    if (tokens_per_epoch <= 0) throw Fault("dataset has no tokens").found(std::to_string(tokens_per_epoch)).expected("at least 1");
    if (seq_length <= 0) throw Fault("seq_length must be positive").found(std::to_string(seq_length));
    if (num_samples < 0) throw Fault("num_samples must not be negative").found(std::to_string(num_samples));
    const auto tokens = static_cast<Wide>(tokens_per_epoch);
    const Wide needed = static_cast<Wide>(num_samples) * static_cast<Wide>(seq_length) + 1;
    const Wide epochs = std::max<Wide>(1, (needed + tokens - 1) / tokens);
    if (epochs * tokens > static_cast<Wide>(std::numeric_limits<int64_t>::max())) throw Fault("samples asked for exceed 2^63 tokens");
    return static_cast<int64_t>(epochs);
}

uint64_t mix(uint64_t key, uint64_t value) {
    uint64_t z = value + 0x9E3779B97F4A7C15u * (key | 1);
    for (int i = 0; i < 2; ++i) {
        z ^= key;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        z ^= z >> 31;
    }
    return z;
}

uint64_t permute(uint64_t key, uint64_t size, uint64_t value) {
    if (size <= 1) return 0;
    const uint64_t a = ceil_root(size);
    const uint64_t b = size / a + (size % a != 0);
    do {
        uint64_t left = value / b, right = value % b;  // left < a, right < b
        for (int round = 0; round < kRounds; ++round) {
            const uint64_t round_key = mix(key, static_cast<uint64_t>(round));
            if (round % 2 == 0)
                left = add_modulo(left, scale(mix(round_key, right), a), a);
            else
                right = add_modulo(right, scale(mix(round_key, left), b), b);
        }
        value = left * b + right;
    } while (value >= size);
    return value;
}

uint64_t EpochOrder::first_token(uint64_t sample) const {
    const uint64_t per_epoch = samples_per_epoch();
    const uint64_t epoch_key = mix(key, sample / per_epoch);
    // Tokens left over by whole samples: the phase moves the cut, so that no token is left out in every epoch.
    const uint64_t spare = (num_tokens - 1) - per_epoch * seq_length;
    const uint64_t phase = scale(mix(epoch_key, ~uint64_t{0}), spare + 1);
    return phase + permute(epoch_key, per_epoch, sample % per_epoch) * seq_length;
}

}  // namespace neox::data
