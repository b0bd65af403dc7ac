// Instances of the dk and dv kernel for float16.
#include "ops/attention/cuda/backward_keys_instances.cuh"

namespace neox::attention {

template cudaError_t launch_backward_keys<__half>(const Attention& in, const Backward<__half>& task, Stream stream);

}  // namespace neox::attention
