// Reader of the indexed dataset of GPT-NeoX and Megatron-LM: PREFIX.idx (structure) and PREFIX.bin (tokens).
//
// PREFIX.idx, little endian: 0 magic "MMIDIDX\0\0" | 9 u64 version 1 | 17 u8 token type | 18 u64 N sequences | 26 u64 D
// document borders | 34 i32 size[N] | i64 byte offset in .bin [N] | i64 document[D]: sequence at which each document
// starts, last entry N. Opening checks the complete index for consistency, and against the size of .bin. No read of a
// file that passes can go out of bounds.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "data/file.h"

namespace neox::data {

constexpr char kIndexMagic[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', '\0', '\0'};
constexpr uint64_t kIndexVersion = 1;
constexpr uint64_t kIndexHeader = 34;

struct TokenType {
    uint8_t code;
    uint32_t bytes;
    const char* name;
    int64_t lowest, highest;
};

// Types 1-5 (u8 i8 i16 i32 i64) and 8 (u16). Throws Fault for any other: 6 and 7 mean floats to some writers, u16 and
// u32 to others.
const TokenType& token_type(uint8_t code);
const TokenType& token_type(const std::string& name);

// Smallest and largest id; smallest > largest if there is none.
struct IdRange {
    int64_t smallest = INT64_MAX, largest = INT64_MIN;

    void add(const IdRange& other) {
        smallest = std::min(smallest, other.smallest);
        largest = std::max(largest, other.largest);
    }
};
IdRange id_range(const TokenType& type, const uint8_t* bytes, uint64_t count);

// The checked content of an .idx, read in place. It is unaligned, so every load copies.
class Index {
  public:
    // `name` is the file's name in messages. Throws Fault if the bytes are not an index or are inconsistent.
    Index(const uint8_t* bytes, uint64_t count, std::string name);

    const TokenType& type() const { return *type_; }
    uint64_t num_sequences() const { return num_sequences_; }
    uint64_t num_documents() const { return num_borders_ - 1; }
    uint64_t num_tokens() const { return num_tokens_; }
    uint64_t bin_bytes() const { return num_tokens_ * type_->bytes; }

    int32_t size(uint64_t sequence) const { return load<int32_t>(kIndexHeader + 4 * sequence); }
    // First token of a sequence, counted over the complete dataset; num_tokens() for sequence == num_sequences().
    uint64_t first_token(uint64_t sequence) const {
        if (sequence >= num_sequences_) return num_tokens_;
        return load<uint64_t>(kIndexHeader + 4 * num_sequences_ + 8 * sequence) / type_->bytes;
    }
    // First sequence of a document; num_sequences() for document == num_documents().
    uint64_t first_sequence(uint64_t document) const {
        return load<uint64_t>(kIndexHeader + 12 * num_sequences_ + 8 * document);
    }
    uint64_t first_token_of_document(uint64_t document) const { return first_token(first_sequence(document)); }

    // The sequence or document that holds a token. Precondition: token < num_tokens().
    uint64_t sequence_of_token(uint64_t token) const;
    uint64_t document_of_token(uint64_t token) const;
    uint64_t document_of_sequence(uint64_t sequence) const;

    const uint8_t* sizes() const { return bytes_ + kIndexHeader; }
    const uint8_t* documents() const { return bytes_ + kIndexHeader + 12 * num_sequences_; }

  private:
    template <typename T>
    T load(uint64_t at) const {
        T value;
        std::memcpy(&value, bytes_ + at, sizeof value);
        return value;
    }
    void check_header(uint64_t count);
    void check_sequences();
    void check_documents() const;

    const uint8_t* bytes_;
    std::string name_;
    const TokenType* type_ = nullptr;
    uint64_t num_sequences_ = 0, num_borders_ = 0, num_tokens_ = 0;
};

class IndexedDataset {
  public:
    explicit IndexedDataset(const std::string& prefix);

    const Index& index() const { return index_; }
    const std::string& bin_path() const { return bin_.path(); }
    const std::string& idx_path() const { return idx_.path(); }
    // The tokens as they are in the file. `check_blocks` finds damage in what is read from here.
    const uint8_t* mapped_tokens() const { return tokens_.bytes(); }
    uint64_t idx_checksum() const;
    void check_unchanged() const;

    // After this call, each block is compared with its checksum when a read first touches it.
    void guard(uint64_t block_bytes, std::vector<uint64_t> sums);
    // Throws Fault if a block with a byte of [first_byte, last_byte] differs from its checksum. Without `guard`, none
    // does.
    void check_blocks(uint64_t first_byte, uint64_t last_byte) const;
    // Compares every block with its checksum; returns the numbers of those that differ.
    std::vector<uint64_t> damaged_blocks() const;

    // Tokens [first, first + count) of the dataset, widened to 64 bits. `segments`, unless null, gets the running
    // number of each token's document.
    void read(uint64_t first, uint64_t count, int64_t* out, int32_t* segments) const;

    // `count` tokens from a concatenation of sequences: order[position] from token `offset` on, order[position + 1],
    // ... T is int32_t or int64_t. Throws Fault if the order ends before `count` tokens, or names a sequence that does
    // not exist.
    template <typename T>
    void read_ordered(const T* order, uint64_t length, uint64_t position, uint64_t offset, uint64_t count, int64_t* out,
                      int32_t* segments) const;

    // Destination of samples of seq_length + 1 tokens. Sample i goes to row rows[i] of `inputs` (all tokens but the
    // last) and `targets` (all but the first), both [rows, seq_length]. `segments` (running number of each input's
    // document) and `positions` (position in its segment) have the same shape and may be null. The reading functions
    // return the range of the ids.
    struct Rows {
        const int64_t* rows;
        uint64_t count, seq_length;
        int64_t *inputs, *targets;
        int32_t* segments;
        int64_t* positions;
    };
    // Sample i starts at token firsts[i] of the dataset.
    IdRange read_rows(const int64_t* firsts, const Rows& to) const;
    // Sample i starts at token offsets[i] of sequence order[positions[i]]; see `read_ordered`.
    template <typename T>
    IdRange read_ordered_rows(const T* order, uint64_t length, const int64_t* positions, const int64_t* offsets,
                              const Rows& to) const;

    // First token id outside [0, vocab_size); num_tokens() if there is none.
    uint64_t find_bad_token(int64_t vocab_size) const;

  private:
    struct Target;
    template <typename Read>
    IdRange fill_rows(const Rows& to, const Read& read) const;
    void read_to(uint64_t first, uint64_t count, const Target& to) const;
    template <typename T>
    void read_ordered_to(const T* order, uint64_t length, uint64_t position, uint64_t offset, uint64_t count,
                         const Target& to) const;
    void read_tokens(uint64_t first, uint64_t count, const Target& to, uint64_t at) const;
    bool block_is_good(uint64_t block) const;

    InputFile idx_, bin_;
    Mapping map_, tokens_;
    Index index_;
    uint64_t block_bytes_ = 0;
    std::vector<uint64_t> sums_;
    std::unique_ptr<std::atomic<bool>[]> verified_;
};

}  // namespace neox::data
