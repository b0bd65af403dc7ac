// XXH3 against digests of the reference implementation, at every branch's lengths, alignments and parts.
#include <cstring>

#include "data/xxh3.h"
#include "disk_calls.h"
#include "expect.h"

using namespace data_test;
using neox::data::xxh3;
using neox::data::Xxh3;

namespace {

std::vector<uint8_t> bytes_of(size_t count) {
    std::vector<uint8_t> bytes(count);
    for (size_t i = 0; i < count; ++i) bytes[i] = static_cast<uint8_t>(i * 7 + 1);
    return bytes;
}

void reference_digests() {
    const std::pair<size_t, uint64_t> wanted[] = {
        {0, 0x2d06800538d394c2u},    {1, 0xe12ef9d2eb86ceebu},    {3, 0x5c83885a0fb5d516u},
        {4, 0x244f36de481e7522u},    {8, 0x96cc97a6768fd7a9u},    {9, 0x4781d83b8e99d495u},
        {16, 0x913bd4a8038027a7u},   {17, 0x2bf6f66973a6179du},   {128, 0xc4399c7829d0628fu},
        {129, 0x8433489056750b32u},  {240, 0x3c0bb96864e543a1u},  {241, 0xbff7215089202d8fu},
        {1024, 0xac8e32e4ea3ba062u}, {1025, 0xc856c953bbdbc807u}, {5000, 0x882162ebfafc2c3fu},
    };
    for (const auto& [count, digest] : wanted) EXPECT_EQ(xxh3(bytes_of(count).data(), count), digest);
}

void alignment_and_content() {
    for (size_t count = 0; count <= 1100; count += count < 300 ? 1 : 37) {
        // exact size, so that the sanitizer detects reads past the end
        const std::vector<uint8_t> exact = bytes_of(count);
        const uint64_t sum = xxh3(exact.data(), count);
        for (size_t shift = 1; shift < 8; ++shift) {
            std::vector<uint8_t> moved(count + shift);
            if (count > 0) std::memcpy(moved.data() + shift, exact.data(), count);
            EXPECT_EQ(xxh3(moved.data() + shift, count), sum);
        }
        for (size_t at = 0; at < count; ++at) {
            std::vector<uint8_t> damaged = exact;
            damaged[at] ^= static_cast<uint8_t>(1u << (at % 8));
            EXPECT(xxh3(damaged.data(), count) != sum);
        }
    }
}

void parts() {
    for (const size_t count :
         {size_t{0}, size_t{100}, size_t{241}, size_t{1024}, size_t{1025}, size_t{4096}, size_t{9001}}) {
        const std::vector<uint8_t> whole = bytes_of(count);
        for (const size_t step : {size_t{1}, size_t{63}, size_t{1000}, size_t{1024}, size_t{5000}}) {
            std::vector<uint8_t> arriving(count);
            Xxh3 digest(arriving.data(), count);
            for (size_t done = 0; done < count;) {
                const size_t more = std::min(step, count - done);
                std::memcpy(arriving.data() + done, whole.data() + done, more);
                digest.advance(done += more);
            }
            EXPECT_EQ(digest.finish(), xxh3(whole.data(), count));
        }
    }
}

// Parts of a file around what is read at a time, by calls that are interrupted and short, and past its end.
void files() {
    const Folder folder;
    const std::vector<uint8_t> content = bytes_of(600'000);
    put(folder / "file", content);
    const int descriptor = ::open((folder / "file").c_str(), O_RDONLY);
    for (const size_t count : {0, 1, 240, 241, 1024, 262'143, 262'144, 262'145, 524'288, 599'993})
        for (const size_t at_most : {SIZE_MAX, size_t{100'001}}) {
            std::vector<uint8_t> out(count);
            disk_calls.record();
            disk_calls.at_most = at_most, disk_calls.interrupting = at_most < SIZE_MAX;
            const auto found = neox::data::read_xxh3(descriptor, 7, out.data(), count);
            disk_calls.stop();
            EXPECT_EQ(found.hash, xxh3(content.data() + 7, count));
            EXPECT(found.bytes == count && found.error == 0);
            EXPECT(std::equal(out.begin(), out.end(), content.begin() + 7));
        }
    std::vector<uint8_t> out(300'000);
    const auto cut = neox::data::read_xxh3(descriptor, 400'000, out.data(), out.size());
    EXPECT(cut.hash == 0 && cut.bytes == 200'000 && cut.error == 0);
    ::close(descriptor);
    const auto closed = neox::data::read_xxh3(descriptor, 0, out.data(), 1);
    EXPECT(closed.hash == 0 && closed.bytes == 0 && closed.error == EBADF);
}

}  // namespace

int main() {
    reference_digests();
    alignment_and_content();
    parts();
    files();
    return tally.finish();
}
