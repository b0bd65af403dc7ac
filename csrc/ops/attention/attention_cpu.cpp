#include <cmath>

#include "ops/attention/attention.h"
#include "ops/attention/block.h"
#include "ops/attention/decode.h"

namespace neox {
namespace {

using namespace attention;

// A block of queries while the tiles of keys go by.
struct Rows {
    QueryBlock block;
    KeyRange range;
    float* query_columns;  // [head_dim][query]
    float* out_columns;    // [head_dim][query]
    float* peak;           // [query] largest score so far
    float* total;          // [query] sum of 2^(score - peak) so far
};

struct Forward {
    Scratch scratch;
    Rows rows[kShared];
    float* buffer;   // [query][head_dim]
    float* keys;     // [key][head_dim]
    float* values;   // [key][head_dim]
    float* scores;   // [key][query]
    float* dropped;  // [key][query] factors of dropout, or null
    float* rescale;  // [query] what a tile multiplies the sums by

    Forward(int64_t padded, bool drops)
        : scratch((1 + 2 * kShared) * kQueries * padded + 2 * kKeys * padded + (1 + drops) * kKeys * kQueries + (1 + 2 * kShared) * kQueries) {
        for (Rows& of : rows) {
            of.query_columns = scratch.take(kQueries * padded);
            of.out_columns = scratch.take(kQueries * padded);
            of.peak = scratch.take(kQueries);
            of.total = scratch.take(kQueries);
        }
        buffer = scratch.take(kQueries * padded);
        keys = scratch.take(kKeys * padded);
        values = scratch.take(kKeys * padded);
        scores = scratch.take(kKeys * kQueries);
        dropped = drops ? scratch.take(kKeys * kQueries) : nullptr;
        rescale = scratch.take(kQueries);
    }
};

// Scores of a tile to 2^(score - peak) for V vectors of queries from lane i on; peak and total move on. True if a peak rose.
template <int V>
bool soften(const Forward& work, const Rows& rows, int64_t i, int64_t keys) {
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
    for (int64_t j = 0; j < keys; ++j) {
        for (int v = 0; v < V; ++v) {
            float* const at = work.scores + j * kQueries + i + v * kVecWidth;
            const Vec p = exp2(load(at) - base[v]);
            sum[v] += p;
            store(at, p);
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

void rescale_out(const Forward& work, const Rows& rows, int64_t head_dim) {
    for (int64_t c = 0; c < head_dim; ++c) {
        for (int64_t i = 0; i < rows.block.padded; i += kVecWidth) {
            float* const at = rows.out_columns + c * kQueries + i;
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

// Keys [begin, end), which lie in the loaded tile: the softmax moves on and the values are added.
void add_keys(const Attention& in, const Rows& rows, int64_t begin, int64_t end, Visible visible, const Forward& work) {
    const QueryBlock& block = rows.block;
    const int64_t padded = round_up(in.head_dim), keys = end - begin, first = begin % kKeys * padded;
    product<false>(keys, block.padded, in.head_dim, Left{work.keys + first, padded, 1}, rows.query_columns, kQueries, work.scores, kQueries, false);
    finish_scores(in, block, begin, end, visible, work.scores, nullptr);
    bool rose = false;
    int64_t i = 0;
    for (; i + 4 * kVecWidth <= block.padded; i += 4 * kVecWidth) rose |= soften<4>(work, rows, i, keys);
    for (; i < block.padded; i += kVecWidth) rose |= soften<1>(work, rows, i, keys);
    if (work.dropped) drop(in, block, begin, end, work);
    if (rose) rescale_out(work, rows, in.head_dim);
    product<true>(in.head_dim, block.padded, keys, Left{work.values + first, 1, padded}, work.scores, kQueries, rows.out_columns, kQueries, true);
}

template <class T>
void start_block(const Attention& in, const Forward& work, const Rows& rows) {
    load_queries(in, rows.block, static_cast<const T*>(in.q), in.q_strides, work.buffer);
    to_columns(in, rows.block, work.buffer, query_factor(in), rows.query_columns);
    std::fill(rows.out_columns, rows.out_columns + round_up(in.head_dim) * kQueries, 0.0f);
    std::fill(rows.peak, rows.peak + kQueries, -kInfinity);
    std::fill(rows.total, rows.total + kQueries, 0.0f);
}

// Divides by the sums and writes the rows of the block.
template <class T>
void finish_block(const Attention& in, const Forward& work, const Rows& rows, T* out, float* lse) {
    const QueryBlock& block = rows.block;
    const int64_t padded = round_up(in.head_dim), heads = in.groups * in.heads;
    for (int64_t i = 0; i < block.padded; ++i) {
        const bool blind = rows.total[i] == 0.0f;
        work.rescale[i] = blind ? 0.0f : 1.0f / rows.total[i];
        if (i >= block.count) continue;
        const int64_t head = block.group * in.heads + block.head[i];
        lse[(block.batch * heads + head) * in.queries + block.row[i]] = blind ? -kInfinity : (rows.peak[i] + std::log2(rows.total[i])) * kLn2;
    }
    rescale_out(work, rows, in.head_dim);
    transpose(rows.out_columns, kQueries, padded, block.padded, work.buffer, padded);
    store_queries(in, block, work.buffer, out, {in.queries * heads * in.head_dim, heads * in.head_dim, in.heads * in.head_dim, in.head_dim});
}

// The blocks of one unit. A tile is loaded when the first of them needs it: heads lie interleaved in memory, so that loading costs a quarter of
// the time of one block.
template <class T>
void forward_unit(const Attention& in, int64_t pair, int64_t unit, Forward& work, T* out, float* lse) {
    const int64_t count = std::min(kShared, num_query_blocks(in) - unit * kShared);
    KeyRange all{in.keys, 0};
    for (int64_t i = 0; i < count; ++i) {
        Rows& rows = work.rows[i];
        rows.block = query_block(in, pair / in.groups, pair % in.groups, unit * kShared + i);
        rows.range = visible_keys(in, rows.block);
        all = {std::min(all.begin, rows.range.begin), std::max(all.end, rows.range.end)};
        start_block<T>(in, work, rows);
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
            add_keys(in, rows, part.begin, part.end, visible, work);
        }
    }
    for (int64_t i = 0; i < count; ++i) finish_block(in, work, work.rows[i], out, lse);
}

}  // namespace

void attention_forward_cpu(const Attention& in, void* out, float* lse, const Parallel& parallel) {
    if (attention_decodes(in)) return attention_decode_cpu(in, out, lse, parallel);
    const int64_t units = num_block_groups(in);
    parallel(in.batch * in.groups * units, 1, [&](int64_t begin, int64_t end) {
        Forward work(round_up(in.head_dim), in.dropout > 0);
        for (int64_t i = begin; i < end; ++i) {
            dispatch(in.dtype, [&](auto zero) {
                using T = decltype(zero);
                forward_unit(in, i / units, folded(i % units, units), work, static_cast<T*>(out), lse);
            });
        }
    });
}

}  // namespace neox
