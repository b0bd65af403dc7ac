#include "data/text_encoder.h"

#include <algorithm>
#include <cstring>

namespace neox::data {

namespace {

constexpr uint32_t kIgnored = UINT32_MAX - 1;  // value of an added token that stays text
constexpr uint32_t kNoMatch = UINT32_MAX;

// kMask + 24 - n: 24 bytes of which the first n are set.
struct alignas(16) Mask {
    uint8_t bytes[48];
    constexpr Mask() : bytes() {
        for (int i = 0; i < 24; ++i) bytes[i] = 0xFF;
    }
};
constexpr Mask kMask;

// Hands the text between the matches to `other` and the ids of the matches to `matched`.
template <typename Other, typename Matched>
void cut(const StringMatcher& matcher, const uint8_t* at, const uint8_t* end, const Other& other, const Matched& matched) {
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

// The next place where two bytes are those of a string; `end` if there is none. Vectors for a few starts, a table walk for many.
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
            for (size_t i = 0; i < kFew; ++i) hits = _mm_or_si128(hits, _mm_and_si128(_mm_cmpeq_epi8(here, firsts[i]), _mm_cmpeq_epi8(behind, seconds[i])));
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

inline WordCache::Key WordCache::key_of(const uint8_t* word, uint64_t length) {
    Key key, mask;
    std::memcpy(key.data(), word, sizeof key);
    std::memcpy(mask.data(), kMask.bytes + 24 - length, sizeof mask);
    return {key[0] & mask[0], key[1] & mask[1], (key[2] & mask[2]) | length << 56};
}

TextEncoder::TextEncoder(BytePairs pairs, SplitPattern pattern, bool normalise, const std::vector<AddedToken>& added)
    : pairs_(std::move(pairs)), splitter_(pattern), normalise_(normalise) {
    for (const AddedToken& token : added) (token.normalized ? normal_ : raw_).add(token.text, token.ignored ? kIgnored : token.id);
}

// Words wait here until there are many, so that the cache lines in which they are looked up are on their way all at one time.
class TextEncoder::Queue {
  public:
    Queue(const TextEncoder& encoder, State& state, const uint8_t* end) : pairs_(encoder.pairs_), state_(state), end_(end) {}

    // Words of `bytes` bytes may be added from now on, and then what the text holds from `rest` on.
    void expect(uint64_t bytes, const uint8_t* rest) {
        flush();
        out_ = state_.ids.room(bytes + static_cast<uint64_t>(end_ - rest) + WordCache::kMostIds);  // a byte gives one id at most
    }

    void add_word(const uint8_t* at, uint64_t length) {
        Word& word = words_[count_];
        word.at = at;
        word.length = static_cast<uint32_t>(length);
        word.cached = length <= WordCache::kLongest;
        if (word.cached) {
            word.key = WordCache::key_of(at, length);
            word.place = state_.cache.place(word.key);
            state_.cache.prefetch(word.place);
        }
        if (++count_ == kMost) look_up();
    }

    void add_id(uint32_t id) {
        words_[count_].at = nullptr;
        words_[count_].place = id;
        if (++count_ == kMost) look_up();
    }

    void flush() {
        look_up();
        if (out_ != nullptr) state_.ids.set_end(out_);
    }

  private:
    static constexpr int kMost = 32;
    struct Word {
        const uint8_t* at;  // nullptr: an id that stands for itself, in `place`
        uint64_t place;
        WordCache::Key key;
        uint32_t length;
        bool cached;
    };

    void look_up() {
        uint32_t* out = out_;
        for (int i = 0; i < count_; ++i) {
            const Word& word = words_[i];
            const WordCache::Entry* found = nullptr;
            if (word.at == nullptr) {
                *out++ = static_cast<uint32_t>(word.place);
            } else if (!word.cached) {
                out += pairs_.encode(word.at, word.length, out);
            } else if ((found = state_.cache.find(word.key, word.place)) != nullptr) {
                std::memcpy(out, found->ids, sizeof found->ids);
                out += found->count;
            } else {
                out += encode_new(word, out);
            }
        }
        count_ = 0;
        out_ = out;
    }

    uint64_t encode_new(const Word& word, uint32_t* out) {
        const uint64_t ids = pairs_.encode(word.at, word.length, out);
        if (ids <= WordCache::kMostIds) {
            WordCache::Entry& entry = state_.cache.replace(word.place);
            entry.key = word.key;
            std::memcpy(entry.ids, out, ids * sizeof *out);
            entry.count = static_cast<uint32_t>(ids);
        }
        return ids;
    }

    const BytePairs& pairs_;
    State& state_;
    const uint8_t* const end_;  // of the text
    uint32_t* out_ = nullptr;
    int count_ = 0;
    Word words_[kMost];
};

void TextEncoder::encode(const uint8_t* text, uint64_t count, State& state) const {
    Queue queue(*this, state, text + count);
    queue.expect(0, text);
    cut(raw_, text, text + count, [&](const uint8_t* at, const uint8_t* end) { encode_part(at, end, state, queue); }, [&](uint32_t id) { queue.add_id(id); });
    queue.flush();
}

void TextEncoder::encode_part(const uint8_t* at, const uint8_t* end, State& state, Queue& queue) const {
    const auto count = static_cast<uint64_t>(end - at);
    if (!normalise_ || first_unstable(at, 0, count) == count) return encode_normal(at, end, queue);
    queue.flush();  // before the text that its words may be in is written over
    state.normal.clear();
    append_nfc(at, count, state.normal);
    const uint64_t length = state.normal.size();
    state.normal.append(kPadding, '\0');
    const auto* normal = reinterpret_cast<const uint8_t*>(state.normal.data());
    queue.expect(length, end);  // it may have become longer
    encode_normal(normal, normal + length, queue);
}

void TextEncoder::encode_normal(const uint8_t* at, const uint8_t* end, Queue& queue) const {
    const auto words = [&](const uint8_t* from, const uint8_t* to) {
        splitter_.split(from, to, [&](const uint8_t* word, uint64_t length) { queue.add_word(word, length); });
    };
    cut(normal_, at, end, words, [&](uint32_t id) { queue.add_id(id); });
}

}  // namespace neox::data
