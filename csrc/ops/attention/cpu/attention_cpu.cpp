#include <cmath>

#include "ops/attention/attention.h"
#include "ops/attention/cpu/decode.h"
#include "ops/attention/cpu/query_block.h"

namespace neox {
namespace {

using namespace attention;

// State of a query block during the loop over key tiles.
template <class E>
struct BlockState {
    QueryBlock block;
    KeyRange range;
    E* query_columns;    // [channel / kTerms][query]
    float* out_columns;  // [channel][query]
    float* peak;         // [query] largest score so far
    float* total;        // [query] sum of 2^(score - peak) so far
};

template <class E>
struct Forward {
    Scratch scratch;
    BlockState<E> rows[kShared];
    E* queries;               // [query][channel / kTerms]
    float* out_rows;          // [query][channel]
    Operand<E> keys, values;  // sums over the channels of keys, over the rows of values
    float* scores;            // [key][query]
    E* probabilities;         // [key / kTerms][query], overwrites the scores
    float* dropped;           // [key][query] factors of dropout, or null
    float* rescale;           // [query] factor that a tile applies to the sums

    Forward(int64_t padded, bool has_dropout)
        : scratch((2 + 2 * kShared) * kQueries * padded + 3 * kKeys * padded + (1 + has_dropout) * kKeys * kQueries +
                  (1 + 2 * kShared) * kQueries) {
        for (BlockState<E>& of : rows) {
            of.query_columns = scratch.allocate<E>(kQueries * padded / kTerms<E>);
            of.out_columns = scratch.allocate(kQueries * padded);
            of.peak = scratch.allocate(kQueries);
            of.total = scratch.allocate(kQueries);
        }
        queries = scratch.allocate<E>(kQueries * padded / kTerms<E>);
        out_rows = scratch.allocate(kQueries * padded);
        keys = {scratch.allocate<E>(kKeys * padded / kTerms<E>), nullptr};
        values.along = scratch.allocate<E>(kKeys * padded / kTerms<E>);
        values.across = kTerms<E> == 1 ? values.along : scratch.allocate<E>(kKeys / kTerms<E> * padded);
        scores = scratch.allocate(kKeys * kQueries);
        probabilities = reinterpret_cast<E*>(scores);
        dropped = has_dropout ? scratch.allocate(kKeys * kQueries) : nullptr;
        rescale = scratch.allocate(kQueries);
    }
};

// Replaces the scores of a tile by 2^(score - peak) with dropout applied, for V vectors of queries from lane i on, and
// updates peak and total. Returns whether a peak rose.
template <int V, class E>
bool online_softmax(const Forward<E>& work, const BlockState<E>& rows, int64_t i, int64_t keys) {
    Vec peak[V], base[V], sum[V] = {};
    for (int v = 0; v < V; ++v) peak[v] = load(rows.peak + i + v * kVecWidth);
    for (int64_t j = 0; j < keys; ++j) {
        for (int v = 0; v < V; ++v) peak[v] = max(load(work.scores + j * kQueries + i + v * kVecWidth), peak[v]);
    }
    VecInt rose = {};
    for (int v = 0; v < V; ++v) {
        base[v] = peak[v] == -kInfinity ? Vec{} : peak[v];
        const Vec before = load(rows.peak + i + v * kVecWidth);
        rose |= before != peak[v];
        store(work.rescale + i + v * kVecWidth, exp2(before - base[v]));
        store(rows.peak + i + v * kVecWidth, peak[v]);
    }
    for (int64_t j = 0; j < keys; j += kTerms<E>) {
        for (int v = 0; v < V; ++v) {
            Vec p[kTerms<E>];
            for (int64_t k = 0; k < kTerms<E>; ++k) {
                const int64_t at = (j + k) * kQueries + i + v * kVecWidth;
                p[k] = exp2(load(work.scores + at) - base[v]);
                sum[v] += p[k];
                if (work.dropped) p[k] *= load(work.dropped + at);
            }
            store(work.probabilities + j / kTerms<E> * kQueries + i + v * kVecWidth, Arithmetic<E>::join(p));
        }
    }
    for (int v = 0; v < V; ++v) {
        float* const total = rows.total + i + v * kVecWidth;
        store(total, load(total) * load(work.rescale + i + v * kVecWidth) + sum[v]);
    }
    int32_t any = 0;
    for (int lane = 0; lane < kVecWidth; ++lane) any |= rose[lane];
    return any != 0;
}

template <class E>
void rescale_out(const Forward<E>& work, const BlockState<E>& rows, int64_t head_dim) {
    for (int64_t c = 0; c < head_dim; ++c) {
        for (int64_t i = 0; i < rows.block.padded; i += kVecWidth) {
            float* const at = rows.out_columns + c * kQueries + i;
            store(at, load(at) * load(work.rescale + i));
        }
    }
}

// Adds keys [begin, end) of the loaded tile: one step of the online softmax, then the product with the values.
template <class E>
void add_keys(const Attention& in, const BlockState<E>& rows, int64_t begin, int64_t end, Visible visible,
              const Forward<E>& work) {
    const QueryBlock& block = rows.block;
    const int64_t padded = padded_channels<E>(in.head_dim), keys = end - begin, row = padded / kTerms<E>;
    const Left<E> tile{work.keys.along + begin % kKeys * row, row, 1};
    product<false>(keys, block.padded, elements<E>(in.head_dim), tile, rows.query_columns, kQueries,
                   Into{work.scores, kQueries, false, query_factor(in)});
    finish_scores(in, block, begin, end, visible, work.scores, nullptr);
    fill_last<E>(keys, -kInfinity, work.scores);
    if (work.dropped) draw_dropout(in, block, begin, end, work.dropped);
    bool rose = false;
    int64_t i = 0;
    for (; i + 4 * kVecWidth <= block.padded; i += 4 * kVecWidth) rose |= online_softmax<4>(work, rows, i, keys);
    for (; i < block.padded; i += kVecWidth) rose |= online_softmax<1>(work, rows, i, keys);
    if (rose) rescale_out(work, rows, in.head_dim);
    const Left<E> weighted{work.values.across + begin % kKeys / kTerms<E> * padded, 1, padded};
    product<true>(in.head_dim, block.padded, elements<E>(keys), weighted, work.probabilities, kQueries,
                  Into{rows.out_columns, kQueries, true});
}

template <class T, class E>
void start_block(const Attention& in, const Forward<E>& work, const BlockState<E>& rows) {
    load_queries(in, rows.block, static_cast<const T*>(in.q), in.q_strides, work.queries);
    to_columns(in, rows.block, work.queries, rows.query_columns);
    std::fill(rows.out_columns, rows.out_columns + padded_channels<E>(in.head_dim) * kQueries, 0.0f);
    std::fill(rows.peak, rows.peak + kQueries, -kInfinity);
    std::fill(rows.total, rows.total + kQueries, 0.0f);
}

// Divides by the sums and writes the block's rows of out and lse.
template <class T, class E>
void finish_block(const Attention& in, const Forward<E>& work, const BlockState<E>& rows, T* out, float* lse) {
    const QueryBlock& block = rows.block;
    const int64_t padded = padded_channels<E>(in.head_dim), heads = in.groups * in.heads;
    for (int64_t i = 0; i < block.padded; ++i) {
        const bool no_keys = rows.total[i] == 0.0f;
        work.rescale[i] = no_keys ? 0.0f : 1.0f / rows.total[i];
        if (i >= block.count) continue;
        const int64_t head = block.group * in.heads + block.head[i];
        lse[(block.batch * heads + head) * in.queries + block.row[i]] =
            no_keys ? -kInfinity : (rows.peak[i] + std::log2(rows.total[i])) * kLn2;
    }
    rescale_out(work, rows, in.head_dim);
    transpose(rows.out_columns, kQueries, padded, block.padded, work.out_rows, padded);
    store_queries(in, block, work.out_rows, padded, out,
                  {in.queries * heads * in.head_dim, heads * in.head_dim, in.heads * in.head_dim, in.head_dim});
}

// Processes the blocks of one unit. A tile is loaded when the first block needs it and is shared, because heads are
// interleaved in memory: loading costs a quarter of the time of one block.
template <class T, class E>
void forward_unit(const Attention& in, int64_t pair, int64_t unit, Forward<E>& work, T* out, float* lse) {
    const int64_t count = std::min(kShared, num_query_blocks(in) - unit * kShared);
    KeyRange all{in.keys, 0};
    for (int64_t i = 0; i < count; ++i) {
        BlockState<E>& rows = work.rows[i];
        rows.block = query_block(in, pair / in.groups, pair % in.groups, unit * kShared + i);
        rows.range = visible_keys(in, rows.block);
        all = {std::min(all.begin, rows.range.begin), std::max(all.end, rows.range.end)};
        start_block<T>(in, work, rows);
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
            add_keys(in, rows, part.begin, part.end, visible, work);
        }
    }
    for (int64_t i = 0; i < count; ++i) finish_block(in, work, work.rows[i], out, lse);
}

}  // namespace

void attention_forward_cpu(const Attention& in, void* out, float* lse, const Parallel& parallel) {
    if (attention_decodes(in)) return attention_decode_cpu(in, out, lse, parallel);
    const int64_t units = num_block_groups(in);
    dispatch(in.dtype, [&](auto zero) {
        using T = decltype(zero);
        using E = Element<T>;
        parallel(in.batch * in.groups * units, 1, [&](int64_t begin, int64_t end) {
            Forward<E> work(padded_channels<E>(in.head_dim), in.dropout > 0);
            for (int64_t i = begin; i < end; ++i)
                forward_unit(in, i / units, alternating(i % units, units), work, static_cast<T*>(out), lse);
        });
    });
}

}  // namespace neox
