// Launches, and the memory that a test gives to them.
#include <algorithm>

#include "simt.h"

namespace simt {
namespace {

Launcher the_launcher;
std::vector<Memory> the_memory;

}  // namespace

Launcher& launcher() { return the_launcher; }

void launch(const Launch& launch, const std::function<void()>& thread_main) {
    if (the_launcher) return the_launcher(launch, thread_main);
    run_grid(launch.grid, launch.block, launch.shared_bytes, thread_main);
}

const std::vector<Memory>& memory() { return the_memory; }

void add_memory(void* begin, size_t bytes, const char* name) {
    if (bytes) the_memory.push_back({name, static_cast<char*>(begin), bytes});
}

void remove_memory(const void* begin) {
    const auto found =
        std::find_if(the_memory.begin(), the_memory.end(), [&](const Memory& memory) { return memory.begin == begin; });
    if (found != the_memory.end()) the_memory.erase(found);
}

}  // namespace simt
