// mbarriers, bulk tensor copies, proxy fences and setmaxnreg of the emulator. See async.h.
#include "async.h"

#include <random>
#include <vector>

#include "scheduler.h"
#include "simt.h"

namespace simt {
namespace {

constexpr int kRegisterFile = 64 << 10;  // 32-bit registers of a multiprocessor
constexpr uint32_t kMaxTransactionBytes = (1u << 20) - 1;

struct Mbarrier {
    const uint64_t* address;
    int arrivals, pending;  // per phase; still missing in the current one
    int64_t bytes = 0;      // expected and not yet copied
    uint32_t phase = 0;     // number of completed phases
    bool visible = false;   // to the asynchronous proxy and other threads: fenced after its initialisation
    int initialised_by;
    std::vector<int> waiting;
};

// Part of a box that lands at once: rows [first, end) of box[0] elements.
struct Part {
    TensorMap map;
    char* shared;
    int coordinates[TensorMap::kMaxDimensions];
    uint32_t first, end;
    int barrier;
};

struct State {
    std::vector<Mbarrier> barriers;
    std::vector<Part> parts;
    std::vector<int> registers;  // per thread
    std::vector<int> starved;    // threads that wait for registers
    int free_registers = 0;      // released by setmaxnreg.dec and not acquired since
    std::mt19937_64 random_bits;
};

State state;

std::string describe(const Mbarrier& barrier) {
    return "mbarrier at shared address " + std::to_string(window_address(barrier.address, 8, "mbarrier")) + ": phase " +
           std::to_string(barrier.phase) + " (parity " + std::to_string(barrier.phase & 1) + "), " +
           std::to_string(barrier.pending) + " of " + std::to_string(barrier.arrivals) + " arrivals and " +
           std::to_string(barrier.bytes) + " bytes pending";
}

int index_of(const uint64_t* address, const char* what) {
    for (size_t i = 0; i < state.barriers.size(); ++i) {
        if (state.barriers[i].address != address) continue;
        if (!state.barriers[i].visible && state.barriers[i].initialised_by != running_thread())
            fail(std::string(what) + ": the initialisation of the mbarrier was not fenced (fence.mbarrier_init)");
        check::read(running_thread(), address, sizeof(*address));
        return static_cast<int>(i);
    }
    fail(std::string(what) + ": no mbarrier has been initialised at this address");
}

void complete_if_done(int index) {
    Mbarrier& barrier = state.barriers[static_cast<size_t>(index)];
    if (barrier.pending > 0 || barrier.bytes > 0) return;
    ++barrier.phase;
    barrier.pending = barrier.arrivals;
    check::mbarrier_complete(index, barrier.phase);
    for (const int thread : std::exchange(barrier.waiting, {})) resume(thread);
}

// Number of rows of box[0] elements in a box.
uint32_t rows_of(const TensorMap& map) {
    uint32_t rows = 1;
    for (int i = 1; i < map.dimensions; ++i) rows *= map.box[i];
    return rows;
}

// Calls body(source, offset in the box, bytes) for each 16-byte chunk of rows [first, end); source is null outside of
// the tensor. `available`: how many of the bytes exist.
template <class Body>
void for_each_chunk(const Part& part, const Body& body) {
    const TensorMap& map = part.map;
    const uint32_t row_bytes = map.box[0] * 2;
    for (uint32_t row = part.first; row < part.end; ++row) {
        const char* source = map.data;
        bool inside = true;
        uint32_t rest = row;
        for (int i = 1; i < map.dimensions; ++i) {
            const int64_t at = part.coordinates[i] + static_cast<int64_t>(rest % map.box[i]);
            rest /= map.box[i];
            inside = inside && at >= 0 && at < static_cast<int64_t>(map.sizes[i]);
            source += at * static_cast<int64_t>(map.strides[i]);
        }
        for (uint32_t byte = 0; byte < row_bytes; byte += 16) {
            const int64_t at = part.coordinates[0] * int64_t{2} + byte,
                          left = static_cast<int64_t>(map.sizes[0]) * 2 - at;
            const bool exists = inside && at >= 0 && left > 0;
            body(exists ? source + at : nullptr, row * row_bytes + byte,
                 exists ? static_cast<uint32_t>(std::min<int64_t>(left, 16)) : 0);
        }
    }
}

// The 128-byte swizzle: bits 4-6 of a shared address are combined with bits 7-9.
char* swizzled(char* shared, uint32_t offset, bool is_swizzled) {
    if (!is_swizzled) return shared + offset;
    const uint32_t base = window_address(shared, 1, "bulk copy"), address = base + offset;
    return shared + ((address ^ (address >> 7 & 7) << 4) - base);
}

void land(const Part& part) {
    uint32_t bytes = 0;
    for_each_chunk(part, [&](const char* source, uint32_t offset, uint32_t available) {
        char* const to = swizzled(part.shared, offset, part.map.swizzled);
        check::bulk_landed(to, 16);
        std::memset(to, 0, 16);
        if (source) std::memcpy(to, source, available);
        bytes += 16;
    });
    Mbarrier& barrier = state.barriers[static_cast<size_t>(part.barrier)];
    barrier.bytes -= bytes;
    if (barrier.bytes < 0) {
        const std::string text = "a bulk copy brings more bytes than expected to the " + describe(barrier);
        abandon_launch(text);
    }
    complete_if_done(part.barrier);
}

void check_load(const void* shared, const TensorMap& map, int dimensions) {
    if (reinterpret_cast<uintptr_t>(&map) % 64) fail("bulk copy: the tensor map must be aligned to 64 bytes");
    if (map.dimensions != dimensions)
        fail("bulk copy: " + std::to_string(dimensions) + " coordinates for a tensor map of " +
             std::to_string(map.dimensions) + " dimensions");
    const size_t bytes = static_cast<size_t>(rows_of(map)) * map.box[0] * 2;
    if (window_address(shared, bytes, "bulk copy") % 128) fail("bulk copy: its target must be aligned to 128 bytes");
}

}  // namespace

namespace async {

void begin_block(int num_threads) {
    state.barriers.clear();
    state.parts.clear();
    state.starved.clear();
    const int registers = std::min(kRegisterFile / num_threads / 8 * 8, 255);
    state.registers.assign(static_cast<size_t>(num_threads), registers);
    state.free_registers = 0;  // registers of the file that the launch did not allocate are not available
    state.random_bits.seed(config().seed);
    wgmma::begin_block(num_threads);
}

bool land_one() {
    if (state.parts.empty()) return false;
    std::swap(state.parts[state.random_bits() % state.parts.size()], state.parts.back());
    const Part part = state.parts.back();
    state.parts.pop_back();
    land(part);
    return true;
}

std::string open_barriers() {
    std::string text;
    for (const Mbarrier& barrier : state.barriers) {
        if (!barrier.waiting.empty()) text += "\n  " + describe(barrier);
    }
    return text;
}

std::string in_flight_at_exit(int thread, bool last) {
    if (last && !state.parts.empty()) return " ends the block with a bulk copy in flight";
    for (size_t i = 0; last && i < state.registers.size(); ++i) {
        if (state.registers[i] != state.registers[i / 128 * 128])
            return " ends the block, in which not all warps of a warpgroup have executed the same setmaxnreg";
    }
    return wgmma::in_flight_at_exit(thread);
}

}  // namespace async

void mbarrier_init(uint64_t* address, int arrivals) {
    window_address(address, sizeof(*address), "mbarrier.init");
    if (reinterpret_cast<uintptr_t>(address) % 8) fail("mbarrier.init: misaligned address");
    if (arrivals < 1) fail("mbarrier.init: the number of arrivals must be positive");
    if (state.barriers.size() == check::kMaxMbarriers) fail("mbarrier.init: too many mbarriers for the emulator");
    for (const Mbarrier& barrier : state.barriers) {
        if (barrier.address == address) fail("mbarrier.init: this mbarrier is initialised already");
    }
    check::write(running_thread(), address, sizeof(*address));
    Mbarrier barrier{};
    barrier.address = address;
    barrier.arrivals = barrier.pending = arrivals;
    barrier.initialised_by = running_thread();
    state.barriers.push_back(barrier);
}

void fence_mbarrier_init() {
    for (Mbarrier& barrier : state.barriers) barrier.visible |= barrier.initialised_by == running_thread();
}

void fence_proxy_async() { check::proxy_fence(running_thread()); }

void mbarrier_arrive(uint64_t* address, uint32_t expected_bytes) {
    const int index = index_of(address, "mbarrier.arrive");
    Mbarrier& barrier = state.barriers[static_cast<size_t>(index)];
    if (barrier.pending == 0) fail("mbarrier.arrive: more arrivals than expected at the " + describe(barrier));
    check::mbarrier_arrive(running_thread(), index);
    barrier.bytes += expected_bytes;
    if (barrier.bytes > kMaxTransactionBytes) fail("mbarrier.arrive: too many bytes in the " + describe(barrier));
    --barrier.pending;
    complete_if_done(index);
}

bool mbarrier_test(uint64_t* address, uint32_t parity) {
    if (parity > 1) fail("mbarrier.try_wait: the parity must be 0 or 1");
    return (state.barriers[static_cast<size_t>(index_of(address, "mbarrier.try_wait"))].phase & 1) != parity;
}

void mbarrier_wait(uint64_t* address, uint32_t parity) {
    const int index = index_of(address, "mbarrier.try_wait");
    if (parity > 1) fail("mbarrier.try_wait: the parity must be 0 or 1");
    // the vector may grow while this thread waits
    while ((state.barriers[static_cast<size_t>(index)].phase & 1) == parity) {
        state.barriers[static_cast<size_t>(index)].waiting.push_back(running_thread());
        suspend("mbarrier.try_wait");
    }
    check::mbarrier_acquire(running_thread(), index);
}

void bulk_load(void* shared, const TensorMap* map, uint64_t* address, const int* coordinates, int dimensions) {
    const int index = index_of(address, "bulk copy");
    if (!state.barriers[static_cast<size_t>(index)].visible)
        fail("bulk copy: the initialisation of its mbarrier was not fenced (fence.mbarrier_init)");
    check_load(shared, *map, dimensions);
    Part part{*map, static_cast<char*>(shared), {}, 0, rows_of(*map), index};
    for (int i = 0; i < dimensions; ++i) part.coordinates[i] = coordinates[i];
    const uint32_t phase = state.barriers[static_cast<size_t>(index)].phase + 1;
    for_each_chunk(part, [&](const char* source, uint32_t offset, uint32_t available) {
        char* const to = swizzled(part.shared, offset, map->swizzled);
        if (source) check::read(running_thread(), source, available);
        check::bulk_write(running_thread(), index, phase, to, 16);
        std::memset(to, 0xff, 16);  // neither the old nor the new data is valid until the copy has landed
    });
    Part rest = part;
    rest.first = part.end = static_cast<uint32_t>(state.random_bits() % part.end);
    if (part.first < part.end) state.parts.push_back(part);
    state.parts.push_back(rest);
}

void set_registers(int count, bool increase) {
    if (count % 8 || count < 24 || count > 256) fail("setmaxnreg: the number must be a multiple of 8 from 24 to 256");
    sync_warp(~0u);  // .sync.aligned
    int& mine = state.registers[static_cast<size_t>(running_thread())];
    if (increase ? count < mine : count > mine)
        fail(std::string("setmaxnreg.") + (increase ? "inc" : "dec") + ": " + std::to_string(count) + " from " +
             std::to_string(mine) + " registers");
    while (increase && state.free_registers < count - mine) {
        state.starved.push_back(running_thread());
        suspend("setmaxnreg.inc");
    }
    state.free_registers -= count - mine;
    mine = count;
    for (const int thread : std::exchange(state.starved, {})) resume(thread);
}

}  // namespace simt
