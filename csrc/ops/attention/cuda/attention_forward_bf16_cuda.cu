// Instances of the forward kernel for bfloat16.
#include "ops/attention/cuda/forward_instances.cuh"

namespace neox::attention {

template cudaError_t launch_forward<__nv_bfloat16>(const Forward<__nv_bfloat16>& task, int dim, bool general,
                                                   Stream stream);

}  // namespace neox::attention
