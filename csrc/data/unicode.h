// UTF-8, the character classes of split patterns, and normalisation form C, with the tables of `tokenizers`
// (unicode_tables.py).
#pragma once

#include <cstdint>
#include <string>

namespace neox::data {

enum CharClass : uint8_t { kOther = 0, kLetter = 1, kNumber = 2, kSpace = 3 };

constexpr uint8_t kClassBits = 3;
constexpr uint8_t kUnstable = 4;  // may differ in NFC, or compose with the character before it
constexpr uint32_t kCodePoints = 0x110000;

// One byte per code point: a CharClass, and kUnstable. Built once; 1.1 MB, of which a text touches only its scripts.
const uint8_t* unicode_traits();

// Decodes one code point of valid UTF-8; `length` gets its number of bytes.
inline uint32_t decode(const uint8_t* at, int& length) {
    const uint32_t lead = at[0];
    if (lead < 0x80) return length = 1, lead;
    if (lead < 0xE0) return length = 2, (lead & 0x1F) << 6 | (at[1] & 0x3Fu);
    if (lead < 0xF0) return length = 3, (lead & 0x0F) << 12 | (at[1] & 0x3Fu) << 6 | (at[2] & 0x3Fu);
    return length = 4, (lead & 0x07) << 18 | (at[1] & 0x3Fu) << 12 | (at[2] & 0x3Fu) << 6 | (at[3] & 0x3Fu);
}

// Bytes of the character at `at`; 0 if [at, end) does not start with well-formed UTF-8 (Unicode 3.9, table 3-7).
inline int utf8_length(const uint8_t* at, const uint8_t* end) {
    const uint8_t lead = at[0];
    if (lead < 0x80) return 1;
    const auto continues = [&](int i) { return at + i < end && (at[i] & 0xC0) == 0x80; };
    if (lead >= 0xC2 && lead < 0xE0) return continues(1) ? 2 : 0;
    if (lead >= 0xE0 && lead < 0xF0) {
        if (!continues(1) || !continues(2)) return 0;
        if ((lead == 0xE0 && at[1] < 0xA0) || (lead == 0xED && at[1] > 0x9F)) return 0;
        return 3;
    }
    if (lead >= 0xF0 && lead < 0xF5) {
        if (!continues(1) || !continues(2) || !continues(3)) return 0;
        if ((lead == 0xF0 && at[1] < 0x90) || (lead == 0xF4 && at[1] > 0x8F)) return 0;
        return 4;
    }
    return 0;
}

bool valid_utf8(const uint8_t* bytes, uint64_t count);

// First byte at or after `from` that starts a character which NFC may change or compose with the one before; `count` if
// there is none.
uint64_t first_unstable(const uint8_t* bytes, uint64_t from, uint64_t count);

// Appends the text in normalisation form C. Precondition: valid UTF-8.
void append_nfc(const uint8_t* bytes, uint64_t count, std::string& out);

}  // namespace neox::data
