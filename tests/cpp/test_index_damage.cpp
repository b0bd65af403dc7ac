// Damaged .idx files, with random and format-aware damage. The reader accepts exactly what an independent check of the
// format accepts, allocates little memory, and no lookup in an accepted file goes out of bounds. Arguments: see
// budget.h (default: 100000 files, 30000 under sanitizers).
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <random>

#include "budget.h"
#include "corpus.h"
#include "data/checksum.h"
#include "data/indexed_dataset.h"
#include "expect.h"
#include "index_bytes.h"

using namespace data_test;
using neox::data::Index;

namespace {

size_t allocated = 0;

}  // namespace

void* operator new(size_t bytes) {
    allocated += bytes;
    if (void* block = std::malloc(bytes)) return block;
    throw std::bad_alloc();
}
void operator delete(void* block) noexcept { std::free(block); }
void operator delete(void* block, size_t) noexcept { std::free(block); }

namespace {

class Damager {
  public:
    explicit Damager(uint64_t seed) : random_(seed) {}

    IndexParts parts() {
        IndexParts made;
        const uint8_t codes[] = {1, 2, 3, 4, 5, 8};
        made.code = codes[below(6)];
        made.token_bytes = bytes_of_code(made.code);
        const uint64_t documents = below(12);
        for (uint64_t d = 0; d < documents; ++d) {
            for (uint64_t s = below(3) == 0 ? below(4) : 1; s > 0; --s)
                made.sizes.push_back(below(9) == 0 ? interesting<int32_t>() & INT32_MAX : int32_t(below(50)));
            made.borders.push_back(static_cast<int64_t>(made.sizes.size()));
        }
        return made;
    }

    // Applies one damage; several may be combined.
    void damage(std::vector<uint8_t>& bytes, const IndexParts& parts) {
        switch (below(9)) {
            case 0:
                return flip(bytes);
            case 1:
                return bytes.resize(below(bytes.size() + 1));
            case 2: {  // bytes inserted or removed anywhere
                const size_t at = below(bytes.size() + 1), many = 1 + below(16);
                const auto from = bytes.begin() + static_cast<long>(at);
                if (below(2) == 0)
                    bytes.insert(from, many, static_cast<uint8_t>(below(256)));
                else
                    bytes.erase(from, from + static_cast<long>(std::min(many, bytes.size() - at)));
                return;
            }
            case 3: {  // another file's tail
                const std::vector<uint8_t> other = index_bytes(this->parts());
                const size_t cut = below(std::min(bytes.size(), other.size()) + 1);
                bytes.resize(cut);
                bytes.insert(bytes.end(), other.begin() + static_cast<long>(cut), other.end());
                return;
            }
            case 4:
                for (auto& byte : bytes)
                    if (below(8) == 0) byte = static_cast<uint8_t>(below(256));
                return;
            case 5:  // only the counts in the header: the size of the file contradicts them, also after overflow
                return set(bytes, below(2) == 0 ? 18 : 26, interesting<uint64_t>());
            case 6:
                return set(bytes, 34 + 4 * below(parts.sizes.size() + 1), interesting<int32_t>());
            case 7:
                return set(bytes, 34 + 4 * parts.sizes.size() + 8 * below(parts.sizes.size() + 1),
                           interesting<uint64_t>());
            default:
                return set(bytes, 34 + 12 * parts.sizes.size() + 8 * below(parts.borders.size() + 1),
                           interesting<uint64_t>());
        }
    }

    // Damages the numbers before the file is built: sizes, counts and offsets are consistent, or nearly.
    void damage(IndexParts& parts) {
        if (!parts.sizes.empty() && below(2) == 0) parts.sizes[below(parts.sizes.size())] = interesting<int32_t>();
        if (below(2) == 0) parts.borders[below(parts.borders.size())] = interesting<int64_t>();
        if (below(4) == 0)
            parts.borders.insert(parts.borders.begin() + static_cast<long>(below(parts.borders.size())),
                                 int64_t(below(20)));
        if (below(4) == 0) parts.borders.erase(parts.borders.begin() + static_cast<long>(below(parts.borders.size())));
        if (below(8) == 0) parts.code = static_cast<uint8_t>(below(12));
    }

    uint64_t below(uint64_t bound) { return random_() % bound; }

  private:
    void flip(std::vector<uint8_t>& bytes) {
        if (!bytes.empty()) bytes[below(bytes.size())] ^= static_cast<uint8_t>(1u << below(8));
    }

    template <typename T>
    void set(std::vector<uint8_t>& bytes, size_t offset, T value) {
        if (offset + sizeof value <= bytes.size()) std::memcpy(bytes.data() + offset, &value, sizeof value);
    }

    template <typename T>
    T interesting() {
        const uint64_t powers[] = {0, 1, 7, 8, 15, 16, 30, 31, 32, 33, 60, 61, 62, 63};
        // one random draw per statement, so that their order is fixed
        uint64_t value = uint64_t{1} << powers[below(14)];
        value *= 1 + below(3);
        value += below(3) - 1;
        switch (below(4)) {
            case 0:
                return static_cast<T>(below(40));
            case 1:
                return static_cast<T>(0 - value);
            default:
                return static_cast<T>(value);
        }
    }

    std::mt19937_64 random_;
};

// Calls every lookup of the reader.
uint64_t walk(const Index& index) {
    uint64_t sum = index.num_tokens() + index.bin_bytes();
    for (uint64_t s = 0; s < index.num_sequences(); ++s) {
        sum += static_cast<uint64_t>(index.size(s)) + index.first_token(s) + index.document_of_sequence(s);
        if (index.size(s) > 0) sum += index.sequence_of_token(index.first_token(s)) - s;
    }
    for (uint64_t d = 0; d <= index.num_documents(); ++d)
        sum += index.first_sequence(d) + index.first_token_of_document(d);
    for (const uint64_t token : {uint64_t{0}, index.num_tokens() / 2, index.num_tokens() - 1})
        if (token < index.num_tokens()) sum += index.document_of_token(token);
    return sum;
}

// Whether the reader accepts the bytes. They are in a separate allocation, so that the sanitizer detects reads past
// either end.
bool takes(const std::vector<uint8_t>& bytes, Damager& damager, uint64_t& sum) {
    const size_t shift = damager.below(8);  // maps are aligned, views may not be
    std::vector<uint8_t> exact(bytes.size() + shift);
    if (!bytes.empty()) std::memcpy(exact.data() + shift, bytes.data(), bytes.size());
    const size_t before = allocated;
    const std::string fault = fault_of([&] { sum += walk(Index(exact.data() + shift, bytes.size(), "damaged.idx")); });
    EXPECT(allocated - before <= 2 * bytes.size() + 8192);  // 8 KiB for the texts of a message
    EXPECT(fault.empty() ||
           (fault.find("where=damaged.idx") != std::string::npos && fault.find("do=") != std::string::npos));
    return fault.empty();
}

}  // namespace

int main(int count, char** arguments) {
#if defined(__SANITIZE_ADDRESS__)
    Budget budget(count, arguments, 30'000);
#else
    Budget budget(count, arguments, 100'000);
#endif
    Damager damager(budget.seed());
    long refused = 0, harmless = 0, changed = 0;
    uint64_t sum = 0;
    bool taken = false;
    Corpus corpus("index_damage", [&](const Bytes& bytes) {
        taken = takes(bytes, damager, sum);
        EXPECT_EQ(taken, is_index(bytes));
    });
    while (budget.next()) {
        IndexParts parts = damager.parts();
        const std::vector<uint8_t> good = index_bytes(parts);
        EXPECT(is_index(good) && takes(good, damager, sum));
        std::vector<uint8_t> bytes =
            corpus.inputs().empty() || damager.below(4) ? good : corpus.inputs()[damager.below(corpus.inputs().size())];
        if (damager.below(3) == 0) damager.damage(parts), bytes = index_bytes(parts);
        if (bytes == good || damager.below(2) == 0)
            for (uint64_t more = 1 + damager.below(2); more > 0; --more) damager.damage(bytes, parts);
        corpus(bytes);
        refused += !taken;
        harmless += bytes == good;
        changed += taken && bytes != good;
        // Damage that keeps the structure valid (a border moved between sequences) is found by the sidecar's checksum
        // of .idx.
        if (bytes != good)
            EXPECT(neox::data::checksum(bytes.data(), bytes.size()) != neox::data::checksum(good.data(), good.size()));
    }
    const auto files = static_cast<long>(budget.done());
    std::printf("%ld files in %.1f s: %ld refused, %ld undamaged, %ld well-formed though changed (%llx)\n", files,
                budget.seconds(), refused, harmless, changed, static_cast<unsigned long long>(sum));
    EXPECT(refused > files / 2);  // most damage is detected
    EXPECT(changed > 0);
    corpus.keep();
    return tally.finish();
}
