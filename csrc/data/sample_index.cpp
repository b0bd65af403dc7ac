#include "data/sample_index.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "data/fault.h"

namespace neox::data {

namespace {

using Wide = unsigned __int128;

constexpr int kRounds = 8;
constexpr int64_t kAhead = 24;  // documents whose size is fetched ahead: the order is random, every size is a cache miss

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
int64_t size_of(const uint8_t* sizes, int64_t num_sizes, const Doc* order, int64_t position) {
    const auto document = static_cast<int64_t>(order[position]);
    if (document < 0 || document >= num_sizes)
        throw Fault("document number out of range")
            .at("position " + std::to_string(position) + " of the document order")
            .found(std::to_string(document))
            .expected("0 to " + std::to_string(num_sizes - 1));
    int32_t size;
    std::memcpy(&size, sizes + 4 * document, sizeof size);
    if (size < 0) throw Fault("negative document size").at("document " + std::to_string(document)).found(std::to_string(size));
    return size;
}

}  // namespace

template <typename Doc, typename Row>
void fill_sample_index(const uint8_t* sizes, int64_t num_sizes, const Doc* order, int64_t length, int64_t seq_length, Row* out, int64_t rows) {
    if (seq_length <= 0) throw Fault("seq_length must be positive").found(std::to_string(seq_length));
    const auto size = [&](int64_t position) {
        const int64_t later = position + kAhead;
        if (later < length) {
            const auto document = static_cast<int64_t>(order[later]);
            if (document >= 0 && document < num_sizes) __builtin_prefetch(sizes + 4 * document);
        }
        return size_of(sizes, num_sizes, order, position);
    };
    StreamPosition at;
    for (int64_t row = 0; row < rows; ++row) {
        if (!advance(at, row == 0 ? 0 : seq_length, length, size))
            throw Fault("documents end before the samples do").at("sample " + std::to_string(row)).expected(std::to_string(rows) + " rows");
        out[2 * row] = static_cast<Row>(at.document);
        out[2 * row + 1] = static_cast<Row>(at.offset);
    }
}

template void fill_sample_index(const uint8_t*, int64_t, const int32_t*, int64_t, int64_t, int32_t*, int64_t);
template void fill_sample_index(const uint8_t*, int64_t, const int32_t*, int64_t, int64_t, int64_t*, int64_t);
template void fill_sample_index(const uint8_t*, int64_t, const int64_t*, int64_t, int64_t, int32_t*, int64_t);
template void fill_sample_index(const uint8_t*, int64_t, const int64_t*, int64_t, int64_t, int64_t*, int64_t);

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
