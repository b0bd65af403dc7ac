// Encoding of lines and their words: random text in separate allocations, so that a sanitizer detects every read past
// the padding, against the gpt2 pattern written out alternative by alternative. The bytes after a text must not matter.
// Arguments: see budget.h (default: 5000 texts).
#include <cstring>
#include <random>

#include "budget.h"
#include "corpus.h"
#include "data/line_encoder.h"
#include "expect.h"

using namespace data_test;
using namespace neox::data;

namespace {

// Words of the pattern, greedy and in the order of its alternatives, on characters and their classes.
class Pattern {
  public:
    explicit Pattern(const std::string& text) {
        const auto* bytes = reinterpret_cast<const uint8_t*>(text.data());
        for (size_t at = 0; at < text.size();) {
            int length;
            const uint32_t code = decode(bytes + at, length);
            starts_.push_back(at);
            codes_.push_back(code);
            classes_.push_back(unicode_traits()[code] & kClassBits);
            at += static_cast<size_t>(length);
        }
        starts_.push_back(text.size());
    }

    std::vector<size_t> ends() const {
        std::vector<size_t> found;
        for (size_t at = 0; at < codes_.size();) found.push_back(starts_[at = end_of_word(at)]);
        return found;
    }

  private:
    size_t run(size_t at, uint8_t kind) const {
        while (at < codes_.size() && classes_[at] == kind) ++at;
        return at;
    }
    bool says(size_t at, const char* word) const {
        for (; *word != 0; ++word, ++at)
            if (at >= codes_.size() || codes_[at] != static_cast<uint32_t>(*word)) return false;
        return true;
    }
    size_t end_of_word(size_t at) const {
        for (const char* short_form : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"})
            if (says(at, short_form)) return at + std::strlen(short_form);
        for (const uint8_t kind : {uint8_t{kLetter}, uint8_t{kNumber}, uint8_t{kOther}}) {
            const size_t first = codes_[at] == ' ' ? at + 1 : at;
            if (const size_t end = run(first, kind); end > first) return end;
        }
        const size_t end = run(at, kSpace);
        return end < codes_.size() && end > at + 1 ? end - 1 : end;  // \s+(?!\S) leaves one blank if a word follows
    }

    std::vector<size_t> starts_;
    std::vector<uint32_t> codes_;
    std::vector<uint8_t> classes_;
};

std::string random_text(std::mt19937_64& random) {
    static const char* const kAtoms[] = {"a",
                                         "Z",
                                         "the",
                                         " ",
                                         " ",
                                         "  ",
                                         "\n",
                                         "\t",
                                         "1",
                                         "42",
                                         ".",
                                         "'",
                                         "'s",
                                         "'t",
                                         "'re",
                                         "'ll",
                                         "'ve",
                                         "'d",
                                         "'m",
                                         "!!",
                                         "\"\\",
                                         "\xC3\xA9",
                                         "\xE6\x97\xA5",
                                         "\xC2\xA0",
                                         "r",
                                         "l",
                                         "e",
                                         "s",
                                         "\r",
                                         "\x0B",
                                         "\x7F",
                                         "\xE3\x80\x80",
                                         "\xCC\x81",
                                         "\xF0\x9F\x98\x80",
                                         "\xD9\xA3",
                                         "\xE2\x80\xA8"};
    const size_t kinds = 1 + random() % std::size(kAtoms), first = random() % std::size(kAtoms);
    std::string text;
    for (uint64_t left = random() % 200; left > 0; --left) {
        const char* atom = kAtoms[(first + random() % kinds) % std::size(kAtoms)];
        for (uint64_t times = random() % 16 == 0 ? 1 + random() % 70 : 1; times > 0; --times) text += atom;
    }
    return text;
}

// The ends of the words of a text that is followed only by its padding.
std::vector<size_t> split(const std::string& text, const std::string& padding) {
    const std::string all = text + padding;
    const std::vector<uint8_t> exact(all.begin(), all.end());
    std::vector<size_t> found;
    size_t end = 0;
    WordSplitter(SplitPattern::gpt2)
        .split(exact.data(), exact.data() + text.size(), [&](const uint8_t* word, uint64_t length) {
            if (word != exact.data() + end) found.push_back(0);  // a gap
            found.push_back(end += length);
        });
    return found;
}

std::string json_of(const std::string& text) {
    std::string out = "{\"text\": \"";
    for (const char c : text) {
        if (static_cast<uint8_t>(c) >= 0x20 && c != '"' && c != '\\') {
            out += c;
            continue;
        }
        char escaped[8];
        std::snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned>(static_cast<uint8_t>(c)));
        out += escaped;
    }
    return out + "\"}\n";
}

// A vocabulary of the bytes and of a few pairs.
TextEncoder encoder() {
    std::vector<uint32_t> bytes(256), left, right, merged;
    for (uint32_t b = 0; b < 256; ++b) bytes[b] = b;
    for (const char* pair : {"th", " t", "  ", "'s", "ll", "re", "\n\n", "42"}) {
        left.push_back(static_cast<uint8_t>(pair[0])), right.push_back(static_cast<uint8_t>(pair[1]));
        merged.push_back(static_cast<uint32_t>(256 + merged.size()));
    }
    return TextEncoder(BytePairs(bytes, left, right, merged), SplitPattern::gpt2, false,
                       {{"<|end|>", 300, false, false}});
}

std::vector<uint32_t> ids(LineState& state) { return {state.ids.begin(), state.ids.begin() + state.ids.size()}; }

}  // namespace

int main(int count, char** arguments) {
    Budget budget(count, arguments, 5'000);
    std::mt19937_64 random(budget.seed());
    const TextEncoder texts = encoder();
    LineState together, alone;
    Corpus corpus("line_encoder", [&](const Bytes& input) {
        const std::string text(input.begin(), input.end());
        const std::vector<size_t> wanted = Pattern(text).ends();
        const char behind = "\0a 1'\n.\xC3"[random() % 8];
        tally.check(split(text, std::string(kPadding, behind)) == wanted, "words", __FILE__, __LINE__, json_of(text));
        const std::string lines =
            json_of(text) + "\n" + (random() % 4 == 0 ? "{]\n" : "") + json_of(random_text(random));
        const std::vector<uint8_t> exact(lines.begin(), lines.end());
        together.clear();
        encode_lines(texts, exact.data(), exact.size(), {"text", 301}, together);
        EXPECT_EQ(together.blank, uint64_t{1});
        EXPECT_EQ(together.sizes.size() + together.empty, size_t{2});
        alone.clear();
        EXPECT(encode_text(texts, reinterpret_cast<const uint8_t*>(text.data()), text.size(), {"", 301}, alone));
        std::vector<uint32_t> start = ids(together);
        start.resize(std::min<size_t>(start.size(), alone.ids.size()));
        EXPECT(start == ids(alone));
    });
    while (budget.next()) {
        const std::string text = random_text(random);
        corpus(Bytes(text.begin(), text.end()));
    }
    corpus.keep();
    std::printf("%llu texts in %.1f s\n", static_cast<unsigned long long>(budget.done()), budget.seconds());
    return tally.finish();
}
