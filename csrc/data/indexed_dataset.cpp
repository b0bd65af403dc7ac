#include "data/indexed_dataset.h"

#include <algorithm>
#include <limits>

#include "data/checksum.h"
#include "data/clones.h"
#include "data/fault.h"

namespace neox::data {

namespace {

constexpr TokenType kTypes[] = {
    {1, 1, "uint8", 0, UINT8_MAX},         {2, 1, "int8", INT8_MIN, INT8_MAX},    {3, 2, "int16", INT16_MIN, INT16_MAX},
    {4, 4, "int32", INT32_MIN, INT32_MAX}, {5, 8, "int64", INT64_MIN, INT64_MAX}, {8, 2, "uint16", 0, UINT16_MAX},
};

constexpr uint64_t kRetainedBytes = 1 << 20;  // of a thread's read buffer, between two reads

std::string number(uint64_t value) { return std::to_string(value); }

// Largest i in [0, count) with value(i) <= target. Precondition: value is non-decreasing and value(0) <= target.
template <typename Value>
uint64_t last_not_above(uint64_t count, uint64_t target, Value value) {
    uint64_t low = 0;
    while (count > 1) {
        const uint64_t half = count / 2;
        if (value(low + half) <= target) low += half;
        count -= half;
    }
    return low;
}

template <typename T>
inline __attribute__((always_inline)) void widen(const uint8_t* from, uint64_t count, int64_t* out) {
    for (uint64_t i = 0; i < count; ++i) {
        T value;
        std::memcpy(&value, from + i * sizeof(T), sizeof(T));
        out[i] = static_cast<int64_t>(value);
    }
}

NEOX_CLONES void widen(const TokenType& type, const uint8_t* from, uint64_t count, int64_t* out) {
    switch (type.code) {
        case 1:
            return widen<uint8_t>(from, count, out);
        case 2:
            return widen<int8_t>(from, count, out);
        case 3:
            return widen<int16_t>(from, count, out);
        case 4:
            return widen<int32_t>(from, count, out);
        case 8:
            return widen<uint16_t>(from, count, out);
        default:
            return widen<int64_t>(from, count, out);
    }
}

template <typename T>
inline __attribute__((always_inline)) IdRange range_of(const uint8_t* from, uint64_t count) {
    T low = std::numeric_limits<T>::max(), high = std::numeric_limits<T>::lowest();
    for (uint64_t i = 0; i < count; ++i) {
        T value;
        std::memcpy(&value, from + i * sizeof(T), sizeof(T));
        low = std::min(low, value);
        high = std::max(high, value);
    }
    return count == 0 ? IdRange{} : IdRange{low, high};
}

NEOX_CLONES void fill_run(int32_t* segments, int64_t* positions, uint64_t count, int32_t segment) {
    for (uint64_t i = 0; i < count; ++i) segments[i] = segment;
    if (positions == nullptr) return;
    for (uint64_t i = 0; i < count; ++i) positions[i] = static_cast<int64_t>(i);
}

}  // namespace

// Destination of count + 1 consecutive tokens: `tokens` gets the first `count`, `shifted` all but the first, `segments`
// and `positions` the number of each token's document and its position in it. All but `tokens` may be null.
struct IndexedDataset::Target {
    int64_t* tokens;
    int64_t* shifted;
    int32_t* segments;
    int64_t* positions;
    uint64_t count;            // of all but `shifted`
    IdRange* range = nullptr;  // of the ids read so far

    // `some` tokens, after the first `at`.
    void put(const TokenType& type, const uint8_t* raw, uint64_t at, uint64_t some) const {
        widen(type, raw, std::min(some, count - at), tokens + at);
        if (range != nullptr) range->add(id_range(type, raw, some));
        if (shifted == nullptr) return;
        const uint64_t skip = at == 0 ? 1 : 0;
        widen(type, raw + skip * type.bytes, some - skip, shifted + at + skip - 1);
    }
    void mark(uint64_t from, uint64_t to, int32_t segment) const {
        if (from < count)
            fill_run(segments + from, positions == nullptr ? nullptr : positions + from, std::min(to, count) - from,
                     segment);
    }
};

NEOX_CLONES IdRange id_range(const TokenType& type, const uint8_t* from, uint64_t count) {
    switch (type.code) {
        case 1:
            return range_of<uint8_t>(from, count);
        case 2:
            return range_of<int8_t>(from, count);
        case 3:
            return range_of<int16_t>(from, count);
        case 4:
            return range_of<int32_t>(from, count);
        case 8:
            return range_of<uint16_t>(from, count);
        default:
            return range_of<int64_t>(from, count);
    }
}

const TokenType& token_type(uint8_t code) {
    for (const TokenType& type : kTypes)
        if (type.code == code) return type;
    throw Fault("token type of the index is not supported")
        .found("code " + number(code))
        .expected("1-5 (uint8 int8 int16 int32 int64) or 8 (uint16)")
        .advise("codes 6 and 7 mean different types to different writers: preprocess the corpus again");
}

const TokenType& token_type(const std::string& name) {
    for (const TokenType& type : kTypes)
        if (type.name == name) return type;
    throw Fault("unknown token type").found(name).expected("uint8, int8, int16, int32, int64 or uint16");
}

Index::Index(const uint8_t* bytes, uint64_t count, std::string name) : bytes_(bytes), name_(std::move(name)) {
    check_header(count);
    check_sequences();
    check_documents();
}

void Index::check_header(uint64_t count) {
    const auto damaged = [&](const std::string& what) {
        return Fault(what).at(name_).advise("restore the file or preprocess the corpus again");
    };
    if (count < kIndexHeader)
        throw damaged("index file is truncated")
            .found(number(count) + " bytes")
            .expected("at least " + number(kIndexHeader));
    if (std::memcmp(bytes_, kIndexMagic, sizeof kIndexMagic) != 0)
        throw damaged("not an index file").expected("it starts with MMIDIDX");
    const auto version = load<uint64_t>(9);
    if (version != kIndexVersion)
        throw damaged("unsupported version of the index file").found(number(version)).expected(number(kIndexVersion));
    try {
        type_ = &token_type(bytes_[17]);
    } catch (Fault& fault) {
        throw fault.at(name_);
    }
    num_sequences_ = load<uint64_t>(18);
    num_borders_ = load<uint64_t>(26);
    // Bounded by the size of the file before any multiplication, so that a hostile count cannot overflow.
    const bool fits = num_sequences_ <= count / 12 && num_borders_ <= count / 8;
    const uint64_t want = fits ? kIndexHeader + 12 * num_sequences_ + 8 * num_borders_ : 0;
    // Megatron-core appends a byte per sequence to a multimodal index: 0 for text.
    if (fits && num_sequences_ > 0 && count == want + num_sequences_)
        throw Fault("dataset is multimodal")
            .at(name_)
            .found(number(num_sequences_) + " sequence modes, as megatron-core writes them for images and text")
            .expected("a dataset of text: 34 + 12 x sequences + 8 x document borders = " + number(want) + " bytes")
            .advise(
                "preprocess the text of the corpus with neox preprocess, or with megatron-core's preprocess_data.py");
    if (!fits || want != count)
        throw damaged("index file has the wrong size")
            .found(number(count) + " bytes")
            .expected("34 + 12 x " + number(num_sequences_) + " sequences + 8 x " + number(num_borders_) +
                      " document borders");
}

void Index::check_sequences() {
    uint64_t sum = 0;
    bool bad = false;
    const uint64_t offsets = kIndexHeader + 4 * num_sequences_;
    for (uint64_t i = 0; i < num_sequences_; ++i) {
        const int32_t tokens = size(i);
        bad |= tokens < 0;
        bad |= load<uint64_t>(offsets + 8 * i) != sum * type_->bytes;
        sum += static_cast<uint32_t>(tokens);
        if (bad)
            throw Fault("index file is damaged")
                .at(name_ + " sequence " + number(i))
                .found("size " + std::to_string(tokens) + ", offset " + std::to_string(load<int64_t>(offsets + 8 * i)))
                .expected("size >= 0, offset " + number((sum - static_cast<uint32_t>(tokens)) * type_->bytes))
                .advise("restore the file or preprocess the corpus again");
    }
    num_tokens_ = sum;
}

void Index::check_documents() const {
    const auto damaged = [&](uint64_t border, const std::string& got, const std::string& want) {
        return Fault("index file is damaged")
            .at(name_ + " document border " + number(border))
            .found(got)
            .expected(want)
            .advise("restore the file or preprocess the corpus again");
    };
    if (num_borders_ == 0) throw damaged(0, "no document borders", "at least one");
    uint64_t before = 0;
    for (uint64_t d = 0; d < num_borders_; ++d) {
        const uint64_t border = first_sequence(d);
        if (border < before || border > num_sequences_ || (d == 0 && border != 0))
            throw damaged(d, std::to_string(static_cast<int64_t>(border)),
                          d == 0 ? "0" : number(before) + " to " + number(num_sequences_));
        before = border;
    }
    if (before != num_sequences_) throw damaged(num_borders_ - 1, number(before), number(num_sequences_));
}

uint64_t Index::sequence_of_token(uint64_t token) const {
    return last_not_above(num_sequences_, token, [&](uint64_t i) { return first_token(i); });
}

uint64_t Index::document_of_sequence(uint64_t sequence) const {
    return last_not_above(num_documents(), sequence, [&](uint64_t d) { return first_sequence(d); });
}

uint64_t Index::document_of_token(uint64_t token) const {
    return last_not_above(num_documents(), token, [&](uint64_t d) { return first_token_of_document(d); });
}

IndexedDataset::IndexedDataset(const std::string& prefix)
    : idx_(prefix + ".idx"),
      bin_(prefix + ".bin"),
      map_(idx_),
      tokens_(bin_),
      index_(map_.bytes(), idx_.size_at_open(), idx_.path()) {
    const uint64_t have = bin_.size_at_open();
    if (have == index_.bin_bytes()) return;
    Fault fault("data file does not fit its index");
    fault.at(bin_.path())
        .found(number(have) + " bytes")
        .expected(number(index_.bin_bytes()) + " bytes, by " + idx_.path());
    if (have < index_.bin_bytes())
        fault.found(fault.got + ", cut in document " + number(index_.document_of_token(have / index_.type().bytes)));
    throw fault.advise("restore both files from the same source or preprocess the corpus again");
}

uint64_t IndexedDataset::idx_checksum() const { return checksum(map_.bytes(), idx_.size_at_open()); }

void IndexedDataset::check_unchanged() const {
    idx_.check_unchanged();
    bin_.check_unchanged();
}

void IndexedDataset::guard(uint64_t block_bytes, std::vector<uint64_t> sums) {
    const uint64_t bytes = bin_.size_at_open();
    const uint64_t blocks = block_bytes == 0 ? 0 : bytes / block_bytes + (bytes % block_bytes != 0);
    if (block_bytes == 0 || sums.size() != blocks)
        throw Fault("checksums do not cover the data file")
            .at(bin_.path())
            .found(number(sums.size()) + " blocks")
            .expected(number(blocks));
    block_bytes_ = block_bytes;
    sums_ = std::move(sums);
    verified_ = std::make_unique<std::atomic<bool>[]>(sums_.size());
}

bool IndexedDataset::block_is_good(uint64_t block) const {
    const uint64_t first = block * block_bytes_;
    std::vector<uint8_t> bytes(std::min(block_bytes_, bin_.size_at_open() - first));
    bin_.read_at(bytes.data(), bytes.size(), first);
    return checksum(bytes.data(), bytes.size()) == sums_[block];
}

std::vector<uint64_t> IndexedDataset::damaged_blocks() const {
    std::vector<uint64_t> damaged;
    for (uint64_t block = 0; block < sums_.size(); ++block)
        if (!block_is_good(block)) damaged.push_back(block);
    return damaged;
}

void IndexedDataset::check_blocks(uint64_t first_byte, uint64_t last_byte) const {
    if (sums_.empty()) return;
    for (uint64_t block = first_byte / block_bytes_; block <= last_byte / block_bytes_; ++block) {
        if (verified_[block].load(std::memory_order_relaxed)) continue;
        if (!block_is_good(block))
            throw Fault("data file is damaged: checksum differs")
                .at(bin_.path() + " bytes " + number(block * block_bytes_) + " to " +
                    number(std::min((block + 1) * block_bytes_, bin_.size_at_open())))
                .found("block " + number(block) + ", starting in document " +
                       number(index_.document_of_token(block * block_bytes_ / index_.type().bytes)))
                .advise("restore the file; `neox data verify` lists all damaged blocks");
        verified_[block].store(true, std::memory_order_relaxed);
    }
}

void IndexedDataset::read_tokens(uint64_t first, uint64_t count, const Target& to, uint64_t at) const {
    if (count == 0) return;
    const uint64_t size = index_.type().bytes;
    check_blocks(first * size, (first + count) * size - 1);
    // pread instead of the map: a file truncated while open is then a Fault and not a SIGBUS.
    thread_local std::vector<uint8_t> raw;  // reused: a loader reads many samples of one size
    raw.resize(count * size);
    bin_.read_at(raw.data(), raw.size(), first * size);
    to.put(index_.type(), raw.data(), at, count);
    if (raw.size() > kRetainedBytes) std::vector<uint8_t>().swap(raw);
}

void IndexedDataset::read(uint64_t first, uint64_t count, int64_t* out, int32_t* segments) const {
    idx_.check_unchanged();
    read_to(first, count, Target{out, nullptr, segments, nullptr, count});
}

void IndexedDataset::read_to(uint64_t first, uint64_t count, const Target& to) const {
    if (first > index_.num_tokens() || count > index_.num_tokens() - first)
        throw Fault("read beyond the end of the dataset")
            .at(bin_.path())
            .found("tokens " + number(first) + " to " + number(first + count))
            .expected("at most " + number(index_.num_tokens()));
    if (count == 0) return;
    read_tokens(first, count, to, 0);
    if (to.segments == nullptr) return;
    uint64_t document = index_.document_of_token(first);
    int32_t segment = 0;
    for (uint64_t i = 0; i < count;) {
        const uint64_t end = std::min(count, index_.first_token_of_document(++document) - first);
        if (end == i) continue;  // a document without tokens
        to.mark(i, end, segment++);
        i = end;
    }
}

template <typename T>
void IndexedDataset::read_ordered(const T* order, uint64_t length, uint64_t position, uint64_t offset, uint64_t count,
                                  int64_t* out, int32_t* segments) const {
    idx_.check_unchanged();
    read_ordered_to(order, length, position, offset, count, Target{out, nullptr, segments, nullptr, count});
}

template <typename T>
void IndexedDataset::read_ordered_to(const T* order, uint64_t length, uint64_t position, uint64_t offset,
                                     uint64_t count, const Target& to) const {
    int32_t segment = 0;
    for (uint64_t done = 0; done < count; ++position, offset = 0) {
        if (position >= length)
            throw Fault("sample runs past the end of its order")
                .at(bin_.path())
                .found("position " + number(position))
                .expected("below " + number(length));
        const auto sequence = static_cast<uint64_t>(order[position]);
        if (sequence >= index_.num_sequences())
            throw Fault("order names a sequence that does not exist")
                .at(bin_.path())
                .found(std::to_string(order[position]))
                .expected("below " + number(index_.num_sequences()));
        const auto size = static_cast<uint64_t>(index_.size(sequence));
        if (offset >= size) continue;
        const uint64_t take = std::min(count - done, size - offset);
        read_tokens(index_.first_token(sequence) + offset, take, to, done);
        if (to.segments != nullptr) to.mark(done, done + take, segment++);
        done += take;
    }
}

template void IndexedDataset::read_ordered(const int32_t*, uint64_t, uint64_t, uint64_t, uint64_t, int64_t*,
                                           int32_t*) const;
template void IndexedDataset::read_ordered(const int64_t*, uint64_t, uint64_t, uint64_t, uint64_t, int64_t*,
                                           int32_t*) const;

template <typename Read>
IdRange IndexedDataset::fill_rows(const Rows& to, const Read& read) const {
    const uint64_t s = to.seq_length;
    IdRange range;
    idx_.check_unchanged();
    for (uint64_t i = 0; i < to.count; ++i) {
        const auto row = static_cast<uint64_t>(to.rows[i]) * s;
        const auto at = [row](auto* data) { return data == nullptr ? nullptr : data + row; };
        read(i, Target{to.inputs + row, to.targets + row, at(to.segments), at(to.positions), s, &range});
    }
    return range;
}

IdRange IndexedDataset::read_rows(const int64_t* firsts, const Rows& to) const {
    return fill_rows(to, [&](uint64_t i, const Target& target) {
        read_to(static_cast<uint64_t>(firsts[i]), to.seq_length + 1, target);
    });
}

template <typename T>
IdRange IndexedDataset::read_ordered_rows(const T* order, uint64_t length, const int64_t* positions,
                                          const int64_t* offsets, const Rows& to) const {
    return fill_rows(to, [&](uint64_t i, const Target& target) {
        read_ordered_to(order, length, static_cast<uint64_t>(positions[i]), static_cast<uint64_t>(offsets[i]),
                        to.seq_length + 1, target);
    });
}

template IdRange IndexedDataset::read_ordered_rows(const int32_t*, uint64_t, const int64_t*, const int64_t*,
                                                   const Rows&) const;
template IdRange IndexedDataset::read_ordered_rows(const int64_t*, uint64_t, const int64_t*, const int64_t*,
                                                   const Rows&) const;

uint64_t IndexedDataset::find_bad_token(int64_t vocab_size) const {
    constexpr uint64_t kChunk = 1 << 16;
    std::vector<int64_t> tokens(std::min(kChunk, index_.num_tokens()));
    for (uint64_t first = 0; first < index_.num_tokens(); first += kChunk) {
        const uint64_t count = std::min(kChunk, index_.num_tokens() - first);
        read_tokens(first, count, Target{tokens.data(), nullptr, nullptr, nullptr, count}, 0);
        for (uint64_t i = 0; i < count; ++i)
            if (tokens[i] < 0 || tokens[i] >= vocab_size) return first + i;
    }
    return index_.num_tokens();
}

}  // namespace neox::data
