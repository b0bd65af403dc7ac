#include <cmath>

#include "ops/attention/attention.h"
#include "ops/attention/cpu/query_block.h"

namespace neox {
namespace {

using namespace attention;

// Which gradients a pass over (query block, key tile) pairs computes. With as many kv heads as threads, one pass
// computes all of them. Otherwise one pass over query blocks computes dq and one over key ranges computes dk and dv, at
// 7 matrix products instead of 5.
//
// The order of summation is the same in both: dq over the key tiles in order, dk and dv over the query blocks in order.
// The bits therefore depend neither on the number of threads nor on the number of passes.
struct Wanted {
    bool queries, keys;
};

// State of a query block during the loop over key tiles.
template <class E>
struct BlockState {
    QueryBlock block;
    KeyRange range;
    Operand<E> queries, douts;        // sums over the rows of the block
    E *query_columns, *dout_columns;  // [channel / kTerms][query]
    float* dquery_columns;            // [channel][query]
    float *lse, *delta;               // [query] in base 2; sum over channels of dout * out
};

template <class E>
struct Backward {
    Scratch scratch;
    BlockState<E> rows[kShared];
    Operand<E> keys, values;  // sums over the channels of both, over the rows of keys
    float *p, *dscores;       // [key][query]
    E *p_rows, *dscore_rows;  // [key][query / kTerms]
    E* dscore_pairs;          // [key / kTerms][query]
    float* cap_slope;         // [key][query], or null
    float* dropped;           // [key][query] factors of dropout, or null
    float *dkeys, *dvalues;   // [key of the range][channel], sums over all queries
    float* dquery_rows;       // [query][channel]

    Backward(const Attention& in, int64_t range) : scratch(floats(in, range)) {
        const int64_t padded = padded_channels<E>(in.head_dim), tile = kKeys * kQueries;
        // pairs along the channels are not used after a block is loaded
        E* const shared = scratch.allocate<E>(kQueries * padded / kTerms<E>);
        for (BlockState<E>& of : rows) {
            for (Operand<E>* operand : {&of.queries, &of.douts}) {
                operand->across = scratch.allocate<E>(kQueries * padded / kTerms<E>);
                operand->along = kTerms<E> == 1 ? operand->across : shared;
            }
            of.query_columns = scratch.allocate<E>(kQueries * padded / kTerms<E>);
            of.dout_columns = scratch.allocate<E>(kQueries * padded / kTerms<E>);
            of.dquery_columns = scratch.allocate(kQueries * padded);
            of.lse = scratch.allocate(kQueries);
            of.delta = scratch.allocate(kQueries);
        }
        keys.along = scratch.allocate<E>(kKeys * padded / kTerms<E>);
        keys.across = kTerms<E> == 1 ? keys.along : scratch.allocate<E>(kKeys / kTerms<E> * padded);
        values = {scratch.allocate<E>(kKeys * padded / kTerms<E>), nullptr};
        p = scratch.allocate(tile);
        dscores = scratch.allocate(tile);
        p_rows = kTerms<E> == 1 ? reinterpret_cast<E*>(p) : scratch.allocate<E>(tile / kTerms<E>);
        dscore_rows = kTerms<E> == 1 ? reinterpret_cast<E*>(dscores) : scratch.allocate<E>(tile / kTerms<E>);
        dscore_pairs = reinterpret_cast<E*>(dscores);
        cap_slope = in.softcap > 0 ? scratch.allocate(tile) : nullptr;
        dropped = in.dropout > 0 ? scratch.allocate(tile) : nullptr;
        dkeys = scratch.allocate(range * padded);
        dvalues = scratch.allocate(range * padded);
        dquery_rows = scratch.allocate(kQueries * padded);
    }

    // Upper bound on the scratch, in floats.
    static int64_t floats(const Attention& in, int64_t range) {
        const int64_t padded = padded_channels<E>(in.head_dim);
        return kShared * (5 * padded + 2) * kQueries + 6 * kKeys * kQueries +
               (3 * kKeys + 2 * range + 2 * kQueries) * padded;
    }
};

// Loads a block: queries and dout, both also transposed, and lse and delta of each row.
template <class T, class E>
void load_block(const Attention& in, const AttentionGradients& grad, const BlockState<E>& rows) {
    const QueryBlock& block = rows.block;
    const int64_t heads = in.groups * in.heads, padded = padded_channels<E>(in.head_dim);
    // out temporarily occupies the buffer of the queries: only its product with dout is needed
    load_queries(in, block, static_cast<const T*>(grad.out),
                 {in.queries * heads * in.head_dim, heads * in.head_dim, in.heads * in.head_dim, in.head_dim},
                 rows.queries.along);
    to_columns(in, block, rows.queries.along, rows.query_columns);
    load_queries(in, block, static_cast<const T*>(grad.dout), grad.dout_strides, rows.douts.along);
    to_columns(in, block, rows.douts.along, rows.dout_columns);
    pair_rows(rows.douts, block.padded, padded);
    // in the channel order of the product dout . value, so that a row that sees one key gets a score gradient of
    // exactly zero
    product_of_columns(in.head_dim, block.padded, rows.query_columns, rows.dout_columns, rows.delta);
    for (int64_t i = 0; i < block.padded; ++i) {
        const int64_t head = block.group * in.heads + block.head[i];
        const float lse = grad.lse[(block.batch * heads + head) * in.queries + block.row[i]];
        rows.lse[i] = lse == -kInfinity ? kInfinity : lse * kLog2E;  // a row without visible keys: 2^(score - inf) = 0
    }
    load_queries(in, block, static_cast<const T*>(in.q), in.q_strides, rows.queries.along);
    to_columns(in, block, rows.queries.along, rows.query_columns);
    pair_rows(rows.queries, block.padded, padded);
}

// p becomes 2^(score - lse) with dropout applied; dscores, dout . value on entry, becomes the gradient of the score.
// Both are written as operands.
template <class E>
void differentiate_softmax(const BlockState<E>& rows, int64_t keys, const Backward<E>& work) {
    using Scalar = typename Arithmetic<E>::Scalar;
    Scalar *const p_rows = reinterpret_cast<Scalar*>(work.p_rows), *const dscore_rows =
                                                                       reinterpret_cast<Scalar*>(work.dscore_rows);
    for (int64_t j = 0; j < keys; j += kTerms<E>) {
        for (int64_t i = 0; i < rows.block.padded; i += kVecWidth) {
            Vec dscore[kTerms<E>];
            for (int64_t k = 0; k < kTerms<E>; ++k) {
                const int64_t at = (j + k) * kQueries + i;
                const Vec p = exp2(load(work.p + at) - load(rows.lse + i));
                const Vec keep = work.dropped ? load(work.dropped + at) : splat(1.0f);
                dscore[k] = p * (load(work.dscores + at) * keep - load(rows.delta + i));
                if (work.cap_slope) dscore[k] *= load(work.cap_slope + at);
                store(p_rows + at, p * keep);
                store(dscore_rows + at, dscore[k]);
            }
            if (kTerms<E> > 1) store(work.dscore_pairs + j / kTerms<E> * kQueries + i, Arithmetic<E>::join(dscore));
        }
    }
}

// Adds keys [begin, end) of the loaded tile. dkeys and dvalues start at key `first`.
template <class E>
void add_keys(const Attention& in, const BlockState<E>& rows, int64_t begin, int64_t end, Visible visible,
              Wanted wanted, int64_t first, const Backward<E>& work) {
    const QueryBlock& block = rows.block;
    const int64_t padded = padded_channels<E>(in.head_dim), keys = end - begin, row = padded / kTerms<E>,
                  skip = begin % kKeys;
    const int64_t channels = elements<E>(in.head_dim), block_rows = elements<E>(block.count);
    const auto left = [&](const E* data) { return Left<E>{data + skip * row, row, 1}; };
    product<false>(keys, block.padded, channels, left(work.keys.along), rows.query_columns, kQueries,
                   Into{work.p, kQueries, false, query_factor(in)});
    finish_scores(in, block, begin, end, visible, work.p, work.cap_slope);
    product<false>(keys, block.padded, channels, left(work.values.along), rows.dout_columns, kQueries,
                   Into{work.dscores, kQueries, false});
    fill_last<E>(keys, -kInfinity, work.p);
    fill_last<E>(keys, 0.0f, work.dscores);
    if (work.cap_slope) fill_last<E>(keys, 0.0f, work.cap_slope);
    if (work.dropped) draw_dropout(in, block, begin, end, work.dropped);
    differentiate_softmax(rows, keys, work);
    if (wanted.keys) {
        const int64_t at = (begin - first) * padded, columns = round_up(in.head_dim);
        const auto transposed = [&](const E* data) { return Left<E>{data, kQueries / kTerms<E>, 1}; };
        product<false>(keys, columns, block_rows, transposed(work.p_rows), rows.douts.across, padded,
                       Into{work.dvalues + at, padded, true});
        product<false>(keys, columns, block_rows, transposed(work.dscore_rows), rows.queries.across, padded,
                       Into{work.dkeys + at, padded, true});
    }
    if (wanted.queries) {
        const Left<E> columns{work.keys.across + skip / kTerms<E> * padded, 1, padded};
        product<true>(in.head_dim, block.padded, elements<E>(keys), columns, work.dscore_pairs, kQueries,
                      Into{rows.dquery_columns, kQueries, true});
    }
}

template <class T, class E>
void store_dqueries(const Attention& in, const AttentionGradients& grad, const BlockState<E>& rows,
                    float* dquery_rows) {
    const int64_t padded = padded_channels<E>(in.head_dim);
    for (int64_t at = 0; at < in.head_dim * kQueries; at += kVecWidth)
        store(rows.dquery_columns + at, load(rows.dquery_columns + at) * in.scale);
    transpose(rows.dquery_columns, kQueries, padded, rows.block.padded, dquery_rows, padded);
    store_queries(in, rows.block, dquery_rows, padded, static_cast<T*>(grad.dq), grad.dq_strides);
}

// Processes the blocks of one unit against keys [range.begin, range.end). A tile is loaded when the first block needs
// it.
template <class T, class E>
void backward_unit(const Attention& in, const AttentionGradients& grad, int64_t pair, int64_t unit, KeyRange range,
                   Wanted wanted, Backward<E>& work) {
    const int64_t count = std::min(kShared, num_query_blocks(in) - unit * kShared);
    KeyRange all{in.keys, 0};
    for (int64_t i = 0; i < count; ++i) {
        BlockState<E>& rows = work.rows[i];
        rows.block = query_block(in, pair / in.groups, pair % in.groups, unit * kShared + i);
        rows.range = intersection(visible_keys(in, rows.block), range);
        all = {std::min(all.begin, rows.range.begin), std::max(all.end, rows.range.end)};
        if (wanted.queries) std::fill_n(rows.dquery_columns, padded_channels<E>(in.head_dim) * kQueries, 0.0f);
        if (rows.range.begin < rows.range.end) load_block<T>(in, grad, rows);
    }
    for (int64_t tile = all.begin / kKeys * kKeys; tile < all.end; tile += kKeys) {
        bool loaded = false;
        for (int64_t i = 0; i < count; ++i) {
            const BlockState<E>& rows = work.rows[i];
            const KeyRange part = align_to_elements<E>(intersection({tile, tile + kKeys}, rows.range));
            if (part.begin >= part.end) continue;
            const Visible visible = visibility(in, rows.block, part.begin, part.end);
            if (visible == Visible::kNone) continue;
            if (!loaded) {
                const KeyRange tile_keys = intersection({tile, tile + kKeys}, {0, in.keys});
                load_keys<T>(in, rows.block, tile_keys, in.k, in.k_strides, work.keys);
                load_keys<T>(in, rows.block, tile_keys, in.v, in.v_strides, work.values);
                loaded = true;
            }
            add_keys(in, rows, part.begin, part.end, visible, wanted, range.begin, work);
        }
    }
    for (int64_t i = 0; wanted.queries && i < count; ++i) store_dqueries<T>(in, grad, work.rows[i], work.dquery_rows);
}

template <class T>
void store_keys(const Attention& in, int64_t batch, int64_t group, KeyRange range, float* sums, float factor, T* data,
                const AttentionStrides& strides) {
    const int64_t padded = padded_channels<Element<T>>(in.head_dim);
    T* const base = data + batch * strides.batch + group * strides.group;
    for (int64_t j = range.begin; j < range.end; ++j) {
        float* const row = sums + (j - range.begin) * padded;
        for (int64_t c = 0; c < padded; c += kVecWidth) store(row + c, load(row + c) * factor);
        store_row(row, in.head_dim, base + j * strides.sequence);
    }
}

// Processes all query blocks against a range of keys.
template <class T, class E>
void backward_keys(const Attention& in, const AttentionGradients& grad, int64_t pair, KeyRange range, Wanted wanted,
                   Backward<E>& work) {
    const int64_t size = (range.end - range.begin) * padded_channels<E>(in.head_dim), batch = pair / in.groups,
                  group = pair % in.groups;
    std::fill_n(work.dkeys, size, 0.0f);
    std::fill_n(work.dvalues, size, 0.0f);
    for (int64_t unit = 0; unit < num_block_groups(in); ++unit)
        backward_unit<T>(in, grad, pair, unit, range, wanted, work);
    store_keys(in, batch, group, range, work.dkeys, in.scale, static_cast<T*>(grad.dk), grad.dk_strides);
    store_keys(in, batch, group, range, work.dvalues, 1.0f, static_cast<T*>(grad.dv), grad.dv_strides);
}

template <class T>
void backward_one_pass(const Attention& in, const AttentionGradients& grad, const Parallel& parallel) {
    parallel(in.batch * in.groups, 1, [&](int64_t begin, int64_t end) {
        Backward<Element<T>> work(in, in.keys);
        for (int64_t pair = begin; pair < end; ++pair)
            backward_keys<T>(in, grad, pair, KeyRange{0, in.keys}, Wanted{true, true}, work);
    });
}

constexpr int64_t kRange = 8 * kKeys;  // keys per unit of work in the pass for dk and dv

template <class T>
void backward_two_passes(const Attention& in, const AttentionGradients& grad, const Parallel& parallel) {
    const int64_t pairs = in.batch * in.groups, ranges = (in.keys + kRange - 1) / kRange, units = num_block_groups(in);
    parallel(pairs * ranges, 1, [&](int64_t begin, int64_t end) {
        Backward<Element<T>> work(in, kRange);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t first = alternating(i % ranges, ranges) * kRange;
            backward_keys<T>(in, grad, i / ranges, KeyRange{first, std::min(first + kRange, in.keys)},
                             Wanted{false, true}, work);
        }
    });
    parallel(pairs * units, 1, [&](int64_t begin, int64_t end) {
        Backward<Element<T>> work(in, 0);
        for (int64_t i = begin; i < end; ++i) {
            backward_unit<T>(in, grad, i / units, alternating(i % units, units), KeyRange{0, in.keys},
                             Wanted{true, false}, work);
        }
    });
}

}  // namespace

void attention_backward_cpu(const Attention& in, const AttentionGradients& grad, int64_t threads,
                            const Parallel& parallel) {
    dispatch(in.dtype, [&](auto zero) {
        using T = decltype(zero);
        // one pass takes 5 products per (batch, group) pair; two passes take 7, which any number of threads can share
        const int64_t pairs = in.batch * in.groups;
        if (5 * threads * ((pairs + threads - 1) / threads) <= 7 * pairs || in.keys <= kRange) {
            backward_one_pass<T>(in, grad, parallel);
        } else {
            backward_two_passes<T>(in, grad, parallel);
        }
    });
}

}  // namespace neox
