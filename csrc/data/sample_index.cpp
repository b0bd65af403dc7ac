#include "data/sample_index.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "data/fault.h"

namespace neox::data {

namespace {

using Wide = unsigned __int128;

constexpr int kRounds = 8;
constexpr int64_t kAhead = 32;             // documents whose size is fetched ahead: the order is random, every size is a cache miss
constexpr int64_t kBlock = 4096;           // documents whose sizes are gathered before they are looked at: 16 KiB
constexpr int64_t kWorthSlices = 1 << 20;  // documents from which on slices and threads pay; of fewer, the sizes are in the cache
constexpr int kSliceBits = 18;             // documents of a slice: 1 MiB of sizes
constexpr int64_t kMostSlices = 128;       // at once: more are slow to write
constexpr int64_t kSpread = 1024;          // sizes, 4 KiB: slices begin at different places in it, so that they do not compete for sets of the cache

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
        __builtin_prefetch(sizes + 4 * (later < bound ? later : 0));
        one(position);
    }
    for (; position < last; ++position) one(position);
    if (bad != 0) refuse(sizes, num_sizes, order, first, last);
    return sum;
}

struct Release {
    void operator()(void* memory) const { std::free(memory); }
};
using Sizes = std::unique_ptr<uint32_t[], Release>;

// Uninitialised, in pages of 2 MiB where there are such: many places of it are written in turn.
Sizes allocate_sizes(int64_t count) {
    constexpr size_t kHugePage = size_t{2} << 20;
    const size_t bytes = (static_cast<size_t>(count) * sizeof(uint32_t) / kHugePage + 1) * kHugePage;
    Sizes memory(static_cast<uint32_t*>(std::aligned_alloc(kHugePage, bytes)));
    if (memory == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    ::madvise(memory.get(), bytes, MADV_HUGEPAGE);  // a wish: without huge pages it works as well, a little slower
#endif
    return memory;
}

// The sizes of all documents, cut into slices that stay in the cache while a share of the order is looked up in one after the other.
struct Table {
    const uint8_t* sizes;
    int64_t num_sizes;
    int shift = kSliceBits;  // a slice has 2^shift documents

    Table(const uint8_t* all, int64_t count) : sizes(all), num_sizes(count) {
        while (slices() > kMostSlices) ++shift;
    }
    int64_t slices() const { return ((num_sizes - 1) >> shift) + 1; }
};

// One thread's share of the documents. `sizes` are sorted by slice, in the order of the documents within one: slice k has [begins[k], ends[k]).
struct Share {
    int64_t first, last;
    Sizes sizes;
    std::vector<int64_t> begins, ends;
    int64_t tokens = 0;
    std::exception_ptr fault;
};

// Puts the documents of the share, as numbers within their slices, where their sizes will be.
template <typename Doc>
void sort_documents(const Table& table, const Doc* order, Share& share) {
    const auto slices = static_cast<uint64_t>(table.slices());
    std::vector<int64_t> counts(slices + 1);  // the last: of documents that there are not
    const auto slice_of = [=](int64_t position) { return static_cast<uint64_t>(static_cast<int64_t>(order[position])) >> table.shift; };
    for (int64_t position = share.first; position < share.last; ++position) ++counts[std::min(slice_of(position), slices)];
    if (counts[slices] != 0) refuse(table.sizes, table.num_sizes, order, share.first, share.last);
    int64_t begin = 0;
    for (uint64_t slice = 0; slice < slices; ++slice) {
        share.begins.push_back(begin);
        begin += std::exchange(counts[slice], begin);
        begin = (begin / kSpread + 1) * kSpread + kSpread / kMostSlices * static_cast<int64_t>(slice);
    }
    share.sizes = allocate_sizes(begin + kAhead);
    const uint64_t within = (uint64_t{1} << table.shift) - 1;
    uint32_t* const out = share.sizes.get();
    for (int64_t position = share.first; position < share.last; ++position)
        out[counts[slice_of(position)]++] = static_cast<uint32_t>(static_cast<uint64_t>(order[position]) & within);
    share.ends = std::move(counts);
}

// Replaces the documents by their sizes and sums these.
template <typename Doc>
void look_up_sizes(const Table& table, const Doc* order, Share& share) {
    uint32_t bad = 0;
    int64_t tokens = 0;
    for (int64_t slice = 0; slice < table.slices(); ++slice) {
        const int64_t start = slice << table.shift;
        const uint8_t* sizes = table.sizes + 4 * start;
        const auto bound = static_cast<uint32_t>(std::min(table.num_sizes - start, int64_t{1} << table.shift));
        uint32_t *place = share.sizes.get() + share.begins[static_cast<size_t>(slice)], *end = share.sizes.get() + share.ends[static_cast<size_t>(slice)];
        for (; place != end; ++place) {
            __builtin_prefetch(sizes + 4 * static_cast<size_t>(place[kAhead]));
            const bool inside = *place < bound;
            uint32_t size;
            std::memcpy(&size, sizes + 4 * static_cast<size_t>(inside ? *place : 0), sizeof size);
            bad |= static_cast<uint32_t>(!inside) | size >> 31;
            tokens += size;
            *place = size;
        }
    }
    if (bad != 0) refuse(table.sizes, table.num_sizes, order, share.first, share.last);
    share.tokens = tokens;
}

template <typename Work>
void on_threads(std::vector<Share>& shares, const Work& work) {
    const auto guarded = [&](Share& share) {
        try {
            work(share);
        } catch (...) {
            share.fault = std::current_exception();
        }
    };
    std::vector<std::thread> threads;
    for (size_t i = 1; i < shares.size(); ++i) threads.emplace_back(guarded, std::ref(shares[i]));
    guarded(shares[0]);
    for (std::thread& thread : threads) thread.join();
    for (const Share& share : shares)
        if (share.fault != nullptr) std::rethrow_exception(share.fault);
}

// The rows that start in documents [first, first + count) of the order, which hold tokens [start, end) of the stream; `next_size` gives their sizes
// one after the other.
template <typename Row, typename NextSize>
void write_rows_of(NextSize next_size, int64_t first, int64_t count, int64_t start, int64_t end, int64_t seq_length, RowRange<Row> range) {
    const int64_t row = start / seq_length + (start % seq_length != 0);
    const int64_t rows = std::min(range.last, end / seq_length + (end % seq_length != 0));  // those after it belong to the next documents
    if (row >= rows) return;
    int64_t offset = row * seq_length - start;  // of the next row in the document
    Row *out = range.out + 2 * (row - range.first), *const out_end = range.out + 2 * (rows - range.first);
    for (int64_t i = 0; i < count && out != out_end; ++i) {
        const int64_t size = next_size(i);
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

// Returns the number of tokens. In the order of the documents every size is a cache miss, and one that is far away. Here they are looked up slice by
// slice and put back, so that each pass over the order reads and writes as many streams as there are slices; on the way rows are made of them.
template <typename Doc, typename Row>
int64_t fill_by_slices(const uint8_t* sizes, int64_t num_sizes, const Doc* order, int64_t length, int64_t seq_length, RowRange<Row> range, int threads) {
    const Table table(sizes, num_sizes);
    std::vector<Share> shares(static_cast<size_t>(std::max(threads, 1)));
    const auto count = static_cast<int64_t>(shares.size());
    for (int64_t i = 0; i < count; ++i) {
        Share& share = shares[static_cast<size_t>(i)];
        share.first = length / count * i, share.last = i + 1 == count ? length : length / count * (i + 1);
    }
    on_threads(shares, [&](Share& share) { sort_documents(table, order, share); });
    on_threads(shares, [&](Share& share) { look_up_sizes(table, order, share); });
    int64_t total = 0;
    for (Share& share : shares) total += std::exchange(share.tokens, total);  // from now on: the tokens before it
    on_threads(shares, [&](Share& share) {
        const int64_t end = &share == &shares.back() ? total : (&share + 1)->tokens;
        const auto next_size = [documents = order + share.first, sorted = share.sizes.get(), at = share.begins.data(), shift = table.shift](int64_t i) {
            const int64_t from = at[documents[i] >> shift]++;
            __builtin_prefetch(sorted + from + kAhead);
            return static_cast<int64_t>(sorted[from]);
        };
        write_rows_of(next_size, share.first, share.last - share.first, share.tokens, end, seq_length, range);
    });
    return total;
}

}  // namespace

template <typename Row>
void write_rows(const int32_t* sizes, int64_t first, int64_t count, int64_t start, int64_t seq_length, RowRange<Row> range) {
    int64_t end = start;
    for (int64_t i = 0; i < count; ++i) end += sizes[i];
    write_rows_of([sizes](int64_t i) { return int64_t{sizes[i]}; }, first, count, start, end, seq_length, range);
}

template void write_rows(const int32_t*, int64_t, int64_t, int64_t, int64_t, RowRange<int32_t>);
template void write_rows(const int32_t*, int64_t, int64_t, int64_t, int64_t, RowRange<int64_t>);

template <typename Doc, typename Row>
void fill_sample_index(const uint8_t* sizes, int64_t num_sizes, const Doc* order, int64_t length, int64_t seq_length, Row* out, int64_t rows, int threads) {
    if (seq_length <= 0) throw Fault("seq_length must be positive").found(std::to_string(seq_length));
    const Wide last_token = rows > 0 ? static_cast<Wide>(rows - 1) * static_cast<Wide>(seq_length) : 0;  // at which the last row starts
    const RowRange<Row> range{out, 0, rows};
    int64_t total = 0;
    if (rows > 0 && length >= kWorthSlices && (threads > 1 || num_sizes >= kWorthSlices)) {
        total = fill_by_slices(sizes, num_sizes, order, length, seq_length, range, threads);
    } else {
        std::unique_ptr<int32_t[]> block(new int32_t[kBlock]);
        for (int64_t first = 0; first < length && rows > 0 && static_cast<Wide>(total) <= last_token; first += kBlock) {
            const int64_t last = std::min(length, first + kBlock);
            const int64_t tokens = gather_sizes(sizes, num_sizes, order, length, first, last, block.get());
            write_rows(block.get(), first, last - first, total, seq_length, range);
            total += tokens;
        }
    }
    if (rows > 0 && static_cast<Wide>(total) <= last_token)
        throw Fault("documents end before the samples do")
            .at("sample " + std::to_string(total / seq_length + (total % seq_length != 0)))
            .expected(std::to_string(rows) + " rows");
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
