// Shared memory that the kernels need per block. The kernels themselves are instantiated elsewhere.
#include "ops/attention/cuda/backward_keys_instances.cuh"
#include "ops/attention/cuda/backward_queries_instances.cuh"
#include "ops/attention/cuda/forward_instances.cuh"

namespace neox {

using namespace attention;

AttentionShared attention_shared_cuda(int64_t head_dim, bool general) {
    AttentionShared bytes{0, 0, static_cast<int64_t>(shared_memory_limit())};
    dispatch_instance(instance_dim(head_dim, general), general, [&](auto dim, auto is_general) {
        constexpr int kDim = decltype(dim)::value;
        constexpr bool kGeneral = decltype(is_general)::value;
        bytes.forward = ForwardShapeOf<kDim, kGeneral>::kSharedBytes;
        bytes.backward =
            std::max(KeysShapeOf<kDim, kGeneral>::kSharedBytes, QueriesShapeOf<kDim, kGeneral>::kSharedBytes);
        return cudaSuccess;
    });
    return bytes;
}

}  // namespace neox
