// Encoding chunks on threads: each result equals that of a single thread, for any number of threads and with other
// chunks dropped. Closing leaves no chunk half encoded. Arguments: see budget.h (default: 60 rounds).
#include <atomic>
#include <random>
#include <stdexcept>
#include <thread>

#include "budget.h"
#include "data/encode_threads.h"
#include "expect.h"

using namespace data_test;
using namespace neox::data;

namespace {

constexpr int64_t kEod = 301;

TextEncoder encoder() {
    std::vector<uint32_t> bytes(256), left, right, merged;
    for (uint32_t b = 0; b < 256; ++b) bytes[b] = b;
    for (const char* pair : {"th", " t", "  ", "ll", "42"}) {
        left.push_back(static_cast<uint8_t>(pair[0])), right.push_back(static_cast<uint8_t>(pair[1]));
        merged.push_back(static_cast<uint32_t>(256 + merged.size()));
    }
    return TextEncoder(BytePairs(bytes, left, right, merged), SplitPattern::gpt2, false,
                       {{"<|end|>", 300, false, false}});
}

struct Case {
    std::string content;
    ChunkKind kind;
    const uint8_t* bytes() const { return reinterpret_cast<const uint8_t*>(content.data()); }
};

// Lines, some of them blank or not JSON, or a text that may not be UTF-8.
Case random_case(std::mt19937_64& random) {
    static const char* const kWords[] = {"the ", " all", "42", "<|end|>", "  ", "a", "\xC3\xA9", "."};
    const auto words = [&] {
        std::string text;
        for (uint64_t left = random() % 40; left > 0; --left) text += kWords[random() % std::size(kWords)];
        return text;
    };
    if (random() % 4 == 0) return {words() + (random() % 4 == 0 ? "\xFF" : ""), ChunkKind::text};
    std::string lines;
    for (uint64_t left = random() % 30; left > 0; --left)
        lines += random() % 8 == 0 ? (random() % 2 == 0 ? "\n" : "{]\n") : "{\"text\": \"" + words() + "\"}\n";
    return {lines, ChunkKind::lines};
}

std::vector<uint32_t> ids_of(const EncodedChunk& chunk, bool wide) {
    std::vector<uint32_t> ids;
    for (uint64_t i = 0; i < chunk.count; ++i) {
        uint32_t id = 0;
        std::memcpy(&id, chunk.tokens.get() + i * (wide ? 4 : 2), wide ? 4 : 2);
        ids.push_back(id);
    }
    return ids;
}

// The result of encoding the chunk on this thread.
void check_chunk(const TextEncoder& texts, const Case& one, const EncodedChunk& chunk, bool wide, LineState& alone) {
    alone.clear();
    bool valid = true;
    if (one.kind == ChunkKind::lines)
        encode_lines(texts, one.bytes(), one.content.size(), {"text", kEod}, alone);
    else
        valid = encode_text(texts, one.bytes(), one.content.size(), {"", kEod}, alone);
    EXPECT_EQ(chunk.valid, valid);
    EXPECT(ids_of(chunk, wide) == std::vector<uint32_t>(alone.ids.begin(), alone.ids.begin() + alone.ids.size()));
    EXPECT(chunk.sizes == alone.sizes);
    EXPECT_EQ(chunk.unsure.size(), alone.unsure.size());
    for (size_t i = 0; i < std::min(chunk.unsure.size(), alone.unsure.size()); ++i)
        EXPECT(chunk.unsure[i].first == alone.unsure[i].first && chunk.unsure[i].last == alone.unsure[i].last &&
               chunk.unsure[i].line == alone.unsure[i].line && chunk.unsure[i].document == alone.unsure[i].document);
    EXPECT(chunk.blank == alone.blank && chunk.empty == alone.empty);
}

void round(const TextEncoder& texts, std::mt19937_64& random, LineState& alone) {
    const bool wide = random() % 2 == 0;
    std::vector<std::unique_ptr<Case>> cases;
    std::vector<std::shared_ptr<EncodedChunk>> chunks;
    EncodeThreads threads(texts, wide, static_cast<int>(random() % 5));
    for (uint64_t left = random() % 60; left > 0; --left) {
        cases.push_back(std::make_unique<Case>(random_case(random)));
        chunks.push_back(
            threads.start(cases.back()->bytes(), cases.back()->content.size(), cases.back()->kind, {"text", kEod}));
    }
    for (size_t i = 0; i < chunks.size(); ++i) {
        if (random() % 8 == 0) {
            threads.drop(*chunks[i]);
            cases[i].reset();  // the sanitizer detects a thread that still reads it
            continue;
        }
        threads.wait(*chunks[i]);
        check_chunk(texts, *cases[i], *chunks[i], wide, alone);
    }
}

// Several callers of one pool, each of which waits for its own chunks.
void check_callers(const TextEncoder& texts) {
    std::string lines;
    for (int i = 0; i < 20; ++i) lines += "{\"text\": \"all the words of one line 42\"}\n";
    for (const int count : {1, 2, 3}) {
        EncodeThreads threads(texts, false, count);
        std::vector<std::thread> callers;
        std::atomic<int> right{0};
        for (int caller = 0; caller < 4; ++caller)
            callers.emplace_back([&] {
                for (int i = 0; i < 50; ++i) {
                    const auto chunk = threads.start(reinterpret_cast<const uint8_t*>(lines.data()), lines.size(),
                                                     ChunkKind::lines, {"text", kEod});
                    threads.wait(*chunk);
                    right += threads.done(*chunk) && chunk->sizes.size() == 20;
                }
            });
        for (std::thread& caller : callers) caller.join();
        EXPECT_EQ(right.load(), 200);
    }
}

void check_close(const TextEncoder& texts) {
    std::string lines;
    for (int i = 0; i < 2'000; ++i) lines += "{\"text\": \"all the words of one line 42\"}\n";
    const auto* bytes = reinterpret_cast<const uint8_t*>(lines.data());
    EncodeThreads threads(texts, false, 1);
    std::vector<std::shared_ptr<EncodedChunk>> chunks;
    for (int i = 0; i < 50; ++i) chunks.push_back(threads.start(bytes, lines.size(), ChunkKind::lines, {"text", kEod}));
    threads.wait(*chunks[0]);
    threads.close();
    size_t done = 0, cancelled = 0;
    for (const auto& chunk : chunks) {
        done += chunk->stage == EncodedChunk::done && chunk->sizes.size() == 2'000;
        cancelled += chunk->stage == EncodedChunk::cancelled && chunk->count == 0;
        EXPECT_EQ(threads.done(*chunk), chunk->stage == EncodedChunk::done);
    }
    EXPECT(done >= 1);
    EXPECT_EQ(done + cancelled, chunks.size());
    bool refused = chunks.back()->stage == EncodedChunk::done;
    try {
        threads.wait(*chunks.back());
    } catch (const std::logic_error&) {
        refused = true;
    }
    EXPECT(refused);
    threads.drop(*chunks.back());
    threads.close();
    // by this thread, since there are no others
    const auto later = threads.start(bytes, lines.size(), ChunkKind::lines, {"text", kEod});
    EXPECT_EQ(later->sizes.size(), size_t{2'000});
}

}  // namespace

int main(int count, char** arguments) {
    Budget budget(count, arguments, 60);
    std::mt19937_64 random(budget.seed());
    const TextEncoder texts = encoder();
    LineState alone;
    check_close(texts);
    check_callers(texts);
    while (budget.next()) round(texts, random, alone);
    std::printf("%llu rounds in %.1f s\n", static_cast<unsigned long long>(budget.done()), budget.seconds());
    return tally.finish();
}
