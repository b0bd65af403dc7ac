#include "data/byte_pair.h"

#include <algorithm>
#include <cstring>
#include <queue>

#include "data/clones.h"
#include "data/fault.h"

namespace neox::data {

namespace {

constexpr uint64_t kFree = UINT64_MAX;
constexpr int kRankBits = 24, kIdBits = 20;
constexpr uint64_t kBitsPerPair = 16;  // of the filter: it passes one in twenty pairs without a rank

uint64_t pair_of(uint32_t left, uint32_t right) { return static_cast<uint64_t>(left) << kIdBits | right; }
uint64_t entry_of(uint32_t rank, uint32_t at) { return static_cast<uint64_t>(rank) << 32 | at; }

uint64_t hash(uint64_t pair) { return (pair ^ pair >> 29) * 0x9E3779B97F4A7C15u; }

int bits_for(uint64_t count) {
    int bits = 6;
    while ((uint64_t{1} << bits) < count) ++bits;
    return bits;
}

}  // namespace

BytePairs::BytePairs(std::vector<uint32_t> byte_ids, const std::vector<uint32_t>& left,
                     const std::vector<uint32_t>& right, std::vector<uint32_t> merged)
    : byte_ids_(std::move(byte_ids)), merged_(std::move(merged)), byte_ranks_(256 * 256, kNone) {
    if (byte_ids_.size() != 256 || left.size() != merged_.size() || right.size() != merged_.size())
        throw Fault("merges and bytes have different sizes");
    if (merged_.size() >= uint64_t{1} << kRankBits)
        throw Fault("too many merges").found(std::to_string(merged_.size())).expected("below 2^24");
    const std::initializer_list<const std::vector<uint32_t>*> lists = {&left, &right, &merged_, &byte_ids_};
    for (const std::vector<uint32_t>* ids : lists)
        for (const uint32_t id : *ids)
            if (id >= kMaxIds && !(id == kNone && ids == &byte_ids_))
                throw Fault("id is too large").found(std::to_string(id)).expected("below 2^20 - 1");
    const int slot_bits = bits_for(2 * merged_.size());
    const int filter_bits = bits_for(kBitsPerPair * merged_.size());
    slot_shift_ = 64 - slot_bits;
    filter_shift_ = 64 - filter_bits;
    slots_.assign(uint64_t{1} << slot_bits, kFree);
    filter_.assign((uint64_t{1} << filter_bits) / 64, 0);
    for (uint32_t r = 0; r < merged_.size(); ++r) {
        const uint64_t pair = pair_of(left[r], right[r]), hashed = hash(pair);
        uint64_t at = hashed >> slot_shift_;
        while (slots_[at] != kFree && slots_[at] >> kRankBits != pair) at = (at + 1) & (slots_.size() - 1);
        slots_[at] = pair << kRankBits | r;  // a pair listed twice gets its later rank
        filter_[hashed >> filter_shift_ >> 6] |= uint64_t{1} << (hashed >> filter_shift_ & 63);
    }
    for (uint32_t a = 0; a < 256; ++a)
        for (uint32_t b = 0; b < 256; ++b)
            if (byte_ids_[a] != kNone && byte_ids_[b] != kNone)
                byte_ranks_[a << 8 | b] = rank(byte_ids_[a], byte_ids_[b]);
    record_windows(left, right);
}

void BytePairs::record_windows(const std::vector<uint32_t>& left, const std::vector<uint32_t>& right) {
    uint32_t largest = 0;
    const auto look = [&](const std::vector<uint32_t>& ids) {
        for (const uint32_t id : ids) largest = std::max(largest, id == kNone ? 0 : id);
    };
    look(left), look(right), look(merged_), look(byte_ids_);
    std::vector<std::string> texts(uint64_t{largest} + 1);
    for (uint32_t b = 0; b < 256; ++b)
        if (byte_ids_[b] != kNone) texts[byte_ids_[b]] = std::string(1, static_cast<char>(b));
    windows_.assign((uint64_t{1} << 24) / 64, 0);
    size_t unknown = merged_.size() + 1;
    // one pass suffices if every merge joins results of earlier ones
    for (size_t before = unknown + 1; unknown != 0 && unknown < before;) {
        before = unknown;
        unknown = 0;
        for (size_t r = 0; r < merged_.size(); ++r) {
            if (texts[left[r]].empty() || texts[right[r]].empty()) {
                ++unknown;
                continue;
            }
            const std::string text = texts[left[r]] + texts[right[r]];
            std::string& known = texts[merged_[r]];
            if (!known.empty() && known != text) return;  // an id of two texts: words are never split
            known = text;
            for (size_t i = 0; i + 2 < text.size(); ++i) {
                const auto byte = [&](size_t at) { return static_cast<uint32_t>(static_cast<uint8_t>(text[at])); };
                const uint32_t window = byte(i) << 16 | byte(i + 1) << 8 | byte(i + 2);
                windows_[window >> 6] |= uint64_t{1} << (window & 63);
            }
        }
    }
    may_split_ = unknown == 0;
}

inline uint32_t BytePairs::rank(uint32_t left, uint32_t right) const {
    const uint64_t pair = pair_of(left, right), hashed = hash(pair);
    if ((filter_[hashed >> filter_shift_ >> 6] >> (hashed >> filter_shift_ & 63) & 1) == 0) return kNone;
    for (uint64_t at = hashed >> slot_shift_;; at = (at + 1) & (slots_.size() - 1)) {
        if (slots_[at] >> kRankBits == pair)
            return static_cast<uint32_t>(slots_[at] & ((uint64_t{1} << kRankBits) - 1));
        if (slots_[at] == kFree) return kNone;
    }
}

uint64_t BytePairs::encode(const uint8_t* word, uint64_t count, uint32_t* out) const {
    if (!word_tokens_.empty()) {
        const auto found = word_tokens_.find(std::string(reinterpret_cast<const char*>(word), count));
        if (found != word_tokens_.end()) return *out = found->second, 1;
    }
    if (count <= 1) return count == 0 ? 0 : (*out = byte_ids_[*word], 1);
    return count <= kTiny    ? encode_tiny(word, count, out)
           : count <= kShort ? encode_short(word, count, out)
                             : encode_long(word, count, out);
}

// As encode_short, but scalar: a vector load of numbers just written one by one stalls until all stores have reached
// the cache.
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("no-tree-vectorize")))
#endif
uint64_t BytePairs::encode_tiny(const uint8_t* word, uint64_t count, uint32_t* out) const {
    uint64_t ranks[kTiny];  // of the pair that begins here, with its position in the lowest bits
    uint32_t ids[kTiny];
    const auto key = [](uint32_t rank, uint64_t place) { return static_cast<uint64_t>(rank) << 8 | place; };
    uint64_t size = count;
    for (uint64_t i = 0; i < size; ++i) ids[i] = byte_ids_[word[i]];
    for (uint64_t i = 0; i + 1 < size; ++i)
        ranks[i] = key(byte_ranks_[static_cast<uint32_t>(word[i]) << 8 | word[i + 1]], i);
    while (size > 1) {
        uint64_t best = ranks[0];
        for (uint64_t i = 1; i + 1 < size; ++i) best = std::min(best, ranks[i]);
        const auto found = static_cast<uint32_t>(best >> 8);
        if (found == kNone) break;
        const uint64_t at = best & 0xFF;
        ids[at] = merged_[found];
        --size;
        // moves everything after it one position forward
        for (uint64_t i = at + 1; i < size; ++i) ids[i] = ids[i + 1], ranks[i - 1] = ranks[i] - 1;
        if (at + 1 < size) ranks[at] = key(rank(ids[at], ids[at + 1]), at);
        if (at > 0) ranks[at - 1] = key(rank(ids[at - 1], ids[at]), at - 1);
    }
    for (uint64_t i = 0; i < size; ++i) out[i] = ids[i];
    return size;
}

// Positions keep their numbers; a merged position loses its key. A key is the rank of a pair with its position in the
// lowest bits, so the smallest key is the lowest rank at its first position.
NEOX_CLONES uint64_t BytePairs::encode_short(const uint8_t* word, uint64_t count, uint32_t* out) const {
    constexpr uint32_t kPlaceBits = 8, kPlace = (1u << kPlaceBits) - 1;
    static_assert(kShort == 1u << kPlaceBits);
    alignas(64) uint32_t keys[kShort];
    uint32_t ids[kShort];
    uint8_t next[kShort], before[kShort];
    const auto size = static_cast<uint32_t>(count);
    const uint32_t padded = (size + 15) & ~15u;
    const auto key = [](uint32_t rank, uint32_t place) { return rank == kNone ? kNone : rank << kPlaceBits | place; };
    for (uint32_t i = 0; i < size; ++i)
        ids[i] = byte_ids_[word[i]], next[i] = static_cast<uint8_t>(i + 1), before[i] = static_cast<uint8_t>(i - 1);
    for (uint32_t i = 0; i + 1 < size; ++i)
        keys[i] = key(byte_ranks_[static_cast<uint32_t>(word[i]) << 8 | word[i + 1]], i);
    for (uint32_t i = size - 1; i < padded; ++i) keys[i] = kNone;
    const uint32_t last = size & kPlace;  // value of `next` at the end: 0 for 256, which is no position's successor
    for (;;) {
        uint32_t best = kNone;
        for (uint32_t i = 0; i < padded; ++i) best = std::min(best, keys[i]);
        if (best == kNone) break;
        const uint32_t at = best & kPlace, gone = next[at], behind = next[gone];
        ids[at] = merged_[best >> kPlaceBits];
        keys[gone] = kNone;
        next[at] = static_cast<uint8_t>(behind);
        keys[at] = kNone;
        if (behind != last) {
            before[behind] = static_cast<uint8_t>(at);
            keys[at] = key(rank(ids[at], ids[behind]), at);
        }
        if (at != 0) keys[before[at]] = key(rank(ids[before[at]], ids[at]), before[at]);
    }
    uint64_t kept = 0;
    uint32_t at = 0;
    do out[kept++] = ids[at];
    while ((at = next[at]) != last);
    return kept;
}

// A heap of (rank, position) over a linked list; entries whose pair has changed are skipped.
uint64_t BytePairs::encode_long(const uint8_t* word, uint64_t count, uint32_t* out) const {
    if (count >= kNone)
        throw Fault("a word is too long").found(std::to_string(count) + " bytes").expected("below 4 GiB");
    const auto size = static_cast<uint32_t>(count);
    std::vector<uint32_t> next(size), before(size), ranks(size, kNone);
    std::vector<uint64_t> entries;
    for (uint32_t i = 0; i < size; ++i) {
        out[i] = byte_ids_[word[i]];
        next[i] = i + 1;
        before[i] = i - 1;
        if (i + 1 < size) ranks[i] = byte_ranks_[static_cast<uint32_t>(word[i]) << 8 | word[i + 1]];
        if (ranks[i] != kNone) entries.push_back(entry_of(ranks[i], i));
    }
    std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> heap(std::greater<>{}, std::move(entries));
    const auto renew = [&](uint32_t at) {
        ranks[at] = next[at] < size ? rank(out[at], out[next[at]]) : kNone;
        if (ranks[at] != kNone) heap.push(entry_of(ranks[at], at));
    };
    while (!heap.empty()) {
        const auto best = static_cast<uint32_t>(heap.top() >> 32), at = static_cast<uint32_t>(heap.top());
        heap.pop();
        if (ranks[at] != best) continue;
        const uint32_t gone = next[at];
        out[at] = merged_[best];
        ranks[gone] = kNone;
        next[at] = next[gone];
        if (next[at] < size) before[next[at]] = at;
        renew(at);
        if (at > 0) renew(before[at]);
    }
    uint32_t kept = 0;
    for (uint32_t at = 0; at < size; at = next[at]) out[kept++] = out[at];
    return kept;
}

}  // namespace neox::data
