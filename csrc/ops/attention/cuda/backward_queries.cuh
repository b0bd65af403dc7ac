// dq with a fixed order of summation: a block of rows against the tiles of keys that they see, as in the forward.
#pragma once

#include "ops/attention/cuda/backward.cuh"

namespace neox::attention {

template <int kDim_, int kRows_, int kKeys_>
struct QueriesShape {
    static constexpr int kDim = kDim_, kRows = kRows_, kKeys = kKeys_, kStages = 2;
    static constexpr int kWarps = kRows / 16, kThreads = kWarps * kWarpSize;
    // queries, dout; kStages of keys and values
    static constexpr size_t kSharedBytes = static_cast<size_t>(2 * kRows + 2 * kStages * kKeys) * kDim * 2;
    static_assert(kKeys % kSegmentTile == 0 && kRowPadding % kRows == 0);
};

template <class T, class Shape>
NEOX_DEVICE void fill_keys(const Backward<T>& task, const T* keys, const T* values, int tile, T* stage) {
    const Params& in = task.in;
    const int first = tile * Shape::kKeys, count = in.keys - first;
    load_rows<Shape::kKeys, Shape::kDim, Shape::kThreads>(stage, keys, task.k.strides.sequence, first, count,
                                                          in.head_dim, task.k.vectorized);
    load_rows<Shape::kKeys, Shape::kDim, Shape::kThreads>(stage + Shape::kKeys * Shape::kDim, values,
                                                          task.v.strides.sequence, first, count, in.head_dim,
                                                          task.v.vectorized);
}

// Of the general kernels: from both products [16 rows, kKeys] to ds.
template <int kKeys>
NEOX_DEVICE void finish_general(const Params& in, int pair, int first_row, int first_key, bool unmasked,
                                const float2 (&row_stats)[2], float (&p)[1][kKeys / 8][4],
                                float (&ds)[1][kKeys / 8][4]) {
    const int lane = threadIdx.x % kWarpSize, key = first_key + lane % 4 * 2;
    const int32_t* const ids = in.segments ? in.segments + static_cast<int64_t>(pair / in.groups) * in.keys : nullptr;
    int positions[2], row_ids[2];
    float slopes[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = min(first_row + half * 8 + lane / 4, in.rows - 1);
        positions[half] = in.position(row);
        slopes[half] = slope_of(in, pair % in.groups, row);
        row_ids[half] = ids ? __ldg(ids + positions[half]) : 0;
    }
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
        const unsigned keep = in.has_dropout ? keep_bits(in, pair, first_row + lane / 4, first_key + n * 8) : 15u;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int half = i / 2, at = key + n * 8 + i % 2, distance = positions[half] - at;
            bool visible = unmasked;
            if (!unmasked) {
                visible = at < in.keys && static_cast<unsigned>(distance) <= in.reach;
                if (ids && visible) visible = __ldg(ids + at) == row_ids[half];
            }
            finish_element(in, slopes[half], distance, visible, keep >> i & 1, row_stats[half].x, row_stats[half].y,
                           p[0][n][i], ds[0][n][i]);
        }
    }
}

// dq [16 rows, kDim] += ds k for one tile. `stage` holds its keys, then its values.
template <class T, class Shape, bool kGeneral>
NEOX_DEVICE void add_keys(const Backward<T>& task, int pair, int row, int tile, bool unmasked, const T* q_tile,
                          const T* dout_tile, const T* stage, const float2 (&row_stats)[2],
                          float (&dq)[1][Shape::kDim / 8][4]) {
    constexpr int kDim = Shape::kDim, kKeys = Shape::kKeys;
    const Params& in = task.in;
    const int warp_row = threadIdx.x / kWarpSize * 16, first_key = tile * kKeys;
    float p[1][kKeys / 8][4] = {}, ds[1][kKeys / 8][4] = {};
    const auto queries = FragmentAddress<kDim>::rows_first(q_tile, warp_row),
               dout = FragmentAddress<kDim>::rows_first(dout_tile, warp_row);
    gemm_nt<T, kDim, 1, kKeys>(
        p, [&](int, int k, uint32_t (&a)[4]) { ldmatrix_x4(a, queries.at(0, k * 2)); }, stage, 0);
    if (!kGeneral && !unmasked) mask_scores<1, kKeys>(in, pair / in.groups, row, first_key, p);
    gemm_nt<T, kDim, 1, kKeys>(
        ds, [&](int, int k, uint32_t (&a)[4]) { ldmatrix_x4(a, dout.at(0, k * 2)); }, stage + kKeys * kDim, 0);
    if constexpr (kGeneral) {
        finish_general<kKeys>(in, pair, row, first_key, unmasked, row_stats, p, ds);
    } else {
        const float factor = in.scale * kLog2E;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                ds[0][n][i] = fast_exp2(p[0][n][i] * factor - row_stats[i / 2].x) * (ds[0][n][i] - row_stats[i / 2].y);
        }
    }
    uint32_t a[kKeys / 16][4];
    accumulators_as_a<T, kKeys>(ds[0], a);
    gemm_nn<T, 1, kKeys, kDim>(
        dq, [&](int, int k, uint32_t (&of)[4]) { copy_fragment(of, a[k]); },
        FragmentAddress<kDim>::rows_first(stage, 0));
}

template <class T, class Shape, bool kGeneral>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    backward_queries_kernel(const __grid_constant__ Backward<T> task) {
    constexpr int kDim = Shape::kDim, kStage = 2 * Shape::kKeys * kDim;
    DYNAMIC_SMEM(raw);
    T* const q_tile = reinterpret_cast<T*>(raw);
    T* const dout_tile = q_tile + Shape::kRows * kDim;
    T* const stages = dout_tile + Shape::kRows * kDim;
    const Params& in = task.in;
    const auto [pair, block] = task.order.current();
    const int batch = pair / in.groups, group = pair % in.groups, first_row = block * Shape::kRows;
    const int warp_row = threadIdx.x / kWarpSize * 16, row = first_row + warp_row, lane = threadIdx.x % kWarpSize;
    const KeyTiles<Shape::kKeys> tiles(in, batch, first_row, min(first_row + Shape::kRows, in.rows) - 1);

    const T* const queries = task.q.at(batch, group);
    const T* const dout = task.dout.at(batch, group);
    const T* const keys = task.k.at(batch, group);
    const T* const values = task.v.at(batch, group);
    load_tile<Shape::kRows, kDim, Shape::kThreads>(
        q_tile, in.rows - first_row, in.head_dim, task.q.vectorized,
        [&](int i) { return queries + in.row_offset(first_row + i, task.q.strides); });
    load_tile<Shape::kRows, kDim, Shape::kThreads>(
        dout_tile, in.rows - first_row, in.head_dim, task.dout.vectorized,
        [&](int i) { return dout + in.row_offset(first_row + i, task.dout.strides); });
    const float2* const all_row_stats = task.rows + static_cast<int64_t>(pair) * task.padded_rows + row + lane / 4;
    const float2 row_stats[2] = {all_row_stats[0], all_row_stats[8]};
    float dq[1][kDim / 8][4] = {};
    int tile = tiles.next(tiles.begin), stage = 0;
    if (tile < tiles.end) fill_keys<T, Shape>(task, keys, values, tile, stages);
    cp_async_commit();
    while (tile < tiles.end) {
        cp_async_wait<0>();
        __syncthreads();  // the tile is complete, and all warps have left the other stage
        const int next = tiles.next(tile + 1);
        if (next < tiles.end) fill_keys<T, Shape>(task, keys, values, next, stages + (stage ^ 1) * kStage);
        cp_async_commit();
        add_keys<T, Shape, kGeneral>(task, pair, row, tile, tiles.unmasked(tile), q_tile, dout_tile,
                                     stages + stage * kStage, row_stats, dq);
        tile = next;
        stage ^= 1;
    }
    cp_async_wait<0>();
    // with no visible tile, cp.async into the query tile may still be in flight; it is reused for the gradient
    __syncthreads();
    stage_rows<kDim>(q_tile, warp_row, dq[0], in.scale, in.scale);
    T* const base = task.dq.at(batch, group);
    store_staged<16, kDim>(q_tile, warp_row, in.head_dim, task.dq.vectorized, [&](int i) {
        const int at = first_row + i;
        return at < in.rows ? base + in.row_offset(at, task.dq.strides) : nullptr;
    });
}

}  // namespace neox::attention
