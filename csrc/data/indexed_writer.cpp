#include "data/indexed_writer.h"

#include <algorithm>
#include <limits>

#include "data/checksum.h"
#include "data/fault.h"

namespace neox::data {

namespace {

constexpr uint64_t kBuffer = 1 << 20;
constexpr const char* kPartial = ".partial";

template <typename T>
void narrow(const int64_t* tokens, uint64_t count, std::vector<uint8_t>& out) {
    out.resize(count * sizeof(T));
    for (uint64_t i = 0; i < count; ++i) {
        const T value = static_cast<T>(tokens[i]);
        std::memcpy(out.data() + i * sizeof(T), &value, sizeof(T));
    }
}

}  // namespace

// PREFIX.bin. Its buffer is one block, so each flush is one block to checksum.
class IndexedWriter::BlockFile : public OutputFile {
  public:
    BlockFile(const std::string& path, uint64_t block_bytes, std::vector<uint64_t>& sums, uint64_t resume_at = 0)
        : OutputFile(path, block_bytes, resume_at), sums_(sums) {}

  protected:
    void on_buffer_written(const uint8_t* bytes, uint64_t count) override { sums_.push_back(checksum(bytes, count)); }

  private:
    std::vector<uint64_t>& sums_;
};

IndexedWriter::IndexedWriter(std::string prefix, const std::string& type_name, uint64_t block_bytes)
    : prefix_(std::move(prefix)), type_(&token_type(type_name)) {
    if (block_bytes == 0) throw Fault("block_bytes must be positive").found("0");
    bin_ = std::make_unique<BlockFile>(prefix_ + ".bin" + kPartial, block_bytes, block_sums_);
    idx_ = std::make_unique<OutputFile>(prefix_ + ".idx" + kPartial, kBuffer);
    // filled in by finish(); until then the file is not a valid index
    const std::vector<uint8_t> header(kIndexHeader, 0);
    idx_->write(header.data(), header.size());
}

IndexedWriter::IndexedWriter(std::string prefix, const std::string& type_name, uint64_t block_bytes,
                             const WriterProgress& progress)
    : prefix_(std::move(prefix)),
      type_(&token_type(type_name)),
      num_sequences_(progress.num_documents),
      num_documents_(progress.num_documents),
      num_tokens_(progress.num_tokens),
      largest_id_(progress.largest_id) {
    if (block_bytes == 0 || progress.num_tokens == 0) throw Fault("nothing to resume from").at(prefix_);
    bin_ =
        std::make_unique<BlockFile>(prefix_ + ".bin" + kPartial, block_bytes, block_sums_, num_tokens_ * type_->bytes);
    bin_->keep();  // until both files are known to be usable
    idx_ = std::make_unique<OutputFile>(prefix_ + ".idx" + kPartial, kBuffer, kIndexHeader + 4 * num_sequences_);
    idx_->keep();
    bin_->reread();
    idx_->reread();
    bin_->keep(false);
    idx_->keep(false);
}

IndexedWriter::~IndexedWriter() = default;

WriterProgress IndexedWriter::sync() {
    check_open();
    if (!borders_.empty() || num_sequences_ != num_documents_)
        throw Fault("only documents of one sequence can be resumed").at(prefix_);
    bin_->sync();
    idx_->sync();
    sync_folder_of(prefix_);
    return {num_documents_, num_tokens_, largest_id_};
}

void IndexedWriter::keep() {
    if (bin_ != nullptr) bin_->keep(), idx_->keep();
}

void IndexedWriter::check_open() const {
    if (bin_ == nullptr) throw Fault("dataset writer is already finished").at(prefix_);
}

void IndexedWriter::abandon() {
    bin_.reset();
    idx_.reset();
}

void IndexedWriter::add_size(uint64_t tokens) {
    if (tokens > static_cast<uint64_t>(std::numeric_limits<int32_t>::max()))
        throw Fault("sequence is too long for the format")
            .at(prefix_ + ".bin")
            .found(std::to_string(tokens) + " tokens")
            .expected("at most 2147483647");
    const auto size = static_cast<int32_t>(tokens);
    idx_->write(&size, sizeof size);
    ++num_sequences_;
}

void IndexedWriter::add_raw(const uint8_t* bytes, uint64_t tokens) {
    largest_id_ = std::max(largest_id_, id_range(*type_, bytes, tokens).largest);
    bin_->write(bytes, tokens * type_->bytes);
    num_tokens_ += tokens;
}

void IndexedWriter::add_sequence(const int64_t* tokens, uint64_t count) {
    check_open();
    for (uint64_t i = 0; i < count; ++i)
        if (tokens[i] < type_->lowest || tokens[i] > type_->highest)
            throw Fault("token id does not fit the token type")
                .at(prefix_ + ".bin document " + std::to_string(num_documents_) + " token " + std::to_string(i))
                .found(std::to_string(tokens[i]))
                .expected(std::string(type_->name) + ": " + std::to_string(type_->lowest) + " to " +
                          std::to_string(type_->highest));
    std::vector<uint8_t> raw;
    switch (type_->bytes) {
        case 1:
            narrow<uint8_t>(tokens, count, raw);
            break;
        case 2:
            narrow<uint16_t>(tokens, count, raw);
            break;
        case 4:
            narrow<uint32_t>(tokens, count, raw);
            break;
        default:
            narrow<uint64_t>(tokens, count, raw);
            break;
    }
    add_size(count);
    add_raw(raw.data(), count);
}

void IndexedWriter::end_document() {
    check_open();
    ++num_documents_;
    if (borders_.empty()) {
        if (num_sequences_ == num_documents_) return;
        for (uint64_t d = 1; d < num_documents_; ++d) borders_.push_back(static_cast<int64_t>(d));
    }
    borders_.push_back(static_cast<int64_t>(num_sequences_));
}

void IndexedWriter::add_documents(const void* tokens, uint64_t count, const int32_t* sizes, uint64_t num_documents) {
    check_open();
    uint64_t sum = 0;
    for (uint64_t d = 0; d < num_documents; ++d) {
        if (sizes[d] < 0) throw Fault("negative document size").at(prefix_).found(std::to_string(sizes[d]));
        sum += static_cast<uint64_t>(sizes[d]);
    }
    if (sum != count)
        throw Fault("document sizes do not add up to the tokens")
            .at(prefix_)
            .found(std::to_string(sum))
            .expected(std::to_string(count));
    add_raw(static_cast<const uint8_t*>(tokens), count);
    for (uint64_t d = 0; d < num_documents; ++d) {
        add_size(static_cast<uint64_t>(sizes[d]));
        end_document();
    }
}

void IndexedWriter::add_dataset(const IndexedDataset& dataset) {
    check_open();
    const Index& index = dataset.index();
    if (index.type().code != type_->code)
        throw Fault("datasets of different token types cannot be merged")
            .at(dataset.idx_path())
            .found(index.type().name)
            .expected(type_->name)
            .advise("preprocess one of the corpora again with the tokenizer of the other");
    dataset.check_unchanged();
    const uint64_t step = std::max<uint64_t>(1, kBuffer / type_->bytes);
    for (uint64_t at = 0; at < index.num_tokens(); at += step) {
        const uint64_t count = std::min(step, index.num_tokens() - at);
        // the copy gets checksums of its own, which must not vouch for damaged tokens
        dataset.check_blocks(at * type_->bytes, (at + count) * type_->bytes - 1);
        add_raw(dataset.mapped_tokens() + at * type_->bytes, count);
    }
    for (uint64_t d = 0; d < index.num_documents(); ++d) {
        for (uint64_t i = index.first_sequence(d); i < index.first_sequence(d + 1); ++i)
            add_size(static_cast<uint64_t>(index.size(i)));
        end_document();
    }
}

void IndexedWriter::write_offsets() {
    idx_->flush();
    std::vector<int32_t> sizes(std::min<uint64_t>(num_sequences_, kBuffer / sizeof(int32_t)));
    uint64_t offset = 0;
    for (uint64_t first = 0; first < num_sequences_; first += sizes.size()) {
        const uint64_t count = std::min<uint64_t>(sizes.size(), num_sequences_ - first);
        idx_->read_at(sizes.data(), count * sizeof(int32_t), kIndexHeader + first * sizeof(int32_t));
        for (uint64_t i = 0; i < count; ++i) {
            idx_->write(&offset, sizeof offset);
            offset += static_cast<uint64_t>(sizes[i]) * type_->bytes;
        }
    }
}

void IndexedWriter::write_documents() {
    int64_t border = 0;
    idx_->write(&border, sizeof border);
    for (uint64_t d = 0; d < num_documents_; ++d) {
        border = borders_.empty() ? static_cast<int64_t>(d) + 1 : borders_[d];
        idx_->write(&border, sizeof border);
    }
}

void IndexedWriter::finish() {
    check_open();
    const uint64_t closed = num_documents_ == 0 ? 0
                            : borders_.empty()  ? num_documents_
                                                : static_cast<uint64_t>(borders_.back());
    if (closed != num_sequences_) throw Fault("last document was not ended").at(prefix_);
    write_offsets();
    write_documents();
    idx_->flush();
    uint8_t header[kIndexHeader];
    const uint64_t borders = num_documents_ + 1;
    std::memcpy(header, kIndexMagic, sizeof kIndexMagic);
    std::memcpy(header + 9, &kIndexVersion, 8);
    header[17] = type_->code;
    std::memcpy(header + 18, &num_sequences_, 8);
    std::memcpy(header + 26, &borders, 8);
    idx_->write_at(header, sizeof header, 0);
    remove_if_there(prefix_ + ".idx");  // an old index must never be next to new tokens
    sync_folder_of(prefix_);
    bin_->publish(prefix_ + ".bin");
    idx_->publish(prefix_ + ".idx");
    abandon();
}

}  // namespace neox::data
