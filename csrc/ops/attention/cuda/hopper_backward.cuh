// dk, dv and dq for Hopper (sm_90a): backward_keys.cuh with warpgroup products.
//
// A block has 128 keys, which bulk copies load with their values. Two warpgroups have 64 of them each, and compute
// scores transposed, [keys, rows]; p and ds stay in registers as left operands of dv += p^T dout and dk += ds^T q. A
// third warpgroup fills two stages of queries, dout and row statistics; it copies rows one by one, because grouped
// heads put the rows of a tile at two strides. ds goes through shared memory, where it becomes the left operand of dq =
// ds k: the warpgroups share dq by channels (head_dim 128) or by rows (64), and add it to global memory with atomics.
#pragma once

#include "ops/attention/cuda/backward_keys.cuh"
#include "ops/attention/cuda/hopper_tile.cuh"

namespace neox::attention {

template <int kDim_, int kRows_>
struct HopperBackwardShape {
    static constexpr int kM = 1, kParts = 1, kPartDim = kDim_;  // of KeySums: a warp has 16 keys and all channels
    static constexpr int kDim = kDim_, kRows = kRows_, kKeys = 128, kStep = 64, kStages = 2;
    static constexpr int kConsumers = 2 * kWarpgroupSize, kThreads = kConsumers + kWarpgroupSize;
    static constexpr int kConsumerRegisters = 224, kProducerRegisters = 56;  // per thread
    static_assert(kConsumers * kConsumerRegisters + kWarpgroupSize * kProducerRegisters <=
                  kThreads * launched_registers(kThreads));
    static constexpr unsigned kKeyPanelBytes = kKeys * kPanelRowBytes, kRowPanelBytes = kRows * kPanelRowBytes;
    static constexpr unsigned kKeyBytes = kDim / 64 * kKeyPanelBytes, kRowBytes = kDim / 64 * kRowPanelBytes,
                              kGradientBytes = kRows / 64 * kKeyPanelBytes;
    static constexpr size_t kSharedBytes = 2 * kKeyBytes +
                                           kStages * (2 * kRowBytes + kGradientBytes + kRows * sizeof(float2)) +
                                           (1 + 2 * kStages) * sizeof(uint64_t);
    // of dq a warpgroup has 64 channels of 64 rows
    static_assert(kRows * kDim == 2 * 64 * 64 && kRowPadding % kRows == 0);
};

template <class T>
struct HopperBackward {
    Backward<T> task;
    TensorMap k, v;  // [batch, groups, keys, head_dim] in boxes of [kKeys, 64]
};

template <class T, class Shape>
struct HopperBackwardShared {
    unsigned char* base;

    __device__ __forceinline__ unsigned char* keys() const { return base; }
    __device__ __forceinline__ unsigned char* values() const { return base + Shape::kKeyBytes; }
    __device__ __forceinline__ unsigned char* queries(int stage) const {
        return base + 2 * Shape::kKeyBytes + stage * (2 * Shape::kRowBytes);
    }
    __device__ __forceinline__ unsigned char* dout(int stage) const { return queries(stage) + Shape::kRowBytes; }
    // [kKeys, kRows] in panels [kKeys, 64]. Two, so that a warpgroup may write one while the other one reads the last.
    __device__ __forceinline__ unsigned char* ds(int parity) const {
        return queries(Shape::kStages) + parity * Shape::kGradientBytes;
    }
    __device__ __forceinline__ float2* rows(int stage) const {
        return reinterpret_cast<float2*>(ds(2)) + stage * Shape::kRows;
    }
    __device__ __forceinline__ uint64_t* keys_full() const { return reinterpret_cast<uint64_t*>(rows(Shape::kStages)); }
    __device__ __forceinline__ uint64_t* full(int stage) const { return keys_full() + 1 + stage; }
    __device__ __forceinline__ uint64_t* empty(int stage) const { return full(Shape::kStages + stage); }

    // By one thread of the block, before a barrier.
    __device__ __forceinline__ void initialise() const {
        mbarrier_init(keys_full(), 1);
        for (int i = 0; i < Shape::kStages; ++i) {
            mbarrier_init(full(i), kWarpgroupSize);
            mbarrier_init(empty(i), Shape::kConsumers / kWarpSize);
        }
        fence_mbarrier_init();
    }
};

// Position in the stages.
struct Stage {
    int index = 0;
    unsigned parity = 0;

    __device__ __forceinline__ void advance() {
        index ^= 1;
        parity ^= index == 0;
    }
};

// The warpgroup that loads the keys, the values and the stages.
template <class T, class Shape>
NEOX_DEVICE void produce_rows(const HopperBackward<T>& work, const RowTiles<Shape::kRows>& tiles, int pair,
                              int block_key, const HopperBackwardShared<T, Shape>& shared) {
    const Backward<T>& task = work.task;
    const Params& in = task.in;
    const int batch = pair / in.groups, group = pair % in.groups,
              thread = static_cast<int>(threadIdx.x) % kWarpgroupSize;
    if (thread == 0) {
        mbarrier_arrive_expect(shared.keys_full(), 2 * Shape::kKeyBytes);
#pragma unroll
        for (int panel = 0; panel < Shape::kDim / 64; ++panel) {
            bulk_load(shared.keys() + panel * Shape::kKeyPanelBytes, &work.k, shared.keys_full(), panel * 64, block_key,
                      group, batch);
            bulk_load(shared.values() + panel * Shape::kKeyPanelBytes, &work.v, shared.keys_full(), panel * 64,
                      block_key, group, batch);
        }
    }
    const T *const queries = task.q.at(batch, group), *const dout = task.dout.at(batch, group);
    Stage stage;
#pragma unroll 1
    for (int tile = tiles.next(tiles.begin); tile < tiles.end; tile = tiles.next(tile + 1)) {
        const int first = tile * Shape::kRows, count = in.rows - first;
        mbarrier_wait(shared.empty(stage.index), stage.parity ^ 1);
        load_panels<Shape::kRows, Shape::kDim>(reinterpret_cast<T*>(shared.queries(stage.index)), count, [&](int i) {
            return queries + in.row_offset(first + i, task.q.strides);
        });
        load_panels<Shape::kRows, Shape::kDim>(reinterpret_cast<T*>(shared.dout(stage.index)), count, [&](int i) {
            return dout + in.row_offset(first + i, task.dout.strides);
        });
        if (thread < Shape::kRows / 2) {
            cp_async_16(shared.rows(stage.index) + 2 * thread,
                        task.rows + static_cast<int64_t>(pair) * task.padded_rows + first + 2 * thread);
        }
        cp_async_commit();
        cp_async_wait<0>();
        fence_proxy_async();  // wgmma reads them
        mbarrier_arrive(shared.full(stage.index));
        stage.advance();
    }
}

// Adds 64 rows of a stage to the gradients of this warpgroup's keys, and writes their ds. The last two products are in
// flight at the end; they read p and ds.
template <class T, class Shape>
NEOX_DEVICE void add_hopper_rows(const Params& in, int pair, int first_row, int first_key, bool unmasked, int step,
                                 const HopperBackwardShared<T, Shape>& shared, int stage, unsigned char* gradients,
                                 KeySums<Shape, true, true>& sums, uint32_t (&p)[Shape::kStep / 16][4],
                                 uint32_t (&ds)[Shape::kStep / 16][4]) {
    constexpr int kDim = Shape::kDim, kStep = Shape::kStep;
    const int lane = threadIdx.x % kWarpSize, warp_key = static_cast<int>(threadIdx.x) / kWarpSize * 16,
              group_bytes = static_cast<int>(threadIdx.x) / kWarpgroupSize * 64 * kPanelRowBytes,
              step_bytes = step * kPanelRowBytes;
    const uint64_t queries = matrix_descriptor(shared.queries(stage) + step_bytes, Shape::kRowPanelBytes),
                   dout = matrix_descriptor(shared.dout(stage) + step_bytes, Shape::kRowPanelBytes);
    const float4* const row_stats = reinterpret_cast<const float4*>(shared.rows(stage) + step) + lane % 4;
    float s[1][kStep / 8][4], dp[kStep / 8][4];
    issue_nt<T, kDim>(s[0], matrix_descriptor(shared.keys() + group_bytes, 0), Shape::kKeyPanelBytes, queries,
                      Shape::kRowPanelBytes);
    issue_nt<T, kDim>(dp, matrix_descriptor(shared.values() + group_bytes, 0), Shape::kKeyPanelBytes, dout,
                      Shape::kRowPanelBytes);
    wgmma_wait<1>();  // scores, and the products before them
    pin(s[0]);
    const float factor = in.scale * kLog2E;
    if (!unmasked) mask_transposed<1, kStep>(in, pair / in.groups, first_row, first_key, s);
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
        const float4 row = row_stats[n * 4];
#pragma unroll
        for (int i = 0; i < 4; ++i) s[0][n][i] = fast_exp2(s[0][n][i] * factor - (i % 2 ? row.z : row.x));
    }
    accumulators_as_a<T, kStep>(s[0], p);
    issue_nn<T>(sums.dv[0], p, dout);
    wgmma_wait<1>();  // dp
    pin(dp);
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
        const float4 row = row_stats[n * 4];
#pragma unroll
        for (int i = 0; i < 4; ++i) dp[n][i] = s[0][n][i] * (dp[n][i] - (i % 2 ? row.w : row.y));
    }
    accumulators_as_a<T, kStep>(dp, ds);
    T* const panel = reinterpret_cast<T*>(gradients + step / 64 * Shape::kKeyPanelBytes);
    const FragmentAddress<64> to{shared_address(panel + Swizzle<64>::at(warp_key + lane / 4, 0) + lane % 4 * 2)};
#pragma unroll
    for (int k = 0; k < kStep / 16; ++k) {
#pragma unroll
        // register i: key half i % 2, row half i / 2
        for (int i = 0; i < 4; ++i) store_shared(to.at(i % 2 * 8, 2 * k + i / 2), ds[k][i]);
    }
    fence_proxy_async();  // the product with the keys reads them
    issue_nn<T>(sums.dk[0], ds, queries);
}

// This warpgroup's part of dq for a tile of rows: 64 channels of 64 rows.
template <class T, class Shape>
NEOX_DEVICE void add_to_global(const Backward<T>& task, int pair, int tile, const float (&dq)[8][4]) {
    constexpr int kDim = Shape::kDim;
    const int lane = threadIdx.x % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const int row = kDim == 64 ? warp * 16 : warp % 4 * 16, channel = kDim == 64 ? 0 : warp / 4 * 64;
    const int64_t at = static_cast<int64_t>(pair) * task.padded_rows + tile * Shape::kRows + row + lane / 4;
    float* const sums = task.dq_sums + at * kDim + channel + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        atomic_add_pair(sums + n * 8, dq[n][0], dq[n][1]);
        atomic_add_pair(sums + 8 * kDim + n * 8, dq[n][2], dq[n][3]);
    }
}

// The gradients of a warpgroup's 64 keys.
template <class T, class Shape>
NEOX_DEVICE void consume_rows(const Backward<T>& task, const RowTiles<Shape::kRows>& tiles, int pair, int first_key,
                              const HopperBackwardShared<T, Shape>& shared, KeySums<Shape, true, true>& sums) {
    constexpr int kBarrier = 1;
    const Params& in = task.in;
    const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroupSize;
    uint32_t p[Shape::kStep / 16][4], ds[Shape::kStep / 16][4];
    Stage stage;
    int parity = 0;
    mbarrier_wait(shared.keys_full(), 0);
#pragma unroll 1
    for (int tile = tiles.next(tiles.begin); tile < tiles.end; tile = tiles.next(tile + 1)) {
        const bool unmasked = tiles.unmasked(tile);
        unsigned char* const gradients = shared.ds(parity);
        mbarrier_wait(shared.full(stage.index), stage.parity);
#pragma unroll 1
        for (int step = 0; step < Shape::kRows; step += Shape::kStep) {
            add_hopper_rows<T, Shape>(in, pair, tile * Shape::kRows + step, first_key, unmasked, step, shared,
                                      stage.index, gradients, sums, p, ds);
        }
        named_barrier(kBarrier, Shape::kConsumers);  // ds of both warpgroups is written
        float dq[8][4];
        const unsigned ds_part = Shape::kDim == 64 ? warpgroup * Shape::kKeyPanelBytes : 0,
                       key_part = Shape::kDim == 64 ? 0 : warpgroup * Shape::kKeyPanelBytes;
        issue_tn<T, Shape::kKeys / 16>(dq, matrix_descriptor(gradients + ds_part, 0),
                                       matrix_descriptor(shared.keys() + key_part, 0));
        wgmma_wait<1>();
        pin(sums.dk[0]), pin(sums.dv[0]), pin(p), pin(ds);
        if (threadIdx.x % kWarpSize == 0) mbarrier_arrive(shared.empty(stage.index));
        wgmma_wait<0>();
        pin(dq);
        add_to_global<T, Shape>(task, pair, tile, dq);
        stage.advance();
        parity ^= 1;
    }
}

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    hopper_backward_kernel([[maybe_unused]] const __grid_constant__ HopperBackward<T> work) {
#if defined(NEOX_SM90A)
    DYNAMIC_SMEM(raw);
    const HopperBackwardShared<T, Shape> shared{raw};
    const Backward<T>& task = work.task;
    const Params& in = task.in;
    if (threadIdx.x == 0) shared.initialise();
    __syncthreads();
    const auto [pair, block] = task.order.current();
    const int block_key = block * Shape::kKeys;
    const RowTiles<Shape::kRows> tiles(in, pair / in.groups, block_key, block_key + Shape::kKeys - 1);
    if (threadIdx.x >= Shape::kConsumers) {
        release_registers<Shape::kProducerRegisters>();
        produce_rows<T, Shape>(work, tiles, pair, block_key, shared);
        return;
    }
    acquire_registers<Shape::kConsumerRegisters>();
    const int first_key = block_key + static_cast<int>(threadIdx.x) / kWarpSize * 16;  // of this warp
    KeySums<Shape, true, true> sums;
    consume_rows<T, Shape>(task, tiles, pair, first_key, shared, sums);
    named_barrier(1, Shape::kConsumers);  // both warpgroups have read the keys; their tiles are reused
    store_keys<T, Shape>(in, task.dk, pair, block_key, reinterpret_cast<T*>(shared.keys()), sums.dk, in.scale);
    store_keys<T, Shape>(in, task.dv, pair, block_key, reinterpret_cast<T*>(shared.values()), sums.dv, 1.0f);
#endif
}

// Launches the instance for a problem (hopper_instances.cuh); one object file per element type.
template <class T>
cudaError_t launch_hopper_backward(const HopperBackward<T>& work, int dim, Stream stream);

// The same for the problem of a basic backward, with its tensor maps (attention_hopper_cuda.cu).
template <class T>
cudaError_t launch_hopper_keys(const Attention& in, const Backward<T>& task, Stream stream);

}  // namespace neox::attention
