#include "data/unicode.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <memory>
#include <vector>

namespace neox::data {

namespace {

struct Range {
    uint32_t first, last;
};
struct Mark {
    uint32_t code;
    uint8_t combining_class;
};
struct Decomposition {
    uint32_t code, form[4];  // full canonical decomposition, terminated by 0
};
struct Composition {
    uint32_t first, second, code;
};

#include "data/unicode_tables.inc"

// Hangul syllables are composed by arithmetic (Unicode 3.12).
constexpr uint32_t kSyllable = 0xAC00, kLead = 0x1100, kVowel = 0x1161, kFinal = 0x11A7;
constexpr uint32_t kVowels = 21, kFinals = 28, kLeads = 19, kSyllables = kLeads * kVowels * kFinals;

template <typename Entry, size_t n>
const Entry* find_code(const Entry (&table)[n], uint32_t code) {
    const Entry* found = std::lower_bound(std::begin(table), std::end(table), code,
                                          [](const Entry& entry, uint32_t value) { return entry.code < value; });
    return found != std::end(table) && found->code == code ? found : nullptr;
}

uint8_t combining_class(uint32_t code) {
    if (code < 0x300) return 0;
    const Mark* found = find_code(kMarks, code);
    return found == nullptr ? 0 : found->combining_class;
}

// The character that two characters compose to; 0 if they do not compose.
uint32_t compose(uint32_t first, uint32_t second) {
    if (first - kLead < kLeads && second - kVowel < kVowels)
        return kSyllable + ((first - kLead) * kVowels + (second - kVowel)) * kFinals;
    if (first - kSyllable < kSyllables && (first - kSyllable) % kFinals == 0 && second - kFinal - 1 < kFinals - 1)
        return first + (second - kFinal);
    const auto before = [](const Composition& entry, const Composition& wanted) {
        return entry.first != wanted.first ? entry.first < wanted.first : entry.second < wanted.second;
    };
    const Composition wanted{first, second, 0};
    const Composition* found = std::lower_bound(std::begin(kCompositions), std::end(kCompositions), wanted, before);
    return found != std::end(kCompositions) && found->first == first && found->second == second ? found->code : 0;
}

void append_decomposed(uint32_t code, std::vector<uint32_t>& out) {
    if (code - kSyllable < kSyllables) {
        const uint32_t index = code - kSyllable;
        out.push_back(kLead + index / (kVowels * kFinals));
        out.push_back(kVowel + index / kFinals % kVowels);
        if (index % kFinals != 0) out.push_back(kFinal + index % kFinals);
        return;
    }
    const Decomposition* found = code < 0xC0 ? nullptr : find_code(kDecompositions, code);
    if (found == nullptr) return out.push_back(code);
    for (uint32_t part : found->form)
        if (part != 0) out.push_back(part);
}

void append_utf8(uint32_t code, std::string& out) {
    const auto byte = [&](uint32_t value) { out.push_back(static_cast<char>(value)); };
    if (code < 0x80) return byte(code);
    if (code < 0x800) return byte(0xC0 | code >> 6), byte(0x80 | (code & 0x3F));
    if (code < 0x10000) return byte(0xE0 | code >> 12), byte(0x80 | (code >> 6 & 0x3F)), byte(0x80 | (code & 0x3F));
    byte(0xF0 | code >> 18), byte(0x80 | (code >> 12 & 0x3F)), byte(0x80 | (code >> 6 & 0x3F)),
        byte(0x80 | (code & 0x3F));
}

// Decomposes one run of characters that nothing outside can compose with, sorts marks by class, and recomposes it
// (Unicode 3.11).
void append_stretch(const uint8_t* at, const uint8_t* end, std::vector<uint32_t>& codes, std::string& out) {
    codes.clear();
    for (int length; at < end; at += length) append_decomposed(decode(at, length), codes);
    for (size_t i = 0; i < codes.size();) {
        if (combining_class(codes[i]) == 0) {
            ++i;
            continue;
        }
        size_t last = i;
        while (last < codes.size() && combining_class(codes[last]) != 0) ++last;
        std::stable_sort(codes.begin() + static_cast<std::ptrdiff_t>(i),
                         codes.begin() + static_cast<std::ptrdiff_t>(last),
                         [](uint32_t left, uint32_t right) { return combining_class(left) < combining_class(right); });
        i = last;
    }
    size_t kept = 0, starter = codes.size();
    uint8_t blocking = 0;  // class of the last character retained since the starter; 0 for none
    for (size_t i = 0; i < codes.size(); ++i) {
        const uint32_t code = codes[i];
        const uint8_t own = combining_class(code);
        const bool adjacent = starter != codes.size() && kept == starter + 1;
        if (starter != codes.size() && (adjacent || (blocking < own && blocking != 0))) {
            if (const uint32_t joined = compose(codes[starter], code); joined != 0) {
                codes[starter] = joined;
                continue;
            }
        }
        if (own == 0) starter = kept;
        blocking = own;
        codes[kept++] = code;
    }
    for (size_t i = 0; i < kept; ++i) append_utf8(codes[i], out);
}

}  // namespace

const uint8_t* unicode_traits() {
    static const std::unique_ptr<const uint8_t[]> traits = [] {
        auto made = std::make_unique<uint8_t[]>(kCodePoints);
        const auto mark = [&](const Range* first, const Range* last, uint8_t bits) {
            for (; first != last; ++first)
                for (uint32_t code = first->first; code <= first->last; ++code) made[code] |= bits;
        };
        mark(std::begin(kLetterRanges), std::end(kLetterRanges), kLetter);
        mark(std::begin(kNumberRanges), std::end(kNumberRanges), kNumber);
        mark(std::begin(kSpaceRanges), std::end(kSpaceRanges), kSpace);
        mark(std::begin(kUnstableRanges), std::end(kUnstableRanges), kUnstable);
        return made;
    }();
    return traits.get();
}

bool valid_utf8(const uint8_t* bytes, uint64_t count) {
    const uint8_t* const end = bytes + count;
    while (bytes < end) {
        uint64_t word;
        if (end - bytes >= 8 && (std::memcpy(&word, bytes, 8), (word & 0x8080808080808080u) == 0)) {
            bytes += 8;
            continue;
        }
        const int length = utf8_length(bytes, end);
        if (length == 0) return false;
        bytes += length;
    }
    return true;
}

uint64_t first_unstable(const uint8_t* bytes, uint64_t from, uint64_t count) {
    const uint8_t* const traits = unicode_traits();
    for (uint64_t i = from; i < count;) {
        uint64_t word;
        if (count - i >= 8 && (std::memcpy(&word, bytes + i, 8), (word & 0x8080808080808080u) == 0)) {
            i += 8;
            continue;
        }
        if (bytes[i] < 0xCC) {  // below U+0300 nothing is unstable; `i` is never at a continuation byte
            i += bytes[i] < 0x80 ? 1 : 2;
            continue;
        }
        int length;
        const uint32_t code = decode(bytes + i, length);
        if ((traits[code] & kUnstable) != 0) return i;
        i += static_cast<uint64_t>(length);
    }
    return count;
}

void append_nfc(const uint8_t* bytes, uint64_t count, std::string& out) {
    const uint8_t* const traits = unicode_traits();
    std::vector<uint32_t> codes;
    uint64_t done = 0;
    while (done < count) {
        const uint64_t unstable = first_unstable(bytes, done, count);
        if (unstable == count) break;
        uint64_t start = unstable;  // the run starts with the stable character before it
        if (start > done) do
                --start;
            while (start > done && (bytes[start] & 0xC0) == 0x80);
        out.append(reinterpret_cast<const char*>(bytes + done), start - done);
        uint64_t end = unstable;
        for (int length; end < count; end += static_cast<uint64_t>(length))
            if ((traits[decode(bytes + end, length)] & kUnstable) == 0) break;
        append_stretch(bytes + start, bytes + end, codes, out);
        done = end;
    }
    out.append(reinterpret_cast<const char*>(bytes + done), count - done);
}

}  // namespace neox::data
