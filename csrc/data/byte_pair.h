// Byte-pair encoding of one word: merges the adjacent pair with the lowest rank, the first on a tie, until no pair has
// a rank (Sennrich et al. 2016, over bytes as in GPT-2). Gives the ids of BPE in `tokenizers` without dropout, unknown
// token and prefixes.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace neox::data {

class BytePairs {
  public:
    static constexpr uint32_t kNone = UINT32_MAX;
    static constexpr uint32_t kMaxIds = (1u << 20) - 1;
    static constexpr uint64_t kTiny = 16;
    static constexpr uint64_t kShort = 256;  // bytes of a word up to which the lowest pair is found by scanning

    // byte_ids: id of each of the 256 bytes, kNone if the vocabulary lacks it. Merge r turns (left[r], right[r]) into
    // merged[r]. Throws Fault for ids >= kMaxIds and for 2^24 merges or more.
    BytePairs(std::vector<uint32_t> byte_ids, const std::vector<uint32_t>& left, const std::vector<uint32_t>& right,
              std::vector<uint32_t> merged);

    // Tokens that encode a complete word without merges (`ignore_merges`).
    void set_word_tokens(std::unordered_map<std::string, uint32_t> tokens) { word_tokens_ = std::move(tokens); }

    // Whether no token crosses the boundary before word[at], 0 < at < count. The two parts of the word can then be
    // encoded separately.
    bool can_split_at(const uint8_t* word, uint64_t at, uint64_t count) const {
        if (byte_ranks_[static_cast<uint32_t>(word[at - 1]) << 8 | word[at]] != kNone) return false;
        if (at >= 2 && inside_token(word + at - 2)) return false;
        return at + 1 >= count || !inside_token(word + at - 1);
    }
    // Whether words may be split at all: not if there are tokens for complete words, or two texts have one id.
    bool may_split() const { return may_split_ && word_tokens_.empty(); }

    // Writes the ids of a word, at most `count`, and returns their number. Takes O(count log count).
    uint64_t encode(const uint8_t* word, uint64_t count, uint32_t* out) const;

  private:
    // Whether some token contains these three consecutive bytes.
    bool inside_token(const uint8_t* at) const {
        const uint32_t window = static_cast<uint32_t>(at[0]) << 16 | static_cast<uint32_t>(at[1]) << 8 | at[2];
        return (windows_[window >> 6] >> (window & 63) & 1) != 0;
    }
    void record_windows(const std::vector<uint32_t>& left, const std::vector<uint32_t>& right);
    uint32_t rank(uint32_t left, uint32_t right) const;
    uint64_t encode_tiny(const uint8_t* word, uint64_t count, uint32_t* out) const;
    uint64_t encode_short(const uint8_t* word, uint64_t count, uint32_t* out) const;
    uint64_t encode_long(const uint8_t* word, uint64_t count, uint32_t* out) const;

    std::vector<uint32_t> byte_ids_, merged_;
    std::vector<uint32_t> byte_ranks_;  // [left byte][right byte]
    std::vector<uint64_t> slots_;       // open addressing: a pair of 20-bit ids, and its 24-bit rank
    std::vector<uint64_t> filter_;      // one bit per hash: rejects most pairs without a rank, and fits in the cache
    std::vector<uint64_t> windows_;     // one bit per three-byte sequence
    bool may_split_ = false;
    int slot_shift_ = 0, filter_shift_ = 0;
    std::unordered_map<std::string, uint32_t> word_tokens_;
};

}  // namespace neox::data
