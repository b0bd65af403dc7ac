// NEOX_RUN and NEOX_QUERY call a launcher while the GPU of the tensor is the current device, and with its stream: the
// number of multiprocessors, by which workspaces are sized, is that of the current device. Torch's functions are
// replaced here, so that a machine without a GPU has several.
#include <stdexcept>
#include <string>

#include "common/binding.h"
#include "tally.h"

namespace {

constexpr int kDefault = 0, kTensor = 3;
int current = kDefault;
int guards = 0;
int stream_of_device[kTensor + 1];

struct Guard {
    int previous;
};

neox::Tensor tensor_on_gpu() {
    static int memory;
    return neox::Tensor(reinterpret_cast<AtenTensorHandle>(&memory));
}

// The launchers of an operator: they report the device on which they are called.
int64_t workspace_cuda(int64_t size) { return 1000 * current + size; }

const char* work_cuda(int* device, neox::Stream* used, neox::Stream stream) {
    *device = current;
    *used = stream;
    return nullptr;
}

const char* failing_cuda(neox::Stream) { return "out of registers"; }

void test_query() {
    EXPECT(NEOX_QUERY(workspace, tensor_on_gpu(), 7) == 1000 * kTensor + 7);
    EXPECT(current == kDefault && guards == 0);
}

void test_run() {
    int device = -1;
    neox::Stream used = nullptr;
    NEOX_RUN(work, tensor_on_gpu(), &device, &used);
    EXPECT(device == kTensor && used == &stream_of_device[kTensor]);
    EXPECT(current == kDefault && guards == 0);
}

void test_failure() {
    std::string message;
    try {
        neox::run_on_device("failing", tensor_on_gpu(), failing_cuda);
    } catch (const std::runtime_error& error) {
        message = error.what();
    }
    EXPECT(message == "failing: the kernel could not be launched: out of registers");
    EXPECT(current == kDefault && guards == 0);
}

}  // namespace

extern "C" {

AOTITorchError aoti_torch_create_device_guard(int32_t device, DeviceGuardHandle* guard) {
    *guard = reinterpret_cast<DeviceGuardHandle>(new Guard{current});
    current = device;
    ++guards;
    return 0;
}

AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle handle) {
    auto* const guard = reinterpret_cast<Guard*>(handle);
    current = guard->previous;
    --guards;
    delete guard;
    return 0;
}

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream) {
    *stream = &stream_of_device[device];
    return 0;
}

AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* device) {
    *device = kTensor;
    return 0;
}

AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle) { return 0; }

}  // extern "C"

int main() {
    test_query();
    test_run();
    test_failure();
    return native_test::tally.finish();
}
