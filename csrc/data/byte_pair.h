// Byte-pair encoding of one word: the pair of neighbours with the lowest rank is merged, the first on a tie, until no pair has a rank
// (Sennrich et al. 2016, over bytes as in GPT-2). Same ids as `tokenizers`' BPE without dropout, unknown token and prefixes.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace neox::data {

class BytePairs {
  public:
    static constexpr uint32_t kNone = UINT32_MAX;
    static constexpr uint64_t kShort = 256;  // bytes of a word up to which the pair is looked for by scanning

    // byte_ids: id of each of the 256 bytes, kNone where the vocabulary lacks it. Merge r makes merged[r] of (left[r], right[r]).
    BytePairs(std::vector<uint32_t> byte_ids, const std::vector<uint32_t>& left, const std::vector<uint32_t>& right, std::vector<uint32_t> merged);

    // Tokens that are taken whole when a word is one (`ignore_merges`).
    void take_whole(std::unordered_map<std::string, uint32_t> tokens) { whole_ = std::move(tokens); }

    // Writes the ids of a word, at most `count` of them; returns how many. Time is linear in `count` but for a logarithm.
    uint64_t encode(const uint8_t* word, uint64_t count, uint32_t* out) const;

  private:
    struct Slot {
        uint64_t pair;
        uint32_t rank;
    };
    uint32_t rank(uint32_t left, uint32_t right) const;
    uint64_t encode_short(const uint8_t* word, uint64_t count, uint32_t* out) const;
    uint64_t encode_long(const uint8_t* word, uint64_t count, uint32_t* out) const;

    std::vector<uint32_t> byte_ids_, merged_;
    std::vector<uint32_t> byte_ranks_;  // [left byte][right byte]
    std::vector<Slot> slots_;           // open addressing
    std::vector<uint64_t> filter_;      // one bit per hash: most pairs have no rank, and this stays in the cache
    int slot_shift_ = 0, filter_shift_ = 0;
    std::unordered_map<std::string, uint32_t> whole_;
};

}  // namespace neox::data
