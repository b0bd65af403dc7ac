#include "ops/attention/forward.cuh"
#include "ops/attention/launch.cuh"

namespace neox {
namespace {

using namespace attention;

// Tiles per head_dim; docs/attention.md has the arithmetic. {kDim, rows, keys, warps, stages, blocks per multiprocessor}
template <int kDim>
struct ForwardShapeOf;
template <>
struct ForwardShapeOf<32> : ForwardShape<32, 128, 64, 4, 4, 2> {};
template <>
struct ForwardShapeOf<64> : ForwardShape<64, 128, 64, 4, 4, 2> {};
template <>
struct ForwardShapeOf<96> : ForwardShape<96, 128, 64, 4, 4, 2> {};
template <>
struct ForwardShapeOf<128> : ForwardShape<128, 128, 64, 4, 3, 2> {};
template <>
struct ForwardShapeOf<192> : ForwardShape<192, 128, 64, 8, 3, 1> {};
template <>
struct ForwardShapeOf<256> : ForwardShape<256, 128, 64, 8, 3, 1> {};

constexpr int kForwardRows = 128, kForwardKeys = 64;  // of every shape

// Parts of the keys: where the blocks are too few to fill the GPU, as in decoding, each takes a part of at least four tiles.
int64_t key_splits(const Attention& in) {
    const int64_t blocks = std::max<int64_t>(in.batch * in.groups * ceil_divide(in.queries * in.heads, kForwardRows), 1), wanted = 2 * multiprocessors();
    const int64_t seen = in.window ? std::min(in.keys, in.window + in.queries) : in.keys;
    const int64_t most = std::min<int64_t>(ceil_divide(seen, 4 * kForwardKeys), 64);
    return std::max<int64_t>(std::min(wanted / blocks, most), 1);
}

template <class T>
Forward<T> describe(const Attention& in, void* out, float* lse, Workspace& workspace) {
    Forward<T> task{};
    task.in = problem_of(in, workspace);
    task.order = block_order(in, ceil_divide(in.queries * in.heads, kForwardRows), in.causal);
    task.q = query_matrix<const T>(in, in.q, in.q_strides);
    task.k = key_matrix<const T>(in, in.k, in.k_strides);
    task.v = key_matrix<const T>(in, in.v, in.v_strides);
    task.out = query_matrix<T>(in, out, output_strides(in));
    task.lse = lse;
    task.splits = static_cast<int>(key_splits(in));
    if (task.splits > 1) {
        const int64_t rows = task.splits * in.batch * in.groups * in.queries * in.heads;
        task.partial_out = workspace.take<float>(rows * instance_dim(in.head_dim));
        task.partial_lse = workspace.take<float>(rows);
    }
    return task;
}

template <class T, int kDim, bool kExtras>
cudaError_t run_forward(const Forward<T>& task, Stream stream) {
    using Shape = ForwardShapeOf<kDim>;
    static_assert(Shape::kRows == kForwardRows && Shape::kKeys == kForwardKeys);
    cudaError_t error = fill_segment_table(task.in, stream);
    if (error != cudaSuccess) return error;
    const int64_t blocks = static_cast<int64_t>(task.order.tiles) * task.order.pairs;
    error = launch(forward_kernel<T, Shape, kExtras>, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(task.splits)), dim3(Shape::kThreads),
                   Shape::kSharedBytes, stream, task);
    if (error != cudaSuccess || task.splits == 1) return error;
    const int64_t rows = static_cast<int64_t>(task.order.pairs) * task.in.rows;
    return launch(combine_kernel<T>, dim3(static_cast<unsigned>(ceil_divide(rows, 4))), dim3(128), 0, stream, task, kDim);
}

}  // namespace

int64_t attention_forward_workspace_cuda(const Attention& in) {
    Workspace workspace(nullptr);
    describe<__nv_bfloat16>(in, nullptr, nullptr, workspace);
    return workspace.used();
}

const char* attention_forward_cuda(const Attention& in, void* out, float* lse, void* workspace, Stream stream) {
    if (in.batch * in.groups * in.queries * in.heads == 0) return nullptr;
    return message(dispatch_instance(in, [&](auto zero, auto dim, auto extras) {
        using T = decltype(zero);
        Workspace pieces(workspace);
        return run_forward<T, decltype(dim)::value, decltype(extras)::value>(describe<T>(in, out, lse, pieces), stream);
    }));
}

}  // namespace neox
