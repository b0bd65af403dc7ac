// Instances of the forward kernel for Hopper and float16. The builds compile *_hopper_cuda.cu for sm_90a only.
#include "ops/attention/cuda/hopper_instances.cuh"

namespace neox::attention {

template cudaError_t launch_hopper_forward<__half>(const HopperForward<__half>& work, int dim, Stream stream);

}  // namespace neox::attention
