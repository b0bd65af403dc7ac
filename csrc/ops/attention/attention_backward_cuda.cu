#include "ops/attention/backward_keys.cuh"
#include "ops/attention/backward_queries.cuh"
#include "ops/attention/launch.cuh"

namespace neox {
namespace {

using namespace attention;

// Tiles per head_dim; docs/attention.md has the arithmetic. {kDim, keys, rows, rows in registers, blocks per multiprocessor}
template <int kDim>
struct KeysShapeOf;
template <>
struct KeysShapeOf<32> : KeysShape<32, 128, 64, 64, 1> {};
template <>
struct KeysShapeOf<64> : KeysShape<64, 128, 64, 64, 1> {};
template <>
struct KeysShapeOf<96> : KeysShape<96, 128, 64, 64, 1> {};
template <>
struct KeysShapeOf<128> : KeysShape<128, 128, 64, 32, 1> {};
template <>
struct KeysShapeOf<192> : KeysShape<192, 64, 64, 64, 1> {};
template <>
struct KeysShapeOf<256> : KeysShape<256, 64, 32, 32, 1> {};

// {kDim, rows, keys, blocks per multiprocessor}
template <int kDim>
struct QueriesShapeOf;
template <>
struct QueriesShapeOf<32> : QueriesShape<32, 128, 64, 1> {};
template <>
struct QueriesShapeOf<64> : QueriesShape<64, 128, 64, 1> {};
template <>
struct QueriesShapeOf<96> : QueriesShape<96, 128, 64, 1> {};
template <>
struct QueriesShapeOf<128> : QueriesShape<128, 128, 64, 1> {};
template <>
struct QueriesShapeOf<192> : QueriesShape<192, 64, 64, 1> {};
template <>
struct QueriesShapeOf<256> : QueriesShape<256, 64, 32, 1> {};

// dq by atomics in the kernel of the keys: 5 products instead of 7, in an order of sums that varies from run to run.
bool sums_queries(int dim, bool deterministic) { return !deterministic && dim <= 128; }

template <class T>
Backward<T> describe(const Attention& in, const AttentionGradients& grad, bool deterministic, Workspace& workspace) {
    Backward<T> task{};
    const int64_t pairs = in.batch * in.groups;
    const int dim = instance_dim(in.head_dim);
    task.in = problem_of(in, workspace);
    task.q = query_matrix<const T>(in, in.q, in.q_strides);
    task.k = key_matrix<const T>(in, in.k, in.k_strides);
    task.v = key_matrix<const T>(in, in.v, in.v_strides);
    task.out = query_matrix<const T>(in, grad.out, output_strides(in));
    task.dout = query_matrix<const T>(in, grad.dout, grad.dout_strides);
    task.dq = query_matrix<T>(in, grad.dq, grad.dq_strides);
    task.dk = key_matrix<T>(in, grad.dk, grad.dk_strides);
    task.dv = key_matrix<T>(in, grad.dv, grad.dv_strides);
    task.lse = grad.lse;
    task.padded_rows = static_cast<int>(ceil_divide(in.queries * in.heads, kRowPadding) * kRowPadding);
    task.rows = workspace.take<float2>(pairs * task.padded_rows);
    task.dq_sums = sums_queries(dim, deterministic) ? workspace.take<float>(pairs * task.padded_rows * dim) : nullptr;
    return task;
}

template <class T, int kDim, bool kExtras>
cudaError_t run_keys(const Attention& in, Backward<T> task, Stream stream) {
    using Shape = KeysShapeOf<kDim>;
    task.order = block_order(in, ceil_divide(in.keys, Shape::kKeys), false);
    const dim3 grid(static_cast<unsigned>(static_cast<int64_t>(task.order.tiles) * task.order.pairs)), block(Shape::kThreads);
    if (grid.x == 0) return cudaSuccess;
    if constexpr (kDim <= 128) {
        return launch(backward_keys_kernel<T, Shape, kExtras, true, true>, grid, block, Shape::kSharedBytes, stream, task);
    } else {  // the sums of both gradients would not fit the registers
        const cudaError_t error = launch(backward_keys_kernel<T, Shape, kExtras, false, true>, grid, block, Shape::kSharedBytes, stream, task);
        if (error != cudaSuccess) return error;
        return launch(backward_keys_kernel<T, Shape, kExtras, true, false>, grid, block, Shape::kSharedBytes, stream, task);
    }
}

template <class T, int kDim, bool kExtras>
cudaError_t run_queries(const Attention& in, Backward<T> task, Stream stream) {
    using Shape = QueriesShapeOf<kDim>;
    task.order = block_order(in, ceil_divide(in.queries * in.heads, Shape::kRows), in.causal);
    const dim3 grid(static_cast<unsigned>(static_cast<int64_t>(task.order.tiles) * task.order.pairs));
    if (grid.x == 0) return cudaSuccess;
    return launch(backward_queries_kernel<T, Shape, kExtras>, grid, dim3(Shape::kThreads), Shape::kSharedBytes, stream, task);
}

template <class T, int kDim, bool kExtras>
cudaError_t run_backward(const Attention& in, const Backward<T>& task, Stream stream) {
    const int64_t rows = in.batch * in.groups * task.padded_rows;
    cudaError_t error = fill_segment_table(task.in, stream);
    if (error == cudaSuccess && rows) error = launch(prepare_kernel<T>, dim3(static_cast<unsigned>(rows / 32)), dim3(256), 0, stream, task);
    if (error == cudaSuccess && task.dq_sums && rows) error = cudaMemsetAsync(task.dq_sums, 0, rows * kDim * sizeof(float), static_cast<cudaStream_t>(stream));
    if (error == cudaSuccess) error = run_keys<T, kDim, kExtras>(in, task, stream);
    if (error != cudaSuccess || rows == 0) return error;
    if (!task.dq_sums) return run_queries<T, kDim, kExtras>(in, task, stream);
    Backward<T> finish = task;
    finish.order = block_order(in, 1, false);
    return launch(finish_dq_kernel<T>, dim3(static_cast<unsigned>(ceil_divide(rows * (kDim / 8), 256))), dim3(256), 0, stream, finish, kDim);
}

}  // namespace

int64_t attention_backward_workspace_cuda(const Attention& in, bool deterministic) {
    Workspace workspace(nullptr);
    describe<__nv_bfloat16>(in, {}, deterministic, workspace);
    return workspace.used();
}

const char* attention_backward_cuda(const Attention& in, const AttentionGradients& grad, bool deterministic, void* workspace, Stream stream) {
    if (in.batch * in.groups == 0) return nullptr;
    return message(dispatch_instance(in, [&](auto zero, auto dim, auto extras) {
        using T = decltype(zero);
        Workspace pieces(workspace);
        return run_backward<T, decltype(dim)::value, decltype(extras)::value>(in, describe<T>(in, grad, deterministic, pieces), stream);
    }));
}

}  // namespace neox
