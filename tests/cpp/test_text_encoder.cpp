// Encoding of texts with every kind of added token, and of words around the limits of the cache, against the same ids
// computed without either: word by word, with the definition of leftmost-longest matches.
#include <cstring>
#include <random>

#include "data/text_encoder.h"
#include "expect.h"

using namespace data_test;
using namespace neox::data;

namespace {

std::vector<uint8_t> padded(const std::string& text, char padding) {
    std::vector<uint8_t> bytes(text.begin(), text.end());
    bytes.insert(bytes.end(), kPadding, static_cast<uint8_t>(padding));
    return bytes;
}

// The match that begins first; of those the longest. Returns its position, or the length of the text.
size_t first_match(const std::string& text, size_t from, const std::vector<std::string>& strings, size_t& which) {
    for (size_t at = from; at < text.size(); ++at) {
        size_t length = 0;
        for (size_t i = 0; i < strings.size(); ++i)
            if (strings[i].size() > length && text.compare(at, strings[i].size(), strings[i]) == 0)
                length = strings[i].size(), which = i;
        if (length > 0) return at;
    }
    return text.size();
}

// Sets of few and of many first letters, of which some are the beginning of others.
void matches_are_the_leftmost_and_longest() {
    const std::vector<std::vector<std::string>> sets = {
        {"<|end|>"},
        {"a"},
        {"ab", "abcd"},
        {"aa", "ab", "ba", "bb"},
        {"aa", "ab", "ba", "bb", "ca"},
        {"abab", "b", "abc", "\xE6\x97\xA5"},
        {"  ", "   ", "        "},
    };
    std::mt19937_64 random(3);
    for (const auto& strings : sets) {
        StringMatcher matcher;
        EXPECT(matcher.empty());
        matcher.add("", 99);  // matches nothing
        EXPECT(matcher.empty());
        for (size_t i = 0; i < strings.size(); ++i) matcher.add(strings[i], static_cast<uint32_t>(i));
        EXPECT(!matcher.empty());
        for (int round = 0; round < 400; ++round) {
            static const char* const kAtoms[] = {
                "a", "b", "c", "d", " ", "<", "<|end|", ">", "|", "\xE6\x97\xA5", "xxxxxxxxxxxxxxx"};
            std::string text;
            for (uint64_t left = random() % 40; left > 0; --left) text += kAtoms[random() % std::size(kAtoms)];
            const std::vector<uint8_t> bytes = padded(text, strings[0].back());  // as if a match crossed the end
            for (size_t from = 0; from <= text.size(); from += 1 + random() % 9) {
                size_t which = 0;
                const size_t wanted = first_match(text, from, strings, which);
                uint64_t length = 0;
                uint32_t value = 99;
                const uint8_t* found = matcher.find(bytes.data() + from, bytes.data() + text.size(), length, value);
                if (wanted == text.size()) {
                    EXPECT(found == nullptr);
                    continue;
                }
                EXPECT(found == bytes.data() + wanted);
                EXPECT_EQ(length, strings[which].size());
                EXPECT_EQ(value, static_cast<uint32_t>(which));
            }
        }
    }
    StringMatcher matcher;  // the value that was given last
    matcher.add("ab", 1), matcher.add("ab", 2);
    const std::vector<uint8_t> bytes = padded("ab", 0);
    uint64_t length = 0;
    uint32_t value = 0;
    EXPECT(matcher.find(bytes.data(), bytes.data() + 2, length, value) == bytes.data() && value == 2);
}

// Ids of 16 bits only, or also larger ones.
BytePairs vocabulary(uint32_t larger) {
    std::vector<uint32_t> bytes(256), left, right, merged;
    for (uint32_t b = 0; b < 256; ++b) bytes[b] = b;
    for (const char* pair : {"ab", "cd", "ef", " a", "\xC3\xA9"}) {
        left.push_back(static_cast<uint8_t>(pair[0])), right.push_back(static_cast<uint8_t>(pair[1]));
        merged.push_back(larger + static_cast<uint32_t>(merged.size()));
    }
    return BytePairs(bytes, left, right, merged);
}

std::vector<uint32_t> ids_of_words(const BytePairs& pairs, const std::string& text) {
    const std::vector<uint8_t> bytes = padded(text, ' ');
    std::vector<uint32_t> ids;
    WordSplitter(SplitPattern::gpt2)
        .split(bytes.data(), bytes.data() + text.size(), [&](const uint8_t* word, uint64_t length) {
            std::vector<uint32_t> more(length);
            more.resize(pairs.encode(word, length, more.data()));
            ids.insert(ids.end(), more.begin(), more.end());
        });
    return ids;
}

std::vector<uint32_t> encoded(const TextEncoder& encoder, const std::string& text, TextEncoder::State& state) {
    const std::vector<uint8_t> bytes = padded(text, 'a');
    const uint64_t before = state.ids.size();
    encoder.encode(bytes.data(), text.size(), state);
    return {state.ids.begin() + before, state.ids.begin() + state.ids.size()};
}

// Words of every length with few and many ids: met once, again, and after many others that evict them.
void cached_words() {
    std::mt19937_64 random(4);
    for (const uint32_t larger : {1000u, 65'533u, 70'000u}) {
        const BytePairs pairs = vocabulary(larger);
        const TextEncoder encoder(pairs, SplitPattern::gpt2, false, {});
        std::vector<std::string> words;
        for (size_t length = 1; length <= 30; ++length)
            for (int i = 0; i < 30; ++i) {
                std::string word;
                const bool merging = i % 2 == 0;
                while (word.size() < length)
                    word += merging ? "abcdef"[word.size() % 6] : static_cast<char>('a' + random() % 8);
                if (i >= 20) word[0] = ' ';
                if (i >= 25) word.back() = static_cast<char>('g' + random() % 10);
                words.push_back(word);
            }
        for (size_t length = 13; length <= 26; ++length)  // that differ in their last letter
            for (char last = 'a'; last <= 'z'; ++last) words.push_back(std::string(length - 1, 'x') + last);
        words.push_back(std::string("a\0", 2)), words.push_back("a"), words.push_back(std::string("!\0\0", 3));
        TextEncoder::State state;
        for (int round = 0; round < 3; ++round) {
            std::string text;
            for (size_t i = 0; i < words.size(); ++i) text += words[random() % words.size()] + (i % 3 == 0 ? "1" : " ");
            EXPECT(encoded(encoder, text, state) == ids_of_words(pairs, text));
            for (const std::string& word : words)
                for (int again = 0; again < 2; ++again)
                    EXPECT(encoded(encoder, word, state) == ids_of_words(pairs, word));
            text.clear();
            for (int i = 0; i < 20'000; ++i) {
                text += " ";
                for (uint64_t left = 1 + random() % 8; left > 0; --left) text += static_cast<char>('a' + random() % 26);
            }
            EXPECT(encoded(encoder, text, state) == ids_of_words(pairs, text));
            state.ids.clear();
        }
    }
}

void added_tokens() {
    const BytePairs pairs = vocabulary(1000);
    const auto encode = [&](std::vector<AddedToken> added, bool normalise, const std::string& text) {
        TextEncoder::State state;
        return encoded(TextEncoder(pairs, SplitPattern::gpt2, normalise, added), text, state);
    };
    using Ids = std::vector<uint32_t>;
    const AddedToken end{"<e>", 5000, false, false}, text_of_end{"<e>", 5000, false, true};
    EXPECT(encode({end}, false, "") == Ids{});
    EXPECT(encode({end}, false, "<e>") == Ids{5000});
    EXPECT(encode({end}, false, "<e><e>") == (Ids{5000, 5000}));
    EXPECT(encode({end}, false, "ab<e> ab<e>") == (Ids{1000, 5000, ' ', 1000, 5000}));
    EXPECT(encode({end}, false, "<<e") == (Ids{'<', '<', 'e'}));
    EXPECT(encode({text_of_end}, false, "ab<e>ab") == (Ids{1000, '<', 'e', '>', 1000}));
    // a token that is text still ends the match of others
    EXPECT(encode({text_of_end, {"e>a", 6000, false, false}}, false, "<e>ab") == (Ids{'<', 'e', '>', 1000}));
    EXPECT(encode({end, {"<e>a", 6000, false, false}}, false, "<e>ab<e>b") == (Ids{6000, 'b', 5000, 'b'}));
    // an accent that composes: only a token of the normalised text is met in it, and only the other in the original
    const std::string apart = "e\xCC\x81", whole = "\xC3\xA9";
    EXPECT(encode({}, false, apart) == (Ids{'e', 0xCC, 0x81}));
    EXPECT(encode({}, true, apart) == Ids{1004});
    EXPECT(encode({{whole, 7000, true, false}}, true, "x" + apart + "x") == (Ids{'x', 7000, 'x'}));
    EXPECT(encode({{whole, 7000, false, false}}, true, "x" + apart + "x") == (Ids{'x', 1004, 'x'}));
    EXPECT(encode({{apart, 7000, false, false}}, true, "x" + apart + whole) == (Ids{'x', 7000, 1004}));
    EXPECT(encode({{whole, 7000, true, false}}, false, apart + whole) == (Ids{'e', 0xCC, 0x81, 7000}));
    // those of the original text come first
    EXPECT(encode({end, {"b<", 8000, true, false}, {"ab", 8001, true, false}}, true, "ab<e>ab<") ==
           (Ids{8001, 5000, 8001, '<'}));
    // normalised parts are longer or shorter than the text, and many
    std::string text;
    Ids wanted;
    for (int i = 0; i < 500; ++i) {
        text += "\xCD\x84" + apart + "<e>" + "ab";  // U+0344 becomes two marks of two bytes
        for (const uint32_t id : {0xCCu, 0x88u, 0xCCu, 0x81u, 1004u, 5000u, 1000u}) wanted.push_back(id);
    }
    EXPECT(encode({end}, true, text) == wanted);
    // more ids than the text has bytes
    text.clear(), wanted.clear();
    for (int i = 0; i < 200'000; ++i) {
        text += "\xCD\x84";
        for (const uint32_t id : {0xCCu, 0x88u, 0xCCu, 0x81u}) wanted.push_back(id);
    }
    EXPECT(encode({}, true, text) == wanted);
}

// Words that are long, without a space, in parts that recur: their ids are those of the whole word.
void long_words_are_those_of_their_parts() {
    std::mt19937_64 random(5);
    const BytePairs pairs = vocabulary(1000);
    const TextEncoder encoder(pairs, SplitPattern::gpt2, false, {});
    BytePairs with_whole = pairs;
    with_whole.set_word_tokens({{"abcdefabcdefabcdef", 9000}, {"ab", 9001}});
    const TextEncoder of_whole(with_whole, SplitPattern::gpt2, false, {});
    TextEncoder::State state, other;
    for (int round = 0; round < 500; ++round) {
        std::string word;
        for (uint64_t left = 5 + random() % 60; left > 0; --left)
            word += random() % 4 == 0 ? std::string("\xC3\xA9") : std::string(1, static_cast<char>('a' + random() % 7));
        std::vector<uint32_t> ids(word.size());
        const auto* at = reinterpret_cast<const uint8_t*>(word.data());
        ids.resize(pairs.encode(at, word.size(), ids.data()));
        EXPECT(encoded(encoder, word, state) == ids);
        EXPECT(encoded(of_whole, word, other) == ids);
    }
    EXPECT(encoded(of_whole, "abcdefabcdefabcdef", other) == std::vector<uint32_t>{9000});
    EXPECT(encoded(of_whole, "ab abcdefabcdefabcdef", other) ==
           (std::vector<uint32_t>{9001, ' ', 1000, 1001, 1002, 1000, 1001, 1002, 1000, 1001, 1002}));
}

void buffers_of_ids_grow() {
    IdBuffer ids;
    EXPECT_EQ(ids.size(), uint64_t{0});
    uint32_t next = 0;
    for (const uint64_t count : {0, 1, 5, 1, 100, 3, 1000}) {
        uint32_t* to = ids.room(count);
        for (uint64_t i = 0; i < count; ++i) *to++ = next++;
        ids.set_end(to);
        EXPECT_EQ(ids.size(), uint64_t{next});
        for (uint32_t i = 0; i < next; ++i) EXPECT_EQ(ids.begin()[i], i);
    }
    ids.shrink_to(7);
    EXPECT_EQ(ids.size(), uint64_t{7});
    *ids.room(1) = 99;
    EXPECT(ids.begin()[6] == 6 && ids.begin()[7] == 99);
    ids.clear();
    EXPECT_EQ(ids.size(), uint64_t{0});
}

}  // namespace

int main() {
    matches_are_the_leftmost_and_longest();
    cached_words();
    added_tokens();
    long_words_are_those_of_their_parts();
    buffers_of_ids_grow();
    return tally.finish();
}
