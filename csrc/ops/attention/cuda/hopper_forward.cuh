// The forward kernel for Hopper (sm_90a): the tiles, masks and results of forward.cuh with warpgroup products and bulk
// copies.
//
// A block has three warpgroups. One warp of the last fills a ring of tiles in the order in which they are used: K0, K1,
// V0, K2, V1, ... Each of the others has 64 rows: while its tensor cores multiply the probabilities of a tile with the
// values, it computes the softmax of the next tile (Shah et al., FlashAttention-3, arXiv:2407.08608, section 3.2). The
// two overlap each other as well.
#pragma once

#include "ops/attention/cuda/forward.cuh"
#include "ops/attention/cuda/hopper_tile.cuh"

namespace neox::attention {

constexpr int kHopperKeys = 128;  // of a tile

template <int kDim_, int kSlots_>
struct HopperShape {
    static constexpr int kDim = kDim_, kSlots = kSlots_;  // tiles in the ring
    static constexpr int kRows = kForwardRows, kKeys = kHopperKeys, kM = 1;
    static constexpr int kConsumers = kRows / 64 * kWarpgroupSize, kThreads = kConsumers + kWarpgroupSize;
    static constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;  // per thread
    static_assert(kConsumers * kConsumerRegisters + kWarpgroupSize * kProducerRegisters <=
                  kThreads * launched_registers(kThreads));
    static constexpr unsigned kPanelBytes = kKeys * kPanelRowBytes, kTileBytes = kDim / 64 * kPanelBytes;
    static constexpr size_t kSharedBytes =
        static_cast<size_t>(kRows) * kDim * 2 + kSlots * (kTileBytes + 2 * sizeof(uint64_t));
    static_assert(kKeys % kSegmentTile == 0);
};

template <class T>
struct HopperForward {
    Forward<T> task;
    TensorMap k, v;  // [batch, groups, keys, head_dim] in boxes of [kKeys, 64]
};

// Tiles of keys or values in shared memory, each as panels [kKeys, 64] with swizzled rows, and two barriers per slot.
template <class Shape>
struct TileRing {
    unsigned char* tiles;
    uint64_t *full, *empty;
    int slot = 0;
    unsigned parity = 0;  // of the phase in which the current slot becomes full

    __device__ __forceinline__ TileRing(unsigned char* memory)
        : tiles(memory),
          full(reinterpret_cast<uint64_t*>(memory + Shape::kSlots * Shape::kTileBytes)),
          empty(full + Shape::kSlots) {}

    // By one thread of the block, before a barrier.
    __device__ __forceinline__ void initialise() const {
        for (int i = 0; i < Shape::kSlots; ++i) {
            mbarrier_init(full + i, 1);
            mbarrier_init(empty + i, Shape::kConsumers / kWarpSize);
        }
        fence_mbarrier_init();
    }
    __device__ __forceinline__ unsigned char* tile(int at) const { return tiles + at * Shape::kTileBytes; }
    __device__ __forceinline__ void advance() {
        slot = slot + 1 == Shape::kSlots ? 0 : slot + 1;
        parity ^= slot == 0;
    }
    // Loads rows [first, first + kKeys) into the next slot. By one thread.
    __device__ __forceinline__ void load(const TensorMap& map, int first, int group, int batch) const {
        mbarrier_wait(empty + slot, parity ^ 1);
        mbarrier_arrive_expect(full + slot, Shape::kTileBytes);
#pragma unroll
        for (int panel = 0; panel < Shape::kDim / 64; ++panel)
            bulk_load(tile(slot) + panel * Shape::kPanelBytes, &map, full + slot, panel * 64, first, group, batch);
    }
    // Waits for the next tile and returns its slot.
    __device__ __forceinline__ int take() {
        const int at = slot;
        mbarrier_wait(full + at, parity);
        advance();
        return at;
    }
    // This warp has read the slot.
    __device__ __forceinline__ void release(int at) const {
        if (threadIdx.x % kWarpSize == 0) mbarrier_arrive(empty + at);
    }
};

// As online_softmax, but leaves `out` to the caller, because a product may be in flight to it: returns whether a row of
// this warp needs its sums rescaled.
template <int kKeys>
NEOX_DEVICE bool softmax_step(float (&s)[kKeys / 8][4], float factor, RunningSoftmax<1>& row, float (&rescale)[2]) {
    bool moved = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float peak = fmaxf(s[0][2 * half], s[0][2 * half + 1]);
#pragma unroll
        for (int n = 1; n < kKeys / 8; ++n) peak = fmaxf(peak, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
        peak = fmaxf(peak, __shfl_xor_sync(kFullWarp, peak, 1));
        peak = fmaxf(peak, __shfl_xor_sync(kFullWarp, peak, 2)) * factor;
        const float before = row.reference[0][half];
        const bool moves = peak > before;
        const float power = fast_exp2(before - peak);
        rescale[half] = moves ? power : 1.0f;
        moved = moved || moves;
        const float reference = moves ? peak : before, base = reference == -INFINITY ? 0.0f : reference;
        float part = 0.0f;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
            for (int i = 2 * half; i < 2 * half + 2; ++i) {
                s[n][i] = fast_exp2(s[n][i] * factor - base);
                part += s[n][i];
            }
        }
        row.reference[0][half] = reference;
        row.total[0][half] = row.total[0][half] * rescale[half] + part;
    }
    return __any_sync(kFullWarp, moved);
}

// Accumulates the 64 rows of a warpgroup over all tiles.
template <class T, class Shape>
NEOX_DEVICE void run_hopper_tiles(const Forward<T>& task, const KeyTiles<Shape::kKeys>& tiles, int pair, int row,
                                  const T* queries, TileRing<Shape>& ring, RunningSoftmax<1>& softmax,
                                  float (&out)[1][Shape::kDim / 8][4]) {
    constexpr int kKeys = Shape::kKeys;
    const Params& in = task.in;
    const uint64_t q = matrix_descriptor(queries, 0);
    const float factor = in.scale * kLog2E;
    float rescale[2];
    uint32_t p[kKeys / 16][4];
    int tile = tiles.next(tiles.begin);
    if (tile >= tiles.end) return;
    {
        float s[1][kKeys / 8][4];
        const int keys = ring.take();
        issue_nt<T, Shape::kDim>(s[0], q, 64 * kPanelRowBytes, matrix_descriptor(ring.tile(keys), 0),
                                 Shape::kPanelBytes);
        wgmma_wait<0>();
        pin(s[0]);
        ring.release(keys);
        if (!tiles.unmasked(tile)) mask_scores<1, kKeys>(in, pair / in.groups, row, tile * kKeys, s);
        softmax_step<kKeys>(s[0], factor, softmax, rescale);
        accumulators_as_a<T, kKeys>(s[0], p);
    }
#pragma unroll 1
    for (tile = tiles.next(tile + 1); tile < tiles.end; tile = tiles.next(tile + 1)) {
        float s[1][kKeys / 8][4];
        const int keys = ring.take();
        issue_nt<T, Shape::kDim>(s[0], q, 64 * kPanelRowBytes, matrix_descriptor(ring.tile(keys), 0),
                                 Shape::kPanelBytes);
        const int values = ring.take();
        issue_nn<T>(out[0], p, matrix_descriptor(ring.tile(values), Shape::kPanelBytes));
        wgmma_wait<1>();
        pin(s[0]);
        ring.release(keys);
        if (!tiles.unmasked(tile)) mask_scores<1, kKeys>(in, pair / in.groups, row, tile * kKeys, s);
        const bool moved = softmax_step<kKeys>(s[0], factor, softmax, rescale);
        wgmma_wait<0>();
        pin(out[0]);
        pin(p);
        ring.release(values);
        if (moved) {
#pragma unroll
            for (int n = 0; n < Shape::kDim / 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) out[0][n][i] *= rescale[i / 2];
            }
        }
        accumulators_as_a<T, kKeys>(s[0], p);
    }
    issue_nn<T>(out[0], p, matrix_descriptor(ring.tile(ring.take()), Shape::kPanelBytes));
    wgmma_wait<0>();
    pin(out[0]);
}

// The warp that fills the ring.
template <class T, class Shape>
NEOX_DEVICE void produce_tiles(const HopperForward<T>& work, const KeyTiles<Shape::kKeys>& tiles, int pair,
                               TileRing<Shape>& ring) {
    const int group = pair % work.task.in.groups, batch = pair / work.task.in.groups;
    const auto load = [&](const TensorMap& map, int tile) {
        if (threadIdx.x % kWarpSize == 0) ring.load(map, tile * Shape::kKeys, group, batch);
        ring.advance();
    };
    int previous = -1;
#pragma unroll 1
    for (int tile = tiles.next(tiles.begin); tile < tiles.end; tile = tiles.next(tile + 1)) {
        load(work.k, tile);
        if (previous >= 0) load(work.v, previous);
        previous = tile;
    }
    if (previous >= 0) load(work.v, previous);
}

template <class T, class Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    hopper_forward_kernel([[maybe_unused]] const __grid_constant__ HopperForward<T> work) {
#if defined(NEOX_SM90A)
    DYNAMIC_SMEM(shared);  // queries [kRows, kDim], then the ring
    const Forward<T>& task = work.task;
    const Params& in = task.in;
    TileRing<Shape> ring(shared + Shape::kRows * Shape::kDim * 2);
    if (threadIdx.x == 0) ring.initialise();
    __syncthreads();
    const auto [pair, block] = task.order.current();
    const int first_row = block * Shape::kRows;
    KeyTiles<Shape::kKeys> tiles(in, pair / in.groups, first_row, min(first_row + Shape::kRows, in.rows) - 1);
    if (task.splits > 1) {
        const int begin = tiles.begin, count = max(tiles.end - begin, 0), part = blockIdx.y;
        tiles.begin = begin + static_cast<int>(static_cast<int64_t>(count) * part / task.splits);
        tiles.end = begin + static_cast<int>(static_cast<int64_t>(count) * (part + 1) / task.splits);
    }
    if (threadIdx.x >= Shape::kConsumers) {
        release_registers<Shape::kProducerRegisters>();
        if (threadIdx.x < Shape::kConsumers + kWarpSize) produce_tiles<T, Shape>(work, tiles, pair, ring);
        return;
    }
    acquire_registers<Shape::kConsumerRegisters>();
    T* const q_tile = reinterpret_cast<T*>(shared);
    const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroupSize,
              row = first_row + static_cast<int>(threadIdx.x) / kWarpSize * 16;
    T* const queries = q_tile + warpgroup * 64 * Shape::kDim;
    const T* const from = task.q.at(pair / in.groups, pair % in.groups);
    const int group_row = first_row + warpgroup * 64;
    load_panels<64, Shape::kDim>(queries, in.rows - group_row,
                                 [&](int i) { return from + in.row_offset(group_row + i, task.q.strides); });
    cp_async_commit();
    cp_async_wait<0>();
    fence_proxy_async();  // wgmma reads them
    named_barrier(1 + warpgroup, kWarpgroupSize);
    RunningSoftmax<1> softmax;
    float out[1][Shape::kDim / 8][4] = {};
    run_hopper_tiles<T, Shape>(task, tiles, pair, row, queries, ring, softmax, out);
    named_barrier(1 + warpgroup, kWarpgroupSize);  // the queries are overwritten
    finish_rows<T, Shape>(task, pair, row, softmax, out, q_tile);
#endif
}

// Launches the instance for a problem (hopper_instances.cuh); one object file per element type.
template <class T>
cudaError_t launch_hopper_forward(const HopperForward<T>& work, int dim, Stream stream);

// The same for the problem of a basic forward, with its tensor maps (attention_hopper_cuda.cu).
template <class T>
cudaError_t launch_hopper(const Attention& in, const Forward<T>& task, Stream stream);

}  // namespace neox::attention
