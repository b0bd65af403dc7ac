#include <cmath>

#include "ops/attention/attention.h"
#include "ops/attention/block.h"

namespace neox {
namespace {

using namespace attention;

// Which gradients a pass over (block of queries, tile of keys) pairs computes. One pass computes all of them where there are as many kv heads
// as threads; else a pass over blocks of queries computes dq and one over ranges of keys dk and dv, at 7 products instead of 5.
struct Wanted {
    bool queries, keys;
};

// Every sum runs in the same order in both: over the tiles of keys in order for dq, over the blocks of queries in order for dk and dv. The bits
// therefore depend neither on the threads nor on the number of passes.
struct Backward {
    Scratch scratch;
    float *query_rows, *dout_rows;        // [query][head_dim]
    float *query_columns, *dout_columns;  // [head_dim][query]
    float* dquery_columns;                // [head_dim][query]
    float *keys, *values;                 // [key][head_dim]
    float *p, *dscores;                   // [key][query]
    float* cap_slope;                     // [key][query]
    float* dropped;                       // [key][query] factors of dropout, or null
    float *lse, *delta;                   // [query] in base 2; sum over channels of dout * out
    float *dkeys, *dvalues;               // [key of the range][head_dim], sums over all queries

    Backward(int64_t padded, int64_t range, bool capped, bool drops)
        : scratch(5 * kQueries * padded + 2 * kKeys * padded + (2 + capped + drops) * kKeys * kQueries + 2 * kQueries + 2 * range * padded) {
        query_rows = scratch.take(kQueries * padded);
        dout_rows = scratch.take(kQueries * padded);
        query_columns = scratch.take(kQueries * padded);
        dout_columns = scratch.take(kQueries * padded);
        dquery_columns = scratch.take(kQueries * padded);
        keys = scratch.take(kKeys * padded);
        values = scratch.take(kKeys * padded);
        p = scratch.take(kKeys * kQueries);
        dscores = scratch.take(kKeys * kQueries);
        cap_slope = capped ? scratch.take(kKeys * kQueries) : nullptr;
        dropped = drops ? scratch.take(kKeys * kQueries) : nullptr;
        lse = scratch.take(kQueries);
        delta = scratch.take(kQueries);
        dkeys = scratch.take(range * padded);
        dvalues = scratch.take(range * padded);
    }
};

// The rows of a block: queries, dout, both transposed, and the two numbers per row.
template <class T>
void load_block(const Attention& in, const AttentionGradients& grad, const QueryBlock& block, const Backward& work) {
    const int64_t heads = in.groups * in.heads;
    // out goes where the queries go afterwards: only its product with dout is needed
    load_queries(in, block, static_cast<const T*>(grad.out), {in.queries * heads * in.head_dim, heads * in.head_dim, in.heads * in.head_dim, in.head_dim},
                 work.query_rows);
    load_queries(in, block, static_cast<const T*>(grad.dout), grad.dout_strides, work.dout_rows);
    to_columns(in, block, work.query_rows, 1.0f, work.query_columns);
    to_columns(in, block, work.dout_rows, 1.0f, work.dout_columns);
    // over the channels in the order of the product dout . value: a row that sees one key then gets a score gradient of exactly zero
    product_of_columns(in.head_dim, block.padded, work.query_columns, work.dout_columns, work.delta);
    for (int64_t i = 0; i < block.padded; ++i) {
        const int64_t head = block.group * in.heads + block.head[i];
        const float lse = grad.lse[(block.batch * heads + head) * in.queries + block.row[i]];
        work.lse[i] = lse == -kInfinity ? kInfinity : lse * kLog2E;  // a row that saw nothing: 2^(score - inf) = 0
    }
    load_queries(in, block, static_cast<const T*>(in.q), in.q_strides, work.query_rows);
    to_columns(in, block, work.query_rows, query_factor(in), work.query_columns);
}

// p = 2^(score - lse) where not dropped; dscores, which comes in as dout . value, becomes the gradient of the score.
void differentiate_softmax(const QueryBlock& block, int64_t keys, const Backward& work) {
    for (int64_t j = 0; j < keys; ++j) {
        for (int64_t i = 0; i < block.padded; i += kVecWidth) {
            const int64_t at = j * kQueries + i;
            const Vec p = exp2(load(work.p + at) - load(work.lse + i));
            const Vec kept = work.dropped ? load(work.dropped + at) : splat(1.0f);
            Vec dscore = p * (load(work.dscores + at) * kept - load(work.delta + i));
            if (work.cap_slope) dscore *= load(work.cap_slope + at);
            store(work.p + at, p * kept);
            store(work.dscores + at, dscore);
        }
    }
}

void add_tile(const Attention& in, const QueryBlock& block, int64_t begin, int64_t end, Visible visible, Wanted wanted, int64_t first, const Backward& work) {
    const int64_t padded = round_up(in.head_dim), keys = end - begin;
    product<false>(keys, block.padded, in.head_dim, Left{work.keys, padded, 1}, work.query_columns, kQueries, work.p, kQueries, false);
    finish_scores(in, block, begin, end, visible, work.p, work.cap_slope);
    product<false>(keys, block.padded, in.head_dim, Left{work.values, padded, 1}, work.dout_columns, kQueries, work.dscores, kQueries, false);
    if (work.dropped) draw_dropout(in, block, begin, end, work.dropped);
    differentiate_softmax(block, keys, work);
    if (wanted.keys) {
        const int64_t at = (begin - first) * padded;
        product<false>(keys, padded, block.count, Left{work.p, kQueries, 1}, work.dout_rows, padded, work.dvalues + at, padded, true);
        product<false>(keys, padded, block.count, Left{work.dscores, kQueries, 1}, work.query_rows, padded, work.dkeys + at, padded, true);
    }
    if (wanted.queries) {
        product<true>(in.head_dim, block.padded, keys, Left{work.keys, 1, padded}, work.dscores, kQueries, work.dquery_columns, kQueries, true);
    }
}

// One block of queries against keys [range.begin, range.end).
template <class T>
void backward_block(const Attention& in, const AttentionGradients& grad, const QueryBlock& block, KeyRange range, Wanted wanted, const Backward& work) {
    const int64_t padded = round_up(in.head_dim);
    const KeyRange seen = visible_keys(in, block);
    const int64_t first = std::max(seen.begin, range.begin), last = std::min(seen.end, range.end);
    if (wanted.queries) std::fill(work.dquery_columns, work.dquery_columns + padded * kQueries, 0.0f);
    if (first < last) load_block<T>(in, grad, block, work);
    for (int64_t begin = first; begin < last; begin += kKeys) {
        const int64_t end = std::min(begin + kKeys, last);
        const Visible visible = visibility(in, block, begin, end);
        if (visible == Visible::kNone) continue;
        load_keys(in, block, begin, end, static_cast<const T*>(in.k), in.k_strides, work.keys);
        load_keys(in, block, begin, end, static_cast<const T*>(in.v), in.v_strides, work.values);
        add_tile(in, block, begin, end, visible, wanted, range.begin, work);
    }
    if (!wanted.queries) return;
    for (int64_t at = 0; at < in.head_dim * kQueries; at += kVecWidth) store(work.dquery_columns + at, load(work.dquery_columns + at) * in.scale);
    transpose(work.dquery_columns, kQueries, padded, block.padded, work.query_rows, padded);
    store_queries(in, block, work.query_rows, static_cast<T*>(grad.dq), grad.dq_strides);
}

template <class T>
void store_keys(const Attention& in, int64_t batch, int64_t group, KeyRange range, float* sums, float factor, T* data, const AttentionStrides& strides) {
    const int64_t padded = round_up(in.head_dim);
    T* const base = data + batch * strides.batch + group * strides.group;
    for (int64_t j = range.begin; j < range.end; ++j) {
        float* const row = sums + (j - range.begin) * padded;
        for (int64_t c = 0; c < padded; c += kVecWidth) store(row + c, load(row + c) * factor);
        store_row(row, in.head_dim, base + j * strides.sequence);
    }
}

// All blocks of queries against a range of keys.
template <class T>
void backward_keys(const Attention& in, const AttentionGradients& grad, int64_t batch, int64_t group, KeyRange range, Wanted wanted, const Backward& work) {
    const int64_t padded = round_up(in.head_dim), size = (range.end - range.begin) * padded;
    std::fill(work.dkeys, work.dkeys + size, 0.0f);
    std::fill(work.dvalues, work.dvalues + size, 0.0f);
    for (int64_t index = 0; index < num_query_blocks(in); ++index) {
        backward_block<T>(in, grad, query_block(in, batch, group, index), range, wanted, work);
    }
    store_keys(in, batch, group, range, work.dkeys, in.scale, static_cast<T*>(grad.dk), grad.dk_strides);
    store_keys(in, batch, group, range, work.dvalues, 1.0f, static_cast<T*>(grad.dv), grad.dv_strides);
}

template <class T>
void backward_one_pass(const Attention& in, const AttentionGradients& grad, const Parallel& parallel) {
    parallel(in.batch * in.groups, 1, [&](int64_t begin, int64_t end) {
        const Backward work(round_up(in.head_dim), in.keys, in.softcap > 0, in.dropout > 0);
        for (int64_t pair = begin; pair < end; ++pair) {
            backward_keys<T>(in, grad, pair / in.groups, pair % in.groups, KeyRange{0, in.keys}, Wanted{true, true}, work);
        }
    });
}

template <class T>
void backward_two_passes(const Attention& in, const AttentionGradients& grad, const Parallel& parallel) {
    constexpr int64_t kRange = 4 * kKeys;
    const int64_t pairs = in.batch * in.groups, ranges = (in.keys + kRange - 1) / kRange, blocks = num_query_blocks(in);
    parallel(pairs * ranges, 1, [&](int64_t begin, int64_t end) {
        const Backward work(round_up(in.head_dim), kRange, in.softcap > 0, in.dropout > 0);
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t pair = unit / ranges, first = folded(unit % ranges, ranges) * kRange;
            const KeyRange range{first, std::min(first + kRange, in.keys)};
            backward_keys<T>(in, grad, pair / in.groups, pair % in.groups, range, Wanted{false, true}, work);
        }
    });
    parallel(pairs * blocks, 1, [&](int64_t begin, int64_t end) {
        const Backward work(round_up(in.head_dim), 0, in.softcap > 0, in.dropout > 0);
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t pair = unit / blocks;
            const QueryBlock block = query_block(in, pair / in.groups, pair % in.groups, folded(unit % blocks, blocks));
            backward_block<T>(in, grad, block, KeyRange{0, in.keys}, Wanted{true, false}, work);
        }
    });
}

}  // namespace

void attention_backward_cpu(const Attention& in, const AttentionGradients& grad, int64_t threads, const Parallel& parallel) {
    dispatch(in.dtype, [&](auto zero) {
        using T = decltype(zero);
        // a pair's gradients are 5 products in one pass, and 7 that any number of threads can share in two
        const int64_t pairs = in.batch * in.groups;
        if (5 * threads * ((pairs + threads - 1) / threads) <= 7 * pairs || in.keys <= 4 * kKeys) {
            backward_one_pass<T>(in, grad, parallel);
        } else {
            backward_two_passes<T>(in, grad, parallel);
        }
    });
}

}  // namespace neox
