// Instances of the dk and dv kernel for bfloat16.
#include "ops/attention/cuda/backward_keys_instances.cuh"

namespace neox::attention {

template cudaError_t launch_backward_keys<__nv_bfloat16>(const Attention& in, const Backward<__nv_bfloat16>& task,
                                                         Stream stream);

}  // namespace neox::attention
