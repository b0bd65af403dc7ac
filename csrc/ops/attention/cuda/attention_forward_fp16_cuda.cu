// Instances of the forward kernel for float16.
#include "ops/attention/cuda/forward_instances.cuh"

namespace neox::attention {

template cudaError_t launch_forward<__half>(const Forward<__half>& task, int dim, bool general, Stream stream);

}  // namespace neox::attention
