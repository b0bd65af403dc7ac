// Writing of indexed datasets: the bytes equal the table of the format, and nothing opens before the end.
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>

#include "data/checksum.h"
#include "data/indexed_writer.h"
#include "disk_calls.h"
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

// Tokens that differ from their checksum, or a file that changed, are not copied into a dataset with new checksums.
void damage_is_not_merged() {
    const Folder folder;
    Corpus corpus = {{std::vector<int64_t>(200, 7)}};
    IndexedWriter writer(folder / "part", "uint16", kBlock);
    write(writer, corpus);
    writer.finish();
    std::vector<uint8_t> bin = content_of(folder / "part.bin");
    for (const size_t at : {size_t{0}, bin.size() - 1}) {
        std::vector<uint8_t> damaged = bin;
        damaged[at] ^= 1;
        put(folder / "part.bin", damaged);
        IndexedDataset part(folder / "part");
        part.guard(kBlock, writer.block_sums());
        IndexedWriter merged(folder / "merged", "uint16", kBlock);
        EXPECT_FAULT(merged.add_dataset(part), "checksum differs");
    }
    EXPECT_EQ(folder.num_files(), 2u);
}

// A writer that resumes after some of the documents: the files are those of one that wrote all.
void resumed_datasets() {
    Corpus corpus;
    for (int64_t d = 0; d < 20; ++d) corpus.push_back({std::vector<int64_t>(static_cast<size_t>(d * 7 % 40), 90 - d)});
    for (const char* name : {"uint8", "int32"}) {
        const TokenType& type = token_type(name);
        for (const size_t first : {2, 7, 16, 20}) {
            const Folder folder;
            const Corpus before(corpus.begin(), corpus.begin() + static_cast<long>(first)),
                after(corpus.begin() + static_cast<long>(first), corpus.end());
            WriterProgress progress;
            {
                IndexedWriter writer(folder / "data", name, kBlock);
                write(writer, before);
                progress = writer.sync();
                if (first != 7) write(writer, kCorpora[3]);  // not durable, and cut off
                writer.keep();
            }
            EXPECT_EQ(progress.num_documents, first);
            EXPECT_EQ(progress.largest_id, int64_t{89});
            IndexedWriter writer(folder / "data", name, kBlock, progress);
            EXPECT_EQ(writer.num_documents(), first);
            EXPECT_EQ(writer.num_sequences(), first);
            EXPECT_EQ(writer.num_tokens(), progress.num_tokens);
            EXPECT_EQ(writer.largest_id(), int64_t{89});
            write(writer, after);
            writer.finish();
            EXPECT(content_of(folder / "data.idx") == wanted_index(corpus, type));
            EXPECT(content_of(folder / "data.bin") == wanted_tokens(corpus, type));
            EXPECT(writer.block_sums() == file_block_checksums(folder / "data.bin", kBlock));
            EXPECT_EQ(folder.num_files(), 2u);
        }
    }
}

// What cannot be resumed is left as it is; what was resumed and ends without `keep` is removed.
void refused_resumption() {
    const Folder folder;
    const int64_t token = 1;
    const auto resume = [&](const WriterProgress& progress) {
        IndexedWriter writer(folder / "data", "uint8", kBlock, progress);
    };
    {
        IndexedWriter writer(folder / "data", "uint8", kBlock);
        writer.add_sequence(&token, 1);
        EXPECT_FAULT(writer.sync(), "only documents of one sequence");
        writer.end_document();
        writer.sync();
        writer.keep();
    }
    EXPECT_FAULT(resume({0, 0, -1}), "nothing to resume from");
    EXPECT_FAULT(IndexedWriter(folder / "data", "uint8", 0, {1, 1, 1}), "nothing to resume from");
    EXPECT_FAULT(resume({1, 2, 1}), "data.bin.partial; got=1 bytes; want=at least 2");
    EXPECT_FAULT(resume({2, 1, 1}), "data.idx.partial; got=38 bytes; want=at least 42");
    EXPECT_EQ(folder.num_files(), 2u);
    resume({1, 1, 1});
    EXPECT_EQ(folder.num_files(), 0u);
    {
        IndexedWriter writer(folder / "data", "uint8", kBlock);
        writer.add_sequence(&token, 1);
        writer.add_sequence(&token, 1);
        writer.end_document();
        EXPECT_FAULT(writer.sync(), "only documents of one sequence");
        writer.add_sequence(&token, 1);
        EXPECT_FAULT(writer.finish(), "last document was not ended");
    }
    {
        IndexedWriter writer(folder / "data", "uint8", kBlock);
        write(writer, {{{1}, {2}}, {}});  // as many sequences as documents, though not one in each
        EXPECT_FAULT(writer.sync(), "only documents of one sequence");
    }
    EXPECT_EQ(folder.num_files(), 0u);
}

// The tokens are durable under their name before the index has its own, and an old index is removed before.
void files_are_durable_in_the_order_of_their_use() {
    const Folder folder;
    const std::string name = std::filesystem::path(folder / "x").parent_path().filename();
    const auto run = [&] {
        IndexedWriter writer(folder / "data", "uint8", kBlock);
        write(writer, kCorpora[3]);
        writer.finish();
    };
    run();
    disk_calls.record();
    run();
    disk_calls.stop();
    EXPECT(disk_calls.has({"unlink data.idx", "fsync " + name, "fsync data.bin.partial", "rename data.bin",
                           "fsync " + name, "rename data.idx", "fsync " + name}));
    EXPECT(disk_calls.has({"fsync data.idx.partial", "rename data.idx"}));
    for (const std::string file : {"data.bin.partial", "data.idx.partial"})
        EXPECT(disk_calls.ends_with("write " + file, "fsync " + file));
    const size_t calls = disk_calls.seen.size();
    for (size_t failing = 0; failing < calls; ++failing) {
        run();
        disk_calls.record(failing);
        const std::string fault = fault_of(run);
        disk_calls.stop();
        EXPECT(fault.find("Input/output error") != std::string::npos && fault.find("; disk") != std::string::npos);
        if (std::filesystem::exists(folder / "data.idx"))
            EXPECT(content_of(folder / "data.idx") == wanted_index(kCorpora[3], token_type("uint8")));
    }
    IndexedWriter writer(folder / "data", "uint8", kBlock);
    write(writer, kCorpora[3]);
    disk_calls.record();
    writer.sync();
    disk_calls.stop();
    EXPECT(disk_calls.has({"fsync " + name}));
    for (const std::string file : {"data.bin.partial", "data.idx.partial"})
        EXPECT(disk_calls.ends_with("write " + file, "fdatasync " + file));
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
    damage_is_not_merged();
    resumed_datasets();
    refused_resumption();
    files_are_durable_in_the_order_of_their_use();
    misuse();
    kill_at_every_step();
    disk_full_at_every_byte();
    return tally.finish();
}
