// Vector clocks, driven by the callbacks of -fsanitize=thread. See check.h.
#include "check.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

namespace simt {
void abandon_launch(const std::string& message);
int running_thread();

namespace check {
namespace {

constexpr size_t kCellBytes = 2;  // the smallest element that kernels share between threads
constexpr int kNobody = -1;

struct Access {
    int16_t thread = kNobody;
    bool atomic = false;
    uint32_t clock = 0, block = 0;
};

enum class Copy : uint8_t { kNone, kCpAsync, kBulk };  // in flight

struct Cell {
    Access writer, readers[2];
    bool written = false;
    Copy in_flight = Copy::kNone;
    bool written_by_thread = false;     // by the generic proxy, not by a bulk copy
    uint16_t asynchronous_readers = 0;  // wgmma in flight
    uint32_t fences = 0;                // the writer's proxy fences before the write
};

struct Region {
    uintptr_t begin, end;
    bool shared, cached, guarded;
    Traffic traffic;
    std::vector<Cell> cells;
    std::vector<bool> touched;
};

// Vector clock of a thread: its local clock, and those that it has synchronised with. `others` has an entry per thread
// and per mbarrier, and is shared by the threads that met at a barrier.
struct Clock {
    std::shared_ptr<const std::vector<uint32_t>> others;
    uint32_t own = 1;
    std::vector<uint32_t> proxy_fences;  // the local clock at each fence.proxy.async
};

// Clocks that the arrivals at an mbarrier have released: in the current phase, and up to the last complete one.
struct Released {
    std::vector<uint32_t> current;
    std::shared_ptr<const std::vector<uint32_t>> complete;
};

std::vector<Region> shared_regions, global_regions;
std::vector<Clock> clocks;
std::vector<int> arrived[16];
Released released[kMaxMbarriers];
uint32_t block_number = 0;
bool active = false;

bool happened_before(const Access& access, int thread) {
    if (access.thread == kNobody || (access.thread == thread && access.block == block_number)) return true;
    if (access.block != block_number) return false;  // the blocks of a launch are unordered
    return (*clocks[static_cast<size_t>(thread)].others)[static_cast<size_t>(access.thread)] >= access.clock;
}

// Whether `thread` has synchronised with a fence.proxy.async of the cell's writer that follows the write.
bool fenced(const Cell& cell, int thread) {
    const std::vector<uint32_t>& fences = clocks[static_cast<size_t>(cell.writer.thread)].proxy_fences;
    return cell.fences < fences.size() &&
           happened_before(Access{cell.writer.thread, false, fences[cell.fences], cell.writer.block}, thread);
}

uint32_t fences_of(int thread) {
    return static_cast<uint32_t>(clocks[static_cast<size_t>(thread)].proxy_fences.size());
}

// The memory that an address is in, or whose guard bytes it is in.
Region* find(uintptr_t address) {
    for (Region& region : shared_regions) {
        if (address >= region.begin && address < region.end + kGuard) return &region;
    }
    Region* guarded = nullptr;
    for (Region& region : global_regions) {
        if (address >= region.begin && address < region.end) return &region;
        if (region.guarded && address + kGuard >= region.begin && address < region.end + kGuard) guarded = &region;
    }
    return guarded;
}

std::string source_line(void* code) {
    Dl_info info;
    if (!code || !dladdr(code, &info) || !info.dli_fname) return "";
    char command[768], line[512] = "";
    const auto offset = static_cast<size_t>(static_cast<char*>(code) - static_cast<char*>(info.dli_fbase)) - 1;
    std::snprintf(command, sizeof(command), "addr2line -Cpe '%s' 0x%zx 2>/dev/null", info.dli_fname, offset);
    if (FILE* pipe = popen(command, "r")) {
        if (!std::fgets(line, sizeof(line), pipe)) line[0] = 0;
        pclose(pipe);
    }
    line[std::strcspn(line, "\n")] = 0;
    return std::string(" at ") + line;
}

void report(const char* kind, const Region& region, uintptr_t address, int thread, const Access& other, void* code) {
    active = false;
    std::string text = std::string(kind) + ": thread " + std::to_string(thread) + ", " +
                       (region.shared ? "shared " : "global ") + region.traffic.name + " + " +
                       std::to_string(static_cast<ptrdiff_t>(address - region.begin));
    if (other.thread >= static_cast<int>(clocks.size())) {
        text += ", against a bulk copy of mbarrier " + std::to_string(other.thread - static_cast<int>(clocks.size()));
    } else if (other.thread != kNobody) {
        text += ", against thread " + std::to_string(other.thread) +
                (other.block != block_number ? " of another block" : "");
    }
    abandon_launch(text + source_line(code));
}

enum class Kind { kRead, kWrite, kAtomic, kAsync };

void count(Region& region, uintptr_t address, size_t bytes, Kind kind) {
    if (kind != Kind::kWrite) region.traffic.read += bytes;
    if (kind == Kind::kWrite || kind == Kind::kAtomic) region.traffic.written += bytes;
    for (size_t i = address - region.begin; i < address - region.begin + bytes; ++i) {
        if (region.touched[i]) continue;
        region.touched[i] = true;
        ++region.traffic.touched;
    }
}

// Two readers are stored. If a later writer is unordered with more than one reader, it is unordered with one of them.
void add_reader(Cell& cell, const Access& now) {
    const bool replace_first = cell.readers[0].thread == kNobody || happened_before(cell.readers[0], now.thread);
    cell.readers[replace_first ? 0 : 1] = now;
}

// Calls body(cell, address, region) for the cells of an access to known memory.
template <class Body>
void for_each_cell(const void* pointer, size_t bytes, const Body& body) {
    const auto begin = reinterpret_cast<uintptr_t>(pointer);
    Region* const region = find(begin);
    for (size_t i = 0; region && i < bytes; i += kCellBytes)
        body(region->cells[(begin + i - region->begin) / kCellBytes], begin + i, *region);
}

void touch(int thread, const void* pointer, size_t bytes, Kind kind, void* code) {
    if (!active || thread < 0) return;
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    Region* const region = find(address);
    if (!region) return;
    if (address < region->begin || address + bytes > region->end)
        return report("out of bounds", *region, address, thread, {}, code);
    if (!region->shared) count(*region, address, bytes, kind);
    const Access now{static_cast<int16_t>(thread), kind == Kind::kAtomic, clocks[static_cast<size_t>(thread)].own,
                     block_number};
    const size_t first = (address - region->begin) / kCellBytes,
                 last = (address + bytes - 1 - region->begin) / kCellBytes;
    for (size_t i = first; i <= last; ++i) {
        Cell& cell = region->cells[i];
        const uintptr_t at = region->begin + i * kCellBytes;
        if (cell.in_flight == Copy::kBulk)
            return report("data of a bulk copy used before its wait", *region, at, thread, {}, code);
        if (cell.in_flight == Copy::kCpAsync && kind != Kind::kAsync)
            return report("cp.async data used before its wait", *region, at, thread, {}, code);
        if (cell.asynchronous_readers && kind != Kind::kRead)
            return report("write to data that a wgmma in flight reads", *region, at, thread, {}, code);
        if (kind == Kind::kRead && region->shared && !cell.written)
            return report("read of shared memory that was never written", *region, at, thread, {}, code);
        const bool both_atomic = kind == Kind::kAtomic && cell.writer.atomic;
        if (!both_atomic && !happened_before(cell.writer, thread)) {
            return report(kind == Kind::kRead ? "race (read after write)" : "race (write after write)", *region, at,
                          thread, cell.writer, code);
        }
        if (kind == Kind::kRead) {
            add_reader(cell, now);
            continue;
        }
        for (const Access& reader : cell.readers) {
            if (!happened_before(reader, thread))
                return report("race (write after read)", *region, at, thread, reader, code);
        }
        cell.writer = now;
        cell.written = true;
        cell.written_by_thread = true;
        cell.fences = fences_of(thread);
        cell.readers[0] = cell.readers[1] = Access{};
    }
}

// Merges the clocks of `threads`.
void join(const std::vector<int>& threads) {
    auto merged = std::make_shared<std::vector<uint32_t>>(clocks.size() + kMaxMbarriers, 0);
    const std::vector<uint32_t>* last = nullptr;
    for (const int thread : threads) {
        const Clock& clock = clocks[static_cast<size_t>(thread)];
        if (clock.others.get() == last) continue;  // as after a barrier of the full block: all share the vector
        last = clock.others.get();
        for (size_t i = 0; i < merged->size(); ++i) (*merged)[i] = std::max((*merged)[i], (*last)[i]);
    }
    for (const int thread : threads) {
        uint32_t& entry = (*merged)[static_cast<size_t>(thread)];
        entry = std::max(entry, clocks[static_cast<size_t>(thread)].own);
    }
    for (const int thread : threads) {
        Clock& clock = clocks[static_cast<size_t>(thread)];
        clock.others = merged;
        ++clock.own;
    }
}

Region make_region(const void* address, size_t bytes, const char* name, bool shared, bool cached, bool guarded) {
    const auto begin = reinterpret_cast<uintptr_t>(address);
    Region region{
        begin, begin + bytes, shared, cached, guarded, {}, std::vector<Cell>((bytes + kCellBytes - 1) / kCellBytes),
        {}};
    region.traffic.name = name;
    if (!shared) region.touched.assign(bytes, false);
    return region;
}

}  // namespace

void begin_launch() {
    for (Region& region : global_regions) std::fill(region.cells.begin(), region.cells.end(), Cell{});
}

void begin_block(int num_threads) {
    shared_regions.clear();
    ++block_number;
    const auto nothing = std::make_shared<std::vector<uint32_t>>(static_cast<size_t>(num_threads + kMaxMbarriers), 0);
    clocks.assign(static_cast<size_t>(num_threads), Clock{nothing, 1, {}});
    for (Released& barrier : released) barrier = Released{*nothing, nothing};
    for (auto& threads : arrived) threads.clear();
    active = true;
}

void end_block() {
    active = false;
    shared_regions.clear();
}

void add_shared(const void* address, size_t bytes, const char* name) {
    shared_regions.push_back(make_region(address, bytes, name, true, false, true));
}
void track(const void* address, size_t bytes, const char* name, bool cached, bool guarded) {
    global_regions.push_back(make_region(address, bytes, name, false, cached, guarded));
}
void untrack(const void* address) {
    const auto begin = reinterpret_cast<uintptr_t>(address);
    global_regions.erase(std::remove_if(global_regions.begin(), global_regions.end(),
                                        [&](const Region& region) { return region.begin == begin; }),
                         global_regions.end());
}
void untrack_all() { global_regions.clear(); }

Traffic traffic(const void* address) {
    const Region* const region = find(reinterpret_cast<uintptr_t>(address));
    return region ? region->traffic : Traffic{};
}

void reset_traffic() {
    for (Region& region : global_regions) {
        region.traffic = Traffic{region.traffic.name};
        std::fill(region.touched.begin(), region.touched.end(), false);
    }
}

uint64_t moved() {
    uint64_t bytes = 0;
    for (const Region& region : global_regions)
        bytes += region.cached ? region.traffic.touched : region.traffic.read + region.traffic.written;
    return bytes;
}

void read(int thread, const void* address, size_t bytes) {
    touch(thread, address, bytes, Kind::kRead, __builtin_return_address(0));
}
void write(int thread, const void* address, size_t bytes) {
    touch(thread, address, bytes, Kind::kWrite, __builtin_return_address(0));
}
void atomic(const void* address, size_t bytes) {
    touch(running_thread(), address, bytes, Kind::kAtomic, __builtin_return_address(0));
}
void async_write(int thread, const void* address, size_t bytes) {
    touch(thread, address, bytes, Kind::kAsync, nullptr);
}

void in_flight(const void* address, size_t bytes, bool on) {
    for_each_cell(address, bytes, [on](Cell& cell, uintptr_t, const Region&) {
        cell.in_flight = on ? Copy::kCpAsync : Copy::kNone;
        // cp.async belongs to the generic proxy; a fence before its wait does not order it
        if (running_thread() >= 0) cell.fences = fences_of(running_thread());
    });
}

void barrier_arrive(int thread, int id) { arrived[id].push_back(thread); }

void barrier_complete(int id) {
    join(arrived[id]);
    arrived[id].clear();
}

void warp_sync(int warp, uint32_t mask) {
    std::vector<int> threads;
    for (uint32_t left = mask; left; left &= left - 1) threads.push_back(warp * 32 + __builtin_ctz(left));
    join(threads);
}

namespace {

// Calls body(cell, address) for the cells of an access to shared memory by an asynchronous unit, after the checks that
// reads and writes share.
template <class Body>
void touch_asynchronously(int thread, const void* pointer, size_t bytes, const Body& body) {
    if (!active) return;
    for_each_cell(pointer, bytes, [&](Cell& cell, uintptr_t at, const Region& region) {
        const auto complain = [&](const char* kind, const Access& other) {
            report(kind, region, at, thread, other, nullptr);
        };
        if (cell.in_flight != Copy::kNone) complain("data of a copy used before its wait", {});
        if (!happened_before(cell.writer, thread)) complain("race (asynchronous access after write)", cell.writer);
        if (cell.written_by_thread && !fenced(cell, thread))
            complain("asynchronous access to a byte that was written without a fence.proxy.async", cell.writer);
        body(cell, complain);
    });
}

// Raises the clocks in `to` to those of a thread.
void merge(std::vector<uint32_t>& to, int thread) {
    const Clock& clock = clocks[static_cast<size_t>(thread)];
    for (size_t i = 0; i < to.size(); ++i) to[i] = std::max(to[i], (*clock.others)[i]);
    to[static_cast<size_t>(thread)] = std::max(to[static_cast<size_t>(thread)], clock.own);
}

}  // namespace

void mbarrier_arrive(int thread, int barrier) {
    merge(released[barrier].current, thread);
    ++clocks[static_cast<size_t>(thread)].own;
}

void mbarrier_complete(int barrier, uint32_t phases) {
    Released& of = released[barrier];
    of.current[clocks.size() + static_cast<size_t>(barrier)] = phases;
    of.complete = std::make_shared<const std::vector<uint32_t>>(of.current);
}

void mbarrier_acquire(int thread, int barrier) {
    auto& known = clocks[static_cast<size_t>(thread)].others;
    const auto& more = *released[barrier].complete;
    bool news = false;
    for (size_t i = 0; i < more.size() && !news; ++i) news = more[i] > (*known)[i];
    if (!news) return;
    auto merged = std::make_shared<std::vector<uint32_t>>(*known);
    for (size_t i = 0; i < more.size(); ++i) (*merged)[i] = std::max((*merged)[i], more[i]);
    known = std::move(merged);
}

void proxy_fence(int thread) {
    Clock& clock = clocks[static_cast<size_t>(thread)];
    clock.proxy_fences.push_back(clock.own);
}

void bulk_write(int thread, int barrier, uint32_t phase, const void* address, size_t bytes) {
    const auto writer = static_cast<int16_t>(static_cast<int>(clocks.size()) + barrier);  // index in Clock::others
    touch_asynchronously(thread, address, bytes, [&](Cell& cell, const auto& complain) {
        for (const Access& reader : cell.readers) {
            if (!happened_before(reader, thread)) complain("race (bulk copy after read)", reader);
        }
        if (cell.asynchronous_readers) complain("bulk copy over data that a wgmma in flight reads", {});
        cell.writer = Access{writer, false, phase, block_number};
        cell.written = true;
        cell.written_by_thread = false;
        cell.in_flight = Copy::kBulk;
        cell.readers[0] = cell.readers[1] = Access{};
    });
}

void bulk_landed(const void* address, size_t bytes) {
    for_each_cell(address, bytes, [](Cell& cell, uintptr_t, const Region&) { cell.in_flight = Copy::kNone; });
}

void async_read_begin(int thread, const void* address, size_t bytes) {
    touch_asynchronously(thread, address, bytes, [&](Cell& cell, const auto& complain) {
        if (!cell.written) complain("read of shared memory that was never written", {});
        ++cell.asynchronous_readers;
    });
}

void async_read_end(int thread, const void* address, size_t bytes) {
    const Access now{static_cast<int16_t>(thread), false, clocks[static_cast<size_t>(thread)].own, block_number};
    for_each_cell(address, bytes, [&now](Cell& cell, uintptr_t, const Region&) {
        --cell.asynchronous_readers;
        add_reader(cell, now);
    });
}

void instrumented(void* address, size_t bytes, bool write, void* code) {
    touch(running_thread(), address, bytes, write ? Kind::kWrite : Kind::kRead, code);
}

// An access through a type of this size. A GPU rejects an address that is not a multiple of it; gcc also calls this for
// types of 16 bytes that are aligned to 8.
void instrumented_aligned(void* address, size_t bytes, bool write, void* code) {
    const auto at = reinterpret_cast<uintptr_t>(address);
    const int thread = running_thread();
    if (active && thread >= 0 && at % std::min<size_t>(bytes, 8)) {
        if (const Region* const region = find(at)) return report("misaligned access", *region, at, thread, {}, code);
    }
    instrumented(address, bytes, write, code);
}

}  // namespace check
}  // namespace simt

#define SIMT_CALLBACK(name, handler, bytes, write) \
    extern "C" void name(void* address) { simt::check::handler(address, bytes, write, __builtin_return_address(0)); }
#define SIMT_CALLBACKS(bytes)                                               \
    SIMT_CALLBACK(__tsan_read##bytes, instrumented_aligned, bytes, false)   \
    SIMT_CALLBACK(__tsan_write##bytes, instrumented_aligned, bytes, true)   \
    SIMT_CALLBACK(__tsan_unaligned_read##bytes, instrumented, bytes, false) \
    SIMT_CALLBACK(__tsan_unaligned_write##bytes, instrumented, bytes, true)
SIMT_CALLBACKS(1)
SIMT_CALLBACKS(2)
SIMT_CALLBACKS(4)
SIMT_CALLBACKS(8)
SIMT_CALLBACKS(16)

extern "C" {
void __tsan_read_range(void* address, size_t bytes) {
    simt::check::instrumented(address, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t bytes) {
    simt::check::instrumented(address, bytes, true, __builtin_return_address(0));
}
void* __tsan_memset(void* target, int value, size_t bytes) {
    __tsan_write_range(target, bytes);
    return std::memset(target, value, bytes);
}
void* __tsan_memcpy(void* target, const void* source, size_t bytes) {
    __tsan_read_range(const_cast<void*>(source), bytes);
    __tsan_write_range(target, bytes);
    return std::memcpy(target, source, bytes);
}
void* __tsan_memmove(void* target, const void* source, size_t bytes) {
    __tsan_read_range(const_cast<void*>(source), bytes);
    __tsan_write_range(target, bytes);
    return std::memmove(target, source, bytes);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
}
