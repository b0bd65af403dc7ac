// Host side of the Hopper kernels: which problems they take, and their tensor maps.
#include "ops/attention/cuda/hopper_backward.cuh"
#include "ops/attention/cuda/hopper_forward.cuh"
#include "ops/attention/cuda/launch.cuh"

namespace neox {
namespace attention {
namespace {

// Boxes of `rows` rows and 64 channels of a [batch, sequence, groups, head_dim] tensor. Strides of dimensions of size 1
// are arbitrary, but the driver checks them.
template <class T>
cudaError_t make_map(TensorMap& map, const Attention& in, const void* data, const AttentionStrides& strides, int rows) {
    const auto stride = [](int64_t size, int64_t value) { return size > 1 ? value : 8; };
    return make_tensor_map<T>(map, TensorBox{data,
                                             {in.head_dim, in.keys, in.groups, in.batch},
                                             {1, stride(in.keys, strides.sequence), stride(in.groups, strides.group),
                                              stride(in.batch, strides.batch)},
                                             {64, rows, 1, 1}});
}

}  // namespace

template <class T>
cudaError_t launch_hopper(const Attention& in, const Forward<T>& task, Stream stream) {
    HopperForward<T> work{task, {}, {}};
    if (in.keys > 0) {  // else no tile is loaded
        cudaError_t error = make_map<T>(work.k, in, in.k, in.k_strides, kHopperKeys);
        if (error == cudaSuccess) error = make_map<T>(work.v, in, in.v, in.v_strides, kHopperKeys);
        if (error != cudaSuccess) return error;
    }
    return launch_hopper_forward<T>(work, static_cast<int>(in.head_dim), stream);
}

template <class T>
cudaError_t launch_hopper_keys(const Attention& in, const Backward<T>& task, Stream stream) {
    if (in.keys == 0) return cudaSuccess;
    HopperBackward<T> work{task, {}, {}};
    work.task.order = block_order(in, ceil_divide(in.keys, kHopperKeys), false);
    cudaError_t error = make_map<T>(work.k, in, in.k, in.k_strides, kHopperKeys);
    if (error == cudaSuccess) error = make_map<T>(work.v, in, in.v, in.v_strides, kHopperKeys);
    return error == cudaSuccess ? launch_hopper_backward<T>(work, static_cast<int>(in.head_dim), stream) : error;
}

template cudaError_t launch_hopper<__nv_bfloat16>(const Attention& in, const Forward<__nv_bfloat16>& task,
                                                  Stream stream);
template cudaError_t launch_hopper<__half>(const Attention& in, const Forward<__half>& task, Stream stream);
template cudaError_t launch_hopper_keys<__nv_bfloat16>(const Attention& in, const Backward<__nv_bfloat16>& task,
                                                       Stream stream);
template cudaError_t launch_hopper_keys<__half>(const Attention& in, const Backward<__half>& task, Stream stream);

}  // namespace attention

using namespace attention;

const char* attention_hopper_problem_cuda(const Attention& in) {
    int device = 0, major = 0;
    const bool known = cudaGetDevice(&device) == cudaSuccess &&
                       cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess;
    if (!known || major != 9) return "the GPU must have compute capability 9.0";
    if (in.dtype == DType::kFloat32) return "q must be bfloat16 or float16";
    if (in.head_dim != 64 && in.head_dim != 128) return "head_dim must be 64 or 128";
    if (is_general(in)) return "softcap, ALiBi, dropout and a scale that is not positive are not supported";
    const bool aligned = rows_vectorize(in, in.q, in.q_strides, in.heads) &&
                         rows_vectorize(in, in.k, in.k_strides, 1) && rows_vectorize(in, in.v, in.v_strides, 1);
    if (!aligned) return "rows of q, k and v must start at multiples of 16 bytes";
    const auto expanded = [&](const AttentionStrides& of) {
        return (in.keys > 1 && !of.sequence) || (in.groups > 1 && !of.group) || (in.batch > 1 && !of.batch);
    };
    const bool mapped = !expanded(in.k_strides) && !expanded(in.v_strides);  // a tensor map has no strides of 0
    return mapped ? nullptr : "k and v must not be expanded";
}

}  // namespace neox
