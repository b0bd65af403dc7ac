// Builder of PREFIX.bin and PREFIX.idx, byte for byte as Megatron-LM writes them, in memory that does not grow with the corpus
// (8 bytes per document only where documents have several sequences).
//
// Nothing carries the final names before finish(); PREFIX.idx appears after PREFIX.bin is durable, so that a process killed at any
// time leaves nothing that opens.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "data/file.h"
#include "data/indexed_dataset.h"

namespace neox::data {

// How far an unfinished dataset of one sequence per document has come.
struct WriterProgress {
    uint64_t num_documents = 0, num_tokens = 0;
    int64_t largest_id = -1;
};

class IndexedWriter {
  public:
    // Blocks of `block_bytes` get a checksum each. Throws Fault when PREFIX.bin or PREFIX.idx cannot be created.
    IndexedWriter(std::string prefix, const std::string& type_name, uint64_t block_bytes);
    // Goes on with the partial files that `sync` left, cut back to what it returned.
    IndexedWriter(std::string prefix, const std::string& type_name, uint64_t block_bytes, const WriterProgress& progress);
    ~IndexedWriter();

    const TokenType& type() const { return *type_; }
    // Adds one sequence to the current document. Throws Fault for an id that the token type cannot hold or more than 2^31 - 1 tokens.
    void add_sequence(const int64_t* tokens, uint64_t count);
    void end_document();
    // Adds documents of one sequence each: `tokens` holds `count` tokens of the file's own type, cut by `sizes`.
    void add_documents(const void* tokens, uint64_t count, const int32_t* sizes, uint64_t num_documents);
    // Appends a whole dataset of the same token type, its document borders included.
    void add_dataset(const IndexedDataset& dataset);

    // Publishes .bin, then .idx. The writer takes nothing afterwards.
    void finish();
    void abandon();  // removes what was written
    // Makes the partial files durable; a writer can go on from what is returned, in this process or after it. Throws Fault for a document of
    // several sequences, or none, or one that was not ended.
    WriterProgress sync();
    void keep();  // the partial files stay when the writer goes

    uint64_t num_sequences() const { return num_sequences_; }
    uint64_t num_documents() const { return num_documents_; }
    uint64_t num_tokens() const { return num_tokens_; }
    int64_t largest_id() const { return largest_id_; }  // -1 without tokens
    const std::vector<uint64_t>& block_sums() const { return block_sums_; }

  private:
    class BlockFile;
    void check_open() const;
    void add_raw(const uint8_t* bytes, uint64_t tokens);
    void add_size(uint64_t tokens);
    void write_offsets();
    void write_documents();

    std::string prefix_;
    const TokenType* type_;
    std::vector<uint64_t> block_sums_;
    std::unique_ptr<BlockFile> bin_;
    std::unique_ptr<OutputFile> idx_;
    std::vector<int64_t> borders_;  // empty while every document has one sequence
    uint64_t num_sequences_ = 0, num_documents_ = 0, num_tokens_ = 0;
    int64_t largest_id_ = -1;
};

}  // namespace neox::data
