// Instances of the deterministic dq kernel for bfloat16.
#include "ops/attention/cuda/backward_queries_instances.cuh"

namespace neox::attention {

template cudaError_t launch_backward_queries<__nv_bfloat16>(const Attention& in, const Backward<__nv_bfloat16>& task,
                                                            Stream stream);

}  // namespace neox::attention
