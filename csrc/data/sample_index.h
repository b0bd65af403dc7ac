// Which tokens make up a sample.
//
// order: neox. The documents of all epochs, shuffled, are one stream of tokens; sample k starts at token k x seq_length
// and has seq_length + 1 tokens. A row of the sample index is where that token lies: (position in the document order,
// offset in the document).
//
// order: epoch. The dataset in file order is one stream. Each epoch cuts it into samples from its own phase and visits
// them in the order of a keyed permutation. No array, O(1) memory, any sample of any epoch in constant time.
#pragma once

#include <cstdint>

namespace neox::data {

// Fills `rows` rows of (position, offset), row k for token k x seq_length. `sizes` are int32 tokens per document and
// may be unaligned. Doc and Row are int32_t or int64_t. `threads` > 1 splits large orders among threads; the result is
// the same. Throws Fault for a document number outside [0, num_sizes), a negative size, or a stream that ends early.
template <typename Doc, typename Row>
void fill_sample_index(const uint8_t* sizes, int64_t num_sizes, const Doc* order, int64_t length, int64_t seq_length,
                       Row* out, int64_t rows, int threads);

// Rows [first, last) of a sample index; `out` receives row `first`.
template <typename Row>
struct RowRange {
    Row* out;
    int64_t first, last;
};

// Writes the rows of the range that start in documents [first, first + count) of the order; document `first` starts at
// token `start`. All arithmetic is 64-bit, so positions, offsets and totals beyond 2^32 are exact. Precondition: the
// first such row is in the range.
template <typename Row>
void write_rows(const int32_t* sizes, int64_t first, int64_t count, int64_t start, int64_t seq_length,
                RowRange<Row> range);

// Smallest number of epochs E whose tokens give at least num_samples samples: (E x tokens_per_epoch - 1) / seq_length
// >= num_samples. Throws Fault if an argument is out of range or the result does not fit 63 bits.
int64_t epochs_needed(int64_t tokens_per_epoch, int64_t seq_length, int64_t num_samples);

// Bijection of [0, size) that depends on the key: an alternating Feistel network with additions modulo a and b over [0,
// a x b), a x b >= size, whose values outside [0, size) are walked along the cycle (Black and Rogaway 2002).
uint64_t permute(uint64_t key, uint64_t size, uint64_t value);

// keyed 64-bit hash, splitmix64 finaliser (Steele et al. 2014) applied twice
uint64_t mix(uint64_t key, uint64_t value);

// The order of one dataset (or of one range of it) over unbounded epochs.
struct EpochOrder {
    uint64_t key;
    uint64_t num_tokens;
    uint64_t seq_length;

    uint64_t samples_per_epoch() const { return num_tokens == 0 ? 0 : (num_tokens - 1) / seq_length; }
    // First token of a sample. Precondition: samples_per_epoch() > 0.
    uint64_t first_token(uint64_t sample) const;
};

}  // namespace neox::data
