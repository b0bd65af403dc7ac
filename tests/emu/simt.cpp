// Scheduler of the SIMT emulator: fibers, warp collectives, block barriers, shared memory, cp.async.
#include "simt.h"

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <random>
#include <vector>

#include "fiber.h"
#include "scheduler.h"

namespace simt {
namespace {

enum class State { kReady, kInWarpCollective, kInBarrier, kSuspended, kDone };

struct Copy {
    char* shared;
    const char* global;
    int bytes, bytes_read;
    bool landed;
};

struct Thread {
    Fiber fiber;
    uint3 index3{};
    int index = 0, lane = 0, warp = 0;
    State state = State::kReady;
    // While the thread waits in a collective or barrier:
    WarpFunction function = nullptr;
    uint32_t mask = 0;
    void* operands = nullptr;
    const char* waits_in = nullptr;
    int predicates = 0;
    // cp.async: committed groups, oldest first, and the group being filled.
    std::deque<std::vector<Copy>> groups;
    std::vector<Copy> open_group;
};

struct Warp {
    uint32_t exists = 0, waiting = 0, exited = 0, in_barrier = 0;  // masks of lanes
};

struct Barrier {
    int expected = 0, predicates = 0;
    std::vector<Thread*> arrived;
};

struct SharedArray {
    const void* key;  // null: the dynamic allocation
    char* data;
    size_t bytes;
    uint32_t window_address;  // 32 bits, as in .shared instructions (scheduler.h)
};

constexpr int kNumBarriers = 16;

// The running block. Blocks run one after another, which kernels must tolerate.
struct Block {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::deque<Thread*> ready;
    Barrier barriers[kNumBarriers];
    std::vector<SharedArray> shared;
    Fiber scheduler;
    Thread* running = nullptr;
    int num_threads = 0, live = 0;
    std::string error;
    const std::function<void()>* thread_main = nullptr;
};

Block block;
Config the_config;
Stats the_stats;
std::mt19937_64 random_bits;

std::string name_of(const Thread& thread) {
    return "thread " + std::to_string(thread.index) + " (warp " + std::to_string(thread.warp) + ", lane " +
           std::to_string(thread.lane) + ")";
}

std::string waiting_threads() {
    constexpr int kShown = 8;
    std::string text;
    int count = 0;
    for (int i = 0; i < block.num_threads; ++i) {
        const Thread& thread = block.threads[static_cast<size_t>(i)];
        if (thread.state == State::kDone || thread.state == State::kReady) continue;
        if (count++ < kShown) text += "\n  " + name_of(thread) + " waits in " + thread.waits_in;
    }
    if (count > kShown) text += "\n  and " + std::to_string(count - kShown) + " more";
    return text;
}

void make_ready(Thread& thread) {
    thread.state = State::kReady;
    block.ready.push_back(&thread);
}

Thread* next_ready() {
    if (block.ready.empty()) return nullptr;
    Thread* next;
    switch (the_config.order) {
        case Order::kRoundRobin:
            next = block.ready.front();
            block.ready.pop_front();
            return next;
        case Order::kRandom:
            std::swap(block.ready[random_bits() % block.ready.size()], block.ready.back());
            break;
        case Order::kReverse:
            break;
    }
    next = block.ready.back();
    block.ready.pop_back();
    return next;
}

void run_thread(Fiber& from, Thread& next, bool last) {
    ++the_stats.switches;
    block.running = &next;
    threadIdx = next.index3;
    Fiber::switch_to(from, next.fiber, last);
}

// The running thread waits or has finished: switches to another one. Bulk copies land when no thread can run, and in
// random order also before.
void yield_processor(Thread& self) {
    if (the_config.order == Order::kRandom && random_bits() % 4 == 0) async::land_one();
    Thread* next = next_ready();
    while (!next && async::land_one()) next = next_ready();
    if (next == &self) return;
    const bool last = self.state == State::kDone;
    if (next) {
        run_thread(self.fiber, *next, last);
        return;
    }
    if (block.live > 0)
        abandon_launch("deadlock: no thread of the block can run" + waiting_threads() + async::open_barriers());
    block.running = nullptr;
    Fiber::switch_to(self.fiber, block.scheduler, last);
}

void check_exit(const Thread& self) {
    if (!self.open_group.empty() || !self.groups.empty())
        abandon_launch(name_of(self) + " exits with cp.async in flight");
    for (const Barrier& barrier : block.barriers) {
        const bool doomed = !barrier.arrived.empty() && barrier.expected > block.live - 1;
        if (doomed) abandon_launch(name_of(self) + " exits while others wait in a block barrier" + waiting_threads());
    }
    const std::string pending = async::in_flight_at_exit(self.index, block.live == 1);
    if (!pending.empty()) abandon_launch(name_of(self) + pending);
    const Warp& warp = block.warps[static_cast<size_t>(self.warp)];
    for (uint32_t left = warp.waiting; left; left &= left - 1) {
        const Thread& other = block.threads[static_cast<size_t>(self.warp * 32 + __builtin_ctz(left))];
        if (other.mask >> self.lane & 1)
            abandon_launch(name_of(self) + " has exited, but " + name_of(other) + " expects it in " + other.waits_in);
    }
}

void thread_entry() {
    Thread& self = *block.running;
    Fiber::entered(self.fiber, block.scheduler);
    std::string error;
    try {
        (*block.thread_main)();
    } catch (const std::exception& thrown) {
        error = thrown.what();
    }
    if (!error.empty()) abandon_launch(error);
    check_exit(self);
    self.state = State::kDone;
    block.warps[static_cast<size_t>(self.warp)].exited |= 1u << self.lane;
    --block.live;
    yield_processor(self);
    std::abort();
}

void* allocate_shared(const void* key, size_t bytes, const char* name) {
    size_t total = bytes;
    uint32_t window_address = kSharedBase;
    for (const SharedArray& array : block.shared) {
        total += array.bytes;
        window_address = array.window_address + static_cast<uint32_t>((array.bytes + 1023) / 1024 * 1024);
    }
    if (total > the_config.shared_limit) {
        fail("too much shared memory: " + std::to_string(total) + " bytes, the limit is " +
             std::to_string(the_config.shared_limit));
    }
    void* memory = nullptr;
    if (posix_memalign(&memory, 1024, bytes + check::kGuard)) fail("out of memory");
    std::memset(memory, 0xff, bytes);  // NaN in fp32, bf16 and fp16
    check::add_shared(memory, bytes, name);
    block.shared.push_back({key, static_cast<char*>(memory), bytes, window_address});
    return memory;
}

void free_shared() {
    check::end_block();
    for (const SharedArray& array : block.shared) std::free(array.data);
    block.shared.clear();
}

void land(Copy& copy) {
    check::async_write(block.running->index, copy.shared, static_cast<size_t>(copy.bytes));
    std::memcpy(copy.shared, copy.global, static_cast<size_t>(copy.bytes_read));
    std::memset(copy.shared + copy.bytes_read, 0, static_cast<size_t>(copy.bytes - copy.bytes_read));
    copy.landed = true;
}

void start_block(dim3 size) {
    const int n = block.num_threads;
    block.live = n;
    block.error.clear();
    block.ready.clear();
    for (Barrier& barrier : block.barriers) barrier = Barrier{};
    block.warps.assign(static_cast<size_t>(n + 31) / 32, Warp{});
    for (int i = 0; i < n; ++i) {
        Thread& thread = block.threads[static_cast<size_t>(i)];
        const auto u = static_cast<unsigned>(i);
        thread.index3 = {u % size.x, u / size.x % size.y, u / size.x / size.y};
        thread.index = i;
        thread.lane = i % 32;
        thread.warp = i / 32;
        thread.groups.clear();
        thread.open_group.clear();
        block.warps[static_cast<size_t>(thread.warp)].exists |= 1u << thread.lane;
        thread.fiber.prepare(thread_entry, the_config.stack_bytes);
        make_ready(thread);
    }
}

void run_block(dim3 size, size_t shared_bytes) {
    ++the_stats.blocks;
    check::begin_block(block.num_threads);
    async::begin_block(block.num_threads);
    struct Cleanup {
        ~Cleanup() { free_shared(); }
    } cleanup;
    if (shared_bytes) allocate_shared(nullptr, shared_bytes, "dynamic shared memory");
    start_block(size);
    run_thread(block.scheduler, *next_ready(), false);
    if (!block.error.empty()) {
        fail("block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
             std::to_string(blockIdx.z) + "): " + block.error);
    }
}

std::vector<size_t> block_order(size_t count) {
    std::vector<size_t> order(count);
    for (size_t i = 0; i < count; ++i) order[i] = i;
    if (the_config.order == Order::kReverse) std::reverse(order.begin(), order.end());
    if (the_config.order == Order::kRandom) std::shuffle(order.begin(), order.end(), random_bits);
    return order;
}

}  // namespace

Config& config() { return the_config; }
Stats& stats() { return the_stats; }
void fail(const std::string& message) { throw Error(message); }

// Ends the launch from inside a thread. The threads of the block never run again. The race checker, which instrumented
// code calls, needs it: the compiler assumes that its callbacks do not throw.
void abandon_launch(const std::string& message) {
    if (block.error.empty()) block.error = message;
    Thread& self = *block.running;
    self.state = State::kDone;
    block.running = nullptr;
    Fiber::switch_to(self.fiber, block.scheduler, true);
    std::abort();
}

int lane_id() { return block.running->lane; }
int running_thread() { return block.running ? block.running->index : -1; }

void suspend(const char* what) {
    Thread& self = *block.running;
    self.state = State::kSuspended;
    self.waits_in = what;
    yield_processor(self);
}

void resume(int thread) { make_ready(block.threads[static_cast<size_t>(thread)]); }

void run_grid(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& thread_main) {
    const size_t threads = static_cast<size_t>(size.x) * size.y * size.z;
    if (threads == 0 || threads > 1024 || size.z > 64)
        fail("invalid block size: " + std::to_string(threads) + " threads, z " + std::to_string(size.z));
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
        fail("invalid grid size: " + std::to_string(grid.x) + " x " + std::to_string(grid.y) + " x " +
             std::to_string(grid.z));
    }
    if (block.thread_main) fail("a kernel launched a kernel");
    ++the_stats.launches;
    check::begin_launch();
    random_bits.seed(the_config.seed);
    if (block.threads.size() < threads) block.threads.resize(threads);
    block.num_threads = static_cast<int>(threads);
    block.thread_main = &thread_main;
    struct Cleanup {
        ~Cleanup() { block.thread_main = nullptr; }
    } cleanup;
    blockDim = size;
    gridDim = grid;
    for (const size_t index : block_order(static_cast<size_t>(grid.x) * grid.y * grid.z)) {
        blockIdx = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                    static_cast<unsigned>(index / grid.x / grid.y)};
        run_block(size, shared_bytes);
    }
}

void* dynamic_shared() {
    if (block.shared.empty() || block.shared[0].key) fail("kernel launched without dynamic shared memory");
    return block.shared[0].data;
}

void* static_shared(const void* key, size_t bytes, const char* name) {
    for (const SharedArray& array : block.shared) {
        if (array.key == key) return array.data;
    }
    return allocate_shared(key, bytes, name);
}

uint32_t window_address(const void* address, size_t bytes, const char* what) {
    const char* const at = static_cast<const char*>(address);
    for (const SharedArray& array : block.shared) {
        if (at >= array.data && at + bytes <= array.data + array.bytes)
            return array.window_address + static_cast<uint32_t>(at - array.data);
    }
    fail(std::string(what) + ": address is not in shared memory");
}

char* window_data(uint32_t address, size_t bytes, const char* what) {
    for (const SharedArray& array : block.shared) {
        if (address >= array.window_address && address + bytes <= array.window_address + array.bytes)
            return array.data + (address - array.window_address);
    }
    fail(std::string(what) + ": shared address " + std::to_string(address) + " is not allocated");
}

void require_shared(const void* address, size_t bytes, const char* what) { window_address(address, bytes, what); }

namespace {

void check_collective(const Thread& self, const Warp& warp, uint32_t mask, WarpFunction function, const char* what) {
    // builds no string in the common case
    const auto complain = [what](const std::string& of) { fail(what + (": " + of)); };
    if (!(mask >> self.lane & 1))
        complain("the calling lane " + std::to_string(self.lane) + " is not in the mask that it passed");
    if (mask & ~warp.exists) complain("the mask names a lane that does not exist");
    if (mask & warp.exited)
        complain("lane " + std::to_string(__builtin_ctz(mask & warp.exited)) + " of the mask has exited");
    if (mask & warp.in_barrier)
        complain("lane " + std::to_string(__builtin_ctz(mask & warp.in_barrier)) +
                 " of the mask waits in a block barrier instead");
    const uint32_t peers = mask & warp.waiting;
    if (!peers) return;
    // The waiting lanes are consistent with each other, so that comparing with one of them suffices.
    const Thread& peer = block.threads[static_cast<size_t>(self.warp * 32 + __builtin_ctz(peers))];
    if (peer.function != function || peer.mask != mask)
        complain("divergent, lane " + std::to_string(peer.lane) + " waits in " + peer.waits_in);
}

}  // namespace

void warp_collective(WarpFunction run, uint32_t mask, void* operands, const char* what) {
    Thread& self = *block.running;
    Warp& warp = block.warps[static_cast<size_t>(self.warp)];
    ++the_stats.collectives;
    check_collective(self, warp, mask, run, what);
    self.function = run;
    self.mask = mask;
    self.operands = operands;
    self.waits_in = what;
    self.state = State::kInWarpCollective;
    warp.waiting |= 1u << self.lane;
    if (mask & ~warp.waiting) {
        yield_processor(self);
        return;
    }
    Thread* const first = &block.threads[static_cast<size_t>(self.warp) * 32];
    void* all[32] = {};
    for (uint32_t left = mask; left; left &= left - 1) all[__builtin_ctz(left)] = first[__builtin_ctz(left)].operands;
    run(all, mask);
    warp.waiting &= ~mask;
    for (uint32_t left = mask; left; left &= left - 1) {
        Thread& other = first[__builtin_ctz(left)];
        if (&other != &self) make_ready(other);
    }
    self.state = State::kReady;
    if (the_config.order == Order::kRandom && (random_bits() & 1)) {
        make_ready(self);
        yield_processor(self);
    }
}

void sync_warp(uint32_t mask) {
    int warp = block.running->warp;
    const auto run = [](void** operands, uint32_t lanes) {
        check::warp_sync(*static_cast<int*>(operands[__builtin_ctz(lanes)]), lanes);
    };
    warp_collective(run, mask, &warp, "__syncwarp");
}

uint32_t ballot(uint32_t mask, bool predicate, const char* what) {
    struct Vote {
        bool in;
        uint32_t out;
    } vote{predicate, 0};
    const auto run = [](void** operands, uint32_t lanes) {
        uint32_t result = 0;
        for (uint32_t left = lanes; left; left &= left - 1) {
            const int lane = __builtin_ctz(left);
            if (static_cast<Vote*>(operands[lane])->in) result |= 1u << lane;
        }
        for (uint32_t left = lanes; left; left &= left - 1)
            static_cast<Vote*>(operands[__builtin_ctz(left)])->out = result;
    };
    warp_collective(run, mask, &vote, what);
    return vote.out;
}

int block_barrier(int id, int count, bool predicate, const char* what) {
    Thread& self = *block.running;
    if (id < 0 || id >= kNumBarriers) fail(std::string(what) + ": no such barrier: " + std::to_string(id));
    Barrier& barrier = block.barriers[id];
    ++the_stats.barriers;
    if (count < 0 && block.live != block.num_threads)
        fail(std::string(what) + ": other threads of the block have exited");
    if (count >= 0 && (count % 32 || count > block.num_threads || !count))
        fail(std::string(what) + ": the count of a named barrier must be a multiple of the warp size");
    const int expected = count < 0 ? block.num_threads : count;
    if (!barrier.arrived.empty() && barrier.expected != expected)
        fail(std::string(what) + ": threads disagree on the count of the barrier");
    barrier.expected = expected;
    barrier.predicates += predicate;
    barrier.arrived.push_back(&self);
    self.waits_in = what;
    self.state = State::kInBarrier;
    block.warps[static_cast<size_t>(self.warp)].in_barrier |= 1u << self.lane;
    check::barrier_arrive(self.index, id);
    if (static_cast<int>(barrier.arrived.size()) < expected) {
        yield_processor(self);
        return self.predicates;
    }
    check::barrier_complete(id);
    const Barrier complete = std::exchange(barrier, Barrier{});
    for (Thread* thread : complete.arrived) {
        thread->predicates = complete.predicates;
        block.warps[static_cast<size_t>(thread->warp)].in_barrier &= ~(1u << thread->lane);
        make_ready(*thread);
    }
    yield_processor(self);
    return self.predicates;
}

void cp_async(void* shared, const void* global, int bytes, int bytes_read) {
    const auto size = static_cast<size_t>(bytes);
    require_shared(shared, size, "cp.async");
    if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % size)
        fail("cp.async: misaligned address");
    Thread& self = *block.running;
    if (bytes_read) check::read(self.index, global, static_cast<size_t>(bytes_read));
    Copy copy{static_cast<char*>(shared), static_cast<const char*>(global), bytes, bytes_read, false};
    check::async_write(self.index, shared, size);
    check::in_flight(shared, size, true);
    const bool late = the_config.order == Order::kRandom ? random_bits() & 1 : the_config.late_copies;
    if (late) {
        std::memset(shared, 0xff, size);  // neither the old nor the new data is valid until the wait
    } else {
        land(copy);
    }
    self.open_group.push_back(copy);
}

void cp_async_commit() {
    Thread& self = *block.running;
    self.groups.push_back(std::exchange(self.open_group, {}));
}

void cp_async_wait(int pending) {
    Thread& self = *block.running;
    while (static_cast<int>(self.groups.size()) > pending) {
        for (Copy& copy : self.groups.front()) {
            check::in_flight(copy.shared, static_cast<size_t>(copy.bytes), false);
            if (!copy.landed) land(copy);
        }
        self.groups.pop_front();
    }
}

}  // namespace simt
