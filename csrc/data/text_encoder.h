// Encodes text as `tokenizers` does for byte-level BPE: cuts out added tokens, applies normalisation form C if the
// tokenizer asks for it, splits the rest into words, and encodes each word. A cache of fixed size holds short words.
#pragma once

#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "data/byte_pair.h"
#include "data/word_split.h"

namespace neox::data {

struct AddedToken {
    std::string text;
    uint32_t id;
    bool normalized;  // matched in the normalised text, else in the original text
    bool ignored;     // takes part in matching, but its matches are encoded as text (--special-tokens text)
};

// Finds the leftmost-longest match of a set of strings.
class StringMatcher {
  public:
    void add(const std::string& text, uint32_t value);
    bool empty() const { return nodes_.size() == 1; }
    // The first match in [at, end), or nullptr; sets its `length` and `value`. Reads up to kPadding bytes past `end`.
    const uint8_t* find(const uint8_t* at, const uint8_t* end, uint64_t& length, uint32_t& value) const;

  private:
    struct Node {
        std::array<uint32_t, 256> next{};  // 0 for none, since no edge leads to the root
        uint32_t value = UINT32_MAX;
    };
    std::vector<Node> nodes_{1};
    std::vector<uint16_t> starts_;  // distinct first two bytes; a string of one byte stands for all 256
    uint32_t match(const uint8_t* at, const uint8_t* end, uint64_t& length) const;
    const uint8_t* next_start(const uint8_t* at, const uint8_t* end) const;
};

// A growing array of ids whose new part is left uninitialised.
class IdBuffer {
  public:
    // Space for `count` more ids at the end.
    uint32_t* room(uint64_t count);
    void set_end(const uint32_t* end) { size_ = static_cast<uint64_t>(end - ids_.get()); }
    uint32_t* begin() { return ids_.get(); }
    uint64_t size() const { return size_; }
    void clear() { size_ = 0; }
    void shrink_to(uint64_t count) { size_ = count; }

  private:
    std::unique_ptr<uint32_t[]> ids_;
    uint64_t size_ = 0, capacity_ = 0;
};

// Zeroed memory, aligned to a huge page if the system has them: random reads of a table then need few TLB entries.
void* zeroed_pages(uint64_t bytes);

struct Free {
    void operator()(void* bytes) const { std::free(bytes); }
};

template <typename T>
using Table = std::unique_ptr<T[], Free>;

// Caches the ids of short words. Most words have up to 15 bytes and up to 7 ids below 65,536 (or 3 of any size). Two of
// them share a cache line, and a new one moves the other aside, so that a rare word does not evict a frequent one.
// Words of up to 23 bytes with up to 9 ids have a line each in a second table.
class WordCache {
  public:
    static constexpr uint64_t kShort = 15, kLongest = 23;
    static constexpr uint64_t kSpill = 9;  // ids that may be written past the valid ones
    struct Key {
        uint64_t bytes[3];  // of the word, zero-padded
        uint32_t length;
        uint32_t slot;  // in the table for its length
    };
    WordCache()
        : lines_(static_cast<Line*>(zeroed_pages(kLines * sizeof(Line)))),
          long_(static_cast<Long*>(zeroed_pages(kLongLines * sizeof(Long)))) {}

    // Sets the key of a word of up to kLongest bytes and prefetches its cache line. Reads 24 bytes. The key is an
    // output argument because returning it would copy it with vector loads, which stall on the scalar stores before
    // them.
    void make_key(const uint8_t* word, uint64_t length, Key& key) const;
    // Copies the ids of a word to `out` and returns their end; nullptr if the word is not cached.
    uint32_t* find(const Key& key, uint32_t* out) const;
    void remember(const Key& key, const uint32_t* ids, uint64_t count);

  private:
    static constexpr uint16_t kWide = 0x8000, kElsewhere = 0x4000, kCount = 0xFF;
    struct Short {
        uint64_t key[2];  // the bytes of the word, then its length in the last byte
        uint16_t ids[7];  // or three of 32 bits
        // of ids, and kWide; in the first entry of a line also kElsewhere: some short word of this line is in the
        // second table
        uint16_t count;
    };
    struct alignas(64) Line {
        Short words[2];
    };
    struct alignas(64) Long {
        uint64_t key[3];
        uint32_t ids[kSpill];
        uint32_t count;
    };
    static constexpr int kBits = 17, kLongBits = 14;
    static constexpr uint64_t kLines = uint64_t{1} << kBits, kLongLines = uint64_t{1} << kLongBits;
    static uint64_t hash(const Key& key);
    static uint64_t tagged(const Key& key, int word) {
        return key.bytes[word] | static_cast<uint64_t>(key.length) << 56;
    }
    static uint32_t* copy(const Short& entry, uint32_t* out);
    const Long& long_line(const Key& key) const { return long_[hash(key) >> (64 - kLongBits)]; }

    Table<Line> lines_;
    Table<Long> long_;
};

class TextEncoder {
  public:
    // The mutable state of encoding: one per thread.
    struct State {
        WordCache cache;
        IdBuffer ids;
        std::string normal;  // text in normalisation form C
    };

    TextEncoder(BytePairs pairs, SplitPattern pattern, bool normalise, const std::vector<AddedToken>& added);

    // Appends the ids of a text to state.ids. Precondition: valid UTF-8, followed by kPadding readable bytes.
    void encode(const uint8_t* text, uint64_t count, State& state) const;

  private:
    class Queue;
    void encode_part(const uint8_t* at, const uint8_t* end, State& state, Queue& queue) const;
    void encode_normal(const uint8_t* at, const uint8_t* end, Queue& queue) const;

    BytePairs pairs_;
    WordSplitter splitter_;
    bool normalise_;
    StringMatcher raw_, normal_;
};

}  // namespace neox::data
