// What the CUDA kernels know of a problem: its rows, what they see, and what happens to a score between the two products.
//
// A row is a (query, head of the kv group) pair, heads innermost: row r is query r / heads. Rows of one kv head share its keys, so grouped and
// multi-query heads fill tiles also in decoding, and the backward sums over the heads of a group without a second pass.
#pragma once

#include "common/ptx.cuh"
#include "ops/attention/attention.h"

namespace neox::attention {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr int kSegmentTile = 32;  // keys per entry of the table of segment ids; tiles of keys are multiples of it

// A tensor [batch, sequence, groups, heads, head_dim]; vectorized: all its rows begin at multiples of 16 bytes and are multiples of 16 bytes long.
template <class T>
struct Matrix {
    T* data;
    AttentionStrides strides;
    bool vectorized;

    __device__ __forceinline__ T* at(int batch, int group) const { return data + batch * strides.batch + group * strides.group; }
};

// Division by a number that the host knows, for dividends from 0 to 2^31 - 1: a product and a shift, where the GPU's own division of integers
// is some 20 instructions. With 2^shift >= divisor the factor ceil(2^(31 + shift) / divisor) is too large by less than one part in 2^31
// (Granlund and Montgomery, "Division by invariant integers using multiplication", theorem 4.2).
struct Divisor {
    uint32_t factor;
    int divisor, shift;  // shift 0: by 1

    static Divisor by(int divisor) {
        int shift = 0;
        while (int64_t{1} << shift < divisor) ++shift;
        return {static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + static_cast<uint64_t>(divisor) - 1) / static_cast<uint64_t>(divisor)), divisor, shift};
    }
    __device__ __forceinline__ int quotient(int dividend) const {
        return shift == 0 ? dividend : static_cast<int>(__umulhi(static_cast<unsigned>(dividend), factor) >> (shift - 1));
    }
};

struct Params {
    int batch, groups, heads, queries, keys, head_dim;
    int rows;  // queries * heads
    Divisor by_heads;
    int offset;      // keys - queries: position of query 0
    unsigned reach;  // key j is visible to position p only if unsigned(p - j) <= reach: the causal mask and the window in one comparison
    bool causal;
    int window;                 // 0: none
    const int32_t* segments;    // [batch, keys], or null
    const int2* segment_table;  // [batch, ceil(keys / kSegmentTile)]: lowest and highest id
    int segment_entries;
    const float* slopes;   // [groups * heads], or null
    float scale, softcap;  // softcap 0: none
    bool has_dropout;      // by Philox words of this seed
    uint64_t seed[2];
    uint32_t threshold;  // dropout keeps words of at least this
    float keep_scale;    // 1 / (1 - dropout)

    __device__ __forceinline__ int query(int row) const { return by_heads.quotient(row); }
    __device__ __forceinline__ int position(int row) const { return query(row) + offset; }
    __device__ __forceinline__ int64_t row_offset(int row, const AttentionStrides& strides) const {
        if (heads == 1) return row * strides.sequence;
        const int i = query(row);
        return i * strides.sequence + (row - i * heads) * strides.head;
    }
    // tanh(scale product / softcap) by 1 - 2 / (1 + e^2x): exact to 1e-7 of one, and at both ends.
    __device__ __forceinline__ float capped(float product) const {
        return 1.0f - __fdividef(2.0f, 1.0f + fast_exp2(product * (scale * (2.0f * kLog2E) / softcap)));
    }
    // From a product of query and key to a score in base 2, without ALiBi.
    __device__ __forceinline__ float score(float product) const { return softcap > 0.0f ? softcap * kLog2E * capped(product) : product * (scale * kLog2E); }
    // Of row `row` in a [batch, groups * heads, queries] tensor.
    __device__ __forceinline__ int64_t index(int pair, int row) const {
        const int i = query(row);
        return (static_cast<int64_t>(pair) * heads + (row - i * heads)) * queries + i;
    }
};

// Which tile of which (batch, group) pair a block of the grid does. Pairs go in chunks whose keys and values fit the L2 cache together;
// within a chunk all pairs' tiles of one place come before those of the next, longest first under a causal mask.
struct BlockOrder {
    int tiles, pairs, chunk;
    bool reversed;

    struct Tile {
        int pair, tile;
    };
    __device__ __forceinline__ Tile current() const {
        const int64_t index = blockIdx.x, whole = static_cast<int64_t>(chunk) * tiles;
        const int first = static_cast<int>(index / whole) * chunk, rest = static_cast<int>(index % whole);
        const int size = min(chunk, pairs - first), tile = rest / size;
        return {first + rest - tile * size, reversed ? tiles - 1 - tile : tile};
    }
};

// Lowest and highest segment id of some keys; empty where low > high.
struct SegmentRange {
    int low = 2147483647, high = -2147483647 - 1;

    __device__ __forceinline__ bool overlaps(const SegmentRange& other) const { return low <= other.high && other.low <= high; }
    __device__ __forceinline__ bool is_single() const { return low == high; }
};

// Of the entries that hold keys [first, last]: a superset of them.
NEOX_DEVICE SegmentRange segments_of(const Params& in, int batch, int first, int last) {
    SegmentRange range;
    first = max(first, 0) / kSegmentTile;
    last = min(last, in.keys - 1) / kSegmentTile;
    for (int i = first; i <= last; ++i) {
        const int2 entry = in.segment_table[static_cast<int64_t>(batch) * in.segment_entries + i];
        range.low = min(range.low, entry.x);
        range.high = max(range.high, entry.y);
    }
    return range;
}

// A block of rows against all tiles of kKeys keys (kOfKeys), or a block of keys against all tiles of kTile rows.
struct Span {
    int first, last;  // positions of rows, or keys
};

NEOX_DEVICE bool all_masked(const Params& in, Span positions, Span keys) {
    return (in.causal && keys.first > positions.last) || (in.window && keys.last <= positions.first - in.window);
}

// The masks hide none of the keys from any position; segments aside.
NEOX_DEVICE bool none_masked(const Params& in, Span positions, Span keys) {
    return keys.last < in.keys && (!in.causal || keys.last <= positions.first) && (!in.window || keys.first > positions.last - in.window);
}

// The first of tiles [tile, end) that visible(tile) holds for, or end. Each warp looks at 32 tiles at a time; all come to the same.
template <class Visible>
NEOX_DEVICE int first_visible(int tile, int end, const Visible& visible) {
    const int lane = threadIdx.x % kWarpSize;
    for (; tile < end; tile += kWarpSize) {
        const unsigned found = __ballot_sync(kFullWarp, tile + lane < end && visible(tile + lane));
        if (found) return tile + __ffs(static_cast<int>(found)) - 1;
    }
    return end;
}

// The tiles of kTile keys that rows [first_row, last_row] may see.
template <int kTile>
struct KeyTiles {
    const Params& in;
    int batch, begin, end;
    Span positions;
    SegmentRange own;

    __device__ __forceinline__ KeyTiles(const Params& params, int batch_index, int first_row, int last_row) : in(params), batch(batch_index) {
        positions = {in.position(first_row), in.position(last_row)};
        const int last = in.causal ? min(in.keys - 1, positions.last) : in.keys - 1;
        begin = in.window ? max(positions.first - in.window + 1, 0) / kTile : 0;
        end = last < 0 ? 0 : last / kTile + 1;
        if (in.segments) own = segments_of(in, batch, positions.first, positions.last);
    }
    __device__ __forceinline__ SegmentRange segments(int tile) const { return segments_of(in, batch, tile * kTile, tile * kTile + kTile - 1); }
    __device__ __forceinline__ int next(int tile) const {
        if (!in.segments) return tile;
        return first_visible(tile, end, [&](int i) { return own.overlaps(segments(i)); });
    }
    __device__ __forceinline__ bool unmasked(int tile) const {
        if (!none_masked(in, positions, {tile * kTile, tile * kTile + kTile - 1})) return false;
        if (!in.segments) return true;
        const SegmentRange range = segments(tile);
        return own.is_single() && range.is_single() && own.low == range.low;
    }
};

// The tiles of kTile rows that may see keys [first_key, last_key].
template <int kTile>
struct RowTiles {
    const Params& in;
    int batch, begin, end;
    Span keys;
    SegmentRange own;

    __device__ __forceinline__ RowTiles(const Params& params, int batch_index, int first_key, int last_key) : in(params), batch(batch_index) {
        keys = {first_key, last_key};
        const int last = min(last_key, in.keys - 1);
        // queries at positions [first_key, last + window - 1]; int64: the window may be wide
        const int64_t first_query = in.causal ? max(first_key - in.offset, 0) : 0;
        const int64_t last_query =
            in.window ? min(static_cast<int64_t>(last) + in.window - 1 - in.offset, static_cast<int64_t>(in.queries - 1)) : in.queries - 1;
        begin = static_cast<int>(first_query * in.heads / kTile);
        end = last_query < first_query ? begin : static_cast<int>(((last_query + 1) * in.heads + kTile - 1) / kTile);
        if (in.segments) own = segments_of(in, batch, first_key, last_key);
    }
    __device__ __forceinline__ Span positions(int tile) const { return {in.position(tile * kTile), in.position(min(tile * kTile + kTile, in.rows) - 1)}; }
    __device__ __forceinline__ SegmentRange segments(int tile) const {
        const Span of = positions(tile);
        return segments_of(in, batch, of.first, of.last);
    }
    __device__ __forceinline__ int next(int tile) const {
        if (!in.segments) return tile;
        return first_visible(tile, end, [&](int i) { return own.overlaps(segments(i)); });
    }
    __device__ __forceinline__ bool unmasked(int tile) const {
        if (!none_masked(in, positions(tile), keys)) return false;
        if (!in.segments) return true;
        const SegmentRange range = segments(tile);
        return own.is_single() && range.is_single() && own.low == range.low;
    }
};

NEOX_DEVICE float slope_of(const Params& in, int group, int row) {
    return in.slopes ? in.slopes[group * in.heads + row - in.query(row) * in.heads] * kLog2E : 0.0f;
}

}  // namespace neox::attention
