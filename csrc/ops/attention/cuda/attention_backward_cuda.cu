#include "ops/attention/cuda/hopper_backward.cuh"
#include "ops/attention/cuda/launch.cuh"

namespace neox {
namespace {

using namespace attention;

// Whether the dk and dv kernel also sums dq, with atomics: 5 matrix products instead of 7, but an order of summation
// that varies from run to run.
bool sums_queries(const Attention& in, bool deterministic) {
    return !deterministic && !is_general(in) && in.head_dim <= 128;
}

template <class T>
Backward<T> describe(const Attention& in, const AttentionGradients& grad, bool deterministic, Workspace& workspace) {
    Backward<T> task{};
    const int64_t pairs = in.batch * in.groups;
    const int dim = instance_dim(in);
    task.in = make_params(in, workspace);
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
    task.rows = workspace.allocate<float2>(pairs * task.padded_rows);
    task.dq_sums =
        sums_queries(in, deterministic) ? workspace.allocate<float>(pairs * task.padded_rows * dim) : nullptr;
    return task;
}

template <class T>
cudaError_t run_backward(const Attention& in, const Backward<T>& task, Stream stream) {
    const int64_t rows = in.batch * in.groups * task.padded_rows, dim = instance_dim(in);
    cudaError_t error = fill_segment_table(task.in, stream);
    if (error == cudaSuccess && rows)
        error = launch(prepare_kernel<T>, dim3(static_cast<unsigned>(rows / 32)), dim3(256), 0, stream, task);
    if (error == cudaSuccess && task.dq_sums && rows)
        error = cudaMemsetAsync(task.dq_sums, 0, rows * dim * sizeof(float), static_cast<cudaStream_t>(stream));
    // The Hopper kernel sums dq with atomics, and copies rows of dout 16 bytes at a time.
    const bool hopper = in.hopper && task.dq_sums && task.dout.vectorized;
    if (error == cudaSuccess)
        error = hopper ? launch_hopper_keys(in, task, stream) : launch_backward_keys(in, task, stream);
    if (error != cudaSuccess || rows == 0) return error;
    if (!task.dq_sums) return launch_backward_queries(in, task, stream);
    Backward<T> finish = task;
    finish.order = block_order(in, 1, false);
    const dim3 grid(static_cast<unsigned>(ceil_divide(rows * (dim / 8), 256)));
    return launch(finish_dq_kernel<T>, grid, dim3(256), 0, stream, finish, static_cast<int>(dim));
}

}  // namespace

int64_t attention_backward_workspace_cuda(const Attention& in, bool deterministic) {
    Workspace workspace(nullptr);
    describe<__nv_bfloat16>(in, {}, deterministic, workspace);
    return workspace.used();
}

const char* attention_backward_cuda(const Attention& in, const AttentionGradients& grad, bool deterministic,
                                    void* workspace, Stream stream) {
    if (in.batch * in.groups == 0) return nullptr;
    if (const char* const problem = in.hopper ? attention_hopper_problem_cuda(in) : nullptr) return problem;
    return message(dispatch_type(in, [&](auto zero) {
        using T = decltype(zero);
        Workspace allocations(workspace);
        return run_backward<T>(in, describe<T>(in, grad, deterministic, allocations), stream);
    }));
}

}  // namespace neox
