// Byte-pair encoding against its definition, for words of every length class, and its running time.
#include <ctime>
#include <map>
#include <random>

#include "data/byte_pair.h"
#include "expect.h"

using namespace data_test;
using namespace neox::data;

namespace {

struct Model {
    std::vector<uint32_t> byte_ids, left, right, merged;
    std::map<std::pair<uint32_t, uint32_t>, uint32_t> ranks;

    BytePairs pairs() const { return BytePairs(byte_ids, left, right, merged); }

    std::vector<uint32_t> encode(const std::string& word) const {
        std::vector<uint32_t> ids;
        for (const char c : word) ids.push_back(byte_ids[static_cast<uint8_t>(c)]);
        for (;;) {
            uint32_t best = UINT32_MAX;
            size_t at = 0;
            for (size_t i = 0; i + 1 < ids.size(); ++i) {
                const auto found = ranks.find({ids[i], ids[i + 1]});
                if (found != ranks.end() && found->second < best) best = found->second, at = i;
            }
            if (best == UINT32_MAX) return ids;
            ids[at] = merged[best];
            ids.erase(ids.begin() + static_cast<long>(at) + 1);
        }
    }
};

// Random merges of existing tokens; some results can be reached in two ways, as in real vocabularies.
Model random_model(std::mt19937_64& random, uint32_t alphabet, uint32_t merges, bool two_ways = true) {
    Model model;
    for (uint32_t b = 0; b < 256; ++b) model.byte_ids.push_back(255 - b);
    std::vector<uint32_t> tokens;
    for (uint32_t a = 0; a < alphabet; ++a) tokens.push_back(model.byte_ids['a' + a]);
    uint32_t next = 1000;
    while (model.merged.size() < merges) {
        const uint32_t left = tokens[random() % tokens.size()], right = tokens[random() % tokens.size()];
        if (model.ranks.count({left, right}) != 0) continue;
        model.ranks[{left, right}] = static_cast<uint32_t>(model.merged.size());
        model.left.push_back(left);
        model.right.push_back(right);
        model.merged.push_back(two_ways && random() % 16 == 0 && next > 1000 ? next - 1 : next++);
        tokens.push_back(model.merged.back());
    }
    return model;
}

std::vector<uint32_t> encode(const BytePairs& pairs, const std::string& word) {
    std::vector<uint32_t> out(word.size());  // exact size, so that the sanitizer detects one token too many
    out.resize(pairs.encode(reinterpret_cast<const uint8_t*>(word.data()), word.size(), out.data()));
    return out;
}

void equals_its_definition() {
    std::mt19937_64 random(7);
    for (int round = 0; round < 60; ++round) {
        const uint32_t alphabet = 1 + static_cast<uint32_t>(random() % 5);
        const Model model = random_model(random, alphabet, 1 + static_cast<uint32_t>(random() % 40));
        const BytePairs pairs = model.pairs();
        for (const size_t length : {0, 1, 2, 3, 5, 17, 63, 64, 65, 255, 256, 257, 258, 600}) {
            std::string word;
            for (size_t i = 0; i < length; ++i) word.push_back(static_cast<char>('a' + random() % alphabet));
            EXPECT(encode(pairs, word) == model.encode(word));
        }
    }
}

// Where `parts` returns true, the ids of a word are those of its two parts.
void words_split_where_no_token_crosses() {
    std::mt19937_64 random(9);
    int parted = 0, whole = 0;
    for (int round = 0; round < 200; ++round) {
        const uint32_t alphabet = 2 + static_cast<uint32_t>(random() % 4);
        const Model model = random_model(random, alphabet, 1 + static_cast<uint32_t>(random() % 12), false);
        const BytePairs pairs = model.pairs();
        EXPECT(pairs.may_split());
        for (int w = 0; w < 20; ++w) {
            std::string word;
            for (uint64_t length = 2 + random() % 12; word.size() < length;)
                word.push_back(static_cast<char>('a' + random() % alphabet));
            for (uint64_t at = 1; at < word.size(); ++at) {
                if (!pairs.can_split_at(reinterpret_cast<const uint8_t*>(word.data()), at, word.size())) {
                    ++whole;
                    continue;
                }
                ++parted;
                std::vector<uint32_t> both = model.encode(word.substr(0, at));
                for (const uint32_t id : model.encode(word.substr(at))) both.push_back(id);
                EXPECT(both == model.encode(word));
            }
        }
    }
    EXPECT(parted > 1000 && whole > 1000);
    Model twice;
    for (uint32_t b = 0; b < 256; ++b) twice.byte_ids.push_back(b);
    twice.left = {'a', 'b'}, twice.right = {'b', 'a'}, twice.merged = {300, 300};
    EXPECT(!twice.pairs().may_split());
}

void whole_words() {
    Model model;
    for (uint32_t b = 0; b < 256; ++b) model.byte_ids.push_back(b);
    BytePairs pairs = model.pairs();
    EXPECT(encode(pairs, "ab") == (std::vector<uint32_t>{'a', 'b'}));
    pairs.set_word_tokens({{"ab", 900}});
    EXPECT(encode(pairs, "ab") == std::vector<uint32_t>{900});
    EXPECT(encode(pairs, "abc") == (std::vector<uint32_t>{'a', 'b', 'c'}));
    EXPECT_FAULT(BytePairs({1, 2}, {}, {}, {}), "have different sizes");
    for (int part = 0; part < 4; ++part) {
        for (const uint32_t id : {(1u << 20) - 1, (1u << 20) - 2}) {
            Model large = model;
            large.left = {'a'}, large.right = {'b'}, large.merged = {300};
            (part == 0 ? large.left : part == 1 ? large.right : part == 2 ? large.merged : large.byte_ids)[0] = id;
            if (id == BytePairs::kMaxIds) EXPECT_FAULT(large.pairs(), "id is too large");
            if (id < BytePairs::kMaxIds) large.pairs();
        }
    }
}

// Bytes that no UTF-8 has may lack a token, and nothing merges with them.
void bytes_without_a_token() {
    Model model;
    for (uint32_t b = 0; b < 256; ++b) model.byte_ids.push_back(b < 0xF5 ? b : BytePairs::kNone);
    model.left = {'a'}, model.right = {'b'}, model.merged = {300};
    model.ranks[{'a', 'b'}] = 0;
    const BytePairs pairs = model.pairs();
    EXPECT(pairs.may_split());
    for (const size_t repeats : {1, 20, 300}) {
        std::string word;
        for (size_t i = 0; i < repeats; ++i)
            word +=
                "ab\xF5\xFF"
                "b";
        EXPECT(encode(pairs, word) == model.encode(word));
    }
}

// Of a pair that is listed twice the later rank and result count, as in a dictionary.
void pairs_listed_twice() {
    Model model;
    for (uint32_t b = 0; b < 256; ++b) model.byte_ids.push_back(b);
    model.left = {'a', 'b', 'a'}, model.right = {'b', 'c', 'b'}, model.merged = {300, 301, 302};
    model.ranks = {{{'a', 'b'}, 2}, {{'b', 'c'}, 1}};
    const BytePairs pairs = model.pairs();
    for (const char* word : {"ab", "abc", "abab", "bcab"}) EXPECT(encode(pairs, word) == model.encode(word));
    EXPECT(encode(pairs, "ab") == std::vector<uint32_t>{302});
}

// The texts of all tokens are known, in whatever order the merges are listed; else no word is split.
void merges_in_any_order() {
    Model model;
    for (uint32_t b = 0; b < 256; ++b) model.byte_ids.push_back(b);
    model.left = {302, 301, 300}, model.right = {'e', 'd', 'c'}, model.merged = {303, 302, 301};
    model.left.push_back('a'), model.right.push_back('b'), model.merged.push_back(300);
    const auto at = [](const char* word) { return reinterpret_cast<const uint8_t*>(word); };
    const BytePairs pairs = model.pairs();
    EXPECT(pairs.may_split());
    EXPECT(!pairs.can_split_at(at("abc"), 1, 3) && !pairs.can_split_at(at("abc"), 2, 3));
    EXPECT(!pairs.can_split_at(at("bcd"), 1, 3) && !pairs.can_split_at(at("cde"), 2, 3) &&
           pairs.can_split_at(at("bce"), 1, 3));
    EXPECT(!pairs.can_split_at(at("ab"), 1, 2) && pairs.can_split_at(at("bc"), 1, 2) &&
           pairs.can_split_at(at("xabx"), 1, 4));
    model.left.back() = 999;  // made by no merge
    EXPECT(!model.pairs().may_split());
    BytePairs whole = pairs;
    whole.set_word_tokens({{"abx", 900}});
    EXPECT(pairs.may_split() && !whole.may_split());
}

void arrays_of_other_lengths() {
    Model model;
    for (uint32_t b = 0; b < 256; ++b) model.byte_ids.push_back(b);
    const std::vector<uint32_t> none, one = {'a'}, many(size_t{1} << 24, 'a');
    EXPECT_FAULT(BytePairs(model.byte_ids, one, none, none), "have different sizes");
    EXPECT_FAULT(BytePairs(model.byte_ids, none, one, none), "have different sizes");
    EXPECT_FAULT(BytePairs(model.byte_ids, one, one, none), "have different sizes");
    EXPECT_FAULT(BytePairs(model.byte_ids, many, many, many), "too many merges; where=; got=16777216; want=below 2^24");
}

// A word of one repeated letter can merge at every position. The time stays proportional to its length.
void linear_time() {
    std::mt19937_64 random(8);
    Model model;
    for (uint32_t b = 0; b < 256; ++b) model.byte_ids.push_back(b);
    for (uint32_t r = 0, token = 'a'; r < 12; ++r, token = 1000 + r - 1) {
        model.left.push_back(token);
        model.right.push_back(token);
        model.merged.push_back(1000 + r);
    }
    const BytePairs pairs = model.pairs();
    double seconds[2];
    for (int i = 0; i < 2; ++i) {
        const std::string word(size_t{200'000} << (2 * i), 'a');
        const std::clock_t start = std::clock();  // processor time, which other processes do not change
        EXPECT_EQ(encode(pairs, word).size(),
                  word.size() / 4096 + static_cast<size_t>(__builtin_popcountll(word.size() % 4096)));
        seconds[i] = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
    }
    EXPECT(seconds[1] < 10 * seconds[0] + 0.1);
}

}  // namespace

int main() {
    equals_its_definition();
    words_split_where_no_token_crosses();
    whole_words();
    bytes_without_a_token();
    pairs_listed_twice();
    merges_in_any_order();
    arrays_of_other_lengths();
    linear_time();
    return tally.finish();
}
