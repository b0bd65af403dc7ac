// Instances of the forward kernel for Hopper and bfloat16. The builds compile *_hopper_cuda.cu for sm_90a only.
#include "ops/attention/cuda/hopper_instances.cuh"

namespace neox::attention {

template cudaError_t launch_hopper_forward<__nv_bfloat16>(const HopperForward<__nv_bfloat16>& work, int dim,
                                                          Stream stream);

}  // namespace neox::attention
