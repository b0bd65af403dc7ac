// dk, dv and optionally dq: a block of keys against the tiles of rows that see them.
//
// Each warp owns 16 keys and all rows of a tile. Scores are computed transposed, [keys, rows]: p and ds then leave the
// tensor cores in the layout of the left operands of dv += p^T dout and dk += ds^T q, and stay in registers. dq needs
// ds of all warps, which they exchange through shared memory; the block's part of dq is added to global memory with
// atomics.
#pragma once

#include "ops/attention/cuda/backward.cuh"

namespace neox::attention {

template <int kDim_, int kKeys_, int kRows_, int kStep_, bool kSumsQueries_>
struct KeysShape {
    static constexpr int kDim = kDim_, kKeys = kKeys_, kRows = kRows_;
    // Rows whose scores are in registers at once. Code for compute_100 needs about ten more registers; the largest
    // instances spilled up to 8 bytes.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    static constexpr int kStep = kSumsQueries_ && kDim > 64 ? kStep_ / 2 : kStep_;
#else
    static constexpr int kStep = kStep_;
#endif
    static constexpr int kStages = 2, kWarps = kKeys / 16, kThreads = kWarps * kWarpSize;
    static constexpr bool kSumsQueries = kSumsQueries_;  // also dq, if task.dq_sums is not null
    // keys, values; kStages of queries, dout and row statistics; ds
    static constexpr int kStageBytes = kRows * (2 * kDim * 2 + 8);
    static constexpr size_t kSharedBytes =
        static_cast<size_t>(2 * kKeys * kDim * 2 + kStages * kStageBytes) + (kSumsQueries ? kKeys * kRows * 2 : 0);
    static_assert(kKeys % kSegmentTile == 0 && kRowPadding % kRows == 0 && kRows % kStep == 0);
};

template <class T, class Shape>
struct KeysShared {
    T *keys, *values;  // [kKeys, kDim]
    T* stage;          // queries [kRows, kDim], dout [kRows, kDim], float2 [kRows]; kStages times
    T* ds;             // [kKeys, kRows]

    __device__ __forceinline__ explicit KeysShared(unsigned char* shared) {
        keys = reinterpret_cast<T*>(shared);
        values = keys + Shape::kKeys * Shape::kDim;
        stage = values + Shape::kKeys * Shape::kDim;
        ds = stage + Shape::kStages * (Shape::kStageBytes / 2);
    }
    __device__ __forceinline__ T* queries(int i) const { return stage + i * (Shape::kStageBytes / 2); }
    __device__ __forceinline__ T* dout(int i) const { return queries(i) + Shape::kRows * Shape::kDim; }
    __device__ __forceinline__ float2* rows(int i) const {
        return reinterpret_cast<float2*>(dout(i) + Shape::kRows * Shape::kDim);
    }
};

template <class T, class Shape>
NEOX_DEVICE void fill_rows(const Backward<T>& task, int batch, int group, int tile, const KeysShared<T, Shape>& shared,
                           int stage) {
    const Params& in = task.in;
    const int first = tile * Shape::kRows, count = in.rows - first, thread = threadIdx.x;
    make_opaque(batch), make_opaque(group);  // or the pointers would occupy registers throughout the loop over tiles
    const T *const queries = task.q.at(batch, group), *const dout = task.dout.at(batch, group);
    if (in.heads == 1) {
        load_rows<Shape::kRows, Shape::kDim, Shape::kThreads>(shared.queries(stage), queries, task.q.strides.sequence,
                                                              first, count, in.head_dim, task.q.vectorized);
        load_rows<Shape::kRows, Shape::kDim, Shape::kThreads>(shared.dout(stage), dout, task.dout.strides.sequence,
                                                              first, count, in.head_dim, task.dout.vectorized);
    } else {
        load_tile<Shape::kRows, Shape::kDim, Shape::kThreads>(
            shared.queries(stage), count, in.head_dim, task.q.vectorized,
            [&](int i) { return queries + in.row_offset(first + i, task.q.strides); });
        load_tile<Shape::kRows, Shape::kDim, Shape::kThreads>(
            shared.dout(stage), count, in.head_dim, task.dout.vectorized,
            [&](int i) { return dout + in.row_offset(first + i, task.dout.strides); });
    }
    if (thread < Shape::kRows / 2)
        cp_async_16(
            shared.rows(stage) + 2 * thread,
            task.rows + static_cast<int64_t>(batch * in.groups + group) * task.padded_rows + first + 2 * thread);
}

// Sets scores s [16 keys, kStep rows] of masked pairs to -inf.
template <int kStep>
NEOX_DEVICE void mask_transposed(const Params& in, int batch, int first_row, int first_key,
                                 float (&s)[1][kStep / 8][4]) {
    const int lane = threadIdx.x % kWarpSize, key = first_key + lane / 4;
    const int32_t* const ids = in.segments ? in.segments + static_cast<int64_t>(batch) * in.keys : nullptr;
    int32_t key_ids[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) key_ids[half] = ids ? __ldg(ids + min(key + 8 * half, in.keys - 1)) : 0;
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int position = in.position(first_row + n * 8 + lane % 4 * 2 + i);
            const int32_t id = ids ? __ldg(ids + min(position, in.keys - 1)) : 0;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int distance = position - key - 8 * half;
                const bool visible =
                    key + 8 * half < in.keys && static_cast<unsigned>(distance) <= in.reach && id == key_ids[half];
                if (!visible) s[0][n][2 * half + i] = -INFINITY;
            }
        }
    }
}

// Of the general kernels: from both products [16 keys, kStep rows] to probabilities and ds. row_stats: lse and delta of
// this lane's rows.
template <int kStep>
NEOX_DEVICE void finish_general(const Params& in, int pair, int first_row, int first_key, bool unmasked,
                                const float4* row_stats, float (&p)[1][kStep / 8][4], float (&ds)[1][kStep / 8][4]) {
    const int lane = threadIdx.x % kWarpSize, key = first_key + lane / 4;
    const int32_t* const ids = in.segments ? in.segments + static_cast<int64_t>(pair / in.groups) * in.keys : nullptr;
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
        const unsigned keep = in.has_dropout ? keep_bits_transposed(in, pair, first_row + n * 8, first_key) : 15u;
        const float4 of = row_stats[n * 4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = min(first_row + n * 8 + lane % 4 * 2 + i, in.rows - 1), position = in.position(row);
            const float slope = slope_of(in, pair % in.groups, row);
            const int32_t id = ids ? __ldg(ids + position) : 0;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int at = 2 * half + i, distance = position - key - 8 * half;
                bool visible = unmasked;
                if (!unmasked) {
                    visible = key + 8 * half < in.keys && static_cast<unsigned>(distance) <= in.reach;
                    if (ids && visible) visible = __ldg(ids + key + 8 * half) == id;
                }
                finish_element(in, slope, distance, visible, keep >> at & 1, i ? of.z : of.x, i ? of.w : of.y,
                               p[0][n][at], ds[0][n][at]);
            }
        }
    }
}

// Sums of the gradients of 16 keys that a kernel computes: both, or one of them for large heads, which take two passes.
template <int kDim, bool kWantK, bool kWantV>
struct KeySums {
    float dk[1][kWantK ? kDim / 8 : 1][4] = {}, dv[1][kWantV ? kDim / 8 : 1][4] = {};
};

// Adds rows [step, step + kStep) of the tile in `stage` to the gradients of this warp's 16 keys.
template <class T, class Shape, bool kGeneral, bool kWantK, bool kWantV>
NEOX_DEVICE void add_rows(const Backward<T>& task, int pair, int tile, int step, int first_key, bool unmasked,
                          const KeysShared<T, Shape>& shared, int stage, KeySums<Shape::kDim, kWantK, kWantV>& sums) {
    constexpr int kDim = Shape::kDim, kStep = Shape::kStep;
    const Params& in = task.in;
    const int lane = threadIdx.x % kWarpSize, warp_key = threadIdx.x / kWarpSize * 16,
              first_row = tile * Shape::kRows + step;
    // each holds two rows
    const float4* const row_stats = reinterpret_cast<const float4*>(shared.rows(stage) + step) + lane % 4;
    // the values follow kKeys rows later
    const auto keys = FragmentAddress<kDim>::rows_first(shared.keys, warp_key);
    const auto multiply_values = [&](float (&ds)[1][kStep / 8][4]) {
        gemm_nt<T, kDim, 1, kStep>(
            ds, [&](int, int k, uint32_t (&a)[4]) { ldmatrix_x4(a, keys.at(Shape::kKeys, k * 2)); }, shared.dout(stage),
            step);
    };

    float p[1][kStep / 8][4] = {};
    gemm_nt<T, kDim, 1, kStep>(
        p, [&](int, int k, uint32_t (&a)[4]) { ldmatrix_x4(a, keys.at(0, k * 2)); }, shared.queries(stage), step);
    float general_ds[1][kStep / 8][4] = {};
    if constexpr (kGeneral) {
        if constexpr (kWantK) multiply_values(general_ds);
        finish_general<kStep>(in, pair, first_row, first_key, unmasked, row_stats, p, general_ds);
    } else {
        const float factor = in.scale * kLog2E;
        if (!unmasked) mask_transposed<kStep>(in, pair / in.groups, first_row, first_key, p);
#pragma unroll
        for (int n = 0; n < kStep / 8; ++n) {
            const float4 row = row_stats[n * 4];
#pragma unroll
            for (int i = 0; i < 4; ++i) p[0][n][i] = fast_exp2(p[0][n][i] * factor - (i % 2 ? row.z : row.x));
        }
    }
    if constexpr (kWantV) {
        uint32_t a[kStep / 16][4];
        accumulators_as_a<T, kStep>(p[0], a);
        gemm_nn<T, 1, kStep, kDim>(
            sums.dv, [&](int, int k, uint32_t (&of)[4]) { copy_fragment(of, a[k]); },
            FragmentAddress<kDim>::rows_first(shared.dout(stage), step));
    }
    if constexpr (kWantK) {
        uint32_t a[kStep / 16][4];
        if constexpr (kGeneral) {
            accumulators_as_a<T, kStep>(general_ds[0], a);
        } else {  // after dv: computed earlier, it would occupy registers while dv is summed
            float ds[1][kStep / 8][4] = {};
            multiply_values(ds);
#pragma unroll
            for (int n = 0; n < kStep / 8; ++n) {
                const float4 row = row_stats[n * 4];
#pragma unroll
                for (int i = 0; i < 4; ++i) ds[0][n][i] = p[0][n][i] * (ds[0][n][i] - (i % 2 ? row.w : row.y));
            }
            accumulators_as_a<T, kStep>(ds[0], a);
        }
        gemm_nn<T, 1, kStep, kDim>(
            sums.dk, [&](int, int k, uint32_t (&of)[4]) { copy_fragment(of, a[k]); },
            FragmentAddress<kDim>::rows_first(shared.queries(stage), step));
        if (Shape::kSumsQueries && task.dq_sums) {
            const T* const mine = shared.ds + Swizzle<Shape::kRows>::at(warp_key + lane / 4, step / 8) + lane % 4 * 2;
            const FragmentAddress<Shape::kRows> to{opaque(shared_address(mine))};
#pragma unroll
            for (int k = 0; k < kStep / 16; ++k) {
#pragma unroll
                // register i: key half i % 2, row half i / 2
                for (int i = 0; i < 4; ++i) store_shared(to.at(i % 2 * 8, 2 * k + i / 2), a[k][i]);
            }
        }
    }
}

// Adds the block's part of dq for a tile of rows: ds [kRows, kKeys] times keys [kKeys, kDim]. A warp computes 16 rows
// and every kParts-th chunk pair.
template <class T, class Shape>
NEOX_DEVICE void add_dq(const Backward<T>& task, int pair, int tile, const KeysShared<T, Shape>& shared) {
    constexpr int kDim = Shape::kDim, kParts = Shape::kWarps / (Shape::kRows / 16), kWide = kDim / kParts;
    static_assert(kWide % 16 == 0 && (kParts & (kParts - 1)) == 0 && kParts * (Shape::kRows / 16) == Shape::kWarps);
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, part = warp % kParts,
              row = warp / kParts * 16;
    float dq[1][kWide / 8][4] = {};
    const auto ds = FragmentAddress<Shape::kRows>::chunks_first(shared.ds, 0, row / 8);
    gemm_nn<T, 1, Shape::kKeys, kWide, kParts>(
        dq, [&](int, int k, uint32_t (&a)[4]) { ldmatrix_x4<true>(a, ds.at(k * 16, 0)); },
        FragmentAddress<kDim>::rows_first(shared.keys, 0, part * 2));
    const int64_t at = static_cast<int64_t>(pair) * task.padded_rows + tile * Shape::kRows + row + lane / 4;
    float* const sums = task.dq_sums + at * kDim + part * 16 + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kWide / 8; ++n) {
        const int column = n / 2 * (16 * kParts) + n % 2 * 8;
        atomic_add_pair(sums + column, dq[0][n][0], dq[0][n][1]);
        atomic_add_pair(sums + 8 * kDim + column, dq[0][n][2], dq[0][n][3]);
    }
}

// Writes the gradient of a warp's 16 keys, staged in the warp's rows of a tile in shared memory.
template <class T, int kDim>
NEOX_DEVICE void store_keys(const Params& in, const Matrix<T>& to, int pair, int first_key, T* tile,
                            const float (&sums)[kDim / 8][4], float factor) {
    const int warp_key = threadIdx.x / kWarpSize * 16;
    T* const base = to.at(pair / in.groups, pair % in.groups);
    stage_rows<kDim>(tile, warp_key, sums, factor, factor);
    store_staged<16, kDim>(tile, warp_key, in.head_dim, to.vectorized, [&](int i) {
        const int key = first_key + i - warp_key;
        return key < in.keys ? base + key * to.strides.sequence : nullptr;
    });
}

template <class T, class Shape, bool kGeneral, bool kWantK, bool kWantV>
__global__ void __launch_bounds__(Shape::kThreads, 1) backward_keys_kernel(const __grid_constant__ Backward<T> task) {
    constexpr int kDim = Shape::kDim, kKeys = Shape::kKeys;
    DYNAMIC_SMEM(raw);
    const KeysShared<T, Shape> shared(raw);
    const Params& in = task.in;
    const auto [pair, block] = task.order.current();
    const int batch = pair / in.groups, group = pair % in.groups, block_key = block * kKeys;
    const int first_key = block_key + static_cast<int>(threadIdx.x) / kWarpSize * 16;  // of this warp
    const RowTiles<Shape::kRows> tiles(in, batch, block_key, block_key + kKeys - 1);

    const int count = in.keys - block_key;
    load_rows<kKeys, kDim, Shape::kThreads>(shared.keys, task.k.at(batch, group), task.k.strides.sequence, block_key,
                                            count, in.head_dim, task.k.vectorized);
    if constexpr (kWantK) {
        load_rows<kKeys, kDim, Shape::kThreads>(shared.values, task.v.at(batch, group), task.v.strides.sequence,
                                                block_key, count, in.head_dim, task.v.vectorized);
    }
    KeySums<kDim, kWantK, kWantV> sums;
    int tile = tiles.next(tiles.begin), stage = 0;
    if (tile < tiles.end) fill_rows<T, Shape>(task, batch, group, tile, shared, 0);
    cp_async_commit();
    while (tile < tiles.end) {
        cp_async_wait<0>();
        __syncthreads();  // the tile is complete; all warps have left the other stage and ds
        const int next = tiles.next(tile + 1);
        if (next < tiles.end) fill_rows<T, Shape>(task, batch, group, next, shared, stage ^ 1);
        cp_async_commit();
        const bool unmasked = tiles.unmasked(tile);
#pragma unroll 1
        for (int step = 0; step < Shape::kRows; step += Shape::kStep) {
            add_rows<T, Shape, kGeneral, kWantK, kWantV>(task, pair, tile, step, first_key, unmasked, shared, stage,
                                                         sums);
        }
        if constexpr (kWantK && Shape::kSumsQueries) {
            if (task.dq_sums) {
                __syncthreads();  // ds of all warps is written
                add_dq<T, Shape>(task, pair, tile, shared);
            }
        }
        tile = next;
        stage ^= 1;
    }
    cp_async_wait<0>();
    __syncthreads();  // all warps have read the keys; their tiles are reused for the gradients
    const float keep_scale = in.has_dropout ? in.keep_scale : 1.0f;
    if constexpr (kWantK) store_keys<T, kDim>(in, task.dk, pair, first_key, shared.keys, sums.dk[0], in.scale);
    if constexpr (kWantV) store_keys<T, kDim>(in, task.dv, pair, first_key, shared.values, sums.dv[0], keep_scale);
}

}  // namespace neox::attention
