// Sums and maxima over a warp and over a block. Every thread gets the result; the order of additions is fixed, so results repeat.
#pragma once

#include "common/device.cuh"

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
    for (int offset = kWarpSize / 2; offset; offset /= 2) value = Reduction::combine(value, __shfl_xor_sync(kFullWarp, value, offset));
    return value;
}

NEOX_DEVICE float warp_sum(float value) { return warp_reduce<Sum>(value); }
NEOX_DEVICE float warp_max(float value) { return warp_reduce<Max>(value); }

// All threads of the block take part; the block is whole warps. scratch: one float per warp, free again when the call returns to all.
template <class Reduction, int kWarps>
NEOX_DEVICE float block_reduce(float value, float* scratch) {
    value = warp_reduce<Reduction>(value);
    if constexpr (kWarps == 1) return value;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    if (lane == 0) scratch[warp] = value;
    __syncthreads();  // every warp's part is written before any is read
    float total = scratch[0];
#pragma unroll
    for (int i = 1; i < kWarps; ++i) total = Reduction::combine(total, scratch[i]);
    __syncthreads();  // every warp has read before the next call writes
    return total;
}

}  // namespace neox
