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
// A block of queries while the tiles of keys go by.
struct Rows {
    QueryBlock block;
    KeyRange range;
    float *query_rows, *dout_rows;        // [query][head_dim]
    float *query_columns, *dout_columns;  // [head_dim][query]
    float* dquery_columns;                // [head_dim][query]
    float *lse, *delta;                   // [query] in base 2; sum over channels of dout * out
};

struct Backward {
    Scratch scratch;
    Rows rows[kShared];
    float *keys, *values;    // [key][head_dim]
    float *p, *dscores;      // [key][query]
    float* cap_slope;        // [key][query], or null
    float* dropped;          // [key][query] factors of dropout, or null
    float *dkeys, *dvalues;  // [key of the range][head_dim], sums over all queries

    Backward(const Attention& in, int64_t range) : scratch(floats(in, range)) {
        const int64_t padded = round_up(in.head_dim);
        for (Rows& of : rows) {
            of.query_rows = scratch.take(kQueries * padded);
            of.dout_rows = scratch.take(kQueries * padded);
            of.query_columns = scratch.take(kQueries * padded);
            of.dout_columns = scratch.take(kQueries * padded);
            of.dquery_columns = scratch.take(kQueries * padded);
            of.lse = scratch.take(kQueries);
            of.delta = scratch.take(kQueries);
        }
        keys = scratch.take(kKeys * padded);
        values = scratch.take(kKeys * padded);
        p = scratch.take(kKeys * kQueries);
        dscores = scratch.take(kKeys * kQueries);
        cap_slope = in.softcap > 0 ? scratch.take(kKeys * kQueries) : nullptr;
        dropped = in.dropout > 0 ? scratch.take(kKeys * kQueries) : nullptr;
        dkeys = scratch.take(range * padded);
        dvalues = scratch.take(range * padded);
    }

    static int64_t floats(const Attention& in, int64_t range) {
        const int64_t tiles = 2 + (in.softcap > 0) + (in.dropout > 0);
        return kShared * (5 * round_up(in.head_dim) + 2) * kQueries + tiles * kKeys * kQueries + 2 * (kKeys + range) * round_up(in.head_dim);
    }
};

// The rows of a block: queries, dout, both transposed, and the two numbers per row.
template <class T>
void load_block(const Attention& in, const AttentionGradients& grad, const Rows& rows) {
    const QueryBlock& block = rows.block;
    const int64_t heads = in.groups * in.heads;
    // out goes where the queries go afterwards: only its product with dout is needed
    load_queries(in, block, static_cast<const T*>(grad.out), {in.queries * heads * in.head_dim, heads * in.head_dim, in.heads * in.head_dim, in.head_dim},
                 rows.query_rows);
    load_queries(in, block, static_cast<const T*>(grad.dout), grad.dout_strides, rows.dout_rows);
    to_columns(in, block, rows.query_rows, 1.0f, rows.query_columns);
    to_columns(in, block, rows.dout_rows, 1.0f, rows.dout_columns);
    // over the channels in the order of the product dout . value: a row that sees one key then gets a score gradient of exactly zero
    product_of_columns(in.head_dim, block.padded, rows.query_columns, rows.dout_columns, rows.delta);
    for (int64_t i = 0; i < block.padded; ++i) {
        const int64_t head = block.group * in.heads + block.head[i];
        const float lse = grad.lse[(block.batch * heads + head) * in.queries + block.row[i]];
        rows.lse[i] = lse == -kInfinity ? kInfinity : lse * kLog2E;  // a row that saw nothing: 2^(score - inf) = 0
    }
    load_queries(in, block, static_cast<const T*>(in.q), in.q_strides, rows.query_rows);
    to_columns(in, block, rows.query_rows, query_factor(in), rows.query_columns);
}

// p = 2^(score - lse) where not dropped; dscores, which comes in as dout . value, becomes the gradient of the score.
void differentiate_softmax(const Rows& rows, int64_t keys, const Backward& work) {
    for (int64_t j = 0; j < keys; ++j) {
        for (int64_t i = 0; i < rows.block.padded; i += kVecWidth) {
            const int64_t at = j * kQueries + i;
            const Vec p = exp2(load(work.p + at) - load(rows.lse + i));
            const Vec kept = work.dropped ? load(work.dropped + at) : splat(1.0f);
            Vec dscore = p * (load(work.dscores + at) * kept - load(rows.delta + i));
            if (work.cap_slope) dscore *= load(work.cap_slope + at);
            store(work.p + at, p * kept);
            store(work.dscores + at, dscore);
        }
    }
}

// Keys [begin, end), which lie in the loaded tile; dkeys and dvalues begin at key `first`.
void add_keys(const Attention& in, const Rows& rows, int64_t begin, int64_t end, Visible visible, Wanted wanted, int64_t first, const Backward& work) {
    const QueryBlock& block = rows.block;
    const int64_t padded = round_up(in.head_dim), keys = end - begin, skip = begin % kKeys * padded;
    product<false>(keys, block.padded, in.head_dim, Left{work.keys + skip, padded, 1}, rows.query_columns, kQueries, work.p, kQueries, false);
    finish_scores(in, block, begin, end, visible, work.p, work.cap_slope);
    product<false>(keys, block.padded, in.head_dim, Left{work.values + skip, padded, 1}, rows.dout_columns, kQueries, work.dscores, kQueries, false);
    if (work.dropped) draw_dropout(in, block, begin, end, work.dropped);
    differentiate_softmax(rows, keys, work);
    if (wanted.keys) {
        const int64_t at = (begin - first) * padded;
        product<false>(keys, padded, block.count, Left{work.p, kQueries, 1}, rows.dout_rows, padded, work.dvalues + at, padded, true);
        product<false>(keys, padded, block.count, Left{work.dscores, kQueries, 1}, rows.query_rows, padded, work.dkeys + at, padded, true);
    }
    if (wanted.queries) {
        product<true>(in.head_dim, block.padded, keys, Left{work.keys + skip, 1, padded}, work.dscores, kQueries, rows.dquery_columns, kQueries, true);
    }
}

template <class T>
void store_dqueries(const Attention& in, const AttentionGradients& grad, const Rows& rows) {
    const int64_t padded = round_up(in.head_dim);
    for (int64_t at = 0; at < in.head_dim * kQueries; at += kVecWidth) store(rows.dquery_columns + at, load(rows.dquery_columns + at) * in.scale);
    transpose(rows.dquery_columns, kQueries, padded, rows.block.padded, rows.query_rows, padded);
    store_queries(in, rows.block, rows.query_rows, static_cast<T*>(grad.dq), grad.dq_strides);
}

// The blocks of one unit against keys [range.begin, range.end); a tile is loaded when the first of them needs it.
template <class T>
void backward_unit(const Attention& in, const AttentionGradients& grad, int64_t pair, int64_t unit, KeyRange range, Wanted wanted, Backward& work) {
    const int64_t count = std::min(kShared, num_query_blocks(in) - unit * kShared);
    KeyRange all{in.keys, 0};
    for (int64_t i = 0; i < count; ++i) {
        Rows& rows = work.rows[i];
        rows.block = query_block(in, pair / in.groups, pair % in.groups, unit * kShared + i);
        rows.range = intersection(visible_keys(in, rows.block), range);
        all = {std::min(all.begin, rows.range.begin), std::max(all.end, rows.range.end)};
        if (wanted.queries) std::fill_n(rows.dquery_columns, round_up(in.head_dim) * kQueries, 0.0f);
        if (rows.range.begin < rows.range.end) load_block<T>(in, grad, rows);
    }
    for (int64_t tile = all.begin / kKeys * kKeys; tile < all.end; tile += kKeys) {
        bool loaded = false;
        for (int64_t i = 0; i < count; ++i) {
            const Rows& rows = work.rows[i];
            const KeyRange part = intersection({tile, tile + kKeys}, rows.range);
            if (part.begin >= part.end) continue;
            const Visible visible = visibility(in, rows.block, part.begin, part.end);
            if (visible == Visible::kNone) continue;
            if (!loaded) load_tile<T>(in, rows.block, intersection({tile, tile + kKeys}, {0, in.keys}), work.keys, work.values);
            loaded = true;
            add_keys(in, rows, part.begin, part.end, visible, wanted, range.begin, work);
        }
    }
    for (int64_t i = 0; wanted.queries && i < count; ++i) store_dqueries<T>(in, grad, work.rows[i]);
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
void backward_keys(const Attention& in, const AttentionGradients& grad, int64_t pair, KeyRange range, Wanted wanted, Backward& work) {
    const int64_t size = (range.end - range.begin) * round_up(in.head_dim), batch = pair / in.groups, group = pair % in.groups;
    std::fill_n(work.dkeys, size, 0.0f);
    std::fill_n(work.dvalues, size, 0.0f);
    for (int64_t unit = 0; unit < num_block_groups(in); ++unit) backward_unit<T>(in, grad, pair, unit, range, wanted, work);
    store_keys(in, batch, group, range, work.dkeys, in.scale, static_cast<T*>(grad.dk), grad.dk_strides);
    store_keys(in, batch, group, range, work.dvalues, 1.0f, static_cast<T*>(grad.dv), grad.dv_strides);
}

template <class T>
void backward_one_pass(const Attention& in, const AttentionGradients& grad, const Parallel& parallel) {
    parallel(in.batch * in.groups, 1, [&](int64_t begin, int64_t end) {
        Backward work(in, in.keys);
        for (int64_t pair = begin; pair < end; ++pair) backward_keys<T>(in, grad, pair, KeyRange{0, in.keys}, Wanted{true, true}, work);
    });
}

constexpr int64_t kRange = 8 * kKeys;  // keys of a unit of the pass for dk and dv

template <class T>
void backward_two_passes(const Attention& in, const AttentionGradients& grad, const Parallel& parallel) {
    const int64_t pairs = in.batch * in.groups, ranges = (in.keys + kRange - 1) / kRange, units = num_block_groups(in);
    parallel(pairs * ranges, 1, [&](int64_t begin, int64_t end) {
        Backward work(in, kRange);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t first = folded(i % ranges, ranges) * kRange;
            backward_keys<T>(in, grad, i / ranges, KeyRange{first, std::min(first + kRange, in.keys)}, Wanted{false, true}, work);
        }
    });
    parallel(pairs * units, 1, [&](int64_t begin, int64_t end) {
        Backward work(in, 0);
        for (int64_t i = begin; i < end; ++i) {
            backward_unit<T>(in, grad, i / units, folded(i % units, units), KeyRange{0, in.keys}, Wanted{true, false}, work);
        }
    });
}

}  // namespace

void attention_backward_cpu(const Attention& in, const AttentionGradients& grad, int64_t threads, const Parallel& parallel) {
    dispatch(in.dtype, [&](auto zero) {
        using T = decltype(zero);
        // a pair's gradients are 5 products in one pass, and 7 that any number of threads can share in two
        const int64_t pairs = in.batch * in.groups;
        if (5 * threads * ((pairs + threads - 1) / threads) <= 7 * pairs || in.keys <= kRange) {
            backward_one_pass<T>(in, grad, parallel);
        } else {
            backward_two_passes<T>(in, grad, parallel);
        }
    });
}

}  // namespace neox
