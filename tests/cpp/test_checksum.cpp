// XXH64 against published digests, at every length and alignment, and of files in blocks.
#include <cstring>

#include "data/checksum.h"
#include "expect.h"

using namespace data_test;
using neox::data::checksum;

namespace {

uint64_t of(const std::string& text, uint64_t seed = 0) { return checksum(text.data(), text.size(), seed); }

void published_digests() {
    EXPECT_EQ(of(""), 0xEF46DB3751D8E999u);
    EXPECT_EQ(of("a"), 0xD24EC4F1A98C6E5Bu);
    EXPECT_EQ(of("abc"), 0x44BC2CF5AD770999u);
    EXPECT_EQ(of("Nobody inspects the spammish repetition"), 0xFBCEA83C8A378BF1u);
    EXPECT_EQ(of("xxhash", 20141025), 0xB559B98D844E0635u);
}

// Digests of xxHash 0.8.4, with and without a seed: around 32 bytes, one step of the four lanes, and its multiples.
void digests_of_whole_lanes() {
    std::vector<uint8_t> bytes(200);
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(i * 37 + 11);
    const struct {
        size_t count;
        uint64_t unseeded, seeded;
    } wanted[] = {
        {31, 0xE4A0E629E519A4AEu, 0x0537871DB26141B6u}, {32, 0xCC6B8AAADA790B2Du, 0xB7228B42EB1FB68Bu},
        {33, 0x35EC49850475A832u, 0xAC910C96071DD692u}, {63, 0xBF9F0BA3CF95B28Au, 0x6C4726061FA07EE6u},
        {64, 0x155CCCE4BF32BEFCu, 0x6A63509BB0EF3CB5u}, {65, 0xDA5EE441A595CFB8u, 0xACC65644906B2839u},
        {96, 0x7C874B795FA7AB0Cu, 0x677A616CBB551D82u}, {200, 0x2F074B6DD9094E34u, 0xA4ED13F48CB24DB2u},
    };
    for (const auto& of_count : wanted) {
        EXPECT_EQ(checksum(bytes.data(), of_count.count), of_count.unseeded);
        EXPECT_EQ(checksum(bytes.data(), of_count.count, 20141025), of_count.seeded);
    }
}

void alignment_and_content() {
    std::vector<uint8_t> bytes(200 + 8);
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(i * 37 + 11);
    for (size_t count = 0; count <= 200; ++count) {
        // exact size, so that the sanitizer detects reads past the end
        const std::vector<uint8_t> exact(bytes.begin(), bytes.begin() + static_cast<long>(count));
        const uint64_t sum = checksum(exact.data(), count);
        for (size_t shift = 1; shift < 8; ++shift) {
            std::vector<uint8_t> moved(count + shift);
            if (count > 0) std::memcpy(moved.data() + shift, exact.data(), count);
            EXPECT_EQ(checksum(moved.data() + shift, count), sum);
        }
        for (size_t at = 0; at < count; ++at) {
            std::vector<uint8_t> damaged = exact;
            damaged[at] ^= static_cast<uint8_t>(1u << (at % 8));
            EXPECT(checksum(damaged.data(), count) != sum);
        }
    }
}

void files() {
    const Folder folder;
    std::vector<uint8_t> bytes(1000);
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(i % 251);
    put(folder / "file", bytes);
    put(folder / "empty", {});
    const auto sums = neox::data::file_block_checksums(folder / "file", 300);
    EXPECT_EQ(sums.size(), 4u);
    for (size_t block = 0; block < sums.size(); ++block)
        EXPECT_EQ(sums[block], checksum(bytes.data() + 300 * block, block == 3 ? 100 : 300));
    EXPECT_EQ(neox::data::file_checksum(folder / "file"), checksum(bytes.data(), bytes.size()));
    EXPECT_EQ(neox::data::file_checksum(folder / "empty"), of(""));
    EXPECT(neox::data::file_block_checksums(folder / "empty", 300).empty());
    EXPECT_EQ(neox::data::file_block_checksums(folder / "file", ~uint64_t{0}).size(), 1u);
    EXPECT_FAULT(neox::data::file_block_checksums(folder / "file", 0), "block_bytes must be positive");
}

}  // namespace

int main() {
    published_digests();
    digests_of_whole_lanes();
    alignment_and_content();
    files();
    return tally.finish();
}
