// UTF-8 against table 3-7 of Unicode at every pair of first bytes and every length, and normalisation form C of text
// whose forms are known. That all tables are those of `tokenizers` is tested in Python.
#include <cstring>

#include "data/unicode.h"
#include "expect.h"

using namespace data_test;
using namespace neox::data;

namespace {

const uint8_t* at(const std::string& text) { return reinterpret_cast<const uint8_t*>(text.data()); }

// UTF-8 of a code point, by its definition.
std::string utf8(uint32_t code) {
    if (code < 0x80) return {static_cast<char>(code)};
    const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    std::string text(1, static_cast<char>((0xFF00 >> (more + 1) & 0xFF) | code >> (6 * more)));
    for (int i = more - 1; i >= 0; --i) text += static_cast<char>(0x80 | (code >> (6 * i) & 0x3F));
    return text;
}

// The length of the first character: the row of the table that its bytes fit.
int wanted_length(const uint8_t* bytes, size_t count) {
    static const struct {
        uint8_t first, last, low, high;
        int length;
    } rows[] = {{0x00, 0x7F, 0, 0, 1},       {0xC2, 0xDF, 0x80, 0xBF, 2}, {0xE0, 0xE0, 0xA0, 0xBF, 3},
                {0xE1, 0xEC, 0x80, 0xBF, 3}, {0xED, 0xED, 0x80, 0x9F, 3}, {0xEE, 0xEF, 0x80, 0xBF, 3},
                {0xF0, 0xF0, 0x90, 0xBF, 4}, {0xF1, 0xF3, 0x80, 0xBF, 4}, {0xF4, 0xF4, 0x80, 0x8F, 4}};
    for (const auto& row : rows) {
        if (bytes[0] < row.first || bytes[0] > row.last) continue;
        if (count < static_cast<size_t>(row.length)) return 0;
        if (row.length > 1 && (bytes[1] < row.low || bytes[1] > row.high)) return 0;
        for (int i = 2; i < row.length; ++i)
            if (bytes[i] < 0x80 || bytes[i] > 0xBF) return 0;
        return row.length;
    }
    return 0;
}

void well_formed_characters() {
    long wrong = 0;
    const uint8_t edges[] = {0x00, 0x7F, 0x80, 0xBF, 0xC0, 0xFF};
    for (int first = 0; first < 256; ++first)
        for (int second = 0; second < 256; ++second)
            for (const uint8_t third : edges)
                for (const uint8_t fourth : edges)
                    for (size_t count = 1; count <= 4; ++count) {
                        const uint8_t bytes[4] = {static_cast<uint8_t>(first), static_cast<uint8_t>(second), third,
                                                  fourth};
                        wrong += utf8_length(bytes, bytes + count) != wanted_length(bytes, count);
                    }
    EXPECT_EQ(wrong, 0L);
}

void every_code_point() {
    long wrong = 0;
    for (uint32_t code = 0; code < kCodePoints; ++code) {
        const std::string text = utf8(code);
        const bool surrogate = code >= 0xD800 && code < 0xE000;
        int length = 0;
        wrong += decode(at(text), length) != code || length != static_cast<int>(text.size());
        wrong += valid_utf8(at(text), text.size()) == surrogate;
    }
    EXPECT_EQ(wrong, 0L);
}

// One bad byte in a text of ASCII or of longer characters: found at every position, whatever is read at a time.
void bad_bytes_at_every_position() {
    EXPECT(valid_utf8(nullptr, 0));
    for (const std::string& piece : {std::string("a"), std::string("\xC3\xA9"), std::string("a\xE6\x97\xA5")}) {
        std::string text;
        for (int i = 0; i < 20; ++i) text += piece;
        EXPECT(valid_utf8(at(text), text.size()));
        for (size_t i = 0; i < text.size(); ++i) {
            std::string damaged = text;
            damaged[i] = '\xFF';
            EXPECT(!valid_utf8(at(damaged), damaged.size()));
        }
        for (size_t count = 0; count < text.size(); ++count) {
            size_t whole = count;
            while (whole > 0 && (text[whole] & 0xC0) == 0x80) --whole;
            const std::vector<uint8_t> exact(text.begin(), text.begin() + static_cast<long>(count));
            EXPECT_EQ(valid_utf8(exact.data(), count), whole == count);
        }
    }
}

std::string nfc(const std::string& text) {
    const std::vector<uint8_t> exact(text.begin(), text.end());
    std::string out = "before";
    append_nfc(exact.data(), exact.size(), out);
    EXPECT(out.compare(0, 6, "before") == 0);
    return out.substr(6);
}

std::string text_of(const std::vector<uint32_t>& codes) {
    std::string text;
    for (const uint32_t code : codes) text += utf8(code);
    return text;
}

// Examples of the rules of Unicode 3.11 and 3.12, each alone and within a longer text.
void normal_forms() {
    const std::pair<std::vector<uint32_t>, std::vector<uint32_t>> wanted[] = {
        {{}, {}},
        {{'e', 0x301}, {0xE9}},                              // composed
        {{0xE9}, {0xE9}},                                    // stays
        {{'a', 0x323, 0x307}, {0x1EA1, 0x307}},              // composed with the first of two marks
        {{'a', 0x307, 0x323}, {0x1EA1, 0x307}},              // which are sorted by class
        {{'q', 0x307, 0x323}, {'q', 0x323, 0x307}},          // also where nothing composes
        {{'a', 0x302, 0x301}, {0x1EA5}},                     // composed twice
        {{'a', 0x301, 0x302}, {0xE1, 0x302}},                // marks of one class keep their order
        {{'a', 0x327, 0x327, 0x301}, {0xE1, 0x327, 0x327}},  // past marks of a lower class
        {{'a', 0x5AE, 0x301}, {0xE1, 0x5AE}},
        {{'a', 0x305, 0x301}, {'a', 0x305, 0x301}},  // but not past one of the same class
        {{'a', 0x30A, 0x301}, {0x1FB}},              // a ring and an acute, both of class 230
        {{'a', 'e', 0x301, 'b'}, {'a', 0xE9, 'b'}},
        {{0x301, 'e'}, {0x301, 'e'}},  // a mark without a letter before it
        {{0x301, 0x301}, {0x301, 0x301}},
        {{'e', 0x34F, 0x301}, {'e', 0x34F, 0x301}},  // a joiner of class 0 between them
        {{0x212B}, {0xC5}},                          // one character for another
        {{0x2126, 0x212A}, {0x3A9, 'K'}},
        {{0x340}, {0x300}},
        {{0x344}, {0x308, 0x301}},
        {{0x958}, {0x915, 0x93C}},  // excluded from composition
        {{0x915, 0x93C}, {0x915, 0x93C}},
        {{0x1100, 0x1161}, {0xAC00}},  // the first and the last syllables
        {{0x1100, 0x1161, 0x11A8}, {0xAC01}},
        {{0x1112, 0x1175}, {0xD788}},
        {{0x1112, 0x1175, 0x11C2}, {0xD7A3}},
        {{0xAC00, 0x11A8}, {0xAC01}},
        {{0xAC00, 0x11C2}, {0xAC1B}},
        {{0xAC00, 0x11A7}, {0xAC00, 0x11A7}},  // one before the finals, one after them
        {{0xAC00, 0x11C3}, {0xAC00, 0x11C3}},
        {{0xAC01, 0x11A8}, {0xAC01, 0x11A8}},  // has a final
        {{0x1100, 0x1160}, {0x1100, 0x1160}},
        {{0x1100, 0x1176}, {0x1100, 0x1176}},
        {{0x10FF, 0x1161}, {0x10FF, 0x1161}},
        {{0x1113, 0x1161}, {0x1113, 0x1161}},
        {{0xAC00, 0x1161}, {0xAC00, 0x1161}},
        {{0x1100, 0xAC00}, {0x1100, 0xAC00}},
        {{0xD7A3, 0x301, 'e', 0x301}, {0xD7A3, 0x301, 0xE9}},
        {{0x1D15E}, {0x1D157, 0x1D165}},  // beyond 16 bits
        {{0x11131, 0x11127}, {0x1112E}},
        {{0x9C7, 0x9BE}, {0x9CB}},                       // a second part of class 0
        {{0x9C7, 0x301, 0x9BE}, {0x9C7, 0x301, 0x9BE}},  // which a mark blocks
        {{0x2F800}, {0x4E3D}},
    };
    for (const auto& [codes, normal] : wanted) {
        const std::string from = text_of(codes), to = text_of(normal);
        EXPECT_EQ(nfc(from), to);
        EXPECT_EQ(nfc(to), to);
        for (const size_t before : {1, 7, 8, 9}) {
            const std::string left(before, 'x'), right = "\xC3\xA9 and more than eight bytes\n";
            EXPECT_EQ(nfc(left + " " + from + "\n" + right + from), left + " " + to + "\n" + right + to);
        }
    }
}

// The first and last characters of each length in UTF-8 are written as they were read.
void characters_before_a_mark() {
    for (const uint32_t code : {0x1u, 0x7Fu, 0x80u, 0x7FFu, 0x800u, 0xD7FFu, 0xE000u, 0xFFFFu, 0x10000u, 0x10FFFFu}) {
        const std::string text = text_of({code, 0x301, 'x', code, 0x327, 0x301});
        EXPECT_EQ(nfc(text), text);
    }
}

void first_unstable_character() {
    const std::string text = "plain text, \xC3\xA9\xC3\xA9 e\xCC\x81 and e\xCC\x81.";
    const uint64_t first = text.find('\xCC'), second = text.rfind('\xCC');
    for (uint64_t from = 0; from <= text.size(); ++from) {
        if (from < text.size() && (text[from] & 0xC0) == 0x80) continue;
        EXPECT_EQ(first_unstable(at(text), from, text.size()), from <= first    ? first
                                                               : from <= second ? second
                                                                                : text.size());
        EXPECT_EQ(first_unstable(at(text), std::min(from, first), first), first);  // none before the end
    }
}

// Classes that the split patterns ask for, at the first and last characters of ranges.
void character_classes() {
    const std::pair<uint8_t, std::vector<uint32_t>> wanted[] = {
        {kLetter,
         {'A', 'Z', 'a', 'z', 0xAA, 0xB5, 0xBA, 0xC0, 0xD6, 0xD8, 0xF6, 0xF8, 0x17F, 0x3A9, 0x4E00, 0xAC00, 0xD7A3,
          0x20000}},
        {kNumber, {'0', '9', 0xB2, 0xB3, 0xB9, 0xBC, 0xBE, 0x2160, 0x663, 0x1D7D8}},
        {kSpace,
         {'\t', '\n', '\v', '\f', '\r', ' ', 0x85, 0xA0, 0x1680, 0x2000, 0x200A, 0x2028, 0x2029, 0x202F, 0x205F,
          0x3000}},
        {kOther, {0,    8,    0xE,  0x1C, '!',  '/',    ':',    '@',    '[',   '`',     '{',
                  0x7F, 0xA9, 0xAB, 0xD7, 0xF7, 0x200B, 0x2010, 0xFEFF, 0x301, 0x1F600, 0x10FFFF}}};
    for (const auto& [kind, codes] : wanted)
        for (const uint32_t code : codes) EXPECT_EQ(unicode_traits()[code] & kClassBits, kind);
}

}  // namespace

int main() {
    well_formed_characters();
    every_code_point();
    bad_bytes_at_every_position();
    normal_forms();
    characters_before_a_mark();
    first_unstable_character();
    character_classes();
    return tally.finish();
}
