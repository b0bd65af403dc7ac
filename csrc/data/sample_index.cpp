#include "data/sample_index.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "data/fault.h"

namespace neox::data {

namespace {

using Wide = unsigned __int128;

constexpr int kRounds = 8;
// documents to prefetch: the order is random, so every size is a cache miss
constexpr int64_t kAhead = 128;
constexpr int64_t kSegment = 16384;               // documents whose sizes are gathered at a time: 64 KiB
constexpr int64_t kWorthThreads = 16 * kSegment;  // documents of an order that is worth threads

#define NEOX_STEP inline __attribute__((always_inline))

// value x bound / 2^64: maps a 64-bit hash evenly to [0, bound) without division.
uint64_t scale(uint64_t hash, uint64_t bound) { return static_cast<uint64_t>((static_cast<Wide>(hash) * bound) >> 64); }

uint64_t ceil_root(uint64_t value) {
    auto root = static_cast<uint64_t>(std::sqrt(static_cast<double>(value)));
    while (static_cast<Wide>(root) * root < value) ++root;
    while (root > 1 && static_cast<Wide>(root - 1) * (root - 1) >= value) --root;
    return root;
}

uint64_t add_modulo(uint64_t left, uint64_t right, uint64_t bound) {
    return left >= bound - right ? left - (bound - right) : left + right;
}

template <typename Doc>
[[noreturn]] void refuse(const uint8_t* sizes, int64_t num_sizes, const Doc* order, int64_t first, int64_t last) {
    for (int64_t position = first; position < last; ++position) {
        const auto document = static_cast<int64_t>(order[position]);
        if (document < 0 || document >= num_sizes)
            throw Fault("document number out of range")
                .at("position " + std::to_string(position) + " of the document order")
                .found(std::to_string(document))
                .expected("0 to " + std::to_string(num_sizes - 1));
        int32_t size;
        std::memcpy(&size, sizes + 4 * document, sizeof size);
        if (size < 0)
            throw Fault("negative document size")
                .at("document " + std::to_string(document))
                .found(std::to_string(size));
    }
    throw Fault("document order changed while it was read");
}

// Gathers the sizes of documents order[first, last) into `out`, and their sum. Each is a cache miss.
template <typename Doc>
class Gather {
  public:
    Gather(const uint8_t* sizes, int64_t num_sizes, const Doc* order, int64_t length, int64_t first, int64_t last,
           int32_t* out)
        : sizes_(sizes),
          bound_(static_cast<uint64_t>(num_sizes)),
          order_(order),
          length_(length),
          first_(first),
          last_(last),
          out_(out) {
        if (bound_ == 0 && first < last) refuse(sizes, num_sizes, order, first, last);
    }

    // Number of documents for `step`; `finish` takes the rest.
    int64_t steps() const { return std::max<int64_t>(0, std::min(last_, length_ - kAhead) - first_); }

    NEOX_STEP void step(int64_t i) {
        const auto later = static_cast<uint64_t>(static_cast<int64_t>(order_[first_ + i + kAhead]));
        // into the second-level cache, which has more outstanding fetches than the first
        __builtin_prefetch(sizes_ + 4 * (later < bound_ ? later : 0), 0, 2);
        take(i);
    }

    // Gathers all documents from number i. Returns the sum of all sizes.
    int64_t finish(int64_t i) {
        for (const int64_t end = steps(); i < end; ++i) step(i);
        for (; i < last_ - first_; ++i) take(i);
        if (bad_ != 0) refuse(sizes_, static_cast<int64_t>(bound_), order_, first_, last_);
        return sum_;
    }

  private:
    NEOX_STEP void take(int64_t i) {
        const auto document = static_cast<uint64_t>(static_cast<int64_t>(order_[first_ + i]));
        const bool inside = document < bound_;
        int32_t size;
        std::memcpy(&size, sizes_ + 4 * (inside ? document : 0), sizeof size);
        bad_ |= static_cast<uint32_t>(!inside) | static_cast<uint32_t>(size) >> 31;
        out_[i] = size;
        sum_ += size;
    }

    const uint8_t* sizes_;
    uint64_t bound_;
    const Doc* order_;
    int64_t length_, first_, last_;
    int32_t* out_;
    int64_t sum_ = 0;
    uint32_t bad_ = 0;
};

// Writes the rows that start in documents [first, first + count) of the order, which hold tokens [start, end) of the
// stream.
template <typename Row>
class RowWriter {
  public:
    RowWriter(const int32_t* sizes, int64_t first, int64_t count, int64_t start, int64_t end, int64_t seq_length,
              RowRange<Row> range)
        : sizes_(sizes), first_(first), count_(count), seq_length_(seq_length) {
        const int64_t row = start / seq_length + (start % seq_length != 0);
        // later rows belong to later documents
        const int64_t rows = std::min(range.last, end / seq_length + (end % seq_length != 0));
        if (row >= rows) return;
        offset_ = row * seq_length - start;
        out_ = range.out + 2 * (row - range.first), end_ = range.out + 2 * (rows - range.first);
    }

    int64_t count() const { return count_; }

    NEOX_STEP void step(int64_t i) {
        if (out_ == end_) return;
        const int64_t size = sizes_[i];
        // Written unconditionally, to avoid a mispredicted branch: if the row does not start here, the next document
        // overwrites it.
        out_[0] = static_cast<Row>(first_ + i);
        out_[1] = static_cast<Row>(offset_);
        offset_ -= size;
        const int64_t inside = offset_ >> 63;  // -1 or 0
        out_ -= 2 * inside;
        offset_ += seq_length_ & inside;
        for (; __builtin_expect(offset_ < 0, 0) && out_ != end_; offset_ += seq_length_, out_ += 2) {
            out_[0] = static_cast<Row>(first_ + i);
            out_[1] = static_cast<Row>(offset_ + size);
        }
    }

    void finish(int64_t i) {
        for (; i < count_; ++i) step(i);
    }

  private:
    const int32_t* sizes_;
    int64_t first_, count_, seq_length_;
    int64_t offset_ = 0;  // of the next row in the current document
    Row *out_ = nullptr, *end_ = nullptr;
};

// Builds the index segment by segment. While a thread writes the rows of one segment it gathers the sizes of its next
// one, because gathering is nearly all memory latency. Threads take segments in turn; each passes the start of the next
// segment in the stream to the thread that has it.
template <typename Doc, typename Row>
class Builder {
  public:
    Builder(const uint8_t* sizes, int64_t num_sizes, const Doc* order, int64_t length, int64_t seq_length,
            RowRange<Row> range)
        : sizes_(sizes),
          num_sizes_(num_sizes),
          order_(order),
          length_(length),
          seq_length_(seq_length),
          range_(range) {}

    // Returns the number of tokens read: at least `needed`, or the complete stream.
    Wide run(Wide needed, int threads) {
        needed_ = needed;
        const int64_t each = 2 * kSegment;
        std::vector<int32_t> buffers(static_cast<size_t>(std::max(threads, 1) * each));
        std::vector<std::thread> others;
        try {
            for (int i = 1; i < threads; ++i)
                others.emplace_back([this, buffer = buffers.data() + i * each] { work(buffer, buffer + kSegment); });
        } catch (const std::system_error&) {
            // no more threads can be started: the existing ones do the work
        }
        work(buffers.data(), buffers.data() + kSegment);
        for (std::thread& other : others) other.join();
        if (fault_ != nullptr && static_cast<Wide>(tokens_) < needed) std::rethrow_exception(fault_);
        return static_cast<Wide>(tokens_);
    }

  private:
    void work(int32_t* sizes, int32_t* next_sizes) {
        // segment held, number of its sizes, and its start and end in the stream
        int64_t segment = 0, held = 0, start = 0, end = 0;
        while (true) {
            const int64_t next = next_++, first = next * kSegment, count = std::min(length_ - first, kSegment);
            RowWriter<Row> writer(sizes, segment * kSegment, held, start, end, seq_length_, range_);
            if (enough_ || count <= 0) return writer.finish(0);
            int64_t sum = 0;
            try {
                sum = gather_and_write(
                    Gather<Doc>(sizes_, num_sizes_, order_, length_, first, first + count, next_sizes), writer);
            } catch (...) {
                // The first fault in the order is reported, whichever thread finds one first: all earlier segments are
                // finished.
                if (wait_for_turn(next)) fault_ = std::current_exception();
                enough_ = true;
                return;
            }
            if (!wait_for_turn(next)) return;
            segment = next, held = count, start = tokens_, end = tokens_ += sum;
            if (static_cast<Wide>(end) >= needed_) enough_ = true;
            turn_.store(next + 1, std::memory_order_release);
            std::swap(sizes, next_sizes);
        }
    }

    // Returns the sum of the gathered sizes. All rows are written even if it throws.
    static int64_t gather_and_write(Gather<Doc> gather, RowWriter<Row> writer) {
        int64_t i = 0;
        for (const int64_t both = std::min(gather.steps(), writer.count()); i < both; ++i) {
            gather.step(i);
            writer.step(i);
        }
        writer.finish(i);
        return gather.finish(i);
    }

    // False if no more of the stream is needed. Only the thread whose turn it is decides that, and all waiting threads
    // come after it.
    bool wait_for_turn(int64_t segment) const {
        while (turn_.load(std::memory_order_acquire) != segment) {
            if (enough_) return false;
            std::this_thread::yield();
        }
        return true;
    }

    const uint8_t* sizes_;
    int64_t num_sizes_;
    const Doc* order_;
    int64_t length_, seq_length_;
    RowRange<Row> range_;
    Wide needed_ = 0;
    std::atomic<int64_t> next_{0};     // next segment to take
    std::atomic<int64_t> turn_{0};     // segment whose start in the stream is known
    std::atomic<bool> enough_{false};  // take no further segment
    int64_t tokens_ = 0;               // before segment turn_; only the thread of that segment accesses this and fault_
    std::exception_ptr fault_;
};

}  // namespace

template <typename Row>
void write_rows(const int32_t* sizes, int64_t first, int64_t count, int64_t start, int64_t seq_length,
                RowRange<Row> range) {
    int64_t end = start;
    for (int64_t i = 0; i < count; ++i) end += sizes[i];
    RowWriter<Row>(sizes, first, count, start, end, seq_length, range).finish(0);
}

template void write_rows(const int32_t*, int64_t, int64_t, int64_t, int64_t, RowRange<int32_t>);
template void write_rows(const int32_t*, int64_t, int64_t, int64_t, int64_t, RowRange<int64_t>);

template <typename Doc, typename Row>
void fill_sample_index(const uint8_t* sizes, int64_t num_sizes, const Doc* order, int64_t length, int64_t seq_length,
                       Row* out, int64_t rows, int threads) {
    if (seq_length <= 0) throw Fault("seq_length must be positive").found(std::to_string(seq_length));
    if (rows <= 0) return;
    // the last row starts at the last of these tokens
    const Wide needed = static_cast<Wide>(rows - 1) * static_cast<Wide>(seq_length) + 1;
    Builder<Doc, Row> builder(sizes, num_sizes, order, length, seq_length, RowRange<Row>{out, 0, rows});
    const Wide tokens = builder.run(needed, length < kWorthThreads ? 1 : threads);
    if (tokens < needed) {
        const auto have = static_cast<uint64_t>(tokens), length_of_one = static_cast<uint64_t>(seq_length);
        throw Fault("documents have fewer tokens than the samples need")
            .at("sample " + std::to_string(have / length_of_one + (have % length_of_one != 0)))
            .expected(std::to_string(rows) + " rows");
    }
}

template void fill_sample_index(const uint8_t*, int64_t, const int32_t*, int64_t, int64_t, int32_t*, int64_t, int);
template void fill_sample_index(const uint8_t*, int64_t, const int32_t*, int64_t, int64_t, int64_t*, int64_t, int);
template void fill_sample_index(const uint8_t*, int64_t, const int64_t*, int64_t, int64_t, int32_t*, int64_t, int);
template void fill_sample_index(const uint8_t*, int64_t, const int64_t*, int64_t, int64_t, int64_t*, int64_t, int);

int64_t epochs_needed(int64_t tokens_per_epoch, int64_t seq_length, int64_t num_samples) {
    if (tokens_per_epoch <= 0)
        throw Fault("dataset has no tokens").found(std::to_string(tokens_per_epoch)).expected("at least 1");
    if (seq_length <= 0) throw Fault("seq_length must be positive").found(std::to_string(seq_length));
    if (num_samples < 0) throw Fault("num_samples must not be negative").found(std::to_string(num_samples));
    const auto tokens = static_cast<Wide>(tokens_per_epoch);
    const Wide needed = static_cast<Wide>(num_samples) * static_cast<Wide>(seq_length) + 1;
    const Wide epochs = std::max<Wide>(1, (needed + tokens - 1) / tokens);
    if (epochs * tokens > static_cast<Wide>(std::numeric_limits<int64_t>::max()))
        throw Fault("samples asked for exceed 2^63 tokens");
    return static_cast<int64_t>(epochs);
}

uint64_t mix(uint64_t key, uint64_t value) {
    uint64_t z = value + 0x9E3779B97F4A7C15u * (key | 1);
    for (int i = 0; i < 2; ++i) {
        z ^= key;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        z ^= z >> 31;
    }
    return z;
}

uint64_t permute(uint64_t key, uint64_t size, uint64_t value) {
    if (size <= 1) return 0;
    const uint64_t a = ceil_root(size);
    const uint64_t b = size / a + (size % a != 0);
    do {
        uint64_t left = value / b, right = value % b;  // left < a, right < b
        for (int round = 0; round < kRounds; ++round) {
            const uint64_t round_key = mix(key, static_cast<uint64_t>(round));
            if (round % 2 == 0)
                left = add_modulo(left, scale(mix(round_key, right), a), a);
            else
                right = add_modulo(right, scale(mix(round_key, left), b), b);
        }
        value = left * b + right;
    } while (value >= size);
    return value;
}

uint64_t EpochOrder::first_token(uint64_t sample) const {
    const uint64_t per_epoch = samples_per_epoch();
    const uint64_t epoch_key = mix(key, sample / per_epoch);
    // Tokens that complete samples leave over. The phase moves the cut, so that no token is left out in every epoch.
    const uint64_t spare = (num_tokens - 1) - per_epoch * seq_length;
    const uint64_t phase = scale(mix(epoch_key, ~uint64_t{0}), spare + 1);
    return phase + permute(epoch_key, per_epoch, sample % per_epoch) * seq_length;
}

}  // namespace neox::data
