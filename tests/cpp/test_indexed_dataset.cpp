// Reading of indexed datasets: every lookup against a linear scan, tokens beyond 2^32, files that change or are
// damaged.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "data/checksum.h"
#include "data/indexed_dataset.h"
#include "expect.h"
#include "index_bytes.h"

using namespace data_test;
using namespace neox::data;

namespace {

// PREFIX.idx and .bin of u16 tokens 0, 1, 2, ... (modulo 65536).
std::string write_dataset(const Folder& folder, const IndexParts& parts) {
    uint64_t tokens = 0;
    for (const int32_t size : parts.sizes) tokens += static_cast<uint64_t>(size);
    std::vector<uint8_t> bin;
    for (uint64_t t = 0; t < tokens; ++t)
        bin.push_back(static_cast<uint8_t>(t)), bin.push_back(static_cast<uint8_t>(t >> 8));
    put(folder / "data.idx", index_bytes(parts));
    put(folder / "data.bin", bin);
    return folder / "data";
}

IndexParts sample_parts() {
    IndexParts parts;
    parts.sizes = {3, 0, 5, 1, 0, 0, 700, 2};
    // documents of one, two and three sequences, one without sequences, one without tokens
    parts.borders = {0, 1, 2, 4, 4, 7, 8};
    return parts;
}

void lookups_equal_a_linear_scan() {
    const IndexParts parts = sample_parts();
    const std::vector<uint8_t> bytes = index_bytes(parts);
    const Index index(bytes.data(), bytes.size(), "walk");
    EXPECT_EQ(index.num_sequences(), parts.sizes.size());
    EXPECT_EQ(index.num_documents(), parts.borders.size() - 1);
    uint64_t token = 0;
    for (uint64_t d = 0; d < index.num_documents(); ++d) {
        EXPECT_EQ(index.first_token_of_document(d), token);
        EXPECT_EQ(index.first_sequence(d), static_cast<uint64_t>(parts.borders[d]));
        for (uint64_t s = index.first_sequence(d); s < index.first_sequence(d + 1); ++s) {
            EXPECT_EQ(index.document_of_sequence(s), d);
            EXPECT_EQ(index.first_token(s), token);
            EXPECT_EQ(index.size(s), parts.sizes[s]);
            for (int32_t i = 0; i < index.size(s); ++i, ++token) {
                EXPECT_EQ(index.sequence_of_token(token), s);
                EXPECT_EQ(index.document_of_token(token), d);
            }
        }
    }
    EXPECT_EQ(index.num_tokens(), token);
    EXPECT_EQ(index.first_token(index.num_sequences()), token);
}

// 6 sequences of 2^31 - 1 tokens: the numbers of a corpus of 12 G tokens in 150 bytes of index.
void index_beyond_32_bits() {
    for (const uint8_t code : {1, 8, 5}) {
        IndexParts parts;
        parts.code = code, parts.token_bytes = bytes_of_code(code);
        parts.sizes.assign(6, INT32_MAX);
        parts.borders = {0, 1, 2, 3, 4, 5, 6};
        const std::vector<uint8_t> bytes = index_bytes(parts);
        const Index index(bytes.data(), bytes.size(), "large");
        EXPECT_EQ(index.num_tokens(), uint64_t{6} * INT32_MAX);
        EXPECT_EQ(index.bin_bytes(), uint64_t{6} * INT32_MAX * parts.token_bytes);
        for (uint64_t border : {uint64_t{INT32_MAX}, uint64_t{1} << 31, uint64_t{2} * INT32_MAX, uint64_t{1} << 32,
                                uint64_t{3} * INT32_MAX})
            for (uint64_t token = border - 1; token <= border + 1; ++token) {
                EXPECT_EQ(index.sequence_of_token(token), token / INT32_MAX);
                EXPECT_EQ(index.document_of_token(token), token / INT32_MAX);
            }
        for (uint64_t s = 0; s < 6; ++s) EXPECT_EQ(index.first_token(s), s * INT32_MAX);
    }
}

// A sparse .bin of 6 GB in which only a few tokens are written.
void tokens_beyond_32_bits() {
    const Folder folder;
    IndexParts parts;
    parts.code = 1, parts.token_bytes = 1;
    parts.sizes.assign(3, INT32_MAX);
    parts.borders = {0, 1, 2, 3};
    put(folder / "data.idx", index_bytes(parts));
    const int fd = ::open((folder / "data.bin").c_str(), O_RDWR | O_CREAT, 0644);
    const uint64_t borders[] = {INT32_MAX, uint64_t{1} << 31, UINT32_MAX, uint64_t{1} << 32,
                                uint64_t{3} * INT32_MAX - 2};
    bool made = ::ftruncate(fd, int64_t{3} * INT32_MAX) == 0;
    for (const uint64_t border : borders)
        for (uint64_t t = border - 1; t <= border + 1; ++t) {
            const auto value = static_cast<uint8_t>(t % 101 + 1);
            made &= ::pwrite(fd, &value, 1, static_cast<off_t>(t)) == 1;
        }
    ::close(fd);
    EXPECT(made);
    const IndexedDataset dataset(folder / "data");
    const int64_t order[] = {2, 0, 1};
    for (const uint64_t border : borders) {
        int64_t got[3], ordered[3];
        int32_t segments[3];
        dataset.read(border - 1, 3, got, segments);
        for (uint64_t i = 0; i < 3; ++i) {
            EXPECT_EQ(got[i], static_cast<int64_t>((border - 1 + i) % 101 + 1));
            EXPECT_EQ(segments[i], static_cast<int32_t>((border - 1 + i) / INT32_MAX - (border - 1) / INT32_MAX));
        }
        const uint64_t sequence = (border - 1) / INT32_MAX;
        const uint64_t position = sequence == 2 ? 0 : sequence + 1;
        if ((border + 1) / INT32_MAX != sequence && sequence == 2) continue;
        dataset.read_ordered(order, 3, position, (border - 1) % INT32_MAX, 3, ordered, segments);
        EXPECT(std::equal(got, got + 3, ordered));
    }
    int64_t out[1];
    EXPECT_FAULT(dataset.read(uint64_t{3} * INT32_MAX, 1, out, nullptr), "beyond the end of the dataset");
}

void reads() {
    const Folder folder;
    const IndexParts parts = sample_parts();
    const IndexedDataset dataset(write_dataset(folder, parts));
    const uint64_t total = dataset.index().num_tokens();
    for (uint64_t first = 0; first <= total; first += 1 + first / 7)
        for (uint64_t count = 0; first + count <= total; count = 2 * count + 1) {
            std::vector<int64_t> out(count);
            std::vector<int32_t> segments(count);
            dataset.read(first, count, out.data(), segments.data());
            int32_t segment = 0;
            for (uint64_t i = 0; i < count; ++i) {
                if (i > 0)
                    segment += dataset.index().document_of_token(first + i) !=
                               dataset.index().document_of_token(first + i - 1);
                EXPECT(out[i] == static_cast<int64_t>(first + i) && segments[i] == segment);
            }
        }
    const int32_t order[] = {6, 1, 0, 2, 7};
    std::vector<int64_t> stream, out;
    std::vector<int32_t> sequence, segments;
    for (const int32_t s : order)
        for (int32_t i = 0; i < parts.sizes[static_cast<size_t>(s)]; ++i)
            stream.push_back(static_cast<int64_t>(dataset.index().first_token(s)) + i), sequence.push_back(s);
    for (uint64_t offset = 0; offset < 700; offset += 23) {
        const uint64_t count = stream.size() - offset;
        out.assign(count, -1), segments.assign(count, -1);
        dataset.read_ordered(order, 5, 0, offset, count, out.data(), segments.data());
        EXPECT(std::equal(out.begin(), out.end(), stream.begin() + static_cast<long>(offset)));
        for (uint64_t i = 1; i < count; ++i)
            EXPECT_EQ(segments[i] - segments[i - 1],
                      static_cast<int32_t>(sequence[offset + i] != sequence[offset + i - 1]));
    }
    out.resize(2000);
    const int32_t bad[] = {0, 8}, negative[] = {-1};
    EXPECT_FAULT(dataset.read_ordered(order, 5, 0, 0, stream.size() + 1, out.data(), nullptr),
                 "past the end of its order");
    EXPECT_FAULT(dataset.read_ordered(bad, 2, 0, 0, 5, out.data(), nullptr), "a sequence that does not exist");
    EXPECT_FAULT(dataset.read_ordered(negative, 1, 0, 0, 1, out.data(), nullptr), "got=-1");
    EXPECT_FAULT(dataset.read_ordered(order, 5, uint64_t{1} << 40, 0, 1, out.data(), nullptr),
                 "past the end of its order");
    EXPECT_FAULT(dataset.read_ordered(order, 5, 4, uint64_t{1} << 40, 1, out.data(), nullptr),
                 "past the end of its order");
    EXPECT_FAULT(dataset.read(total, 1, out.data(), nullptr), "beyond the end");
    EXPECT_FAULT(dataset.read(1, ~uint64_t{0}, out.data(), nullptr), "beyond the end");
    EXPECT_FAULT(dataset.read(~uint64_t{0}, 2, out.data(), nullptr), "beyond the end");
    EXPECT_EQ(dataset.find_bad_token(1 << 16), total);
    EXPECT_EQ(dataset.find_bad_token(500), 500u);
    EXPECT_EQ(dataset.find_bad_token(0), 0u);
}

void files_that_do_not_match() {
    const Folder folder;
    const std::string prefix = write_dataset(folder, sample_parts());
    const std::vector<uint8_t> idx = content_of(prefix + ".idx"), bin = content_of(prefix + ".bin");
    for (const size_t bytes : {size_t{0}, size_t{7}, bin.size() - 1, bin.size() + 1, bin.size() + 2}) {
        std::vector<uint8_t> other = bin;
        other.resize(bytes);
        put(prefix + ".bin", other);
        EXPECT_FAULT(IndexedDataset{prefix}, "got=" + std::to_string(bytes) + " bytes");
    }
    put(prefix + ".bin", std::vector<uint8_t>(bin.begin(), bin.begin() + 12));
    EXPECT_FAULT(IndexedDataset{prefix}, "cut in document 2");
    put(prefix + ".bin", bin);
    {
        const IndexedDataset dataset(prefix);
        std::vector<int64_t> out(8);
        ::truncate((prefix + ".bin").c_str(), 100);
        EXPECT_FAULT(dataset.read(600, 8, out.data(), nullptr), "changed while it was open");  // instead of SIGBUS
        put(prefix + ".bin", bin);
    }
    {
        const IndexedDataset dataset(prefix);
        ::truncate((prefix + ".idx").c_str(), 40);
        int64_t out[1];
        EXPECT_FAULT(dataset.read(0, 1, out, nullptr), "data.idx");
        const int32_t order[] = {0};
        EXPECT_FAULT(dataset.read_ordered(order, 1, 0, 0, 1, out, nullptr), "data.idx");
    }
}

void guarded_reads() {
    const Folder folder;
    const std::string prefix = write_dataset(folder, sample_parts());
    const auto sums = file_block_checksums(prefix + ".bin", 100);
    std::vector<uint8_t> bin = content_of(prefix + ".bin");
    bin[555] ^= 4;
    put(prefix + ".bin", bin);
    IndexedDataset dataset(prefix);
    dataset.guard(100, sums);
    int64_t out[200];
    for (int round = 0; round < 2; ++round) {  // a block that is found damaged is reported at every read
        dataset.read(150, 100, out, nullptr);
        dataset.read(300, 5, out, nullptr);
        EXPECT_FAULT(dataset.read(249, 2, out, nullptr), "bytes 500 to 600; got=block 5");
        EXPECT_FAULT(dataset.read(240, 100, out, nullptr), "checksum differs");
    }
    EXPECT(dataset.damaged_blocks() == std::vector<uint64_t>{5});
    EXPECT_FAULT(dataset.guard(100, {1, 2}), "do not cover");
    EXPECT_FAULT(dataset.guard(0, {}), "do not cover");
    EXPECT_FAULT(dataset.guard(1, {}), "do not cover");
}

// Damage in the last block, which is shorter, and in the first; a changed file; and a guard that is replaced.
void guarded_edges() {
    const Folder folder;
    const std::string prefix = write_dataset(folder, sample_parts());
    const auto sums = file_block_checksums(prefix + ".bin", 100);
    const std::vector<uint8_t> bin = content_of(prefix + ".bin");  // 1422 bytes
    int64_t out[711];
    for (const size_t at : {size_t{0}, size_t{99}, size_t{1400}, bin.size() - 1}) {
        std::vector<uint8_t> damaged = bin;
        damaged[at] ^= 0x80;
        put(prefix + ".bin", damaged);
        IndexedDataset dataset(prefix);
        EXPECT(dataset.damaged_blocks().empty());  // without checksums
        dataset.read(0, 711, out, nullptr);
        dataset.guard(100, sums);
        dataset.read(50, 650, out, nullptr);
        EXPECT_FAULT(dataset.read(at / 2, 1, out, nullptr),
                     at < 100 ? "bytes 0 to 100; got=block 0, starting in document 0"
                              : "bytes 1400 to 1422; got=block 14, starting in document 4");
        EXPECT_FAULT(dataset.check_blocks(at, at), "checksum differs");
        EXPECT(dataset.damaged_blocks() == std::vector<uint64_t>{at / 100});
        dataset.guard(100, file_block_checksums(prefix + ".bin", 100));
        dataset.read(0, 711, out, nullptr);
        dataset.guard(100, sums);  // what was verified by other checksums is not by these
        EXPECT_FAULT(dataset.read(0, 711, out, nullptr), "checksum differs");
    }
    put(prefix + ".bin", bin);
    for (const char* file : {".idx", ".bin"}) {
        const std::vector<uint8_t> content = content_of(prefix + file);
        const IndexedDataset dataset(prefix);
        dataset.check_unchanged();
        std::vector<uint8_t> longer = content;
        longer.push_back(0);
        put(prefix + file, longer);
        EXPECT_FAULT(dataset.check_unchanged(), std::string("where=") + prefix + file);
        put(prefix + file, content);
    }
    const IndexedDataset dataset(prefix);
    const std::vector<uint8_t> idx = content_of(prefix + ".idx");
    EXPECT_EQ(dataset.idx_checksum(), checksum(idx.data(), idx.size()));
}

// Rows of consecutive samples, in an order of documents or in that of the file, against their tokens one by one.
template <typename T>
void rows_equal_their_definition() {
    const Folder folder;
    const IndexParts parts = sample_parts();
    const IndexedDataset dataset(write_dataset(folder, parts));
    const T order[] = {6, 1, 0, 3, 2, 4, 7, 5};
    for (const bool ordered : {false, true}) {
        std::vector<int64_t> tokens, positions, offsets;  // of every token of the stream
        std::vector<int32_t> documents;
        for (int64_t p = 0; p < 8; ++p) {
            const auto sequence = static_cast<uint64_t>(ordered ? order[p] : p);
            for (int32_t i = 0; i < parts.sizes[sequence]; ++i) {
                tokens.push_back(static_cast<int64_t>(dataset.index().first_token(sequence)) + i);
                positions.push_back(p), offsets.push_back(i);
                documents.push_back(
                    static_cast<int32_t>(ordered ? sequence : dataset.index().document_of_sequence(sequence)));
            }
        }
        for (const uint64_t length : {1, 2, 5, 9, 300, 710}) {
            const int64_t rows[] = {2, 0, 3};
            const uint64_t firsts[] = {0, tokens.size() - length - 1, (tokens.size() - length - 1) / 2};
            std::vector<int64_t> starts, skips;
            for (const uint64_t first : firsts) {
                starts.push_back(ordered ? positions[first] : static_cast<int64_t>(first));
                skips.push_back(offsets[first]);
            }
            const size_t cells = 5 * length;
            for (const int optional : {0, 1, 2}) {
                std::vector<int64_t> inputs(cells, -1), targets(cells, -1), places(cells, -1);
                std::vector<int32_t> segments(cells, -1);
                const IndexedDataset::Rows to{rows,
                                              3,
                                              length,
                                              inputs.data(),
                                              targets.data(),
                                              optional > 0 ? segments.data() : nullptr,
                                              optional > 1 ? places.data() : nullptr};
                const IdRange range = ordered ? dataset.read_ordered_rows(order, 8, starts.data(), skips.data(), to)
                                              : dataset.read_rows(starts.data(), to);
                std::vector<int64_t> wanted_inputs(cells, -1), wanted_targets(cells, -1), wanted_places(cells, -1);
                std::vector<int32_t> wanted_segments(cells, -1);
                IdRange wanted;
                for (size_t sample = 0; sample < 3; ++sample) {
                    int32_t segment = 0;
                    int64_t place = 0;
                    for (size_t i = 0; i <= length; ++i) {
                        const size_t at = firsts[sample] + i, cell = static_cast<size_t>(rows[sample]) * length + i;
                        wanted.smallest = std::min(wanted.smallest, tokens[at]);
                        wanted.largest = std::max(wanted.largest, tokens[at]);
                        if (i > 0) wanted_targets[cell - 1] = tokens[at];
                        if (i == length) break;
                        if (i > 0 && documents[at] != documents[at - 1]) ++segment, place = 0;
                        wanted_inputs[cell] = tokens[at];
                        wanted_segments[cell] = optional > 0 ? segment : -1;
                        wanted_places[cell] = optional > 1 ? place++ : -1;
                    }
                }
                EXPECT(inputs == wanted_inputs);
                EXPECT(targets == wanted_targets);
                EXPECT(segments == wanted_segments);
                EXPECT(places == wanted_places);
                EXPECT(range.smallest == wanted.smallest && range.largest == wanted.largest);
            }
        }
        std::vector<int64_t> out(800);
        const int64_t row = 0, late = static_cast<int64_t>(ordered ? 6 : tokens.size() - 5), none = 0;
        const IndexedDataset::Rows to{&row, 1, 6, out.data(), out.data(), nullptr, nullptr};
        if (ordered)
            EXPECT_FAULT(dataset.read_ordered_rows(order, 8, &late, &none, to), "past the end of its order");
        else
            EXPECT_FAULT(dataset.read_rows(&late, to), "beyond the end of the dataset");
        const std::vector<uint8_t> idx = content_of(folder / "data.idx");
        ::truncate((folder / "data.idx").c_str(), 40);
        if (ordered)
            EXPECT_FAULT(dataset.read_ordered_rows(order, 8, &none, &none, to), "changed while it was open");
        else
            EXPECT_FAULT(dataset.read_rows(&none, to), "changed while it was open");
        put(folder / "data.idx", idx);
    }
}

// Ids of every type at its limits; the first one outside a vocabulary, on both sides of what is read at a time.
void ids() {
    const struct {
        const char* name;
        std::vector<int64_t> ids;
    } cases[] = {{"uint8", {0, 255}},
                 {"int8", {-128, 127}},
                 {"int16", {-32768, 32767}},
                 {"uint16", {0, 65535}},
                 {"int32", {INT32_MIN, INT32_MAX}},
                 {"int64", {INT64_MIN, INT64_MAX}}};
    for (const auto& one : cases) {
        const TokenType& type = token_type(one.name);
        EXPECT_EQ(id_range(type, nullptr, 0).smallest, INT64_MAX);
        EXPECT_EQ(id_range(type, nullptr, 0).largest, INT64_MIN);
        for (const size_t count : {1, 2, 17, 300})
            for (const size_t at : {size_t{0}, count / 2, count - 1})
                for (const int64_t id : one.ids) {
                    std::vector<uint8_t> raw;
                    for (size_t i = 0; i < count; ++i) {
                        const int64_t value = i == at ? id : 5;
                        append(raw, &value, type.bytes);
                    }
                    const IdRange range = id_range(type, raw.data(), count);
                    EXPECT_EQ(range.smallest, count == 1 ? id : std::min<int64_t>(id, 5));
                    EXPECT_EQ(range.largest, count == 1 ? id : std::max<int64_t>(id, 5));
                }
    }
    IdRange range{3, 5};
    range.add({4, 9}), range.add({-1, 2}), range.add({});
    EXPECT(range.smallest == -1 && range.largest == 9);

    const Folder folder;
    IndexParts parts;
    parts.code = 4, parts.token_bytes = 4;
    parts.sizes = {200'000};
    parts.borders = {0, 1};
    put(folder / "data.idx", index_bytes(parts));
    for (const int32_t bad : {100, -1})
        for (const size_t at : {0, 65'535, 65'536, 131'072, 199'999}) {
            std::vector<int32_t> tokens(200'000, 99);
            tokens[at] = bad, tokens.back() = at == 0 ? 99 : 1000;
            std::vector<uint8_t> bin;
            append(bin, tokens.data(), 4 * tokens.size());
            put(folder / "data.bin", bin);
            EXPECT_EQ(IndexedDataset(folder / "data").find_bad_token(100), at);
        }
}

void token_types() {
    for (int code = 0; code < 256; ++code) {
        const bool known = bytes_of_code(static_cast<uint8_t>(code)) != 0;
        const std::string fault = fault_of([&] {
            EXPECT_EQ(token_type(static_cast<uint8_t>(code)).bytes, bytes_of_code(static_cast<uint8_t>(code)));
        });
        EXPECT_EQ(fault.empty(), known);
    }
    EXPECT_EQ(token_type("uint16").code, 8);
    EXPECT_FAULT(token_type("uint32"), "unknown token type");
}

}  // namespace

int main() {
    lookups_equal_a_linear_scan();
    index_beyond_32_bits();
    tokens_beyond_32_bits();
    reads();
    files_that_do_not_match();
    guarded_reads();
    guarded_edges();
    rows_equal_their_definition<int32_t>();
    rows_equal_their_definition<int64_t>();
    ids();
    token_types();
    return tally.finish();
}
