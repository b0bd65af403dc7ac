// A CUDA device for autograd in a torch that was built without CUDA: one device with one stream, on which nothing runs.
// Autograd executes a node on a thread of its device. It asks torch for the accelerator, CUDA's hooks for a context,
// and the device's guard for streams. The library defines the two functions again, so it must be loaded globally and
// before torch.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {
namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);

struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
    c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
    c10::Device getDevice() const override { return kDevice; }
    c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
    c10::Stream exchangeStream(c10::Stream) const noexcept override {
        return c10::Stream(c10::Stream::DEFAULT, kDevice);
    }
    void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
    void block(void*, const c10::Stream&) const override {}
    bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Hooks : CUDAHooksInterface {
    void init() const override {}
    bool hasPrimaryContext(DeviceIndex) const override { return true; }
};

}  // namespace

namespace accelerator {
TORCH_API std::optional<c10::DeviceType> getAccelerator(bool) { return c10::DeviceType::CUDA; }
}  // namespace accelerator

namespace detail {
TORCH_API const CUDAHooksInterface& getCUDAHooks() {
    static const Hooks hooks;
    return hooks;
}
}  // namespace detail

}  // namespace at
