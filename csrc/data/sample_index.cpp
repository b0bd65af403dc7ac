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
#include <vector>

#include "data/fault.h"

namespace neox::data {

namespace {

using Wide = unsigned __int128;

constexpr int kRounds = 8;
constexpr int64_t kAhead = 128;                   // documents whose size is fetched ahead: the order is random, every size is a cache miss
constexpr int64_t kSegment = 16384;               // documents whose sizes are gathered before they are looked at: 64 KiB
constexpr int64_t kWorthThreads = 16 * kSegment;  // documents of an order

// value x bound / 2^64: an even map of a 64-bit hash to [0, bound) without division.
uint64_t scale(uint64_t hash, uint64_t bound) { return static_cast<uint64_t>((static_cast<Wide>(hash) * bound) >> 64); }

uint64_t ceil_root(uint64_t value) {
    auto root = static_cast<uint64_t>(std::sqrt(static_cast<double>(value)));
    while (static_cast<Wide>(root) * root < value) ++root;
    while (root > 1 && static_cast<Wide>(root - 1) * (root - 1) >= value) --root;
    return root;
}

uint64_t add_modulo(uint64_t left, uint64_t right, uint64_t bound) { return left >= bound - right ? left - (bound - right) : left + right; }

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
        if (size < 0) throw Fault("negative document size").at("document " + std::to_string(document)).found(std::to_string(size));
    }
    throw Fault("document order changed while it was read");
}

// Copies the sizes of the documents order[first, last), where every one is a cache miss of its own, and returns their sum.
template <typename Doc>
int64_t gather_sizes(const uint8_t* sizes, int64_t num_sizes, const Doc* order, int64_t length, int64_t first, int64_t last, int32_t* out) {
    int64_t sum = 0;
    uint32_t bad = 0;
    const auto bound = static_cast<uint64_t>(num_sizes);
    const auto one = [&](int64_t position) {
        const auto document = static_cast<uint64_t>(static_cast<int64_t>(order[position]));
        const bool inside = document < bound;
        int32_t size;
        std::memcpy(&size, sizes + 4 * (inside ? document : 0), sizeof size);
        bad |= static_cast<uint32_t>(!inside) | static_cast<uint32_t>(size) >> 31;
        out[position - first] = size;
        sum += size;
    };
    if (bound == 0 && first < last) refuse(sizes, num_sizes, order, first, last);
    const int64_t ahead = std::min(last, length - kAhead);
    int64_t position = first;
    for (; position < ahead; ++position) {
        const auto later = static_cast<uint64_t>(static_cast<int64_t>(order[position + kAhead]));
        __builtin_prefetch(sizes + 4 * (later < bound ? later : 0), 0, 2);  // to the second level: more fetches can be under way than to the first
        one(position);
    }
    for (; position < last; ++position) one(position);
    if (bad != 0) refuse(sizes, num_sizes, order, first, last);
    return sum;
}

// The rows that start in documents [first, first + count) of the order, which hold tokens [start, end) of the stream.
template <typename Row>
void write_rows_between(const int32_t* sizes, int64_t first, int64_t count, int64_t start, int64_t end, int64_t seq_length, RowRange<Row> range) {
    const int64_t row = start / seq_length + (start % seq_length != 0);
    const int64_t rows = std::min(range.last, end / seq_length + (end % seq_length != 0));  // those after it belong to the next documents
    if (row >= rows) return;
    int64_t offset = row * seq_length - start;  // of the next row in the document
    Row *out = range.out + 2 * (row - range.first), *const out_end = range.out + 2 * (rows - range.first);
    for (int64_t i = 0; i < count && out != out_end; ++i) {
        const int64_t size = sizes[i];
        // Written before it is known whether the row starts here, so that nothing has to be guessed: the next document writes it again.
        out[0] = static_cast<Row>(first + i);
        out[1] = static_cast<Row>(offset);
        offset -= size;
        const int64_t inside = offset >> 63;  // -1 or 0
        out -= 2 * inside;
        offset += seq_length & inside;
        for (; __builtin_expect(offset < 0, 0) && out != out_end; offset += seq_length, out += 2) {
            out[0] = static_cast<Row>(first + i);
            out[1] = static_cast<Row>(offset + size);
        }
    }
}

// Makes the index segment by segment. Threads take segments in turn and gather at the same time; where a segment starts in the stream is handed on from
// each to the next.
template <typename Doc, typename Row>
class Builder {
  public:
    Builder(const uint8_t* sizes, int64_t num_sizes, const Doc* order, int64_t length, int64_t seq_length, RowRange<Row> range)
        : sizes_(sizes), num_sizes_(num_sizes), order_(order), length_(length), seq_length_(seq_length), range_(range) {}

    // Returns the number of tokens that were looked at: at least `needed`, or all of the stream.
    Wide run(Wide needed, int threads) {
        needed_ = needed;
        std::vector<int32_t> buffers(static_cast<size_t>(std::max(threads, 1) * kSegment));
        std::vector<std::thread> others;
        try {
            for (int i = 1; i < threads; ++i) others.emplace_back([this, buffer = buffers.data() + i * kSegment] { work(buffer); });
        } catch (const std::system_error&) {
            // no more threads are to be had: those that there are do the work
        }
        work(buffers.data());
        for (std::thread& other : others) other.join();
        if (fault_ != nullptr && static_cast<Wide>(tokens_) < needed) std::rethrow_exception(fault_);
        return static_cast<Wide>(tokens_);
    }

  private:
    void work(int32_t* buffer) {
        for (int64_t segment = next_++; !enough_ && segment * kSegment < length_; segment = next_++) {
            const int64_t first = segment * kSegment, count = std::min(length_ - first, kSegment);
            int64_t sum = 0;
            try {
                sum = gather_sizes(sizes_, num_sizes_, order_, length_, first, first + count, buffer);
            } catch (...) {
                // The first fault of the order counts, whichever thread is the first to meet one: all before it get their turn.
                if (wait_for_turn(segment)) fault_ = std::current_exception();
                enough_ = true;
                return;
            }
            if (!wait_for_turn(segment)) return;
            const int64_t start = tokens_, end = tokens_ += sum;
            if (static_cast<Wide>(end) >= needed_) enough_ = true;
            turn_.store(segment + 1, std::memory_order_release);
            write_rows_between(buffer, first, count, start, end, seq_length_, range_);
        }
    }

    // False if the stream needs to go no further: only the thread whose turn it is says so, and then all who wait come after it.
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
    std::atomic<int64_t> next_{0};     // segment to be taken
    std::atomic<int64_t> turn_{0};     // segment whose start is known
    std::atomic<bool> enough_{false};  // no further segment is to be taken
    int64_t tokens_ = 0;               // before segment turn_; only its thread touches this and fault_
    std::exception_ptr fault_;
};

}  // namespace

template <typename Row>
void write_rows(const int32_t* sizes, int64_t first, int64_t count, int64_t start, int64_t seq_length, RowRange<Row> range) {
    int64_t end = start;
    for (int64_t i = 0; i < count; ++i) end += sizes[i];
    write_rows_between(sizes, first, count, start, end, seq_length, range);
}

template void write_rows(const int32_t*, int64_t, int64_t, int64_t, int64_t, RowRange<int32_t>);
template void write_rows(const int32_t*, int64_t, int64_t, int64_t, int64_t, RowRange<int64_t>);

template <typename Doc, typename Row>
void fill_sample_index(const uint8_t* sizes, int64_t num_sizes, const Doc* order, int64_t length, int64_t seq_length, Row* out, int64_t rows, int threads) {
    if (seq_length <= 0) throw Fault("seq_length must be positive").found(std::to_string(seq_length));
    if (rows <= 0) return;
    const Wide needed = static_cast<Wide>(rows - 1) * static_cast<Wide>(seq_length) + 1;  // the last row starts at the last of these
    Builder<Doc, Row> builder(sizes, num_sizes, order, length, seq_length, RowRange<Row>{out, 0, rows});
    const Wide tokens = builder.run(needed, length < kWorthThreads ? 1 : threads);
    if (tokens < needed) {
        const auto have = static_cast<uint64_t>(tokens), length_of_one = static_cast<uint64_t>(seq_length);
        throw Fault("documents end before the samples do")
            .at("sample " + std::to_string(have / length_of_one + (have % length_of_one != 0)))
            .expected(std::to_string(rows) + " rows");
    }
}

template void fill_sample_index(const uint8_t*, int64_t, const int32_t*, int64_t, int64_t, int32_t*, int64_t, int);
template void fill_sample_index(const uint8_t*, int64_t, const int32_t*, int64_t, int64_t, int64_t*, int64_t, int);
template void fill_sample_index(const uint8_t*, int64_t, const int64_t*, int64_t, int64_t, int32_t*, int64_t, int);
template void fill_sample_index(const uint8_t*, int64_t, const int64_t*, int64_t, int64_t, int64_t*, int64_t, int);

int64_t epochs_needed(int64_t tokens_per_epoch, int64_t seq_length, int64_t num_samples) {
    if (tokens_per_epoch <= 0) throw Fault("dataset has no tokens").found(std::to_string(tokens_per_epoch)).expected("at least 1");
    if (seq_length <= 0) throw Fault("seq_length must be positive").found(std::to_string(seq_length));
    if (num_samples < 0) throw Fault("num_samples must not be negative").found(std::to_string(num_samples));
    const auto tokens = static_cast<Wide>(tokens_per_epoch);
    const Wide needed = static_cast<Wide>(num_samples) * static_cast<Wide>(seq_length) + 1;
    const Wide epochs = std::max<Wide>(1, (needed + tokens - 1) / tokens);
    if (epochs * tokens > static_cast<Wide>(std::numeric_limits<int64_t>::max())) throw Fault("samples asked for exceed 2^63 tokens");
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
    // Tokens left over by whole samples: the phase moves the cut, so that no token is left out in every epoch.
    const uint64_t spare = (num_tokens - 1) - per_epoch * seq_length;
    const uint64_t phase = scale(mix(epoch_key, ~uint64_t{0}), spare + 1);
    return phase + permute(epoch_key, per_epoch, sample % per_epoch) * seq_length;
}

}  // namespace neox::data
