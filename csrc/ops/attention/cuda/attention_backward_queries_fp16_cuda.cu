// Instances of the deterministic dq kernel for float16.
#include "ops/attention/cuda/backward_queries_instances.cuh"

namespace neox::attention {

template cudaError_t launch_backward_queries<__half>(const Attention& in, const Backward<__half>& task, Stream stream);

}  // namespace neox::attention
