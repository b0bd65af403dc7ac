// Sums and maxima over a warp and over a block. Every thread gets the result. The order of additions is fixed, so that
// results are reproducible.
#pragma once

#include "common/ptx.cuh"

namespace neox {

struct Sum {
    static constexpr float kIdentity = 0.0f;
    NEOX_DEVICE float combine(float a, float b) { return a + b; }
};

struct Max {
    static constexpr float kIdentity = -INFINITY;
    NEOX_DEVICE float combine(float a, float b) { return fmaxf(a, b); }
};

template <class Reduction>
NEOX_DEVICE float warp_reduce(float value) {
#pragma unroll
    for (int offset = kWarpSize / 2; offset; offset /= 2)
        value = Reduction::combine(value, __shfl_xor_sync(kFullWarp, value, offset));
    return value;
}

NEOX_DEVICE float warp_sum(float value) { return warp_reduce<Sum>(value); }
NEOX_DEVICE float warp_max(float value) { return warp_reduce<Max>(value); }

// All threads of the block take part; the block size is a multiple of the warp size. scratch: one float per warp,
// reusable after the call.
template <class Reduction, int kWarps>
NEOX_DEVICE float block_reduce(float value, float* scratch) {
    value = warp_reduce<Reduction>(value);
    if constexpr (kWarps == 1) return value;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    if (lane == 0) scratch[warp] = value;
    __syncthreads();  // all warps have written their partial results
    float total = scratch[0];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) total = Reduction::combine(total, scratch[i]);
    __syncthreads();  // all reads precede the writes of the next call
    return total;
}

constexpr int64_t kNamedBarriers = 15;  // of a block, in addition to that of __syncthreads

// Threads for a row of `packs` packs, at most `each` per thread: a power of two up to a warp, or a multiple of warps.
inline int64_t row_threads(int64_t packs, int64_t each) {
    if (packs > kWarpSize * each) return (packs + kWarpSize * each - 1) / (kWarpSize * each) * kWarpSize;
    int64_t threads = 1;
    while (threads < packs && threads < kWarpSize) threads *= 2;
    return threads;
}

// Sums over the threads that share a row: blockDim.x threads of a block (threads of a row, rows), a power of two up to
// a warp, or a multiple of warps. Rows wider than a warp synchronise at a named barrier per row (at most 15 rows), so
// that the rows of a block do not wait for each other.
//
// scratch: kValues floats per warp of the block. Consecutive calls must alternate between two scratch buffers: a thread
// in the third call has passed the barrier of the second, before which all threads have finished reading in the first.
template <int kValues>
NEOX_DEVICE void row_sums(float (&value)[kValues], float* scratch) {
    static_assert(kValues == 1 || kValues == 2);
    constexpr int kLanes = kWarpSize / kValues;  // of two values, each half of a warp sums one: half as many shuffles
    const int threads = blockDim.x, lane = threadIdx.x % kWarpSize;
    if (threads < kWarpSize) {
        for (int offset = threads / 2; offset; offset /= 2) {
#pragma unroll
            for (int k = 0; k < kValues; ++k) value[k] += __shfl_xor_sync(kFullWarp, value[k], offset);
        }
        return;
    }
    float sum = value[0];
    if constexpr (kValues == 2) {
        const bool second = lane >= kLanes;
        sum = second ? value[1] : value[0];
        sum += __shfl_xor_sync(kFullWarp, second ? value[0] : value[1], kLanes);
    }
    const auto add_lanes = [&] {
#pragma unroll
        for (int offset = kLanes / 2; offset; offset /= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
    };
    add_lanes();
    if (threads > kWarpSize) {
        const int warps = threads / kWarpSize, at = lane % kLanes;
        float* const row = scratch + (static_cast<int>(threadIdx.y) * kValues + lane / kLanes) * warps;
        if (at == 0) row[threadIdx.x / kWarpSize] = sum;
        named_barrier(1 + static_cast<int>(threadIdx.y), threads);  // all warps have written their partial results
        sum = at < warps ? row[at] : 0.0f;
        if (kLanes < kWarpSize && at + kLanes < warps) sum += row[at + kLanes];
        add_lanes();
    }
    value[0] = sum;
    if constexpr (kValues == 2) {
#pragma unroll
        for (int k = 0; k < kValues; ++k) value[k] = __shfl_sync(kFullWarp, sum, k * kLanes);
    }
}

// e^x for x <= 0. Error: the instruction's few ulp plus 2^-24 |x| relative, negligible next to the term e^0.
NEOX_DEVICE float exp_nonpositive(float x) { return fast_exp2(x * 1.44269504f); }

// Running maximum and sum of e^(x - max), in one pass. Initially (-infinity, 0). NaN or +infinity in the input makes
// the sum NaN.
struct MaxSum {
    float max = -INFINITY, sum = 0.0f;

    // Rescales a sum from maximum `from` to maximum `to` >= from. If `to` is -infinity, all terms are e^-infinity.
    NEOX_DEVICE float rescaled(float sum, float from, float to) {
        return sum * exp_nonpositive(from - (to == -INFINITY ? 0.0f : to));
    }

    template <int kCount>
    __device__ __forceinline__ void add(const float (&x)[kCount]) {
        float best = max;
#pragma unroll
        for (int k = 0; k < kCount; ++k) best = fmaxf(best, x[k]);
        sum = rescaled(sum, max, best);
        const float shift = best == -INFINITY ? 0.0f : best;
#pragma unroll
        for (int k = 0; k < kCount; ++k) sum += exp_nonpositive(x[k] - shift);
        max = best;
    }
};

// Merges the values of all threads of a block of kWarps warps. Every thread gets the result. scratch: as for
// block_reduce.
template <int kWarps>
NEOX_DEVICE MaxSum block_merge(const MaxSum& mine, float* scratch) {
    MaxSum all;
    all.max = block_reduce<Max, kWarps>(mine.max, scratch);
    all.sum = block_reduce<Sum, kWarps>(MaxSum::rescaled(mine.sum, mine.max, all.max), scratch);
    return all;
}

}  // namespace neox
