#include "ops/attention/cuda/hopper_forward.cuh"
#include "ops/attention/cuda/launch.cuh"

namespace neox {
namespace attention {
namespace {

// Computes the table of segment ids, one warp per entry.
__global__ void __launch_bounds__(128)
    segment_table_kernel(const int32_t* segments, int2* table, int64_t entries, int entries_per_batch, int keys) {
    const int64_t entry = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / kWarpSize;
    if (entry >= entries) return;
    const int64_t batch = entry / entries_per_batch;
    const int first = static_cast<int>(entry % entries_per_batch) * kSegmentTile,
              key = min(first + static_cast<int>(threadIdx.x) % kWarpSize, keys - 1);
    int low = segments[batch * keys + key], high = low;
#pragma unroll
    for (int offset = kWarpSize / 2; offset; offset /= 2) {
        low = min(low, __shfl_xor_sync(kFullWarp, low, offset));
        high = max(high, __shfl_xor_sync(kFullWarp, high, offset));
    }
    if (threadIdx.x % kWarpSize == 0) table[entry] = make_int2(low, high);
}

static_assert(kSegmentTile == kWarpSize, "one lane per key of an entry");

// Number of splits of the keys. If there are too few blocks to fill the GPU, as in decoding, each takes a split of at
// least 256 keys.
int64_t key_splits(const Attention& in) {
    const int64_t blocks =
                      std::max<int64_t>(in.batch * in.groups * ceil_divide(in.queries * in.heads, kForwardRows), 1),
                  wanted = 2 * multiprocessors();
    const int64_t seen = in.window ? std::min(in.keys, in.window + in.queries) : in.keys;
    const int64_t most = std::min<int64_t>(ceil_divide(seen, 256), 64);
    return std::max<int64_t>(std::min(wanted / blocks, most), 1);
}

template <class T>
Forward<T> describe(const Attention& in, void* out, float* lse, Workspace& workspace) {
    Forward<T> task{};
    task.in = make_params(in, workspace);
    task.order = block_order(in, ceil_divide(in.queries * in.heads, kForwardRows), in.causal);
    task.q = query_matrix<const T>(in, in.q, in.q_strides);
    task.k = key_matrix<const T>(in, in.k, in.k_strides);
    task.v = key_matrix<const T>(in, in.v, in.v_strides);
    task.out = query_matrix<T>(in, out, output_strides(in));
    task.lse = lse;
    task.splits = static_cast<int>(key_splits(in));
    if (task.splits > 1) {
        const int64_t rows = task.splits * in.batch * in.groups * in.queries * in.heads;
        task.partial_out = workspace.allocate<float>(rows * instance_dim(in));
        task.partial_lse = workspace.allocate<float>(rows);
    }
    return task;
}

}  // namespace

cudaError_t fill_segment_table(const Params& params, Stream stream) {
    const int64_t entries = static_cast<int64_t>(params.batch) * params.segment_entries;
    if (!params.segments || entries == 0) return cudaSuccess;
    return launch(segment_table_kernel, dim3(static_cast<unsigned>(ceil_divide(entries, 4))), dim3(128), 0, stream,
                  params.segments, const_cast<int2*>(params.segment_table), entries, params.segment_entries,
                  params.keys);
}

}  // namespace attention

using namespace attention;

int64_t attention_forward_workspace_cuda(const Attention& in) {
    Workspace workspace(nullptr);
    describe<__nv_bfloat16>(in, nullptr, nullptr, workspace);
    return workspace.used();
}

const char* attention_forward_cuda(const Attention& in, void* out, float* lse, void* workspace, Stream stream) {
    if (in.batch * in.groups * in.queries * in.heads == 0) return nullptr;
    if (const char* const problem = in.hopper ? attention_hopper_problem_cuda(in) : nullptr) return problem;
    return message(dispatch_type(in, [&](auto zero) {
        using T = decltype(zero);
        Workspace allocations(workspace);
        const Forward<T> task = describe<T>(in, out, lse, allocations);
        const int dim = instance_dim(in);
        cudaError_t error = fill_segment_table(task.in, stream);
        if (error == cudaSuccess) {
            error =
                in.hopper ? launch_hopper<T>(in, task, stream) : launch_forward<T>(task, dim, is_general(in), stream);
        }
        if (error != cudaSuccess || task.splits == 1) return error;
        const int64_t rows = static_cast<int64_t>(task.order.pairs) * task.in.rows;
        return launch(combine_kernel<T>, dim3(static_cast<unsigned>(ceil_divide(rows, 4))), dim3(128), 0, stream, task,
                      dim);
    }));
}

}  // namespace neox
