// Tile shapes of the Hopper kernels per head_dim. docs/attention.md derives them.
#pragma once

#include "ops/attention/cuda/hopper_backward.cuh"
#include "ops/attention/cuda/hopper_forward.cuh"
#include "ops/attention/cuda/launch.cuh"

namespace neox::attention {

// {kDim, slots of the ring}
using HopperShape64 = HopperShape<64, 8>;
using HopperShape128 = HopperShape<128, 6>;
// {kDim, rows}
using HopperBackwardShape64 = HopperBackwardShape<64, 128>;
using HopperBackwardShape128 = HopperBackwardShape<128, 64>;

template <class T>
cudaError_t launch_hopper_forward(const HopperForward<T>& work, int dim, Stream stream) {
    const auto with = [&](auto shape) {
        using Shape = decltype(shape);
        const dim3 grid(static_cast<unsigned>(static_cast<int64_t>(work.task.order.tiles) * work.task.order.pairs),
                        static_cast<unsigned>(work.task.splits));
        return launch(hopper_forward_kernel<T, Shape>, grid, dim3(Shape::kThreads), Shape::kSharedBytes, stream, work);
    };
    if (dim == 64) return with(HopperShape64{});
    return dim == 128 ? with(HopperShape128{}) : cudaErrorInvalidValue;
}

template <class T>
cudaError_t launch_hopper_backward(const HopperBackward<T>& work, int dim, Stream stream) {
    const auto with = [&](auto shape) {
        using Shape = decltype(shape);
        const dim3 grid(static_cast<unsigned>(static_cast<int64_t>(work.task.order.tiles) * work.task.order.pairs));
        return launch(hopper_backward_kernel<T, Shape>, grid, dim3(Shape::kThreads), Shape::kSharedBytes, stream, work);
    };
    if (dim == 64) return with(HopperBackwardShape64{});
    return dim == 128 ? with(HopperBackwardShape128{}) : cudaErrorInvalidValue;
}

}  // namespace neox::attention
