// Kernel parameters of attention: the geometry of rows and keys, which tiles are visible, and the map from products to
// scores.
//
// A row is a (query, head of the kv group) pair, heads innermost: row r is query r / heads. The rows of a kv head share
// its keys. Grouped and multi-query heads therefore fill tiles even in decoding, and the backward sums over the heads
// of a group without a second pass.
#pragma once

#include "common/divisor.cuh"
#include "common/ptx.cuh"
#include "ops/attention/attention.h"

namespace neox::attention {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr int kSegmentTile = 32;  // keys per entry of the table of segment ids; tiles of keys are multiples of it

// A tensor [batch, sequence, groups, heads, head_dim]. vectorized: every row starts at a multiple of 16 bytes and its
// length is one.
template <class T>
struct Matrix {
    T* data;
    AttentionStrides strides;
    bool vectorized;

    __device__ __forceinline__ T* at(int batch, int group) const {
        return data + batch * strides.batch + group * strides.group;
    }
};

struct Params {
    int batch, groups, heads, queries, keys, head_dim;
    int rows;  // queries * heads
    Divisor by_heads;
    int offset;  // keys - queries: position of query 0
    // causal mask and window in one comparison: key j is visible to position p if unsigned(p - j) <= reach
    unsigned reach;
    bool causal;
    int window;                 // 0: no window
    const int32_t* segments;    // [batch, keys], or null
    const int2* segment_table;  // [batch, ceil(keys / kSegmentTile)]: lowest and highest id
    int segment_entries;
    const float* slopes;   // [groups * heads], or null
    float scale, softcap;  // softcap 0: no softcap
    bool has_dropout;      // drawn from Philox with this seed
    uint64_t seed[2];
    uint32_t threshold;  // an element is retained if its word is at least this
    float keep_scale;    // 1 / (1 - dropout)

    __device__ __forceinline__ int query(int row) const { return by_heads.quotient(row); }
    __device__ __forceinline__ int position(int row) const { return query(row) + offset; }
    __device__ __forceinline__ int64_t row_offset(int row, const AttentionStrides& strides) const {
        if (heads == 1) return row * strides.sequence;
        const int i = query(row);
        return i * strides.sequence + (row - i * heads) * strides.head;
    }
    // tanh(scale product / softcap) as 1 - 2 / (1 + e^2x): absolute error 1e-7, exact at both ends.
    __device__ __forceinline__ float capped(float product) const {
        return 1.0f - __fdividef(2.0f, 1.0f + fast_exp2(product * (scale * (2.0f * kLog2E) / softcap)));
    }
    // The score in base 2 of a product of query and key, without ALiBi.
    __device__ __forceinline__ float score(float product) const {
        return softcap > 0.0f ? softcap * kLog2E * capped(product) : product * (scale * kLog2E);
    }
    // Index of row `row` in a [batch, groups * heads, queries] tensor.
    __device__ __forceinline__ int64_t index(int pair, int row) const {
        const int i = query(row);
        return (static_cast<int64_t>(pair) * heads + (row - i * heads)) * queries + i;
    }
};

// Maps a block of the grid to a (batch, group) pair and a tile. Pairs are processed in chunks whose keys and values fit
// into the L2 cache together. Within a chunk, tile i of all pairs precedes tile i + 1; under a causal mask the longest
// tiles come first.
struct BlockOrder {
    int tiles, pairs, chunk;
    bool reversed;

    struct Tile {
        int pair, tile;
    };
    __device__ __forceinline__ Tile current() const {
        const int64_t index = blockIdx.x, chunk_blocks = static_cast<int64_t>(chunk) * tiles;
        const int first = static_cast<int>(index / chunk_blocks) * chunk, rest = static_cast<int>(index % chunk_blocks);
        const int size = min(chunk, pairs - first), tile = rest / size;
        return {first + rest - tile * size, reversed ? tiles - 1 - tile : tile};
    }
};

// Lowest and highest segment id of a range of keys; empty if low > high.
struct SegmentRange {
    int low = 2147483647, high = -2147483647 - 1;

    __device__ __forceinline__ bool overlaps(const SegmentRange& other) const {
        return low <= other.high && other.low <= high;
    }
    __device__ __forceinline__ bool is_single() const { return low == high; }
};

// The range of the table entries that cover keys [first, last], which may include further keys.
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

struct Span {
    int first, last;  // positions of rows, or keys; inclusive
};

NEOX_DEVICE bool all_masked(const Params& in, Span positions, Span keys) {
    return (in.causal && keys.first > positions.last) || (in.window && keys.last <= positions.first - in.window);
}

// Whether causal mask and window hide no key from any position. Segments are checked separately.
NEOX_DEVICE bool none_masked(const Params& in, Span positions, Span keys) {
    return keys.last < in.keys && (!in.causal || keys.last <= positions.first) &&
           (!in.window || keys.first > positions.last - in.window);
}

// The first of tiles [tile, end) for which visible(tile) holds, or end. A warp tests 32 tiles at a time; all warps get
// the same result.
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
    SegmentRange block_segments;

    __device__ __forceinline__ KeyTiles(const Params& params, int batch_index, int first_row, int last_row)
        : in(params), batch(batch_index) {
        positions = {in.position(first_row), in.position(last_row)};
        const int last = in.causal ? min(in.keys - 1, positions.last) : in.keys - 1;
        begin = in.window ? max(positions.first - in.window + 1, 0) / kTile : 0;
        end = last < 0 ? 0 : last / kTile + 1;
        if (in.segments) block_segments = segments_of(in, batch, positions.first, positions.last);
    }
    __device__ __forceinline__ SegmentRange segments(int tile) const {
        return segments_of(in, batch, tile * kTile, tile * kTile + kTile - 1);
    }
    __device__ __forceinline__ int next(int tile) const {
        if (!in.segments) return tile;
        return first_visible(tile, end, [&](int i) { return block_segments.overlaps(segments(i)); });
    }
    __device__ __forceinline__ bool unmasked(int tile) const {
        if (!none_masked(in, positions, {tile * kTile, tile * kTile + kTile - 1})) return false;
        if (!in.segments) return true;
        const SegmentRange range = segments(tile);
        return block_segments.is_single() && range.is_single() && block_segments.low == range.low;
    }
};

// The tiles of kTile rows that may see keys [first_key, last_key].
template <int kTile>
struct RowTiles {
    const Params& in;
    int batch, begin, end;
    Span keys;
    SegmentRange block_segments;

    __device__ __forceinline__ RowTiles(const Params& params, int batch_index, int first_key, int last_key)
        : in(params), batch(batch_index) {
        keys = {first_key, last_key};
        const int last = min(last_key, in.keys - 1);
        // queries at positions [first_key, last + window - 1]; int64, because the window may be wide
        const int64_t first_query = in.causal ? max(first_key - in.offset, 0) : 0;
        const int64_t last_query = in.window ? min(static_cast<int64_t>(last) + in.window - 1 - in.offset,
                                                   static_cast<int64_t>(in.queries - 1))
                                             : in.queries - 1;
        begin = static_cast<int>(first_query * in.heads / kTile);
        end = last_query < first_query ? begin : static_cast<int>(((last_query + 1) * in.heads + kTile - 1) / kTile);
        if (in.segments) block_segments = segments_of(in, batch, first_key, last_key);
    }
    __device__ __forceinline__ Span positions(int tile) const {
        return {in.position(tile * kTile), in.position(min(tile * kTile + kTile, in.rows) - 1)};
    }
    __device__ __forceinline__ SegmentRange segments(int tile) const {
        const Span of = positions(tile);
        return segments_of(in, batch, of.first, of.last);
    }
    __device__ __forceinline__ int next(int tile) const {
        if (!in.segments) return tile;
        return first_visible(tile, end, [&](int i) { return block_segments.overlaps(segments(i)); });
    }
    __device__ __forceinline__ bool unmasked(int tile) const {
        if (!none_masked(in, positions(tile), keys)) return false;
        if (!in.segments) return true;
        const SegmentRange range = segments(tile);
        return block_segments.is_single() && range.is_single() && block_segments.low == range.low;
    }
};

NEOX_DEVICE float slope_of(const Params& in, int group, int row) {
    return in.slopes ? in.slopes[group * in.heads + row - in.query(row) * in.heads] * kLog2E : 0.0f;
}

}  // namespace neox::attention
