#include <cmath>

#include "ops/attention/attention.h"
#include "ops/attention/block.h"
#include "ops/attention/decode.h"

namespace neox {
namespace {

using namespace attention;

struct Forward {
    Scratch scratch;
    float* rows;           // [query][head_dim]
    float* query_columns;  // [head_dim][query]
    float* out_columns;    // [head_dim][query]
    float* keys;           // [key][head_dim]
    float* values;         // [key][head_dim]
    float* scores;         // [key][query]
    float* peak;           // [query] largest score so far
    float* total;          // [query] sum of 2^(score - peak) so far
    float* rescale;        // [query] what the last tile multiplied the sums by
    float* dropped;        // [key][query] factors of dropout, or null

    Forward(int64_t padded, bool drops) : scratch(3 * kQueries * padded + 2 * kKeys * padded + (1 + drops) * kKeys * kQueries + 3 * kQueries) {
        rows = scratch.take(kQueries * padded);
        query_columns = scratch.take(kQueries * padded);
        out_columns = scratch.take(kQueries * padded);
        keys = scratch.take(kKeys * padded);
        values = scratch.take(kKeys * padded);
        scores = scratch.take(kKeys * kQueries);
        peak = scratch.take(kQueries);
        total = scratch.take(kQueries);
        rescale = scratch.take(kQueries);
        dropped = drops ? scratch.take(kKeys * kQueries) : nullptr;
    }
};

// Scores of a tile to 2^(score - peak) for V vectors of queries from lane i on; peak and total move on. True if a peak rose.
template <int V>
bool soften(const Forward& work, int64_t i, int64_t keys) {
    Vec peak[V], base[V], sum[V] = {};
    for (int v = 0; v < V; ++v) peak[v] = load(work.peak + i + v * kVecWidth);
    for (int64_t j = 0; j < keys; ++j) {
        for (int v = 0; v < V; ++v) peak[v] = max(load(work.scores + j * kQueries + i + v * kVecWidth), peak[v]);
    }
    VecInt rose = {};
    for (int v = 0; v < V; ++v) {
        base[v] = peak[v] == -kInfinity ? Vec{} : peak[v];
        const Vec before = load(work.peak + i + v * kVecWidth);
        rose |= before != peak[v];
        store(work.rescale + i + v * kVecWidth, exp2(before - base[v]));
        store(work.peak + i + v * kVecWidth, peak[v]);
    }
    for (int64_t j = 0; j < keys; ++j) {
        for (int v = 0; v < V; ++v) {
            float* const at = work.scores + j * kQueries + i + v * kVecWidth;
            const Vec p = exp2(load(at) - base[v]);
            sum[v] += p;
            store(at, p);
        }
    }
    for (int v = 0; v < V; ++v) {
        float* const total = work.total + i + v * kVecWidth;
        store(total, load(total) * load(work.rescale + i + v * kVecWidth) + sum[v]);
    }
    int32_t any = 0;
    for (int lane = 0; lane < kVecWidth; ++lane) any |= rose[lane];
    return any != 0;
}

void rescale_out(const Forward& work, const QueryBlock& block, int64_t head_dim) {
    for (int64_t c = 0; c < head_dim; ++c) {
        for (int64_t i = 0; i < block.padded; i += kVecWidth) {
            float* const at = work.out_columns + c * kQueries + i;
            store(at, load(at) * load(work.rescale + i));
        }
    }
}

void drop(const Attention& in, const QueryBlock& block, int64_t begin, int64_t end, const Forward& work) {
    draw_dropout(in, block, begin, end, work.dropped);
    for (int64_t j = 0; j < end - begin; ++j) {
        for (int64_t i = j * kQueries; i < j * kQueries + block.padded; i += kVecWidth) store(work.scores + i, load(work.scores + i) * load(work.dropped + i));
    }
}

// One tile of keys: the softmax moves on and the values are added.
void add_tile(const Attention& in, const QueryBlock& block, int64_t begin, int64_t end, Visible visible, const Forward& work) {
    const int64_t padded = round_up(in.head_dim), keys = end - begin;
    product<false>(keys, block.padded, in.head_dim, Left{work.keys, padded, 1}, work.query_columns, kQueries, work.scores, kQueries, false);
    finish_scores(in, block, begin, end, visible, work.scores, nullptr);
    bool rose = false;
    int64_t i = 0;
    for (; i + 4 * kVecWidth <= block.padded; i += 4 * kVecWidth) rose |= soften<4>(work, i, keys);
    for (; i < block.padded; i += kVecWidth) rose |= soften<1>(work, i, keys);
    if (work.dropped) drop(in, block, begin, end, work);
    if (rose) rescale_out(work, block, in.head_dim);
    product<true>(in.head_dim, block.padded, keys, Left{work.values, 1, padded}, work.scores, kQueries, work.out_columns, kQueries, true);
}

// Divides by the sums and writes the rows of the block.
template <class T>
void finish_block(const Attention& in, const QueryBlock& block, const Forward& work, T* out, float* lse) {
    const int64_t padded = round_up(in.head_dim), heads = in.groups * in.heads;
    for (int64_t i = 0; i < block.padded; ++i) {
        const bool blind = work.total[i] == 0.0f;
        work.rescale[i] = blind ? 0.0f : 1.0f / work.total[i];
        if (i >= block.count) continue;
        const int64_t head = block.group * in.heads + block.head[i];
        lse[(block.batch * heads + head) * in.queries + block.row[i]] = blind ? -kInfinity : (work.peak[i] + std::log2(work.total[i])) * kLn2;
    }
    rescale_out(work, block, in.head_dim);
    transpose(work.out_columns, kQueries, padded, block.padded, work.rows, padded);
    store_queries(in, block, work.rows, out, {in.queries * heads * in.head_dim, heads * in.head_dim, in.heads * in.head_dim, in.head_dim});
}

template <class T>
void forward_block(const Attention& in, const QueryBlock& block, const Forward& work, T* out, float* lse) {
    const int64_t padded = round_up(in.head_dim);
    load_queries(in, block, static_cast<const T*>(in.q), in.q_strides, work.rows);
    to_columns(in, block, work.rows, query_factor(in), work.query_columns);
    std::fill(work.out_columns, work.out_columns + padded * kQueries, 0.0f);
    std::fill(work.peak, work.peak + kQueries, -kInfinity);
    std::fill(work.total, work.total + kQueries, 0.0f);
    const KeyRange range = visible_keys(in, block);
    for (int64_t begin = range.begin; begin < range.end; begin += kKeys) {
        const int64_t end = std::min(begin + kKeys, range.end);
        const Visible visible = visibility(in, block, begin, end);
        if (visible == Visible::kNone) continue;
        load_keys(in, block, begin, end, static_cast<const T*>(in.k), in.k_strides, work.keys);
        load_keys(in, block, begin, end, static_cast<const T*>(in.v), in.v_strides, work.values);
        add_tile(in, block, begin, end, visible, work);
    }
    finish_block(in, block, work, out, lse);
}

}  // namespace

void attention_forward_cpu(const Attention& in, void* out, float* lse, const Parallel& parallel) {
    if (attention_decodes(in)) return attention_decode_cpu(in, out, lse, parallel);
    const int64_t blocks = num_query_blocks(in);
    parallel(in.batch * in.groups * blocks, 1, [&](int64_t begin, int64_t end) {
        const Forward work(round_up(in.head_dim), in.dropout > 0);
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t pair = unit / blocks;
            const QueryBlock block = query_block(in, pair / in.groups, pair % in.groups, folded(unit % blocks, blocks));
            dispatch(in.dtype, [&](auto zero) {
                using T = decltype(zero);
                forward_block(in, block, work, static_cast<T*>(out), lse);
            });
        }
    });
}

}  // namespace neox
