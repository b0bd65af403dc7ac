#include "data/text_encoder.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

namespace neox::data {

namespace {

constexpr uint32_t kIgnored = UINT32_MAX - 1;  // value of an added token that is encoded as text
constexpr uint32_t kNoMatch = UINT32_MAX;

// kMask + 24 - n points to 24 bytes, of which the first n are set.
struct alignas(16) Mask {
    uint8_t bytes[48];
    constexpr Mask() : bytes() {
        for (int i = 0; i < 24; ++i) bytes[i] = 0xFF;
    }
};
constexpr Mask kMask;

// Calls `other` with the text between the matches and `matched` with the ids of the matches.
template <typename Other, typename Matched>
void cut(const StringMatcher& matcher, const uint8_t* at, const uint8_t* end, const Other& other,
         const Matched& matched) {
    if (matcher.empty()) return other(at, end);
    const uint8_t* search = at;
    while (at < end) {
        uint64_t length;
        uint32_t id;
        const uint8_t* found = matcher.find(search, end, length, id);
        if (found == nullptr) return other(at, end);
        search = found + length;
        if (id == kIgnored) continue;
        if (found > at) other(at, found);
        matched(id);
        at = search;
    }
}

}  // namespace

void StringMatcher::add(const std::string& text, uint32_t value) {
    if (text.empty()) return;
    uint32_t node = 0;
    for (const char c : text) {
        const auto byte = static_cast<uint8_t>(c);
        if (nodes_[node].next[byte] == 0) {
            nodes_.emplace_back();
            nodes_[node].next[byte] = static_cast<uint32_t>(nodes_.size() - 1);
        }
        node = nodes_[node].next[byte];
    }
    nodes_[node].value = value;
    const auto start = [&](uint32_t first, uint32_t second) {
        const auto both = static_cast<uint16_t>(first | second << 8);
        if (std::find(starts_.begin(), starts_.end(), both) == starts_.end()) starts_.push_back(both);
    };
    const uint32_t first = static_cast<uint8_t>(text[0]);
    if (text.size() > 1) return start(first, static_cast<uint8_t>(text[1]));
    for (uint32_t second = 0; second < 256; ++second) start(first, second);
}

uint32_t StringMatcher::match(const uint8_t* at, const uint8_t* end, uint64_t& length) const {
    uint32_t value = kNoMatch;
    uint32_t node = 0;
    for (const uint8_t* from = at; at < end && (node = nodes_[node].next[*at]) != 0;) {
        ++at;
        if (nodes_[node].value == kNoMatch) continue;
        value = nodes_[node].value;
        length = static_cast<uint64_t>(at - from);
    }
    return value;
}

// The next position whose two bytes start some string; `end` if there is none. Uses vectors for few distinct starts, a
// table for many.
const uint8_t* StringMatcher::next_start(const uint8_t* at, const uint8_t* end) const {
#if defined(__SSE2__)
    constexpr size_t kFew = 4;
    if (starts_.size() <= kFew) {
        __m128i firsts[kFew], seconds[kFew];
        for (size_t i = 0; i < kFew; ++i) {
            const uint16_t both = starts_[std::min(i, starts_.size() - 1)];
            firsts[i] = _mm_set1_epi8(static_cast<char>(both & 0xFF));
            seconds[i] = _mm_set1_epi8(static_cast<char>(both >> 8));
        }
        for (; at < end; at += 16) {
            const __m128i here = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
            const __m128i behind = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + 1));
            __m128i hits = _mm_setzero_si128();
            for (size_t i = 0; i < kFew; ++i)
                hits = _mm_or_si128(hits,
                                    _mm_and_si128(_mm_cmpeq_epi8(here, firsts[i]), _mm_cmpeq_epi8(behind, seconds[i])));
            const auto mask = static_cast<uint32_t>(_mm_movemask_epi8(hits));
            if (mask != 0) return std::min(at + __builtin_ctz(mask), end);
        }
        return end;
    }
#endif
    while (at < end && nodes_[0].next[*at] == 0) ++at;
    return at;
}

const uint8_t* StringMatcher::find(const uint8_t* at, const uint8_t* end, uint64_t& length, uint32_t& value) const {
    for (;; ++at) {
        at = next_start(at, end);
        if (at >= end) return nullptr;
        value = match(at, end, length);
        if (value != kNoMatch) return at;
    }
}

uint32_t* IdBuffer::room(uint64_t count) {
    if (capacity_ - size_ < count) {
        const uint64_t wanted = std::max(2 * capacity_, size_ + count);
        std::unique_ptr<uint32_t[]> larger(new uint32_t[wanted]);
        if (size_ != 0) std::memcpy(larger.get(), ids_.get(), size_ * sizeof(uint32_t));
        ids_ = std::move(larger);
        capacity_ = wanted;
    }
    return ids_.get() + size_;
}

void* zeroed_pages(uint64_t bytes) {
    constexpr uint64_t kHugePage = 2 << 20;
    const uint64_t alignment = bytes >= kHugePage ? kHugePage : 64;
    void* made = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    if (made == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    // only a hint: without huge pages it is a little slower
    if (alignment == kHugePage) ::madvise(made, bytes, MADV_HUGEPAGE);
#endif
    return std::memset(made, 0, bytes);
}

inline uint64_t WordCache::hash(const Key& key) {
    const uint64_t mixed = (key.bytes[0] ^ key.bytes[0] >> 32) * 0x9E3779B97F4A7C15u +
                           key.bytes[1] * 0xC2B2AE3D27D4EB4Fu + key.bytes[2] * 0x165667B19E3779F9u;
    return (mixed + key.length) * 0xD6E8FEB86659FD93u;
}

inline void WordCache::make_key(const uint8_t* word, uint64_t length, Key& key) const {
    for (int i = 0; i < 3; ++i) {
        uint64_t bytes, mask;
        std::memcpy(&bytes, word + 8 * i, sizeof bytes);
        std::memcpy(&mask, kMask.bytes + 24 - length + 8 * i, sizeof mask);
        key.bytes[i] = bytes & mask;
    }
    key.length = static_cast<uint32_t>(length);
    const uint64_t hashed = hash(key);
    key.slot = static_cast<uint32_t>(hashed >> (64 - kBits));
    length <= kShort ? __builtin_prefetch(&lines_[key.slot]) : __builtin_prefetch(&long_line(key));
}

inline uint32_t* WordCache::copy(const Short& entry, uint32_t* out) {
    if ((entry.count & kWide) != 0) {
        std::memcpy(out, entry.ids, 3 * sizeof *out);
        return out + (entry.count & kCount);
    }
#if defined(__SSE2__)
    // the last element is the count
    const __m128i ids = _mm_loadu_si128(reinterpret_cast<const __m128i*>(entry.ids)), zero = _mm_setzero_si128();
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi16(ids, zero));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 4), _mm_unpackhi_epi16(ids, zero));
#else
    for (int i = 0; i < 7; ++i) out[i] = entry.ids[i];
#endif
    return out + (entry.count & kCount);
}

inline uint32_t* WordCache::find(const Key& key, uint32_t* out) const {
    if (key.length <= kShort) {
        const Line& line = lines_[key.slot];
        const uint64_t high = tagged(key, 1);
        const auto holds = [&](const Short& entry) {
            return ((entry.key[0] ^ key.bytes[0]) | (entry.key[1] ^ high)) == 0;
        };
        const bool first = holds(line.words[0]), second = holds(line.words[1]);
        // one branch for both, so that the processor does not predict which of them it is
        if (__builtin_expect(first | second, 1)) return copy(line.words[second], out);
        // the common case; it saves fetching the line of the other table
        if ((line.words[0].count & kElsewhere) == 0) return nullptr;
    }
    const Long& line = long_line(key);
    if (((line.key[0] ^ key.bytes[0]) | (line.key[1] ^ key.bytes[1]) | (line.key[2] ^ tagged(key, 2))) != 0)
        return nullptr;
    std::memcpy(out, line.ids, sizeof line.ids);
    return out + line.count;
}

void WordCache::remember(const Key& key, const uint32_t* ids, uint64_t count) {
    const bool wide = std::any_of(ids, ids + count, [](uint32_t id) { return id > UINT16_MAX; });
    if (key.length <= kShort && count <= (wide ? 3u : 7u)) {
        Line& line = lines_[key.slot];
        line.words[1] = line.words[0];
        Short& entry = line.words[0];
        const uint16_t elsewhere = entry.count & kElsewhere;
        entry.key[0] = key.bytes[0];
        entry.key[1] = tagged(key, 1);
        entry.count = static_cast<uint16_t>(count | (wide ? kWide : 0) | elsewhere);
        if (wide)
            std::memcpy(entry.ids, ids, count * sizeof *ids);
        else
            for (uint64_t i = 0; i < count; ++i) entry.ids[i] = static_cast<uint16_t>(ids[i]);
    } else if (count <= kSpill) {
        if (key.length <= kShort) lines_[key.slot].words[0].count |= kElsewhere;
        Long& line = long_[hash(key) >> (64 - kLongBits)];
        for (int i = 0; i < 2; ++i) line.key[i] = key.bytes[i];
        line.key[2] = tagged(key, 2);
        std::memcpy(line.ids, ids, count * sizeof *ids);
        line.count = static_cast<uint32_t>(count);
    }
}

TextEncoder::TextEncoder(BytePairs pairs, SplitPattern pattern, bool normalise, const std::vector<AddedToken>& added)
    : pairs_(std::move(pairs)), splitter_(pattern), normalise_(normalise) {
    for (const AddedToken& token : added)
        (token.normalized ? normal_ : raw_).add(token.text, token.ignored ? kIgnored : token.id);
}

// Collects words, so that the cache lines of many lookups are fetched at the same time.
class TextEncoder::Queue {
  public:
    Queue(const TextEncoder& encoder, State& state, const uint8_t* end)
        : pairs_(encoder.pairs_), may_split_(encoder.pairs_.may_split()), state_(state), end_(end) {}

    // Reserves space for words of `bytes` bytes and for the text from `rest`.
    void expect(uint64_t bytes, const uint8_t* rest) {
        flush();
        // a byte gives one id at most
        out_ = state_.ids.room(bytes + static_cast<uint64_t>(end_ - rest) + WordCache::kSpill);
    }

    // Long words, such as sentences in scripts without spaces, are split where no token can cross: the parts are short,
    // and recur.
    void add_word(const uint8_t* at, uint64_t length) {
        if (length <= kWhole || !may_split_) return add_part(at, length);
        uint64_t first = 0;
        for (uint64_t i = 1; i < length; ++i) {
            if ((at[i] & 0xC0) == 0x80 || !pairs_.can_split_at(at, i, length)) continue;
            add_part(at + first, i - first);
            first = i;
        }
        add_part(at + first, length - first);
    }

    void add_id(uint32_t id) {
        words_[count_].at = nullptr;
        words_[count_].length = id;
        if (++count_ == kMaxWords) look_up();
    }

    void flush() {
        look_up();
        if (out_ != nullptr) state_.ids.set_end(out_);
    }

  private:
    static constexpr int kMaxWords = 32;
    static constexpr uint64_t kWhole = 12;  // bytes of a word up to which splitting is not worth the search
    struct Word {
        const uint8_t* at;  // nullptr for an id, which is in `length`
        uint64_t length;
        WordCache::Key key;
    };

    void add_part(const uint8_t* at, uint64_t length) {
        Word& word = words_[count_];
        word.at = at;
        word.length = length;
        if (length <= WordCache::kLongest) state_.cache.make_key(at, length, word.key);
        if (++count_ == kMaxWords) look_up();
    }

    void look_up() {
        uint32_t* out = out_;
        for (int i = 0; i < count_; ++i) {
            const Word& word = words_[i];
            uint32_t* found = nullptr;
            if (word.at == nullptr) {
                *out++ = static_cast<uint32_t>(word.length);
            } else if (word.length > WordCache::kLongest) {
                out += pairs_.encode(word.at, word.length, out);
            } else if ((found = state_.cache.find(word.key, out)) != nullptr) {
                out = found;
            } else {
                const uint64_t ids = pairs_.encode(word.at, word.length, out);
                state_.cache.remember(word.key, out, ids);
                out += ids;
            }
        }
        count_ = 0;
        out_ = out;
    }

    const BytePairs& pairs_;
    const bool may_split_;
    State& state_;
    const uint8_t* const end_;  // end of the text
    uint32_t* out_ = nullptr;
    int count_ = 0;
    Word words_[kMaxWords];
};

void TextEncoder::encode(const uint8_t* text, uint64_t count, State& state) const {
    Queue queue(*this, state, text + count);
    queue.expect(0, text);
    cut(
        raw_, text, text + count, [&](const uint8_t* at, const uint8_t* end) { encode_part(at, end, state, queue); },
        [&](uint32_t id) { queue.add_id(id); });
    queue.flush();
}

void TextEncoder::encode_part(const uint8_t* at, const uint8_t* end, State& state, Queue& queue) const {
    const auto count = static_cast<uint64_t>(end - at);
    if (!normalise_ || first_unstable(at, 0, count) == count) return encode_normal(at, end, queue);
    queue.flush();  // before the buffer that its words may point into is overwritten
    state.normal.clear();
    append_nfc(at, count, state.normal);
    const uint64_t length = state.normal.size();
    state.normal.append(kPadding, '\0');
    const auto* normal = reinterpret_cast<const uint8_t*>(state.normal.data());
    queue.expect(length, end);  // normalisation may have made it longer
    encode_normal(normal, normal + length, queue);
}

void TextEncoder::encode_normal(const uint8_t* at, const uint8_t* end, Queue& queue) const {
    const auto words = [&](const uint8_t* from, const uint8_t* to) {
        splitter_.split(from, to, [&](const uint8_t* word, uint64_t length) { queue.add_word(word, length); });
    };
    cut(normal_, at, end, words, [&](uint32_t id) { queue.add_id(id); });
}

}  // namespace neox::data
