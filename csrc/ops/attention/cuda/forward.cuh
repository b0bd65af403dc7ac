// The forward kernel: a block of rows against the tiles of keys that they see.
//
// Each warp owns 16 kM rows and all keys of a tile, so that the softmax needs no shared memory. Key and value tiles
// alternate in a ring of kStages slots, which cp.async fills kStages - 1 tiles ahead. A variant with other copy or
// tensor-core instructions replaces the loop over tiles (run_tiles) only; mask, softmax and epilogue operate on its
// accumulators.
#pragma once

#include "common/vec.cuh"
#include "ops/attention/cuda/mask.cuh"
#include "ops/attention/cuda/shared_tile.cuh"

namespace neox::attention {

constexpr int kForwardRows = 128;  // rows of a block in every instance

template <int kDim_, int kRows_, int kKeys_, int kWarps_, int kStages_, int kBlocks_>
struct ForwardShape {
    static constexpr int kDim = kDim_, kRows = kRows_, kKeys = kKeys_, kWarps = kWarps_, kStages = kStages_;
    static constexpr int kBlocks = kBlocks_;  // resident per multiprocessor; sets the register budget
    static constexpr int kThreads = kWarps * kWarpSize, kM = kRows / kWarps / 16;
    static constexpr size_t kSharedBytes = static_cast<size_t>(kRows + kStages * kKeys) * kDim * 2;
    static_assert(kKeys % kSegmentTile == 0 && kRows == kM * kWarps * 16);
};

template <class T>
struct Forward {
    Params in;
    BlockOrder order;
    Matrix<const T> q, k, v;
    Matrix<T> out;
    float* lse;          // [batch, groups * heads, queries]
    int splits;          // of the keys, one per gridDim.y; with more than one the results go to:
    float* partial_out;  // [splits, pairs, rows, kDim], each split divided by its sum
    float* partial_lse;  // [splits, pairs, rows], base 2
};

// State of the online softmax of this lane's 2 kM rows.
template <int kM>
struct RunningSoftmax {
    float reference[kM][2];  // the largest score so far; exponents are relative to it
    float total[kM][2];      // sum of probabilities over this lane's columns

    __device__ __forceinline__ RunningSoftmax() {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
            reference[m][0] = reference[m][1] = -INFINITY;
            total[m][0] = total[m][1] = 0.0f;
        }
    }
};

// s [16 kM, kKeys] becomes 2^(factor s - reference). If a row's maximum grows, its reference follows and its sums in
// `out` are rescaled. The decision is per row, so that the bits of a row do not depend on other rows; a warp skips the
// rescaling if none of its rows needs it.
//
// A lazy reference, which lags the maximum, would save most of the rescaling. But the largest probability of a row
// would no longer be 1, and rounding it to bf16 for the product with the values loses up to 2^-9 of it. Where one key
// takes nearly all of the attention nothing averages that error out: the output, and through dout . out every gradient
// of the scores, would be off by twice the rounding error of the output.
template <int kM, int kKeys, int kDim>
NEOX_DEVICE void online_softmax(float (&s)[kM][kKeys / 8][4], float factor, RunningSoftmax<kM>& row,
                                float (&out)[kM][kDim / 8][4]) {
    float rescale[kM][2];
    bool moved = false;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float peak = fmaxf(s[m][0][2 * half], s[m][0][2 * half + 1]);
#pragma unroll
            for (int n = 1; n < kKeys / 8; ++n) peak = fmaxf(peak, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
            peak = fmaxf(peak, __shfl_xor_sync(kFullWarp, peak, 1));
            peak = fmaxf(peak, __shfl_xor_sync(kFullWarp, peak, 2)) * factor;
            const float before = row.reference[m][half];
            const bool moves = peak > before;
            const float power = fast_exp2(before - peak);
            rescale[m][half] = moves ? power : 1.0f;
            row.reference[m][half] = moves ? peak : before;
            moved = moved || moves;
        }
    }
    if (__any_sync(kFullWarp, moved)) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                row.total[m][half] *= rescale[m][half];
#pragma unroll
                for (int n = 0; n < kDim / 8; ++n) {
                    out[m][n][2 * half] *= rescale[m][half];
                    out[m][n][2 * half + 1] *= rescale[m][half];
                }
            }
        }
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float base = row.reference[m][half] == -INFINITY ? 0.0f : row.reference[m][half];
            float part = 0.0f;
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    s[m][n][i] = fast_exp2(s[m][n][i] * factor - base);
                    part += s[m][n][i];
                }
            }
            row.total[m][half] += part;
        }
    }
}

// Fills the ring with the visible tiles, keys and values alternating, one slot each.
template <class T, class Shape>
struct TileLoader {
    const Forward<T>& task;
    const KeyTiles<Shape::kKeys>& tiles;
    const T *keys, *values;
    T* ring;
    int tile;

    template <bool kValues>
    __device__ __forceinline__ void load_next(int slot) {
        if (tile < tiles.end) {
            const int first = tile * Shape::kKeys;
            const Matrix<const T>& from = kValues ? task.v : task.k;
            load_rows<Shape::kKeys, Shape::kDim, Shape::kThreads>(
                ring + slot * (Shape::kKeys * Shape::kDim), kValues ? values : keys, from.strides.sequence, first,
                task.in.keys - first, task.in.head_dim, from.vectorized);
            if (kValues) tile = tiles.next(tile + 1);
        }
        cp_async_commit();  // even without copies, because waits count groups
    }
};

// Accumulates this warp's rows over all tiles. Rows past the last one are zeros and are not stored.
template <class T, class Shape, bool kGeneral>
NEOX_DEVICE void run_tiles(const Forward<T>& task, const KeyTiles<Shape::kKeys>& tiles, const BlockOrder::Tile* here,
                           const T* q_tile, TileLoader<T, Shape>& loader, RunningSoftmax<Shape::kM>& softmax,
                           float (&out)[Shape::kM][Shape::kDim / 8][4]) {
    constexpr int kM = Shape::kM, kKeys = Shape::kKeys, kDim = Shape::kDim;
    const Params& in = task.in;
    const int warp_row = threadIdx.x / kWarpSize * (16 * kM);
    const float factor = kGeneral ? 1.0f : in.scale * kLog2E;
    constexpr bool kHold = kDim <= 64;  // small heads leave registers to hold the queries
    uint32_t q[kHold ? kM : 1][kHold ? kDim / 16 : 1][4];
    const auto q_address = FragmentAddress<kDim>::rows_first(q_tile, warp_row);
    bool fresh = true;
    int slot = 0;
    const auto before = [](int of) { return of == 0 ? Shape::kStages - 1 : of - 1; };  // the slot that is filled next
    for (int tile = tiles.next(tiles.begin); tile < tiles.end; tile = tiles.next(tile + 1)) {
        uint32_t p[kM][kKeys / 16][4];
        cp_async_wait<Shape::kStages - 2>();
        // the key tile is complete, and all warps have left the slot that is filled next
        __syncthreads();
        // the kind of tile that is kStages - 1 slots ahead of these keys
        loader.template load_next<Shape::kStages % 2 == 0>(before(slot));
        float s[kM][kKeys / 8][4] = {};
        if constexpr (kHold) {
            if (fresh) {
#pragma unroll
                for (int m = 0; m < kM; ++m) {
#pragma unroll
                    for (int k = 0; k < kDim / 16; ++k) ldmatrix_x4(q[m][k], q_address.at(m * 16, k * 2));
                }
            }
            fresh = false;
        }
        const auto q_of = [&](int m, int k, uint32_t (&a)[4]) {
            if constexpr (kHold) {
                copy_fragment(a, q[m][k]);
            } else {
                ldmatrix_x4(a, q_address.at(m * 16, k * 2));
            }
        };
        gemm_nt<T, kDim, kM, kKeys>(s, q_of, loader.ring + slot * (kKeys * kDim), 0);
        const auto row = [&] { return here->tile * Shape::kRows + warp_row; };
        if constexpr (kGeneral) apply_softcap_and_alibi<kM, kKeys>(in, here->pair % in.groups, row(), tile * kKeys, s);
        if (!tiles.unmasked(tile)) mask_scores<kM, kKeys>(in, tiles.batch, row(), tile * kKeys, s);
        online_softmax<kM, kKeys, kDim>(s, factor, softmax, out);
        if constexpr (kGeneral) {
            if (in.has_dropout) apply_dropout<kM, kKeys>(in, here->pair, row(), tile * kKeys, s);
        }
#pragma unroll
        for (int m = 0; m < kM; ++m) accumulators_as_a<T, kKeys>(s[m], p[m]);
        slot = slot + 1 == Shape::kStages ? 0 : slot + 1;
        cp_async_wait<Shape::kStages - 2>();
        __syncthreads();  // the same for the value tile
        loader.template load_next<Shape::kStages % 2 == 1>(before(slot));
        const auto p_of = [&](int m, int k, uint32_t (&a)[4]) { copy_fragment(a, p[m][k]); };
        gemm_nn<T, kM, kKeys, kDim>(out, p_of,
                                    FragmentAddress<kDim>::rows_first(loader.ring + slot * (kKeys * kDim), 0));
        slot = slot + 1 == Shape::kStages ? 0 : slot + 1;
    }
    cp_async_wait<0>();
    // with no visible tile, cp.async into the query tile may still be in flight; it is reused for the output
    __syncthreads();
}

// Divides by the sums and writes lse and out. out is staged in this warp's rows of the query tile.
template <class T, class Shape>
NEOX_DEVICE void finish_rows(const Forward<T>& task, int pair, int row, const RunningSoftmax<Shape::kM>& softmax,
                             const float (&out)[Shape::kM][Shape::kDim / 8][4], T* q_tile) {
    const Params& in = task.in;
    const int lane = threadIdx.x % kWarpSize, warp_row = threadIdx.x / kWarpSize * (16 * Shape::kM);
    const float keep_scale = in.has_dropout ? in.keep_scale : 1.0f;
#pragma unroll
    for (int m = 0; m < Shape::kM; ++m) {
        float inverse[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float total = softmax.total[m][half];
            total += __shfl_xor_sync(kFullWarp, total, 1);
            total += __shfl_xor_sync(kFullWarp, total, 2);
            const bool no_keys = total == 0.0f;
            inverse[half] = no_keys ? 0.0f : keep_scale / total;
            const int at = row + m * 16 + half * 8 + lane / 4;
            const float lse = no_keys ? -INFINITY : softmax.reference[m][half] + log2f(total);
            if (at < in.rows && lane % 4 == 0) {
                if (task.splits > 1) {
                    task.partial_lse[(static_cast<int64_t>(blockIdx.y) * task.order.pairs + pair) * in.rows + at] = lse;
                } else {
                    task.lse[in.index(pair, at)] = lse * kLn2;
                }
            }
            if (at < in.rows && task.splits > 1) {
                float* const part =
                    task.partial_out +
                    ((static_cast<int64_t>(blockIdx.y) * task.order.pairs + pair) * in.rows + at) * Shape::kDim;
#pragma unroll
                for (int n = 0; n < Shape::kDim / 8; ++n) {
                    *reinterpret_cast<float2*>(part + n * 8 + lane % 4 * 2) =
                        make_float2(out[m][n][2 * half] * inverse[half], out[m][n][2 * half + 1] * inverse[half]);
                }
            }
        }
        if (task.splits == 1) stage_rows<Shape::kDim>(q_tile, warp_row + m * 16, out[m], inverse[0], inverse[1]);
    }
    if (task.splits > 1) return;
    T* const base = task.out.at(pair / in.groups, pair % in.groups);
    store_staged<16 * Shape::kM, Shape::kDim>(q_tile, warp_row, in.head_dim, task.out.vectorized, [&](int i) {
        const int at = row + i - warp_row;
        return at < in.rows ? base + in.row_offset(at, task.out.strides) : nullptr;
    });
}

template <class T, class Shape, bool kGeneral>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    forward_kernel(const __grid_constant__ Forward<T> task) {
    DYNAMIC_SMEM(shared);
    T* const q_tile = reinterpret_cast<T*>(shared);  // [kRows, kDim], then the ring of [kKeys, kDim]
    const Params& in = task.in;
    const auto [pair, block] = task.order.current();
    // For uses after the next barrier. In registers, which head_dim 128 does not have, they would be live throughout
    // the loop over tiles.
    STATIC_SMEM(BlockOrder::Tile, here, [1]);
    if (threadIdx.x == 0) here[0] = {pair, block};
    const int batch = pair / in.groups, group = pair % in.groups, first_row = block * Shape::kRows;
    KeyTiles<Shape::kKeys> tiles(in, batch, first_row, min(first_row + Shape::kRows, in.rows) - 1);
    if (task.splits > 1) {
        const int begin = tiles.begin, count = max(tiles.end - begin, 0), part = blockIdx.y;
        tiles.begin = begin + static_cast<int>(static_cast<int64_t>(count) * part / task.splits);
        tiles.end = begin + static_cast<int>(static_cast<int64_t>(count) * (part + 1) / task.splits);
    }
    const T* const queries = task.q.at(batch, group);
    load_tile<Shape::kRows, Shape::kDim, Shape::kThreads>(
        q_tile, in.rows - first_row, in.head_dim, task.q.vectorized,
        [&](int i) { return queries + in.row_offset(first_row + i, task.q.strides); });
    TileLoader<T, Shape> loader{task,
                                tiles,
                                task.k.at(batch, group),
                                task.v.at(batch, group),
                                q_tile + Shape::kRows * Shape::kDim,
                                tiles.next(tiles.begin)};
#pragma unroll 1
    for (int i = 0; i < (Shape::kStages - 1) / 2; ++i) {
        loader.template load_next<false>(2 * i);
        loader.template load_next<true>(2 * i + 1);
    }
    if constexpr (Shape::kStages % 2 == 0) loader.template load_next<false>(Shape::kStages - 2);

    RunningSoftmax<Shape::kM> softmax;
    float out[Shape::kM][Shape::kDim / 8][4] = {};
    run_tiles<T, Shape, kGeneral>(task, tiles, here, q_tile, loader, softmax, out);
    const int row = here->tile * Shape::kRows + static_cast<int>(threadIdx.x) / kWarpSize * (16 * Shape::kM);
    finish_rows<T, Shape>(task, here->pair, row, softmax, out, q_tile);
}

// Combines the splits of the keys in order, weighted by their sums. One row per warp.
template <class T>
__global__ void __launch_bounds__(128) combine_kernel(const __grid_constant__ Forward<T> task, int dim) {
    const Params& in = task.in;
    const int lane = threadIdx.x % kWarpSize;
    const int64_t row_index = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / kWarpSize,
                  all_rows = static_cast<int64_t>(task.order.pairs) * in.rows;
    if (row_index >= all_rows) return;
    const int pair = static_cast<int>(row_index / in.rows), row = static_cast<int>(row_index % in.rows);
    float peak = -INFINITY, total = 0.0f;
    for (int part = 0; part < task.splits; ++part) peak = fmaxf(peak, task.partial_lse[part * all_rows + row_index]);
    const float base = peak == -INFINITY ? 0.0f : peak;
    for (int part = 0; part < task.splits; ++part)
        total += fast_exp2(task.partial_lse[part * all_rows + row_index] - base);
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    T* const out = task.out.at(pair / in.groups, pair % in.groups) + in.row_offset(row, task.out.strides);
    for (int c = lane; c < in.head_dim; c += kWarpSize) {
        float sum = 0.0f;
        for (int part = 0; part < task.splits; ++part) {
            const float weight = fast_exp2(task.partial_lse[part * all_rows + row_index] - base) * inverse;
            sum += weight * task.partial_out[(part * all_rows + row_index) * dim + c];
        }
        out[c] = from_fp32<T>(sum);
    }
    if (lane == 0) task.lse[in.index(pair, row)] = total == 0.0f ? -INFINITY : (base + log2f(total)) * kLn2;
}

// Launches the instance for a problem (forward_instances.cuh); one object file per element type.
template <class T>
cudaError_t launch_forward(const Forward<T>& task, int dim, bool general, Stream stream);

}  // namespace neox::attention
