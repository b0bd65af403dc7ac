// The split patterns of byte-level tokenizers as hand-written matchers: one pass, no backtracking. `split_words` calls
// emit(first byte, bytes) for each word of [at, end), in order; the words concatenated are the text.
//
// gpt2:  's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
// llama: (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|
// ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+ qwen:  as llama with \p{N}
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "data/unicode.h"

namespace neox::data {

enum class SplitPattern { gpt2, llama, qwen };

constexpr uint64_t kPadding = 64;  // readable bytes that must follow a text: words are loaded as full vectors

class WordSplitter {
  public:
    explicit WordSplitter(SplitPattern pattern) : pattern_(pattern), traits_(unicode_traits()) {}

    // Precondition: valid UTF-8, kPadding readable bytes after `end`.
    template <typename Emit>
    void split(const uint8_t* at, const uint8_t* end, Emit emit) const {
        if (pattern_ == SplitPattern::gpt2)
            split_gpt2(at, end, emit);
        else
            split_llama(at, end, pattern_ == SplitPattern::llama ? 3 : 1, emit);
    }

  private:
    uint8_t class_at(const uint8_t* at) const {
        if (*at < 0x80) return traits_[*at] & kClassBits;
        int length;
        return traits_[decode(at, length)] & kClassBits;
    }

    // Bit i: byte i of the 16 at `at` is an ASCII letter.
    static uint32_t letters(const uint8_t* at) {
#if defined(__SSE2__)
        const __m128i lower = _mm_or_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)), _mm_set1_epi8(0x20));
        // Signed comparison after a shift of the range: 'a' to 'z' become the 26 lowest values.
        const __m128i shifted = _mm_add_epi8(lower, _mm_set1_epi8(static_cast<char>(0x80 - 'a')));
        return static_cast<uint32_t>(
            _mm_movemask_epi8(_mm_cmplt_epi8(shifted, _mm_set1_epi8(static_cast<char>(0x80 + 26)))));
#else
        uint32_t mask = 0;
        for (int i = 0; i < 16; ++i)
            mask |= static_cast<uint32_t>(static_cast<uint8_t>((at[i] | 0x20) - 'a') < 26) << i;
        return mask;
#endif
    }

    const uint8_t* letter_run(const uint8_t* at, const uint8_t* end) const {
        for (;;) {
            const uint32_t others = ~letters(at);
            // 16 if all are letters: the upper bits of `others` are set
            const auto count = static_cast<uint32_t>(__builtin_ctz(others));
            at += count;
            if (at >= end) return end;
            if (count == 16) continue;
            if (*at < 0x80) return at;
            for (int length; *at >= 0x80; at += length) {
                if ((traits_[decode(at, length)] & kClassBits) != kLetter) return at;
                if (at + length >= end) return end;
            }
        }
    }

    // The end of a run of characters of one class.
    const uint8_t* run(uint8_t wanted, const uint8_t* at, const uint8_t* end) const {
        if (wanted == kLetter) return letter_run(at, end);
        while (at < end) {
            int length;
            if ((traits_[decode(at, length)] & kClassBits) != wanted) return at;
            at += length;
        }
        return end;
    }

    // Bytes of 's 't 'm 'd 're 've 'll at an apostrophe; 0 for none. `fold` ignores case, and U+017F counts as s.
    static uint64_t contraction(const uint8_t* at, const uint8_t* end, bool fold) {
        const auto letter = [&](int i) -> uint8_t {
            return at + i >= end ? 0 : fold && at[i] < 0x80 ? at[i] | 0x20 : at[i];
        };
        const uint8_t a = letter(1), b = letter(2);
        if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
        if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return 3;
        return fold && a == 0xC5 && b == 0xBF ? 3 : 0;
    }

    // The whitespace run at `at`: its end, and the start of its last character.
    const uint8_t* space_run(const uint8_t* at, const uint8_t* end, const uint8_t*& last) const {
        while (at < end) {
            int length;
            if ((traits_[decode(at, length)] & kClassBits) != kSpace) return at;
            last = at;
            at += length;
        }
        return end;
    }

    // The word of the gpt2 pattern at `at`: its end.
    const uint8_t* word_end_gpt2(const uint8_t* at, const uint8_t* end) const {
        if (*at == '\'') {
            if (const uint64_t length = contraction(at, end, false); length != 0) return at + length;
        }
        const uint8_t* const body = *at == ' ' && at + 1 < end ? at + 1 : at;
        if (const uint8_t kind = class_at(body); kind != kSpace) return run(kind, body, end);
        const uint8_t* last = at;
        const uint8_t* const stop = space_run(at, end, last);
        // the last space of a run belongs to the next word, or is a word by itself
        return stop < end && last > at ? last : stop;
    }

#if defined(__SSE2__)
    // Character classes of 64 bytes of text as bit sets: bit i is byte i.
    struct Classes {
        uint64_t letter, number, space, blank, apostrophe;
        uint32_t known;  // number of bytes whose class is known: up to a character outside ASCII or the end of the text
        bool all;        // the text ends here, so nothing can change a word
    };

    Classes classes_of(const uint8_t* at, const uint8_t* end) const {
        Classes c{};
        uint64_t wide = 0;  // not ASCII
        for (int i = 0; i < 64; i += 16) {
            const __m128i here = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at + i));
            const auto set = [&](uint64_t& bits, __m128i chosen) {
                bits |= static_cast<uint64_t>(static_cast<uint32_t>(_mm_movemask_epi8(chosen))) << i;
            };
            // unsigned byte - first < count, as a signed comparison
            const auto below = [&](__m128i bytes, char first, int count) {
                return _mm_cmplt_epi8(_mm_add_epi8(bytes, _mm_set1_epi8(static_cast<char>(0x80 - first))),
                                      _mm_set1_epi8(static_cast<char>(0x80 + count)));
            };
            const __m128i blank = _mm_cmpeq_epi8(here, _mm_set1_epi8(' '));
            set(c.letter, below(_mm_or_si128(here, _mm_set1_epi8(0x20)), 'a', 26));
            set(c.number, below(here, '0', 10));
            set(c.space, _mm_or_si128(blank, below(here, '\t', 5)));
            set(c.blank, blank);
            set(c.apostrophe, _mm_cmpeq_epi8(here, _mm_set1_epi8('\'')));
            set(wide, here);
        }
        c.all = end - at < 64;
        c.known = c.all ? static_cast<uint32_t>(end - at) : 64;
        while (wide != 0) {
            const auto i = static_cast<uint32_t>(__builtin_ctzll(wide));
            if (i >= c.known) break;
            int length;
            const uint8_t kind = traits_[decode(at + i, length)] & kClassBits;
            if (kind == kSpace) return c.known = i, c.all = false, c;
            const uint64_t bytes = ((uint64_t{1} << length) - 1) << i;
            if (kind == kLetter) c.letter |= bytes;
            if (kind == kNumber) c.number |= bytes;
            wide &= ~bytes;
        }
        return c;
    }

    // Starts of words of the gpt2 pattern among 64 bytes that begin with a word, where the class of the next byte is
    // known. A word ends where the class changes; a blank belongs to the next word, and the last blank of longer white
    // space is separate.
    uint64_t starts_gpt2(const Classes& c, const uint8_t* at, const uint8_t* end) const {
        const uint64_t known = c.known == 64 ? ~uint64_t{0} : (uint64_t{1} << c.known) - 1;
        const uint64_t letter = c.letter & known, number = c.number & known, space = c.space | ~known;
        const uint64_t other = ~(letter | number | space);
        const uint64_t same = (letter & letter << 1) | (number & number << 1) | (other & other << 1);
        uint64_t starts = (~space & ~same & ~(c.blank << 1)) | (space & ~(space << 1 & space >> 1)) | 1;
        for (uint64_t marks = c.apostrophe & starts; marks != 0; marks &= marks - 1) {
            const auto i = static_cast<uint32_t>(__builtin_ctzll(marks));
            // near the edge, leave words that this could change
            if ((starts >> i & 1) == 0 || (!c.all && i + 3 >= c.known)) continue;
            const uint64_t length = contraction(at + i, end, false);
            if (length == 0) continue;
            starts &= ~(uint64_t{6} << i) | uint64_t{1} << (i + length);
            starts |= uint64_t{1} << (i + length);
        }
        return starts;
    }
#endif

    template <typename Emit>
    void split_gpt2(const uint8_t* at, const uint8_t* end, Emit& emit) const {
        while (at < end) {
#if defined(__SSE2__)
            const Classes classes = classes_of(at, end);
            // A start is certain if the class of the next byte is known, and that of the letters after an apostrophe.
            const uint32_t certain = classes.all ? classes.known : classes.known < 4 ? 0 : classes.known - 4;
            uint64_t starts = starts_gpt2(classes, at, end) & ((uint64_t{1} << certain) - 1) & ~uint64_t{1};
            const uint8_t* word = at;
            for (; starts != 0; starts &= starts - 1) {
                const uint8_t* const next = at + __builtin_ctzll(starts);
                emit(word, static_cast<uint64_t>(next - word));
                word = next;
            }
            if (classes.all) return emit(word, static_cast<uint64_t>(end - word));
            if (word != at) {
                at = word;
                continue;
            }
#endif
            const uint8_t* const stop = word_end_gpt2(at, end);
            emit(at, static_cast<uint64_t>(stop - at));
            at = stop;
        }
    }

    template <typename Emit>
    void split_llama(const uint8_t* at, const uint8_t* end, int max_digits, Emit& emit) const {
        while (at < end) {
            const uint8_t* const start = at;
            at = word_end_llama(at, end, max_digits);
            emit(start, static_cast<uint64_t>(at - start));
        }
    }

    const uint8_t* word_end_llama(const uint8_t* at, const uint8_t* end, int max_digits) const {
        if (*at == '\'') {
            if (const uint64_t length = contraction(at, end, true); length != 0) return at + length;
        }
        int length;
        const uint8_t kind = traits_[decode(at, length)] & kClassBits;
        if (kind == kLetter) return letter_run(at, end);
        if (kind == kNumber) {
            for (int digits = 1; digits <= max_digits; ++digits) {
                at += length;
                if (at >= end || (traits_[decode(at, length)] & kClassBits) != kNumber) return at;
            }
            return at;
        }
        const uint8_t* const behind = at + length;
        const uint8_t following = behind < end ? class_at(behind) : static_cast<uint8_t>(kSpace);
        if (*at != '\r' && *at != '\n' && following == kLetter) return letter_run(behind, end);
        if (kind == kOther || (*at == ' ' && behind < end && following == kOther)) {
            at = run(kOther, kind == kOther ? at : behind, end);
            while (at < end && (*at == '\r' || *at == '\n')) ++at;
            return at;
        }
        const uint8_t* last = at;
        const uint8_t* const stop = space_run(at, end, last);
        for (const uint8_t* line = stop; line > at; --line)
            if (line[-1] == '\r' || line[-1] == '\n') return line;
        return stop < end && last > at ? last : stop;
    }

    SplitPattern pattern_;
    const uint8_t* traits_;
};

}  // namespace neox::data
