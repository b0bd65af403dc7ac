// dk, dv and optionally dq: a block of keys against the tiles of rows that see them.
//
// kParts warps share 16 kM keys. Each computes the scores of its part of a tile's rows, and sums its part of the
// channels of dk and dv. Scores are computed transposed, [keys, rows]: p and ds then leave the tensor cores in the
// layout of the left operands of dv += p^T dout and dk += ds^T q, and stay in registers. What other warps need of them
// goes through shared memory: p and ds for the other parts of the channels, ds of all keys for dq. The block's part of
// dq is added to global memory with atomics.
//
// ldmatrix, not the tensor cores, limits this kernel. At head_dim 128, 16 keys per warp, which need no exchange, take
// 200 per 320 mma (3,200 clocks of shared memory to 2,048 of the tensor cores of an H100); 32 keys in two parts take
// 136.
#pragma once

#include "ops/attention/cuda/backward.cuh"

namespace neox::attention {

template <int kDim_, int kKeys_, int kRows_, int kStep_, bool kSumsQueries_, int kM_ = 1, int kParts_ = 1>
struct KeysShape {
    static constexpr int kDim = kDim_, kKeys = kKeys_, kRows = kRows_, kM = kM_, kParts = kParts_;
    static constexpr int kStep = kStep_;  // rows whose scores are in registers at once
    static constexpr int kStages = 2, kWarps = kKeys / (16 * kM) * kParts, kThreads = kWarps * kWarpSize;
    static constexpr int kBlocks = 8 / kWarps > 0 ? 8 / kWarps : 1;  // per multiprocessor: its registers hold 8 warps
    static constexpr int kPartRows = kRows / kParts, kPartDim = kDim / kParts;
    static constexpr bool kSumsQueries = kSumsQueries_;  // also dq, if task.dq_sums is not null
    // keys, values; kStages of queries, dout and row statistics; ds and p
    static constexpr int kStageBytes = kRows * (2 * kDim * 2 + 8);
    static constexpr int kExchanged = kParts > 1 ? 2 : kSumsQueries ? 1 : 0;
    static constexpr size_t kSharedBytes =
        static_cast<size_t>(2 * kKeys * kDim * 2 + kStages * kStageBytes + kExchanged * kKeys * kRows * 2);
    static_assert(kKeys % (16 * kM) == 0 && kPartRows % kStep == 0 && kPartDim % 16 == 0);
    static_assert(kKeys % kSegmentTile == 0 && kRowPadding % kRows == 0);
};

template <class T, class Shape>
struct KeysShared {
    T *keys, *values;  // [kKeys, kDim]
    T* stage;          // queries [kRows, kDim], dout [kRows, kDim], float2 [kRows]; kStages times
    T *ds, *p;         // [kKeys, kRows]

    __device__ __forceinline__ explicit KeysShared(unsigned char* shared) {
        keys = reinterpret_cast<T*>(shared);
        values = keys + Shape::kKeys * Shape::kDim;
        stage = values + Shape::kKeys * Shape::kDim;
        ds = stage + Shape::kStages * (Shape::kStageBytes / 2);
        p = ds + Shape::kKeys * Shape::kRows;
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

// Sets scores s [16 kM keys, kStep rows] of masked pairs to -inf.
template <int kM, int kStep>
NEOX_DEVICE void mask_transposed(const Params& in, int batch, int first_row, int first_key,
                                 float (&s)[kM][kStep / 8][4]) {
    const int lane = threadIdx.x % kWarpSize, key = first_key + lane / 4;
    const int32_t* const ids = in.segments ? in.segments + static_cast<int64_t>(batch) * in.keys : nullptr;
    int32_t key_ids[2 * kM];
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) key_ids[i] = ids ? __ldg(ids + min(key + 8 * i, in.keys - 1)) : 0;
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int position = in.position(first_row + n * 8 + lane % 4 * 2 + i);
            const int32_t id = ids ? __ldg(ids + min(position, in.keys - 1)) : 0;
#pragma unroll
            for (int half = 0; half < 2 * kM; ++half) {
                const int distance = position - key - 8 * half;
                const bool visible =
                    key + 8 * half < in.keys && static_cast<unsigned>(distance) <= in.reach && id == key_ids[half];
                if (!visible) s[half / 2][n][half % 2 * 2 + i] = -INFINITY;
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

// The keys and channels of this warp.
template <class Shape>
struct KeysOfWarp {
    int part, key;  // key: the first of 16 kM, in the block

    __device__ __forceinline__ KeysOfWarp()
        : part(static_cast<int>(threadIdx.x) / kWarpSize % Shape::kParts),
          key(static_cast<int>(threadIdx.x) / kWarpSize / Shape::kParts * (16 * Shape::kM)) {}
    // The channels of a part are every kParts-th pair of chunks of rows [row, ...) of a tile.
    template <class T>
    __device__ __forceinline__ FragmentAddress<Shape::kDim> channels(const T* tile, int row) const {
        return FragmentAddress<Shape::kDim>::rows_first(tile, row, part * 2);
    }
};

// Sums of the gradients of a warp's keys and channels that a kernel computes: both, or one of them for large heads,
// which take two passes.
template <class Shape, bool kWantK, bool kWantV>
struct KeySums {
    static constexpr int kM = Shape::kM, kColumns = Shape::kPartDim / 8;
    float dk[kM][kWantK ? kColumns : 1][4] = {}, dv[kM][kWantV ? kColumns : 1][4] = {};
};

// sums += a b for rows [row, row + kRows) of a tile, a in registers.
template <class T, class Shape, int kRows>
NEOX_DEVICE void add_product(float (&sums)[Shape::kM][Shape::kPartDim / 8][4],
                             const uint32_t (&a)[Shape::kM][kRows / 16][4], const T* tile, int row) {
    gemm_nn<T, Shape::kM, kRows, Shape::kPartDim, Shape::kParts>(
        sums, [&](int m, int k, uint32_t (&of)[4]) { copy_fragment(of, a[m][k]); },
        KeysOfWarp<Shape>().channels(tile, row));
}

// Writes the A fragments of this warp's keys and rows [row, row + kRows) to a tile [kKeys, Shape::kRows].
template <class T, class Shape, int kRows>
NEOX_DEVICE void share(T* tile, int row, const uint32_t (&a)[Shape::kM][kRows / 16][4]) {
    const int lane = threadIdx.x % kWarpSize, key = KeysOfWarp<Shape>().key + lane / 4;
    const FragmentAddress<Shape::kRows> to{
        shared_address(tile + Swizzle<Shape::kRows>::at(key, row / 8) + lane % 4 * 2)};
#pragma unroll
    for (int m = 0; m < Shape::kM; ++m) {
#pragma unroll
        for (int k = 0; k < kRows / 16; ++k) {
#pragma unroll
            // register i: key half i % 2, row half i / 2
            for (int i = 0; i < 4; ++i) store_shared(to.at(m * 16 + i % 2 * 8, 2 * k + i / 2), a[m][k][i]);
        }
    }
}

// Adds rows [step, step + kStep) of the tile in `stage` to the gradients of this warp's keys.
template <class T, class Shape, bool kGeneral, bool kWantK, bool kWantV>
NEOX_DEVICE void add_rows(const Backward<T>& task, int pair, int tile, int step, int first_key, bool unmasked,
                          const KeysShared<T, Shape>& shared, int stage, KeySums<Shape, kWantK, kWantV>& sums) {
    constexpr int kDim = Shape::kDim, kStep = Shape::kStep, kM = Shape::kM;
    const Params& in = task.in;
    const int lane = threadIdx.x % kWarpSize, first_row = tile * Shape::kRows + step;
    // each holds two rows
    const float4* const row_stats = reinterpret_cast<const float4*>(shared.rows(stage) + step) + lane % 4;
    // the values follow kKeys rows later
    const auto keys = FragmentAddress<kDim>::rows_first(shared.keys, KeysOfWarp<Shape>().key);
    const auto multiply_values = [&](float (&ds)[kM][kStep / 8][4]) {
        gemm_nt<T, kDim, kM, kStep>(
            ds, [&](int m, int k, uint32_t (&a)[4]) { ldmatrix_x4(a, keys.at(Shape::kKeys + m * 16, k * 2)); },
            shared.dout(stage), step);
    };

    float p[kM][kStep / 8][4] = {};
    gemm_nt<T, kDim, kM, kStep>(
        p, [&](int m, int k, uint32_t (&a)[4]) { ldmatrix_x4(a, keys.at(m * 16, k * 2)); }, shared.queries(stage),
        step);
    float general_ds[kM][kStep / 8][4] = {};
    if constexpr (kGeneral) {
        if constexpr (kWantK) multiply_values(general_ds);
        finish_general<kStep>(in, pair, first_row, first_key, unmasked, row_stats, p, general_ds);
    } else {
        const float factor = in.scale * kLog2E;
        if (!unmasked) mask_transposed<kM, kStep>(in, pair / in.groups, first_row, first_key, p);
#pragma unroll
        for (int n = 0; n < kStep / 8; ++n) {
            const float4 row = row_stats[n * 4];
#pragma unroll
            for (int i = 0; i < 4 * kM; ++i) {
                float& score = p[i / 4][n][i % 4];
                score = fast_exp2(score * factor - (i % 2 ? row.z : row.x));
            }
        }
    }
    uint32_t a[kM][kStep / 16][4];
    if constexpr (kWantV) {
#pragma unroll
        for (int m = 0; m < kM; ++m) accumulators_as_a<T, kStep>(p[m], a[m]);
        add_product<T, Shape, kStep>(sums.dv, a, shared.dout(stage), step);
        if constexpr (Shape::kParts > 1) share<T, Shape, kStep>(shared.p, step, a);
    }
    if constexpr (kWantK) {
        if constexpr (kGeneral) {
#pragma unroll
            for (int m = 0; m < kM; ++m) accumulators_as_a<T, kStep>(general_ds[m], a[m]);
        } else {  // after dv: computed earlier, it would occupy registers while dv is summed
            float ds[kM][kStep / 8][4] = {};
            multiply_values(ds);
#pragma unroll
            for (int n = 0; n < kStep / 8; ++n) {
                const float4 row = row_stats[n * 4];
#pragma unroll
                for (int i = 0; i < 4 * kM; ++i) {
                    float& element = ds[i / 4][n][i % 4];
                    element = p[i / 4][n][i % 4] * (element - (i % 2 ? row.w : row.y));
                }
            }
#pragma unroll
            for (int m = 0; m < kM; ++m) accumulators_as_a<T, kStep>(ds[m], a[m]);
        }
        add_product<T, Shape, kStep>(sums.dk, a, shared.queries(stage), step);
        if (Shape::kParts > 1 || (Shape::kSumsQueries && task.dq_sums)) share<T, Shape, kStep>(shared.ds, step, a);
    }
}

// Adds the rows whose p and ds other warps of the same keys computed.
template <class T, class Shape>
NEOX_DEVICE void add_other_parts(const KeysShared<T, Shape>& shared, int stage, KeySums<Shape, true, true>& sums) {
    constexpr int kRows = Shape::kPartRows;
    const KeysOfWarp<Shape> mine;
#pragma unroll
    for (int other = 1; other < Shape::kParts; ++other) {
        const int row = (mine.part + other) % Shape::kParts * kRows;
        const auto add = [&](float (&to)[Shape::kM][Shape::kPartDim / 8][4], const T* left, const T* right) {
            const auto a = FragmentAddress<Shape::kRows>::rows_first(left, mine.key, row / 8);
            gemm_nn<T, Shape::kM, kRows, Shape::kPartDim, Shape::kParts>(
                to, [&](int m, int k, uint32_t (&of)[4]) { ldmatrix_x4(of, a.at(m * 16, k * 2)); },
                mine.channels(right, row));
        };
        add(sums.dv, shared.p, shared.dout(stage));
        add(sums.dk, shared.ds, shared.queries(stage));
    }
}

// Adds the block's part of dq for a tile of rows: ds [kRows, kKeys] times keys [kKeys, kDim]. A warp computes 16 kM
// rows and every kParts-th chunk pair.
template <class T, class Shape>
NEOX_DEVICE void add_dq(const Backward<T>& task, int pair, int tile, const KeysShared<T, Shape>& shared) {
    constexpr int kDim = Shape::kDim;
    // 32 rows take fewer ldmatrix, if the channels can be divided so
    constexpr int kM = kDim % (Shape::kWarps * 32 * 16 / Shape::kRows) == 0 ? 2 : 1;
    constexpr int kParts = Shape::kWarps * 16 * kM / Shape::kRows, kWide = kDim / kParts;
    static_assert(kWide % 16 == 0 && (kParts & (kParts - 1)) == 0 && kParts * Shape::kRows == Shape::kWarps * 16 * kM);
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, part = warp % kParts,
              row = warp / kParts * (16 * kM);
    float dq[kM][kWide / 8][4] = {};
    const auto ds = FragmentAddress<Shape::kRows>::chunks_first(shared.ds, 0, row / 8);
    gemm_nn<T, kM, Shape::kKeys, kWide, kParts>(
        dq, [&](int m, int k, uint32_t (&a)[4]) { ldmatrix_x4<true>(a, ds.at(k * 16, m * 2)); },
        FragmentAddress<kDim>::rows_first(shared.keys, 0, part * 2));
    const int64_t at = static_cast<int64_t>(pair) * task.padded_rows + tile * Shape::kRows + row + lane / 4;
    float* const sums = task.dq_sums + at * kDim + part * 16 + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int n = 0; n < kWide / 8; ++n) {
            float* const to = sums + m * 16 * kDim + n / 2 * (16 * kParts) + n % 2 * 8;
            atomic_add_pair(to, dq[m][n][0], dq[m][n][1]);
            atomic_add_pair(to + 8 * kDim, dq[m][n][2], dq[m][n][3]);
        }
    }
}

// Writes the gradient of the block's keys, staged in a tile in shared memory.
template <class T, class Shape>
NEOX_DEVICE void store_keys(const Params& in, const Matrix<T>& to, int pair, int block_key, T* tile,
                            const float (&sums)[Shape::kM][Shape::kPartDim / 8][4], float factor) {
    constexpr int kRows = 16 * Shape::kM / Shape::kParts;  // that each warp stores
    const KeysOfWarp<Shape> mine;
    T* const base = to.at(pair / in.groups, pair % in.groups);
#pragma unroll
    for (int m = 0; m < Shape::kM; ++m)
        stage_rows<Shape::kDim, Shape::kParts>(tile, mine.key + m * 16, sums[m], factor, factor, mine.part);
    if (Shape::kParts > 1) __syncthreads();  // all parts of the channels are staged
    store_staged<kRows, Shape::kDim>(tile, mine.key + mine.part * kRows, in.head_dim, to.vectorized, [&](int i) {
        return block_key + i < in.keys ? base + (block_key + i) * to.strides.sequence : nullptr;
    });
}

template <class T, class Shape, bool kGeneral, bool kWantK, bool kWantV>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    backward_keys_kernel(const __grid_constant__ Backward<T> task) {
    constexpr int kDim = Shape::kDim, kKeys = Shape::kKeys;
    DYNAMIC_SMEM(raw);
    const KeysShared<T, Shape> shared(raw);
    const Params& in = task.in;
    const auto [pair, block] = task.order.current();
    const int batch = pair / in.groups, group = pair % in.groups, block_key = block * kKeys;
    const KeysOfWarp<Shape> mine;
    const RowTiles<Shape::kRows> tiles(in, batch, block_key, block_key + kKeys - 1);

    const int count = in.keys - block_key;
    load_rows<kKeys, kDim, Shape::kThreads>(shared.keys, task.k.at(batch, group), task.k.strides.sequence, block_key,
                                            count, in.head_dim, task.k.vectorized);
    if constexpr (kWantK) {
        load_rows<kKeys, kDim, Shape::kThreads>(shared.values, task.v.at(batch, group), task.v.strides.sequence,
                                                block_key, count, in.head_dim, task.v.vectorized);
    }
    KeySums<Shape, kWantK, kWantV> sums;
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
        for (int step = 0; step < Shape::kPartRows; step += Shape::kStep) {
            add_rows<T, Shape, kGeneral, kWantK, kWantV>(task, pair, tile, mine.part * Shape::kPartRows + step,
                                                         block_key + mine.key, unmasked, shared, stage, sums);
        }
        if constexpr (Shape::kParts > 1) {
            __syncthreads();  // p and ds of all warps are written
            add_other_parts<T, Shape>(shared, stage, sums);
        }
        if constexpr (kWantK && Shape::kSumsQueries) {
            if (task.dq_sums) {
                if (Shape::kParts == 1) __syncthreads();  // ds of all warps is written
                add_dq<T, Shape>(task, pair, tile, shared);
            }
        }
        tile = next;
        stage ^= 1;
    }
    cp_async_wait<0>();
    __syncthreads();  // all warps have read the keys; their tiles are reused for the gradients
    const float keep_scale = in.has_dropout ? in.keep_scale : 1.0f;
    if constexpr (kWantK) store_keys<T, Shape>(in, task.dk, pair, block_key, shared.keys, sums.dk, in.scale);
    if constexpr (kWantV) store_keys<T, Shape>(in, task.dv, pair, block_key, shared.values, sums.dv, keep_scale);
}

}  // namespace neox::attention
