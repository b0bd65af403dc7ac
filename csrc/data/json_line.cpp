#include "data/json_line.h"

#include <cstring>

#include "data/unicode.h"
#include "data/word_split.h"

namespace neox::data {

namespace {

constexpr int kDeepest = 64;  // nesting depth; deeper lines are left to the full parser

bool is_space(uint8_t c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }
bool is_digit(uint8_t c) { return c >= '0' && c <= '9'; }

int hex_digit(uint8_t c) {
    if (is_digit(c)) return c - '0';
    const int letter = (c | 0x20) - 'a';
    return letter >= 0 && letter < 6 ? letter + 10 : -1;
}

class LineParser {
  public:
    LineParser(const uint8_t* at, const uint8_t* end, const uint8_t* limit) : at_(at), end_(end), limit_(limit) {}

    // Parses the line as an object. True if its last value of `key` is a string, which is then in `text`.
    bool object_with(const std::string& key, TextBuffer& text, uint64_t& count) {
        bool found = false;
        space();
        if (!take('{')) return false;
        space();
        if (take('}')) return false;
        do {
            space();
            const uint8_t* const name = at_ + 1;
            if (!plain_string()) return false;
            const auto length = static_cast<uint64_t>(at_ - 1 - name);
            space();
            if (!take(':')) return false;
            space();
            if (length == key.size() && std::memcmp(name, key.data(), length) == 0) {
                if (!text_string(text, count)) return false;
                found = true;
            } else if (!value(1)) {
                return false;
            }
            space();
        } while (take(','));
        if (!take('}')) return false;
        space();
        return found && at_ == end_;
    }

  private:
    void space() {
        while (at_ < end_ && is_space(*at_)) ++at_;
    }
    bool take(uint8_t c) { return at_ < end_ && *at_ == c && (++at_, true); }

    bool word(const char* expected) {
        const size_t length = std::strlen(expected);
        if (static_cast<size_t>(end_ - at_) < length || std::memcmp(at_, expected, length) != 0) return false;
        return at_ += length, true;
    }

    // Skips a string without escapes.
    bool plain_string() {
        if (!take('"')) return false;
        while (at_ < end_) {
            if (*at_ == '"') return ++at_, true;
            if (*at_ == '\\' || *at_ < 0x20) return false;
            const int length = utf8_length(at_, end_);
            if (length == 0) return false;
            at_ += length;
        }
        return false;
    }

    // Skips a string.
    bool any_string() {
        if (!take('"')) return false;
        while (at_ < end_) {
            if (*at_ == '"') return ++at_, true;
            if (*at_ == '\\') {
                uint8_t unescaped[4];
                if (escape(unescaped) < 0) return false;
                continue;
            }
            const int length = *at_ < 0x20 ? 0 : utf8_length(at_, end_);
            if (length == 0) return false;
            at_ += length;
        }
        return false;
    }

    bool value(int depth) {
        if (at_ >= end_ || depth > kDeepest) return false;
        switch (*at_) {
            case '"':
                return any_string();
            case '{':
                return group('}', true, depth);
            case '[':
                return group(']', false, depth);
            case 't':
                return word("true");
            case 'f':
                return word("false");
            case 'n':
                return word("null");
            case 'N':
                return word("NaN");  // as Python's json writes it; so does Infinity
            case 'I':
                return word("Infinity");
            default:
                return number();
        }
    }

    bool group(uint8_t close, bool named, int depth) {
        ++at_;
        space();
        if (take(close)) return true;
        do {
            space();
            if (named) {
                if (!any_string()) return false;
                space();
                if (!take(':')) return false;
                space();
            }
            if (!value(depth + 1)) return false;
            space();
        } while (take(','));
        return take(close);
    }

    bool digits() {
        const uint8_t* const first = at_;
        while (at_ < end_ && is_digit(*at_)) ++at_;
        return at_ > first;
    }

    // Skips a number of any size.
    bool number() {
        if (take('-') && at_ < end_ && *at_ == 'I') return word("Infinity");
        if (!take('0') && !digits()) return false;
        if (take('.') && !digits()) return false;
        if (!take('e') && !take('E')) return true;
        if (!take('+')) take('-');
        return digits();
    }

    // Writes the escape at `at_` as UTF-8 and returns its bytes, or -1.
    int escape(uint8_t* out) {
        if (end_ - at_ < 2) return -1;
        const uint8_t kind = at_[1];
        at_ += 2;
        switch (kind) {
            case '"':
            case '\\':
            case '/':
                return *out = kind, 1;
            case 'b':
                return *out = '\b', 1;
            case 'f':
                return *out = '\f', 1;
            case 'n':
                return *out = '\n', 1;
            case 'r':
                return *out = '\r', 1;
            case 't':
                return *out = '\t', 1;
            case 'u':
                return unicode_escape(out);
            default:
                return -1;
        }
    }

    int four_hex() {
        if (end_ - at_ < 4) return -1;
        int code = 0;
        for (int i = 0; i < 4; ++i) {
            const int digit = hex_digit(at_[i]);
            if (digit < 0) return -1;
            code = code << 4 | digit;
        }
        at_ += 4;
        return code;
    }

    int unicode_escape(uint8_t* out) {
        int code = four_hex();
        if (code < 0 || (code >= 0xDC00 && code < 0xE000)) return -1;
        if (code >= 0xD800 && code < 0xDC00) {
            if (!take('\\') || !take('u')) return -1;
            const int low = four_hex();
            if (low < 0xDC00 || low >= 0xE000) return -1;
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
        }
        const auto byte = [&](int i, int bits) { out[i] = static_cast<uint8_t>(bits); };
        if (code < 0x80) return byte(0, code), 1;
        if (code < 0x800) return byte(0, 0xC0 | code >> 6), byte(1, 0x80 | (code & 0x3F)), 2;
        if (code < 0x10000)
            return byte(0, 0xE0 | code >> 12), byte(1, 0x80 | (code >> 6 & 0x3F)), byte(2, 0x80 | (code & 0x3F)), 3;
        byte(0, 0xF0 | code >> 18), byte(1, 0x80 | (code >> 12 & 0x3F)), byte(2, 0x80 | (code >> 6 & 0x3F)),
            byte(3, 0x80 | (code & 0x3F));
        return 4;
    }

    // Reads a string into `text`. Unescaping never makes it longer.
    bool text_string(TextBuffer& text, uint64_t& count) {
        if (!take('"')) return false;
        uint8_t* out = text.room(static_cast<uint64_t>(end_ - at_));
        while (at_ < end_) {
            copy_plain(out);
            if (at_ >= end_) return false;
            if (*at_ == '"') {
                ++at_;
                count = static_cast<uint64_t>(out - text.begin());
                return true;
            }
            if (*at_ == '\\') {
                const int length = escape(out);
                if (length < 0) return false;
                out += length;
                continue;
            }
            if (*at_ < 0x20) return false;
            do {
                const int length = utf8_length(at_, end_);
                if (length == 0) return false;
                std::memcpy(out, at_, static_cast<size_t>(length));
                at_ += length;
                out += length;
            } while (at_ < end_ && *at_ >= 0x80);
        }
        return false;
    }

    // Copies ASCII up to the next byte that needs parsing.
    void copy_plain(uint8_t*& out) {
#if defined(__SSE2__)
        while (limit_ - at_ >= 16) {
            const __m128i here = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at_));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out), here);
            // signed: control characters, and every byte that is not ASCII
            const __m128i low = _mm_cmplt_epi8(here, _mm_set1_epi8(0x20));
            const __m128i marks =
                _mm_or_si128(_mm_cmpeq_epi8(here, _mm_set1_epi8('"')), _mm_cmpeq_epi8(here, _mm_set1_epi8('\\')));
            const auto mask = static_cast<uint32_t>(_mm_movemask_epi8(_mm_or_si128(low, marks)));
            const int plain = mask == 0 ? 16 : __builtin_ctz(mask);
            at_ += plain;
            out += plain;
            if (plain < 16) return;  // also at the line feed after the line
        }
#endif
        while (at_ < end_ && *at_ >= 0x20 && *at_ < 0x80 && *at_ != '"' && *at_ != '\\') *out++ = *at_++;
    }

    const uint8_t* at_;
    const uint8_t* const end_;
    const uint8_t* const limit_;
};

}  // namespace

uint8_t* TextBuffer::room(uint64_t count) {
    if (capacity_ < count + kPadding) {
        capacity_ = 2 * count + kPadding;
        bytes_.reset(new uint8_t[capacity_]);
    }
    return bytes_.get();
}

LineKind read_json_line(const uint8_t* at, const uint8_t* end, const uint8_t* limit, const std::string& key,
                        TextBuffer& text, uint64_t& count) {
    const uint8_t* first = at;
    while (first < end && (is_space(*first) || *first == '\v' || *first == '\f')) ++first;
    if (first == end) return LineKind::blank;
    return LineParser(at, end, limit).object_with(key, text, count) ? LineKind::text : LineKind::unsure;
}

}  // namespace neox::data
