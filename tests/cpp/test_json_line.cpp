// The fast reader of JSON lines: what it accepts and what it leaves to the full parser, and mutated lines in separate
// allocations, so that a sanitizer detects every read past either end. Arguments: see budget.h (default: 100000 lines).
#include <cstring>
#include <random>

#include "budget.h"
#include "corpus.h"
#include "data/json_line.h"
#include "data/unicode.h"
#include "expect.h"

using namespace data_test;
using namespace neox::data;

namespace {

struct Read {
    LineKind kind;
    std::string text;
};

// Reads a line that fills its allocation exactly.
Read read(const std::string& line, const std::string& key = "text") {
    const std::vector<uint8_t> exact(line.begin(), line.end());
    TextBuffer text;
    uint64_t count = 0;
    const LineKind kind =
        read_json_line(exact.data(), exact.data() + exact.size(), exact.data() + exact.size(), key, text, count);
    if (kind != LineKind::text) return {kind, ""};
    return {kind, std::string(reinterpret_cast<const char*>(text.begin()), count)};
}

void gives(const std::string& line, const std::string& text) {
    const Read got = read(line);
    tally.check(got.kind == LineKind::text && got.text == text, line.c_str(), __FILE__, __LINE__, got.text);
}

void leaves(const std::string& line) {
    tally.check(read(line).kind == LineKind::unsure, line.c_str(), __FILE__, __LINE__);
}

void texts() {
    gives(R"({"text": "a"})", "a");
    gives("\t{ \"text\" :\"\" } \r", "");
    gives(R"({"id": 17, "meta": {"text": "no", "list": [1, -2.5, [], {}, "x\n", null, true, false]}, "text": "yes"})",
          "yes");
    gives(R"({"text": "first", "text": "last"})", "last");
    gives(R"({"text": "\"\\\/\b\f\n\r\t\u0041\u00e9\u65E5\ud83D\uDE00"})",
          "\"\\/\b\f\n\r\tA\xC3\xA9\xE6\x97\xA5\xF0\x9F\x98\x80");
    gives("{\"text\": \"\xC3\xA9\xE6\x97\xA5\xF0\x9F\x98\x80 sixteen bytes and more \xC3\xA9\"}",
          "\xC3\xA9\xE6\x97\xA5\xF0\x9F\x98\x80 sixteen bytes and more \xC3\xA9");
    gives("{\"text\": \"" + std::string(1000, 'x') + "\\n" + std::string(1000, 'y') + "\"}",
          std::string(1000, 'x') + "\n" + std::string(1000, 'y'));
    gives(R"({"a": 0, "b": -0.5, "c": 12345678901234567, "text": "n"})", "n");
    EXPECT_EQ(read(R"({"corps": "a"})", "corps").text, std::string("a"));
    for (const char* blank : {"", " ", "\t\r", "\v\f "}) EXPECT(read(blank).kind == LineKind::blank);
}

// What Python's json writes or reads as a number or constant, at the end of a line and before another key.
void numbers() {
    for (const char* number :
         {"0", "-0", "7", "120", "0.0", "-10.05", "1e5", "1E5", "1e+05", "1E-300", "0e0", "2.5e7", "NaN", "Infinity",
          "-Infinity", "true", "false", "null", "123456789012345678901234567890"}) {
        gives(std::string("{\"a\": ") + number + ", \"text\": \"n\"}", "n");
        gives(std::string("{\"text\": \"n\", \"a\":") + number + "}", "n");
        leaves(std::string("{\"text\": \"n\", \"a\": ") + number);
        leaves(std::string("{\"text\": \"n\", \"a\": ") + number + "x}");
        leaves(std::string("{\"text\": \"n\", \"a\": +") + number + "}");
    }
}

// Escapes of the first and the last character of each length in UTF-8, with digits of both cases.
void escapes() {
    const std::pair<const char*, const char*> wanted[] = {{"\\u0001", "\x01"},
                                                          {"\\u007f", "\x7F"},
                                                          {"\\u0080", "\xC2\x80"},
                                                          {"\\u07FF", "\xDF\xBF"},
                                                          {"\\u0800", "\xE0\xA0\x80"},
                                                          {"\\ud7ff", "\xED\x9F\xBF"},
                                                          {"\\uE000", "\xEE\x80\x80"},
                                                          {"\\uffff", "\xEF\xBF\xBF"},
                                                          {"\\ud800\\udc00", "\xF0\x90\x80\x80"},
                                                          {"\\uDBFF\\uDFFF", "\xF4\x8F\xBF\xBF"},
                                                          {"\\u9aAf", "\xE9\xAA\xAF"},
                                                          {"\\ud83d\\ude00", "\xF0\x9F\x98\x80"}};
    for (const auto& [escape, utf8] : wanted) {
        gives(std::string("{\"text\": \"") + escape + "\"}", utf8);
        gives(std::string("{\"a\": \"") + escape + "\", \"text\": \"a" + escape + escape + "b\"}",
              std::string("a") + utf8 + utf8 + "b");
    }
    EXPECT_EQ(read("{\"text\": \"\\u0000\"}").text, std::string(1, '\0'));
    for (const char* escape :
         {"\\uDBFF\\uDBFF", "\\uDBFF\\uE000", "\\uDFFF", "\\ud800", "\\ud800\\n", "\\ud800\\x", "\\u00/0", "\\u00:0",
          "\\u00@0", "\\u00G0", "\\u00`0", "\\u00g0", "\\U0041", "\\'", "\\0", "\\v", "\\a"})
        leaves(std::string("{\"text\": \"") + escape + "\"}");
}

// Only the key itself, not one that begins with it or that it begins with.
void keys() {
    gives(R"({"texts": "no", "tex": "no", "": "no", "Text": "no", "text": "yes"})", "yes");
    gives(R"({"text": "yes", "texts": "no", "tex": "no", "": "no", "Text": "no", "TEXT": "no"})", "yes");
    for (const char* line : {R"({"texts": "no"})", R"({"tex": "no"})", R"({"": "no"})", R"({"Text": "no"})"})
        leaves(line);
    EXPECT_EQ(read(R"({"": "a"})", "").text, std::string("a"));
    EXPECT_EQ(read("{\"t\xC3\xA9xt\": \"a\"}", "t\xC3\xA9xt").text, std::string("a"));
}

// A line within a block, whose other lines are read as vectors with it: a character of every kind at every position,
// and a text that only a later line would end.
void lines_within_a_block() {
    const auto read_first = [](const std::string& line, const std::string& rest) {
        const std::string block = line + rest;
        const std::vector<uint8_t> exact(block.begin(), block.end());
        TextBuffer text;
        uint64_t count = 0;
        const LineKind kind =
            read_json_line(exact.data(), exact.data() + line.size(), exact.data() + exact.size(), "text", text, count);
        return kind == LineKind::text ? std::string(reinterpret_cast<const char*>(text.begin()), count)
                                      : std::string(kind == LineKind::blank ? "(blank)" : "(unsure)");
    };
    const std::string rest = "\n{\"text\": \"of another line, longer than a vector\"}\n";
    for (size_t before = 0; before < 35; ++before) {
        const std::string left(before, 'x'), start = "{\"text\": \"" + left;
        EXPECT_EQ(read_first(start + "\"}", rest), left);
        EXPECT_EQ(read_first(start + "\\n \x7F~!#[]\\\\\"}", rest), left + "\n \x7F~!#[]\\");
        EXPECT_EQ(read_first(start + "\xC3\xA9\xE6\x97\xA5y\"}", rest), left + "\xC3\xA9\xE6\x97\xA5y");
        for (const char* unfinished : {"", "\\", "\\u12", "\xC3", "\x1F\"}", "\t\"}", "\xFF\"}", "\"", "\"} x"})
            EXPECT_EQ(read_first(start + unfinished, rest), std::string("(unsure)"));
        EXPECT_EQ(read_first(std::string(before, ' '), rest), std::string("(blank)"));
    }
}

void doubts() {
    for (const char* line : {"{",
                             "}",
                             "[]",
                             "\"text\"",
                             "null",
                             "{}",
                             R"({"text"})",
                             R"({"text": })",
                             R"({"text": 1})",
                             R"({"text": null})",
                             R"({"other": "a"})",
                             R"({"text": "a")",
                             R"({"text": "a"}})",
                             R"({"text": "a"} x)",
                             R"({"text": "a",})",
                             R"({,"text": "a"})",
                             R"({"text": "a)",
                             R"({"text": "a\)",
                             R"({"text": "\x"})",
                             R"({"text": "\u12"})",
                             R"({"text": "\u12g4"})",
                             R"({"text": "\ud800"})",
                             R"({"text": "\udc00"})",
                             R"({"text": "\ud800A"})",
                             R"({"text": "\ud800\ud800"})",
                             R"({"te\u0078t": "a"})",
                             R"({"a": 01, "text": "a"})",
                             R"({"a": 1., "text": "a"})",
                             R"({"a": .5, "text": "a"})",
                             R"({"a": -, "text": "a"})",
                             R"({"a": 1e, "text": "a"})",
                             R"({"a": 1e+-5, "text": "a"})",
                             R"({"a": nan, "text": "a"})",
                             R"({"a": -NaN, "text": "a"})",
                             R"({"a": Inf, "text": "a"})",
                             R"({"a": "\ud800", "text": "a"})",
                             R"({"a": tru, "text": "a"})",
                             R"({"a": [1,], "text": "a"})",
                             R"({"a": {"b"}, "text": "a"})",
                             R"({"text": "a", "text": 1})",
                             "\xEF\xBB\xBF{\"text\": \"a\"}",
                             "{'text': 'a'}"})
        leaves(line);
    for (const char* bytes :
         {"\xFF", "\xC3", "\xC0\x80", "\xED\xA0\x80", "\xF4\x90\x80\x80", "\xE6\x97", "\x01", "\x1F", "\t", "\n"})
        leaves("{\"text\": \"a" + std::string(bytes) + "\"}");
    leaves(std::string("{\"text\": \"a\0\"}", 14));
    // what follows would be right if the text ended there
    for (const char* bad : {"\\x", "\\u12", "\\ud800", "\\udc00", "\x01", "\n", "\xFF", "\xC3", "\\"})
        for (const char* rest : {"}", " }", ", \"b\": 1}", ",\"text\": \"c\"}"}) {
            leaves("{\"text\": \"a" + std::string(bad) + rest);
            leaves("{\"text\": \"a\", \"b\": \"" + std::string(bad) + rest);
            leaves("{\"text\": \"a\", \"b\": [\"" + std::string(bad) + "]" + rest);
            leaves("{\"text\": \"a\", \"b" + std::string(bad) + ": 1" + rest);
        }
    leaves("{\"a\": " + std::string(100, '[') + std::string(100, ']') + ", \"text\": \"a\"}");
    gives("{\"a\": " + std::string(60, '[') + std::string(60, ']') + ", \"text\": \"a\"}", "a");
    leaves("{\"a\": " + std::string(1'000'000, '['));  // of any depth: the stack does not grow
}

void mutated(Budget& budget) {
    const std::string seeds[] = {
        "{\"text\": \"caf\xC3\xA9 \\\"q\\\" \\u00e9 \\ud83d\\ude00 and more words\", \"n\": [1, -2.5, {\"text\": "
        "\"x\"}], \"t\": true}",
        "{\"a\": null, \"text\": \"\xE6\x97\xA5\xE6\x9C\xAC\\n\\t\\/\", \"text\": \"second\", \"z\": "
        "\"\xF0\x9F\x98\x80\"}",
        "  {\"k\":0.125,\"text\":\"plain text of more than sixteen bytes, and then some more of it\"}\r",
    };
    const std::string pieces[] = {"\"", "\\", "\\u", "\\ud800", "\xFF", "\xC3", "\xED\xA0\x80", "{",    "}",   "[",
                                  "]",  ",",  ":",   "1e5",     "00",   "NaN",  "-Inf",         "\x1F", "text"};
    std::mt19937_64 random(budget.seed());
    uint64_t taken = 0, cases = 0;
    Corpus corpus("json_line", [&](const Bytes& line) {
        const Read got = read(std::string(line.begin(), line.end()));
        if (got.kind != LineKind::text) return;
        ++taken;
        EXPECT(got.text.size() <= line.size());
        EXPECT(valid_utf8(reinterpret_cast<const uint8_t*>(got.text.data()), got.text.size()));
        EXPECT(valid_utf8(line.data(), line.size()));  // an accepted line is valid UTF-8
    });
    taken = 0;
    for (; budget.next(); ++cases) {
        const auto& found = corpus.inputs();
        const size_t chosen = found.empty() || random() % 2 ? found.size() : random() % found.size();
        std::string line =
            chosen < found.size() ? std::string(found[chosen].begin(), found[chosen].end()) : seeds[random() % 3];
        for (uint64_t changes = random() % 4; changes > 0; --changes) {
            const size_t at = random() % (line.size() + 1);
            switch (random() % 4) {
                case 0:
                    line.resize(at);
                    break;
                case 1:
                    line.insert(at, pieces[random() % std::size(pieces)]);
                    break;
                case 2:
                    line.erase(at, 1 + random() % 4);
                    break;
                default:
                    if (at < line.size()) line[at] = static_cast<char>(random());
            }
        }
        corpus(Bytes(line.begin(), line.end()));
    }
    std::printf("%llu lines, %llu taken\n", static_cast<unsigned long long>(cases),
                static_cast<unsigned long long>(taken));
    EXPECT(taken > cases / 20 && taken < cases * 9 / 10);
    corpus.keep();
}

}  // namespace

int main(int count, char** arguments) {
    Budget budget(count, arguments, 100'000);
    texts();
    numbers();
    escapes();
    keys();
    lines_within_a_block();
    doubts();
    mutated(budget);
    return tally.finish();
}
