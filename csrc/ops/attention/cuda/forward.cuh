// The forward kernel: a block of rows against the tiles of keys that they see.
//
// Each warp owns 16 kM rows and all keys of a tile, so that the softmax needs no shared memory. Tiles of keys and of values take turns in one
// ring of kStages slots, filled kStages - 1 tiles ahead by cp.async. The loop over tiles (run_tiles) is all that a variant with other copies or
// other tensor-core instructions has to replace: mask, softmax and epilogue work on its sums.
#pragma once

#include "common/vec.cuh"
#include "ops/attention/cuda/mask.cuh"
#include "ops/attention/cuda/shared_tile.cuh"

namespace neox::attention {

constexpr int kForwardRows = 128;  // of a block, in every instance

template <int kDim_, int kRows_, int kKeys_, int kWarps_, int kStages_, int kBlocks_>
struct ForwardShape {
    static constexpr int kDim = kDim_, kRows = kRows_, kKeys = kKeys_, kWarps = kWarps_, kStages = kStages_;
    static constexpr int kBlocks = kBlocks_;  // of a multiprocessor at once, for the register budget
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
    int splits;          // parts of the keys, one per gridDim.y; above 1 the results go to:
    float* partial_out;  // [splits, pairs, rows, kDim], each part divided by its own sum
    float* partial_lse;  // [splits, pairs, rows], base 2
};

// Softmax of this lane's 2 kM rows, as far as the tiles have come.
template <int kM>
struct RunningSoftmax {
    float reference[kM][2];  // the largest score so far, which exponents are taken relative to
    float total[kM][2];      // of this lane's columns

    __device__ __forceinline__ RunningSoftmax() {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
            reference[m][0] = reference[m][1] = -INFINITY;
            total[m][0] = total[m][1] = 0.0f;
        }
    }
};

// s [16 kM, kKeys] becomes 2^(factor s - reference). Where a row's maximum has grown, its reference moves and its sums in `out` are rescaled.
// Each row decides for itself, so that its bits don't depend on other rows; the multiplication by 1 is skipped by whole warps.
//
// With a reference that may lag behind the maximum, as saves most of the rescaling, the largest probability of a row is no longer 1, and loses up
// to 2^-9 of itself in bf16 ahead of the product with the values. Where one key has nearly all of the attention nothing averages that out: the
// output, and through dout . out every gradient of the scores, is off by twice what rounding the output costs.
template <int kM, int kKeys, int kDim>
NEOX_DEVICE void online_softmax(float (&s)[kM][kKeys / 8][4], float factor, RunningSoftmax<kM>& row, float (&out)[kM][kDim / 8][4]) {
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

// Fills the ring: keys and values of the visible tiles by turns, one slot each.
template <class T, class Shape>
struct TileLoader {
    const Forward<T>& task;
    const KeyTiles<Shape::kKeys>& tiles;
    const T *keys, *values;
    T* ring;
    int tile, slot = 0;
    bool is_values = false;

    __device__ __forceinline__ void load_next() {
        if (tile < tiles.end) {
            const int first = tile * Shape::kKeys;
            const int64_t stride = is_values ? task.v.strides.sequence : task.k.strides.sequence;
            const T* const base = (is_values ? values : keys) + first * stride;
            load_tile<Shape::kKeys, Shape::kDim, Shape::kThreads>(ring + slot * (Shape::kKeys * Shape::kDim), task.in.keys - first, task.in.head_dim,
                                                                  is_values ? task.v.vectorized : task.k.vectorized, [&](int i) { return base + i * stride; });
            slot = slot + 1 == Shape::kStages ? 0 : slot + 1;
            if (is_values) tile = tiles.next(tile + 1);
            is_values = !is_values;
        }
        cp_async_commit();  // also without copies: waits count groups
    }
};

// The sums of this warp's rows over all tiles. Rows beyond the last are zeros and come to nothing that is stored.
template <class T, class Shape, bool kGeneral>
NEOX_DEVICE void run_tiles(const Forward<T>& task, const KeyTiles<Shape::kKeys>& tiles, int pair, int row, const T* q_tile, TileLoader<T, Shape>& loader,
                           RunningSoftmax<Shape::kM>& softmax, float (&out)[Shape::kM][Shape::kDim / 8][4]) {
    constexpr int kM = Shape::kM, kKeys = Shape::kKeys, kDim = Shape::kDim;
    const Params& in = task.in;
    const int warp_row = threadIdx.x / kWarpSize * (16 * kM);
    const float factor = kGeneral ? 1.0f : in.scale * kLog2E;
    constexpr bool kHold = kDim <= 64;  // the queries stay in registers where those suffice
    uint32_t q[kHold ? kM : 1][kHold ? kDim / 16 : 1][4];
    bool fresh = true;
    int slot = 0;
    for (int tile = tiles.next(tiles.begin); tile < tiles.end; tile = tiles.next(tile + 1)) {
        uint32_t p[kM][kKeys / 16][4];
        cp_async_wait<Shape::kStages - 2>();
        __syncthreads();  // everyone's part of the keys has landed, and nobody reads the slot that is filled next
        loader.load_next();
        float s[kM][kKeys / 8][4] = {};
        if constexpr (kHold) {
            if (fresh) {
#pragma unroll
                for (int m = 0; m < kM; ++m) {
#pragma unroll
                    for (int k = 0; k < kDim / 16; ++k) load_a<kDim>(q[m][k], q_tile, warp_row + m * 16, k * 2);
                }
            }
            fresh = false;
        }
        const auto q_of = [&](int m, int k, uint32_t (&a)[4]) {
            if constexpr (kHold) {
                copy_fragment(a, q[m][k]);
            } else {
                load_a<kDim>(a, q_tile, warp_row + m * 16, k * 2);
            }
        };
        gemm_nt<T, kDim, kM, kKeys>(s, q_of, loader.ring + slot * (kKeys * kDim), 0);
        if constexpr (kGeneral) apply_softcap_and_alibi<kM, kKeys>(in, pair % in.groups, row, tile * kKeys, s);
        if (!tiles.unmasked(tile)) mask_scores<kM, kKeys>(in, pair / in.groups, row, tile * kKeys, s);
        online_softmax<kM, kKeys, kDim>(s, factor, softmax, out);
        if constexpr (kGeneral) {
            if (in.has_dropout) apply_dropout<kM, kKeys>(in, pair, row, tile * kKeys, s);
        }
#pragma unroll
        for (int m = 0; m < kM; ++m) sums_as_a<T, kKeys>(s[m], p[m]);
        slot = slot + 1 == Shape::kStages ? 0 : slot + 1;
        cp_async_wait<Shape::kStages - 2>();
        __syncthreads();  // the same for the values
        loader.load_next();
        const auto p_of = [&](int m, int k, uint32_t (&a)[4]) { copy_fragment(a, p[m][k]); };
        gemm_nn<T, kDim, kM, kKeys, kDim>(out, p_of, loader.ring + slot * (kKeys * kDim), 0, 0);
        slot = slot + 1 == Shape::kStages ? 0 : slot + 1;
    }
    cp_async_wait<0>();
    __syncthreads();  // without any tile, the copies of others into this warp's queries would still be under way when out takes their place
}

// Divides by the sums, writes lse, and out through this warp's own rows of the tile of queries.
template <class T, class Shape>
NEOX_DEVICE void finish_rows(const Forward<T>& task, int pair, int row, const RunningSoftmax<Shape::kM>& softmax,
                             const float (&out)[Shape::kM][Shape::kDim / 8][4], T* q_tile) {
    const Params& in = task.in;
    const int lane = threadIdx.x % kWarpSize, warp_row = threadIdx.x / kWarpSize * (16 * Shape::kM);
    const float kept = in.has_dropout ? in.keep_scale : 1.0f;
#pragma unroll
    for (int m = 0; m < Shape::kM; ++m) {
        float inverse[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float total = softmax.total[m][half];
            total += __shfl_xor_sync(kFullWarp, total, 1);
            total += __shfl_xor_sync(kFullWarp, total, 2);
            const bool no_keys = total == 0.0f;
            inverse[half] = no_keys ? 0.0f : kept / total;
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
                float* const part = task.partial_out + ((static_cast<int64_t>(blockIdx.y) * task.order.pairs + pair) * in.rows + at) * Shape::kDim;
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
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks) forward_kernel(const __grid_constant__ Forward<T> task) {
    DYNAMIC_SMEM(shared);
    T* const q_tile = reinterpret_cast<T*>(shared);  // [kRows, kDim], then the ring of [kKeys, kDim]
    const Params& in = task.in;
    const auto [pair, block] = task.order.current();
    const int batch = pair / in.groups, group = pair % in.groups, first_row = block * Shape::kRows;
    KeyTiles<Shape::kKeys> tiles(in, batch, first_row, min(first_row + Shape::kRows, in.rows) - 1);
    if (task.splits > 1) {
        const int begin = tiles.begin, count = max(tiles.end - begin, 0), part = blockIdx.y;
        tiles.begin = begin + static_cast<int>(static_cast<int64_t>(count) * part / task.splits);
        tiles.end = begin + static_cast<int>(static_cast<int64_t>(count) * (part + 1) / task.splits);
    }
    const T* const queries = task.q.at(batch, group);
    load_tile<Shape::kRows, Shape::kDim, Shape::kThreads>(q_tile, in.rows - first_row, in.head_dim, task.q.vectorized,
                                                          [&](int i) { return queries + in.row_offset(first_row + i, task.q.strides); });
    TileLoader<T, Shape> loader{task, tiles, task.k.at(batch, group), task.v.at(batch, group), q_tile + Shape::kRows * Shape::kDim, tiles.next(tiles.begin)};
#pragma unroll 1
    for (int i = 0; i < Shape::kStages - 1; ++i) loader.load_next();

    const int row = first_row + static_cast<int>(threadIdx.x) / kWarpSize * (16 * Shape::kM);
    RunningSoftmax<Shape::kM> softmax;
    float out[Shape::kM][Shape::kDim / 8][4] = {};
    run_tiles<T, Shape, kGeneral>(task, tiles, pair, row, q_tile, loader, softmax, out);
    finish_rows<T, Shape>(task, pair, row, softmax, out, q_tile);
}

// One row per warp: the parts of its keys, weighed by their sums, in order.
template <class T>
__global__ void __launch_bounds__(128) combine_kernel(const __grid_constant__ Forward<T> task, int dim) {
    const Params& in = task.in;
    const int lane = threadIdx.x % kWarpSize;
    const int64_t row_index = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / kWarpSize, all_rows = static_cast<int64_t>(task.order.pairs) * in.rows;
    if (row_index >= all_rows) return;
    const int pair = static_cast<int>(row_index / in.rows), row = static_cast<int>(row_index % in.rows);
    float peak = -INFINITY, total = 0.0f;
    for (int part = 0; part < task.splits; ++part) peak = fmaxf(peak, task.partial_lse[part * all_rows + row_index]);
    const float base = peak == -INFINITY ? 0.0f : peak;
    for (int part = 0; part < task.splits; ++part) total += fast_exp2(task.partial_lse[part * all_rows + row_index] - base);
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

// forward_kernel of the instance (forward_instances.cuh), one object per element type.
template <class T>
cudaError_t launch_forward(const Forward<T>& task, int dim, bool general, Stream stream);

}  // namespace neox::attention
