// Writer of PREFIX.bin and PREFIX.idx, byte for byte as Megatron-LM writes them. Its memory does not grow with the
// corpus, except for 8 bytes per document if documents have several sequences.
//
// No file has its final name before finish(), and PREFIX.idx appears after PREFIX.bin is durable. A process killed at
// any time therefore leaves no dataset that opens.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "data/file.h"
#include "data/indexed_dataset.h"

namespace neox::data {

// The durable part of an unfinished dataset with one sequence per document.
struct WriterProgress {
    uint64_t num_documents = 0, num_tokens = 0;
    int64_t largest_id = -1;
};

class IndexedWriter {
  public:
    // Each block of `block_bytes` gets a checksum. Throws Fault if PREFIX.bin or PREFIX.idx cannot be created.
    IndexedWriter(std::string prefix, const std::string& type_name, uint64_t block_bytes);
    // Resumes from the partial files that `sync` left, truncated to what it returned.
    IndexedWriter(std::string prefix, const std::string& type_name, uint64_t block_bytes,
                  const WriterProgress& progress);
    ~IndexedWriter();

    const TokenType& type() const { return *type_; }
    // Adds one sequence to the current document. Throws Fault for an id that the token type cannot hold or more than
    // 2^31 - 1 tokens.
    void add_sequence(const int64_t* tokens, uint64_t count);
    void end_document();
    // Adds documents of one sequence each: `count` tokens of the dataset's token type, split by `sizes`.
    void add_documents(const void* tokens, uint64_t count, const int32_t* sizes, uint64_t num_documents);
    // Appends all documents of a dataset of the same token type.
    void add_dataset(const IndexedDataset& dataset);

    // Publishes .bin, then .idx. Nothing can be added afterwards.
    void finish();
    void abandon();  // removes the partial files
    // Makes the partial files durable and returns what a later writer needs to resume from them, in any process. Throws
    // Fault if there is no document, if one has several sequences, or if the last one was not ended.
    WriterProgress sync();
    void keep();  // the destructor leaves the partial files

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
