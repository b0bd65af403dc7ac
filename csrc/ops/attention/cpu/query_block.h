// A block of query rows, the keys visible to it, and its scores against a tile of keys. No torch.
//
// Scores are stored [key][query]. Vector lanes hold queries, so that the softmax over keys needs no reduction across
// lanes, and the elements of keys and values are broadcast one at a time in memory order.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/philox.h"
#include "ops/attention/attention.h"
#include "ops/attention/cpu/gemm.h"

namespace neox::attention {

constexpr int64_t kQueries = 64;  // rows of a block: (query, head of the group) pairs, heads innermost
// keys of a tile, a multiple of the 6 rows of a product block; tiles start at multiples of it
constexpr int64_t kKeys = 48;
constexpr int64_t kShared = 4;  // blocks that share a loaded tile
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline int64_t round_up(int64_t size) { return (size + kVecWidth - 1) / kVecWidth * kVecWidth; }

// Number of elements that hold `count` terms of a sum.
template <class E>
inline int64_t elements(int64_t count) {
    return (count + kTerms<E> - 1) / kTerms<E>;
}

// Channels of a tile row with elements E: head_dim rounded up to full vectors. The padding is zero.
template <class E>
inline int64_t padded_channels(int64_t head_dim) {
    return kTerms<E> * round_up(elements<E>(head_dim));
}

struct QueryBlock {
    int64_t batch, group;
    int64_t count;   // rows in use; the lanes past them repeat the last row
    int64_t padded;  // count rounded up to full vectors
    int64_t row[kQueries], head[kQueries];
    alignas(64) int32_t position[kQueries];
    alignas(64) int32_t segment[kQueries];
    alignas(64) float slope[kQueries];  // ALiBi slopes for scores in base 2
    int64_t first_position, last_position;
    int32_t low_segment, high_segment;
};

inline int64_t num_query_blocks(const Attention& in) { return (in.queries * in.heads + kQueries - 1) / kQueries; }

// Units of work: groups of up to kShared neighbouring blocks.
inline int64_t num_block_groups(const Attention& in) { return (num_query_blocks(in) + kShared - 1) / kShared; }

inline QueryBlock query_block(const Attention& in, int64_t batch, int64_t group, int64_t index) {
    QueryBlock block{};
    block.batch = batch;
    block.group = group;
    block.count = std::min(kQueries, in.queries * in.heads - index * kQueries);
    block.padded = round_up(block.count);
    for (int64_t lane = 0; lane < block.padded; ++lane) {
        const int64_t pair = index * kQueries + std::min(lane, block.count - 1);
        block.row[lane] = pair / in.heads;
        block.head[lane] = pair % in.heads;
        const int64_t position = block.row[lane] + in.keys - in.queries;
        block.position[lane] = static_cast<int32_t>(position);
        if (in.segments) block.segment[lane] = in.segments[batch * in.keys + position];
        if (in.slopes) block.slope[lane] = in.slopes[group * in.heads + block.head[lane]] * kLog2E;
    }
    block.first_position = block.position[0];
    block.last_position = block.position[block.count - 1];
    if (in.segments) {
        block.low_segment = *std::min_element(block.segment, block.segment + block.count);
        block.high_segment = *std::max_element(block.segment, block.segment + block.count);
    }
    return block;
}

struct KeyRange {
    int64_t begin, end;
};

// The smallest contiguous range that contains every key visible to a row of the block.
inline KeyRange visible_keys(const Attention& in, const QueryBlock& block) {
    KeyRange range{0, in.keys};
    if (in.causal) range.end = std::min(range.end, block.last_position + 1);
    if (in.window) range.begin = std::max<int64_t>(range.begin, block.first_position - in.window + 1);
    if (in.segments) {
        const int32_t* const segments = in.segments + block.batch * in.keys;
        const auto foreign = [&](int64_t j) {
            return segments[j] < block.low_segment || segments[j] > block.high_segment;
        };
        while (range.begin < range.end && foreign(range.begin)) ++range.begin;
        while (range.begin < range.end && foreign(range.end - 1)) --range.end;
    }
    return range;
}

inline KeyRange intersection(const KeyRange& a, const KeyRange& b) {
    return {std::max(a.begin, b.begin), std::min(a.end, b.end)};
}

enum class Visible { kNone, kSome, kAll };

// How much of keys [begin, end) the rows of the block see.
inline Visible visibility(const Attention& in, const QueryBlock& block, int64_t begin, int64_t end) {
    bool all = true;
    if (in.causal) all = all && end - 1 <= block.first_position;
    if (in.window) all = all && begin > block.last_position - in.window;
    if (in.segments) {
        const int32_t* const segments = in.segments + block.batch * in.keys;
        int32_t low = segments[begin], high = segments[begin];
        for (int64_t j = begin; j < end; ++j) {
            low = std::min(low, segments[j]);
            high = std::max(high, segments[j]);
        }
        if (low > block.high_segment || high < block.low_segment) return Visible::kNone;
        all = all && low == high && block.low_segment == block.high_segment;
    }
    return all ? Visible::kAll : Visible::kSome;
}

// 2^x with relative error 8e-8; exactly 0 below 2^-126, NaN for NaN.
NEOX_INLINE Vec exp2(Vec x) {
    const Vec shifted = x + 12582912.0f;  // 1.5 * 2^23: the low mantissa bits become x rounded to an integer
    const Vec f = x - (shifted - 12582912.0f);
    Vec p = f * 1.535336180e-4f + 1.339887445e-3f;
    p = p * f + 9.618437358e-3f;
    p = p * f + 5.550332471e-2f;
    p = p * f + 2.402264791e-1f;
    p = p * f + 6.931472029e-1f;
    p = p * f + 1.0f;
    return x < -126.0f ? Vec{} : from_bits(bits(p) + (bits(shifted) << 23));
}

// Factor on products of queries and keys that gives scores in base 2, or with softcap the argument of tanh.
inline float query_factor(const Attention& in) { return in.softcap > 0 ? in.scale / in.softcap : in.scale * kLog2E; }

// scores [key][query] become softcap * tanh(scores) in base 2. Unless null, slope becomes the derivative 1 - tanh^2.
inline void cap_scores(const Attention& in, const QueryBlock& block, int64_t keys, float* scores, float* slope) {
    const float cap = in.softcap * kLog2E;
    for (int64_t j = 0; j < keys; ++j) {
        for (int64_t i = 0; i < block.padded; i += kVecWidth) {
            const Vec t = tanh(load(scores + j * kQueries + i));
            store(scores + j * kQueries + i, t * cap);
            if (slope) store(slope + j * kQueries + i, 1.0f - t * t);
        }
    }
}

inline VecInt load_int(const int32_t* p) {
    VecInt v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}

inline void add_alibi(const QueryBlock& block, int64_t begin, int64_t end, float* scores) {
    for (int64_t j = begin; j < end; ++j, scores += kQueries) {
        for (int64_t i = 0; i < block.padded; i += kVecWidth) {
            const Vec distance =
                abs(__builtin_convertvector(load_int(block.position + i) - static_cast<int32_t>(j), Vec));
            store(scores + i, load(scores + i) - load(block.slope + i) * distance);
        }
    }
}

// Sets the scores of keys that a row does not see to -inf.
inline void mask_scores(const Attention& in, const QueryBlock& block, int64_t begin, int64_t end, float* scores) {
    const int32_t* const segments = in.segments ? in.segments + block.batch * in.keys : nullptr;
    const int32_t reach = static_cast<int32_t>(std::min<int64_t>(in.window, std::numeric_limits<int32_t>::max()));
    for (int64_t j = begin; j < end; ++j, scores += kQueries) {
        const int32_t key = static_cast<int32_t>(j);
        for (int64_t i = 0; i < block.padded; i += kVecWidth) {
            const VecInt position = load_int(block.position + i);
            VecInt hidden = {};
            if (in.causal) hidden |= position < key;
            if (in.window) hidden |= position - key >= reach;
            if (segments) hidden |= load_int(block.segment + i) != segments[j];
            store(scores + i, hidden ? splat(-kInfinity) : load(scores + i));
        }
    }
}

// Applies softcap, ALiBi and masks: all between the product of queries and keys and the softmax.
inline void finish_scores(const Attention& in, const QueryBlock& block, int64_t begin, int64_t end, Visible visible,
                          float* scores, float* cap_slope) {
    if (in.softcap > 0) cap_scores(in, block, end - begin, scores, cap_slope);
    if (in.slopes) add_alibi(block, begin, end, scores);
    if (visible == Visible::kSome) mask_scores(in, block, begin, end, scores);
}

// Dropout factors [key][query] of the probabilities of keys [begin, end): 0 or 1 / (1 - p). The random word of key j
// for row i of head h in batch b has index ((b * n + h) * s + i) * ceil(t / 4) * 4 + j, which does not depend on the
// tiling.
inline void draw_dropout(const Attention& in, const QueryBlock& block, int64_t begin, int64_t end, float* factors) {
    const int64_t quads = (in.keys + 3) / 4, heads = in.groups * in.heads;
    const uint32_t threshold = static_cast<uint32_t>(dropout_threshold(in.dropout));
    const float keep_scale = 1.0f / (1.0f - in.dropout);
    uint64_t first[kQueries];
    for (int64_t i = 0; i < block.padded; ++i) {
        const int64_t head = block.batch * heads + block.group * in.heads + block.head[i];
        first[i] = static_cast<uint64_t>((head * in.queries + block.row[i]) * quads);
    }
    for (int64_t quad = begin / 4; quad * 4 < end; ++quad) {
        uint32_t words[4][kQueries];
        for (int64_t i = 0; i < block.padded; ++i) {
            const PhiloxWords drawn = philox(in.seed[0], first[i] + static_cast<uint64_t>(quad), in.seed[1]);
            for (int w = 0; w < 4; ++w) words[w][i] = drawn.word[w];
        }
        for (int64_t j = std::max(quad * 4, begin); j < std::min(quad * 4 + 4, end); ++j) {
            for (int64_t i = 0; i < block.padded; ++i)
                factors[(j - begin) * kQueries + i] = words[j % 4][i] >= threshold ? keep_scale : 0.0f;
        }
    }
}

// Loads a row of head_dim channels and pads it with zeros to `padded` channels.
template <class T>
inline void load_row(const T* from, int64_t head_dim, int64_t padded, float* to) {
    int64_t c = 0;
    for (; c + kVecWidth <= head_dim; c += kVecWidth) store(to + c, load(from + c));
    if (c < padded) store(to + c, load(from + c, head_dim - c));
}

inline void load_row(const bf16* from, int64_t head_dim, int64_t padded, Pair* to) {
    constexpr int64_t kStep = 2 * kVecWidth;
    int64_t c = 0;
    const auto copy = [&](const bf16* values) {
        Vec words;
        std::memcpy(&words, values, sizeof(words));
        store(to + c / 2, words);
    };
    for (; c + kStep <= head_dim; c += kStep) copy(from + c);
    if (c < padded) {
        bf16 rest[kStep] = {};
        std::copy(from + c, from + head_dim, rest);
        copy(rest);
    }
}

template <class T>
inline void store_row(const float* from, int64_t head_dim, T* to) {
    int64_t c = 0;
    for (; c + kVecWidth <= head_dim; c += kVecWidth) store(to + c, load(from + c));
    if (c < head_dim) store(to + c, load(from + c), head_dim - c);
}

// Loads a block's rows of a [batch, sequence, groups, heads, head_dim] tensor. Lanes past its rows become zeros.
template <class T, class E>
inline void load_queries(const Attention& in, const QueryBlock& block, const T* data, const AttentionStrides& strides,
                         E* rows) {
    const int64_t padded = padded_channels<E>(in.head_dim), row = padded / kTerms<E>;
    const T* const base = data + block.batch * strides.batch + block.group * strides.group;
    for (int64_t i = 0; i < block.count; ++i) {
        load_row(base + block.row[i] * strides.sequence + block.head[i] * strides.head, in.head_dim, padded,
                 rows + i * row);
    }
    std::fill(rows + block.count * row, rows + block.padded * row, E{});
}

// Stores a block's rows, fp32 [row][padded], to such a tensor.
template <class T>
inline void store_queries(const Attention& in, const QueryBlock& block, const float* rows, int64_t padded, T* data,
                          const AttentionStrides& strides) {
    T* const base = data + block.batch * strides.batch + block.group * strides.group;
    for (int64_t i = 0; i < block.count; ++i) {
        store_row(rows + i * padded, in.head_dim,
                  base + block.row[i] * strides.sequence + block.head[i] * strides.head);
    }
}

// A tile as operand of sums over channels, along [row][channel / kTerms], and of sums over rows, across [row /
// kTerms][channel]. For floats both are the same buffer. Pairs of bf16 need one copy of each; `across` is null if
// nothing sums over the rows.
template <class E>
struct Operand {
    E* along;
    E* across;
};

// Fills across from along. An unpaired last row is paired with zeros.
template <class E>
inline void pair_rows(const Operand<E>& operand, int64_t rows, int64_t padded) {
    if constexpr (kTerms<E> == 2) {
        for (int64_t i = 0; i < rows; i += 2) {
            const E* const row = operand.along + i * padded / 2;
            for (int64_t c = 0; c < padded; c += 2 * kVecWidth) {
                const Vec first = load(row + c / 2), second = i + 1 < rows ? load(row + (padded + c) / 2) : Vec{};
                Arithmetic<E>::interleave(first, second, operand.across + i / 2 * padded + c);
            }
        }
    }
}

// Loads rows [range.begin, range.end) of the keys or values of one batch and group.
template <class T, class E>
inline void load_keys(const Attention& in, const QueryBlock& block, KeyRange range, const void* data,
                      const AttentionStrides& strides, const Operand<E>& to) {
    const int64_t padded = padded_channels<E>(in.head_dim), row = padded / kTerms<E>;
    const T* const base = static_cast<const T*>(data) + block.batch * strides.batch + block.group * strides.group;
    for (int64_t j = range.begin; j < range.end; ++j)
        load_row(base + j * strides.sequence, in.head_dim, padded, to.along + (j - range.begin) * row);
    if (to.across) pair_rows(to, range.end - range.begin, padded);
}

// Transposes rows [query][channel / kTerms] to columns [channel / kTerms][query].
template <class E>
inline void to_columns(const Attention& in, const QueryBlock& block, const E* rows, E* columns) {
    const int64_t row = padded_channels<E>(in.head_dim) / kTerms<E>;
    transpose(rows, row, block.padded, row, columns, kQueries);
}

// products[query] = sum over channels of a [channel][query] * b [channel][query], in the order of `product`.
template <class E>
inline void product_of_columns(int64_t channels, int64_t queries, const E* a, const E* b, float* products) {
    for (int64_t i = 0; i < queries; i += kVecWidth) {
        Vec total = {};
        for (int64_t c = 0; c < elements<E>(channels); ++c)
            total = Arithmetic<E>::multiply_add(load(a + c * kQueries + i), load(b + c * kQueries + i), total);
        store(products + i, total);
    }
}

// The range extended to start at the first key of an element.
template <class E>
inline KeyRange align_to_elements(KeyRange range) {
    return {range.begin - range.begin % kTerms<E>, range.end};
}

// Sets the missing row of a tile of scores or their gradients, [key][query], to `value` if the last element is
// incomplete.
template <class E>
inline void fill_last(int64_t keys, float value, float* tile) {
    if (keys % kTerms<E>) std::fill_n(tile + keys * kQueries, kQueries, value);
}

// Scratch memory of one thread, zero-initialised, from which buffers aligned to 64 bytes are carved. Sizes count
// elements of 4 bytes.
class Scratch {
  public:
    explicit Scratch(int64_t elements) : lines_(static_cast<size_t>((elements + 15) / 16 + 64)) {}

    template <class E = float>
    E* allocate(int64_t elements) {
        static_assert(sizeof(E) == sizeof(float));
        float* const buffer = lines_.data()->x + used_;
        used_ += (elements + 15) / 16 * 16;
        return reinterpret_cast<E*>(buffer);
    }

  private:
    struct alignas(64) Line {
        float x[16];
    };
    std::vector<Line> lines_;
    int64_t used_ = 0;
};

// Order in which n blocks of growing cost are assigned to threads, so that equal ranges cost about the same: 0, n - 1,
// 1, n - 2, ...
inline int64_t alternating(int64_t index, int64_t n) { return index % 2 == 0 ? index / 2 : n - 1 - index / 2; }

}  // namespace neox::attention
