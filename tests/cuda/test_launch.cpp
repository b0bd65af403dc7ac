// What a launch asks of CUDA's runtime, and what a failed one leaves there. The emulator replaces this part of
// device.cuh.
#include <string>

#include "common/device.cuh"
#include "tally.h"

namespace {

using fake_runtime::state;

void kernel(int) {}

cudaError_t launch_with(size_t shared_bytes) {
    state = {};
    return neox::launch(kernel, dim3(1), dim3(32), shared_bytes, nullptr, 1);
}

void test_shared_memory() {
    EXPECT(launch_with(48 << 10) == cudaSuccess);
    EXPECT(state.attributes.empty() && state.launches == std::vector<size_t>{48 << 10});
    EXPECT(launch_with(100 << 10) == cudaSuccess);
    EXPECT(state.launches == std::vector<size_t>{100 << 10});
    EXPECT(state.attributes[cudaFuncAttributeMaxDynamicSharedMemorySize] == 100 << 10);
    // by default the driver reserves what one block needs, and a second one does not fit
    EXPECT(state.attributes[cudaFuncAttributePreferredSharedMemoryCarveout] == cudaSharedmemCarveoutMaxShared);
}

void test_errors() {
    EXPECT(neox::message(launch_with(0)) == nullptr);
    state.launch_error = cudaErrorInvalidConfiguration;
    const char* const message = neox::message(neox::launch(kernel, dim3(1), dim3(32), 0, nullptr, 1));
    EXPECT(message != nullptr && std::string(message) == "an error");
    EXPECT(cudaGetLastError() == cudaSuccess);  // else torch's next check would report it as its own
}

void test_device() {
    EXPECT(neox::multiprocessors() == 1 && neox::shared_memory_limit() == 48 << 10);  // nothing is known
    state.device = {{cudaDevAttrMultiProcessorCount, 132},
                    {cudaDevAttrMaxSharedMemoryPerBlock, 48 << 10},
                    {cudaDevAttrMaxSharedMemoryPerBlockOptin, 227 << 10},
                    {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 228 << 10}};
    EXPECT(neox::multiprocessors() == 132 && neox::shared_memory_limit() == 227 << 10);
}

}  // namespace

int main() {
    test_device();
    test_shared_memory();
    test_errors();
    return native_test::tally.finish();
}
