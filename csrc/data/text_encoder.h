// Text to ids as `tokenizers` gives them for byte-level BPE: added tokens are cut out, the rest is brought to normalisation form C where the
// tokenizer wants it, split into words, and each word is encoded; a cache of fixed size remembers short words.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "data/byte_pair.h"
#include "data/word_split.h"

namespace neox::data {

struct AddedToken {
    std::string text;
    uint32_t id;
    bool normalized;  // looked for in the normalised text, else in the text as it is
    bool ignored;     // takes part in the matching, but what it matches stays text (special tokens that are to be encoded as text)
};

// Finds the leftmost longest of a set of strings.
class StringMatcher {
  public:
    void add(const std::string& text, uint32_t value);
    bool empty() const { return nodes_.size() == 1; }
    // The first match in [at, end): its bytes, or nullptr; `length` and `value` are of the match. Reads up to kPadding bytes behind `end`.
    const uint8_t* find(const uint8_t* at, const uint8_t* end, uint64_t& length, uint32_t& value) const;

  private:
    struct Node {
        std::array<uint32_t, 256> next{};  // 0: none, since nothing leads to the root
        uint32_t value = UINT32_MAX;
    };
    std::vector<Node> nodes_{1};
    std::vector<uint16_t> starts_;  // distinct first two bytes; a string of one byte stands for all 256
    uint32_t match(const uint8_t* at, const uint8_t* end, uint64_t& length) const;
    const uint8_t* next_start(const uint8_t* at, const uint8_t* end) const;
};

// A growing array of ids whose new part is not touched before it is written.
class IdBuffer {
  public:
    // Room for `count` ids behind those that are there.
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

// Remembers the ids of words of up to 23 bytes with up to 9 ids. Every word has two places; a new one takes the first and moves what was there
// to the second, so that frequent words are not lost to every rare one.
class WordCache {
  public:
    static constexpr uint64_t kLongest = 23, kMostIds = 9;
    using Key = std::array<uint64_t, 3>;  // the bytes, zeros, and the length as last byte
    struct alignas(64) Entry {
        Key key;
        uint32_t ids[kMostIds];
        uint32_t count;
    };
    WordCache() : entries_(new Entry[kEntries]()) {}
    static Key key_of(const uint8_t* word, uint64_t length);  // reads 24 bytes
    // The first place of a word; the second is the one beside it.
    uint64_t place(const Key& key) const {
        const uint64_t mixed = (key[0] ^ key[0] >> 32) * 0x9E3779B97F4A7C15u + key[1] * 0xC2B2AE3D27D4EB4Fu + key[2] * 0x165667B19E3779F9u;
        return mixed * 0xD6E8FEB86659FD93u >> (64 - kBits);
    }
    void prefetch(uint64_t place) const { __builtin_prefetch(&entries_[place]); }
    Entry* find(const Key& key, uint64_t place) {
        if (same(entries_[place].key, key)) return &entries_[place];
        return same(entries_[place ^ 1].key, key) ? &entries_[place ^ 1] : nullptr;
    }
    Entry& replace(uint64_t place) {
        entries_[place ^ 1] = entries_[place];
        return entries_[place];
    }

  private:
    static bool same(const Key& one, const Key& other) { return ((one[0] ^ other[0]) | (one[1] ^ other[1]) | (one[2] ^ other[2])) == 0; }
    static constexpr int kBits = 16;
    static constexpr uint64_t kEntries = uint64_t{1} << kBits;
    std::unique_ptr<Entry[]> entries_;
};

class TextEncoder {
  public:
    // What encoding needs and changes: one per thread.
    struct State {
        WordCache cache;
        IdBuffer ids;
        std::string normal;  // text in normalisation form C
    };

    TextEncoder(BytePairs pairs, SplitPattern pattern, bool normalise, const std::vector<AddedToken>& added);

    // Appends the ids of a text to state.ids. Precondition: valid UTF-8, kPadding readable bytes behind it.
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
