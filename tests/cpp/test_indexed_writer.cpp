// Writing of indexed datasets: the bytes equal the table of the format, and nothing opens before the end.
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>

#include "data/checksum.h"
#include "data/indexed_writer.h"
#include "expect.h"
#include "index_bytes.h"

using namespace data_test;
using namespace neox::data;

namespace {

constexpr uint64_t kBlock = 64;

// Documents, each a list of sequences.
using Corpus = std::vector<std::vector<std::vector<int64_t>>>;

const Corpus kCorpora[] = {
    {},
    {{{}}},
    {{}},
    {{{1, 2, 3}}, {{4}}, {{}}, {{5, 6}}},
    {{{1, 2, 3}, {}}, {}, {{4}, {5}, {6}}},
    {{{7}}, {{8}}, {}, {{9}}},
    {{std::vector<int64_t>(1000, 100)}, {std::vector<int64_t>(333, 27), {1}}},
};

void write(IndexedWriter& writer, const Corpus& corpus) {
    for (const auto& document : corpus) {
        for (const auto& sequence : document) writer.add_sequence(sequence.data(), sequence.size());
        writer.end_document();
    }
}

std::vector<uint8_t> wanted_index(const Corpus& corpus, const TokenType& type) {
    IndexParts parts;
    parts.code = type.code, parts.token_bytes = type.bytes;
    for (const auto& document : corpus) {
        for (const auto& sequence : document) parts.sizes.push_back(static_cast<int32_t>(sequence.size()));
        parts.borders.push_back(static_cast<int64_t>(parts.sizes.size()));
    }
    return index_bytes(parts);
}

std::vector<uint8_t> wanted_tokens(const Corpus& corpus, const TokenType& type) {
    std::vector<uint8_t> out;
    for (const auto& document : corpus)
        for (const auto& sequence : document)
            for (const int64_t token : sequence) append(out, &token, type.bytes);  // little endian, so the low bytes
    return out;
}

void bytes_of_every_type() {
    for (const char* name : {"uint8", "int8", "int16", "int32", "int64", "uint16"}) {
        const TokenType& type = token_type(name);
        for (const Corpus& corpus : kCorpora) {
            const Folder folder;
            IndexedWriter writer(folder / "data", name, kBlock);
            write(writer, corpus);
            EXPECT_EQ(folder.num_files(), 2u);
            writer.finish();
            EXPECT_EQ(folder.num_files(), 2u);
            EXPECT(content_of(folder / "data.idx") == wanted_index(corpus, type));
            EXPECT(content_of(folder / "data.bin") == wanted_tokens(corpus, type));
            EXPECT(writer.block_sums() == file_block_checksums(folder / "data.bin", kBlock));
            const IndexedDataset dataset(folder / "data");
            EXPECT_EQ(dataset.index().num_documents(), corpus.size());
            EXPECT_EQ(dataset.index().num_tokens(), writer.num_tokens());
        }
        const Folder folder;
        IndexedWriter writer(folder / "data", name, kBlock);
        const int64_t extremes[] = {type.lowest, type.highest};
        writer.add_sequence(extremes, 2);
        for (const bool high : {false, true}) {
            if (type.bytes == 8) continue;
            const int64_t beyond[] = {1, high ? type.highest + 1 : type.lowest - 1};
            EXPECT_FAULT(writer.add_sequence(beyond, 2),
                         "does not fit the token type; where=" + (folder / "data.bin document 0 token 1"));
        }
        writer.end_document();
        EXPECT_EQ(writer.largest_id(), type.highest);
        writer.finish();
        int64_t back[2];
        IndexedDataset(folder / "data").read(0, 2, back, nullptr);
        EXPECT(back[0] == type.lowest && back[1] == type.highest);
    }
}

void documents_at_once_equal_one_by_one() {
    const Folder folder;
    IndexedWriter writer(folder / "data", "uint16", kBlock);
    const uint16_t tokens[] = {1, 2, 3, 4, 5, 6};
    const int32_t sizes[] = {3, 1, 0, 2}, negative[] = {7, -1}, small[] = {3, 1};
    EXPECT_FAULT(writer.add_documents(tokens, 6, negative, 2), "negative document size");
    EXPECT_FAULT(writer.add_documents(tokens, 6, small, 2), "do not add up");
    writer.add_documents(tokens, 6, sizes, 4);
    writer.finish();
    EXPECT(content_of(folder / "data.idx") == wanted_index(kCorpora[3], token_type("uint16")));
    EXPECT(content_of(folder / "data.bin") == wanted_tokens(kCorpora[3], token_type("uint16")));
}

void merging_keeps_every_border() {
    Corpus all;
    const Folder folder;
    IndexedWriter merged(folder / "merged", "int32", kBlock);
    for (const Corpus& corpus : kCorpora) {
        IndexedWriter writer(folder / "part", "int32", kBlock);
        write(writer, corpus);
        writer.finish();
        merged.add_dataset(IndexedDataset(folder / "part"));
        all.insert(all.end(), corpus.begin(), corpus.end());
    }
    IndexedWriter other(folder / "other", "uint16", kBlock);
    other.finish();
    EXPECT_FAULT(merged.add_dataset(IndexedDataset(folder / "other")), "different token types cannot be merged");
    merged.finish();
    EXPECT(content_of(folder / "merged.idx") == wanted_index(all, token_type("int32")));
    EXPECT(content_of(folder / "merged.bin") == wanted_tokens(all, token_type("int32")));
}

void misuse() {
    const Folder folder;
    EXPECT_FAULT(IndexedWriter(folder / "data", "float", kBlock), "unknown token type");
    EXPECT_FAULT(IndexedWriter(folder / "data", "uint8", 0), "block_bytes");
    EXPECT_FAULT(IndexedWriter(folder / "absent/data", "uint8", kBlock), "disk");
    IndexedWriter writer(folder / "data", "uint8", kBlock);
    const int64_t token = 1;
    writer.add_sequence(&token, 1);
    EXPECT_FAULT(writer.finish(), "last document was not ended");
    writer.end_document();
    writer.finish();
    EXPECT_FAULT(writer.finish(), "already finished");
    EXPECT_FAULT(writer.add_sequence(&token, 1), "already finished");
    EXPECT_FAULT(writer.end_document(), "already finished");
}

// The folder after kill -9 at each step: an older dataset stays intact until finish(), and nothing else opens.
void kill_at_every_step() {
    for (int step = 0; step < 4; ++step) {
        const Folder folder;
        {
            IndexedWriter old(folder / "data", "uint8", kBlock);
            write(old, kCorpora[3]);
            if (step % 2 == 0) old.finish();
        }
        const pid_t child = ::fork();
        if (child == 0) {
            IndexedWriter writer(folder / "data", "uint8", kBlock);
            write(writer, kCorpora[6]);
            if (step >= 2) write(writer, kCorpora[3]);
            ::kill(::getpid(), SIGKILL);
        }
        int status = 0;
        ::waitpid(child, &status, 0);
        EXPECT(WIFSIGNALED(status));
        if (step % 2 == 0) {
            EXPECT(content_of(folder / "data.idx") == wanted_index(kCorpora[3], token_type("uint8")));
            EXPECT(content_of(folder / "data.bin") == wanted_tokens(kCorpora[3], token_type("uint8")));
        } else {
            EXPECT_FAULT(IndexedDataset(folder / "data"), "No such file");
        }
        EXPECT_FAULT(IndexedDataset(folder / "data.partial"), "No such file");
        IndexedWriter again(folder / "data", "uint8", kBlock);  // leftover partial files are overwritten
        write(again, kCorpora[6]);
        again.finish();
        EXPECT(content_of(folder / "data.idx") == wanted_index(kCorpora[6], token_type("uint8")));
        EXPECT_EQ(folder.num_files(), 2u);
    }
}

// Files are limited to 0, 1, 2, ... bytes: each failing write is a Fault, and no file is left.
void disk_full_at_every_byte() {
    ::signal(SIGXFSZ, SIG_IGN);
    rlimit before{};
    ::getrlimit(RLIMIT_FSIZE, &before);
    bool whole = false;
    for (rlim_t room = 0; !whole; room += 13) {
        const Folder folder;
        const rlimit tight{room, before.rlim_max};
        ::setrlimit(RLIMIT_FSIZE, &tight);
        const std::string fault = fault_of([&] {
            IndexedWriter writer(folder / "data", "uint8", kBlock);
            write(writer, kCorpora[6]);
            writer.finish();
        });
        ::setrlimit(RLIMIT_FSIZE, &before);
        whole = fault.empty();
        EXPECT(whole || fault.find("; disk") != std::string::npos);
        EXPECT_EQ(folder.num_files(), whole ? 2u : 0u);
    }
}

}  // namespace

int main() {
    bytes_of_every_type();
    documents_at_once_equal_one_by_one();
    merging_keeps_every_border();
    misuse();
    kill_at_every_step();
    disk_full_at_every_byte();
    return tally.finish();
}
