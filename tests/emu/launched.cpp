// Which kernels were launched, for tests/ops/test_kernel_cases.py. Only in the torch libraries with emulated kernels.
#include <algorithm>
#include <vector>

#include "simt.h"

namespace {

std::vector<const void*>& launched() {
    static std::vector<const void*> kernels;  // without duplicates
    return kernels;
}

}  // namespace

// Records the launches from now on, and forgets the earlier ones.
extern "C" void neox_record_launches() {
    launched().clear();
    simt::launcher() = [](const simt::Launch& launch, const std::function<void()>& thread_main) {
        auto& seen = launched();
        if (std::find(seen.begin(), seen.end(), launch.kernel) == seen.end()) seen.push_back(launch.kernel);
        simt::run_grid(launch.grid, launch.block, launch.shared_bytes, thread_main);
    };
}

// Copies the addresses of the launched kernels, up to `max`. Returns how many there are.
extern "C" size_t neox_launched_kernels(const void** kernels, size_t max) {
    std::copy_n(launched().begin(), std::min(max, launched().size()), kernels);
    return launched().size();
}
