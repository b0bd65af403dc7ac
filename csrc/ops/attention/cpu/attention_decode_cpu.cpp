// Forward for a few query rows per kv head against many keys, as in decoding with a KV cache. It is bound by reading
// the keys and values once.
//
// Vector lanes hold channels, because the query blocks of attention_cpu.cpp would leave most lanes idle. Threads share
// fixed-length spans of keys. Each span yields a partial softmax; the partials are combined in order, so that the bits
// do not depend on the number of threads.
#include <cmath>

#include "ops/attention/attention.h"
#include "ops/attention/cpu/decode.h"
#include "ops/attention/cpu/query_block.h"

namespace neox {
namespace {

using namespace attention;

constexpr int64_t kSpan = 512;  // keys of a partial softmax
// rows to prefetch: heads are interleaved, a stride that the hardware prefetcher does not follow
constexpr int64_t kPrefetch = 16;

template <class T>
NEOX_INLINE void prefetch_row(const T* row, int64_t head_dim) {
    for (int64_t c = 0; c < head_dim; c += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + c);
}

// scores[row][j] = query row * key j. queries [rows][padded], scores [rows][kSpan].
template <class T>
void score_span(const float* queries, int64_t rows, int64_t head_dim, const T* keys, int64_t stride, int64_t count,
                float* scores) {
    const int64_t padded = round_up(head_dim), full = head_dim / kVecWidth * kVecWidth;
    for (int64_t j = 0; j < count; j += kVecWidth) {
        const int64_t used = std::min<int64_t>(kVecWidth, count - j);
        for (int64_t i = 0; i < used && j + i + kPrefetch < count; ++i)
            prefetch_row(keys + (j + i + kPrefetch) * stride, head_dim);
        for (int64_t r = 0; r < rows; ++r) {
            const float* const query = queries + r * padded;
            Vec products[kVecWidth] = {};
            for (int64_t i = 0; i < used; ++i) {
                const T* const key = keys + (j + i) * stride;
                Vec total = {};
                for (int64_t c = 0; c < full; c += kVecWidth) total += load(key + c) * load(query + c);
                if (full < head_dim) total += load(key + full, head_dim - full) * load(query + full);
                products[i] = total;
            }
            store(scores + r * kSpan + j, sum_lanes(products));
        }
    }
}

// Applies softcap, ALiBi and masks to one row's scores against keys [begin, end). Lanes hold keys.
void finish_row(const Attention& in, const QueryBlock& block, int64_t row, int64_t begin, int64_t end, float* scores) {
    const int32_t* const segments = in.segments ? in.segments + block.batch * in.keys : nullptr;
    const int32_t position = block.position[row];
    for (int64_t j = begin; j < end; j += kVecWidth) {
        float* const at = scores + (j - begin);
        const VecInt key = lane_index() + static_cast<int32_t>(j);
        VecInt hidden = key >= static_cast<int32_t>(end);
        if (in.causal) hidden |= key > position;
        if (in.window)
            hidden |= position - key >=
                      static_cast<int32_t>(std::min<int64_t>(in.window, std::numeric_limits<int32_t>::max()));
        if (segments) {
            for (int64_t i = 0; i < std::min<int64_t>(kVecWidth, end - j); ++i)
                hidden[i] |= segments[j + i] != block.segment[row] ? -1 : 0;
        }
        Vec score = load(at);
        if (in.softcap > 0) score = tanh(score) * (in.softcap * kLog2E);
        if (in.slopes) score -= block.slope[row] * abs(__builtin_convertvector(key - position, Vec));
        store(at, hidden ? splat(-kInfinity) : score);
    }
}

struct Partial {
    float peak, total;
};

// Replaces the scores of a row by 2^(score - peak). Lanes past the last key become zeros.
Partial online_softmax_row(int64_t count, float* scores) {
    Vec peaks = splat(-kInfinity), totals = {};
    for (int64_t j = 0; j < count; j += kVecWidth) peaks = max(load(scores + j), peaks);
    const float peak = max_lane(peaks);
    const float base = peak == -kInfinity ? 0.0f : peak;
    for (int64_t j = 0; j < count; j += kVecWidth) {
        const Vec p = exp2(load(scores + j) - base);
        totals += p;
        store(scores + j, p);
    }
    return {peak, sum(totals)};
}

// out[row][c ...] = sum over j of p[row][j] * values[j][c ...] for R rows and V vectors of channels; the last vector
// holds `rest` channels unless that is 0.
template <int R, int V, class T>
NEOX_INLINE void weigh_block(const float* p, const T* values, int64_t stride, int64_t count, int64_t rest, float* out,
                             int64_t out_row) {
    Vec total[R][V] = {};
    for (int64_t j = 0; j < count; ++j) {
        const T* const row = values + j * stride;
        if (j + kPrefetch < count) prefetch_row(row + kPrefetch * stride, V * kVecWidth);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const Vec value = rest ? load(row + v * kVecWidth, rest) : load(row + v * kVecWidth);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) total[r][v] += splat(p[r * kSpan + j]) * value;
        }
    }
    for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) store(out + r * out_row + v * kVecWidth, total[r][v]);
    }
}

template <int R, class T>
void weigh_rows(const float* p, const T* values, int64_t stride, int64_t count, int64_t head_dim, float* out) {
    const int64_t padded = round_up(head_dim);
    int64_t c = 0;
    for (; c + 4 * kVecWidth <= head_dim; c += 4 * kVecWidth)
        weigh_block<R, 4>(p, values + c, stride, count, 0, out + c, padded);
    for (; c + kVecWidth <= head_dim; c += kVecWidth)
        weigh_block<R, 1>(p, values + c, stride, count, 0, out + c, padded);
    if (c < head_dim) weigh_block<R, 1>(p, values + c, stride, count, head_dim - c, out + c, padded);
}

// out [rows][padded] = p [rows][kSpan] * values.
template <class T>
void weigh_span(const float* p, int64_t rows, int64_t head_dim, const T* values, int64_t stride, int64_t count,
                float* out) {
    const int64_t padded = round_up(head_dim);
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) weigh_rows<4>(p + r * kSpan, values, stride, count, head_dim, out + r * padded);
    for (; r < rows; ++r) weigh_rows<1>(p + r * kSpan, values, stride, count, head_dim, out + r * padded);
}

// Processes one span of keys: the partial softmax of each row and its weighted sum of the values, not yet divided.
template <class T>
void decode_span(const Attention& in, const QueryBlock& block, int64_t begin, int64_t end, float* queries,
                 float* scores, Partial* partials, float* out) {
    const int64_t padded = round_up(in.head_dim), count = end - begin;
    const auto rows_of = [&](const void* data, const AttentionStrides& strides) {
        return static_cast<const T*>(data) + block.batch * strides.batch + block.group * strides.group +
               begin * strides.sequence;
    };
    load_queries(in, block, static_cast<const T*>(in.q), in.q_strides, queries);
    const float factor = query_factor(in);
    for (int64_t i = 0; i < block.count * padded; i += kVecWidth) store(queries + i, load(queries + i) * factor);
    score_span(queries, block.count, in.head_dim, rows_of(in.k, in.k_strides), in.k_strides.sequence, count, scores);
    for (int64_t r = 0; r < block.count; ++r) {
        finish_row(in, block, r, begin, end, scores + r * kSpan);
        partials[r] = online_softmax_row(count, scores + r * kSpan);
    }
    weigh_span(scores, block.count, in.head_dim, rows_of(in.v, in.v_strides), in.v_strides.sequence, count, out);
}

// Combines the spans of one kv head.
template <class T>
void combine_spans(const Attention& in, const QueryBlock& block, int64_t spans, const Partial* partials,
                   float* out_parts, T* out, float* lse) {
    const int64_t padded = round_up(in.head_dim), heads = in.groups * in.heads;
    for (int64_t r = 0; r < block.count; ++r) {
        float peak = -kInfinity, total = 0;
        for (int64_t s = 0; s < spans; ++s) peak = std::max(peak, partials[s * block.count + r].peak);
        for (int64_t s = 0; s < spans; ++s) {
            const Partial& part = partials[s * block.count + r];
            const float weight = part.peak == -kInfinity ? 0.0f : std::exp2(part.peak - peak);
            total += part.total * weight;
            float* const values = out_parts + (s * block.count + r) * padded;
            float* const sums = out_parts + r * padded;  // in the buffer of span 0
            for (int64_t c = 0; c < padded; c += kVecWidth)
                store(sums + c, s ? load(sums + c) + load(values + c) * weight : load(values + c) * weight);
        }
        const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
        for (int64_t c = 0; c < padded; c += kVecWidth)
            store(out_parts + r * padded + c, load(out_parts + r * padded + c) * inverse);
        const int64_t head = block.group * in.heads + block.head[r];
        lse[(block.batch * heads + head) * in.queries + block.row[r]] =
            total == 0.0f ? -kInfinity : (peak + std::log2(total)) * kLn2;
    }
    store_queries(in, block, out_parts, padded, out,
                  {in.queries * heads * in.head_dim, heads * in.head_dim, in.heads * in.head_dim, in.head_dim});
}

}  // namespace

bool attention_decodes(const Attention& in) {
    return in.queries * in.heads <= kDecodeRows && in.dropout == 0 && in.keys > 0;
}

void attention_decode_cpu(const Attention& in, void* out, float* lse, const Parallel& parallel) {
    const int64_t pairs = in.batch * in.groups, rows = in.queries * in.heads, padded = round_up(in.head_dim);
    const int64_t spans = (in.keys + kSpan - 1) / kSpan;
    std::vector<Partial> partials(static_cast<size_t>(pairs * spans * rows));
    Scratch parts(pairs * spans * rows * padded);
    float* const out_parts = parts.allocate(pairs * spans * rows * padded);
    dispatch(in.dtype, [&](auto zero) {
        using T = decltype(zero);
        parallel(pairs * spans, 1, [&](int64_t first, int64_t last) {
            Scratch scratch(round_up(rows) * padded + rows * kSpan);
            float* const queries = scratch.allocate(round_up(rows) * padded);
            float* const scores = scratch.allocate(rows * kSpan);
            for (int64_t unit = first; unit < last; ++unit) {
                const QueryBlock block = query_block(in, unit / spans / in.groups, unit / spans % in.groups, 0);
                const KeyRange seen = visible_keys(in, block);
                const int64_t begin = std::max(unit % spans * kSpan, seen.begin),
                              end = std::min((unit % spans + 1) * kSpan, seen.end);
                if (begin >= end) {
                    std::fill_n(partials.data() + unit * rows, rows, Partial{-kInfinity, 0.0f});
                    std::fill_n(out_parts + unit * rows * padded, rows * padded, 0.0f);
                } else {
                    decode_span<T>(in, block, begin, end, queries, scores, partials.data() + unit * rows,
                                   out_parts + unit * rows * padded);
                }
            }
        });
        for (int64_t pair = 0; pair < pairs; ++pair) {
            const QueryBlock block = query_block(in, pair / in.groups, pair % in.groups, 0);
            const int64_t unit = pair * spans;
            combine_spans(in, block, spans, partials.data() + unit * rows, out_parts + unit * rows * padded,
                          static_cast<T*>(out), lse);
        }
    });
}

}  // namespace neox
