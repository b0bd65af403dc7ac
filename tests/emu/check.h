// Happens-before checker and traffic counter, driven by gcc's -fsanitize=thread instrumentation.
//
// Kernels are compiled with -fsanitize=thread and linked without its runtime; check.cpp supplies the callbacks. From a
// single schedule it finds races through shared or tracked global memory (also between blocks), reads of unwritten
// shared memory, accesses next to a shared array or a guarded buffer, misaligned ones, and data of cp.async that is
// used before its wait. As in CUDA, barriers and __syncwarp order memory; shuffles and votes do not. In a build without
// SIMT_CHECK all of this is empty.
//
// Of the asynchronous units (async.h) it checks:
//   - An arrival at an mbarrier is a release, and a wait for its phase an acquire.
//   - Bulk copies are writes by their mbarrier. A thread has synchronised with them once it has waited for the phase.
//   - A byte that a wgmma reads must not be written between its issue and its wait.
//   - A byte that a thread has written may be accessed asynchronously only after that thread has executed a
//     fence.proxy.async and then synchronised with the accessing thread. PTX also accepts a fence by the accessing
//     thread after the synchronisation; our kernels do not need it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace simt::check {

// Bytes that threads accessed in a tracked buffer since track() or reset_traffic(). `touched` counts each byte once.
struct Traffic {
    std::string name;
    uint64_t read = 0, written = 0, touched = 0;
};

constexpr int kMaxMbarriers = 64;  // of a block

#ifdef SIMT_CHECK
constexpr bool kEnabled = true;
// Bytes after every shared array, and on both sides of a tracked buffer that is guarded, which no thread may access.
constexpr size_t kGuard = 64;
void begin_launch();
void begin_block(int num_threads);
void end_block();
void add_shared(const void* address, size_t bytes, const char* name);
void read(int thread, const void* address, size_t bytes);
void write(int thread, const void* address, size_t bytes);
void async_write(int thread, const void* address, size_t bytes);
void in_flight(const void* address, size_t bytes, bool on);
void barrier_arrive(int thread, int id);
void barrier_complete(int id);
void warp_sync(int warp, uint32_t mask);
void atomic(const void* address, size_t bytes);
void mbarrier_arrive(int thread, int barrier);
void mbarrier_complete(int barrier, uint32_t phases);  // `phases`: number of complete ones
void mbarrier_acquire(int thread, int barrier);
void proxy_fence(int thread);
void bulk_write(int thread, int barrier, uint32_t phase, const void* address, size_t bytes);
void bulk_landed(const void* address, size_t bytes);
void async_read_begin(int thread, const void* address, size_t bytes);
void async_read_end(int thread, const void* address, size_t bytes);
// Registers a device buffer. `cached`: only the first read of each byte counts as memory traffic, as for parameters and
// tables that every row reads.
void track(const void* address, size_t bytes, const char* name, bool cached = false, bool guarded = false);
void untrack(const void* address);
void untrack_all();
Traffic traffic(const void* address);
void reset_traffic();
uint64_t moved();  // bytes of memory traffic: all reads and writes; of cached buffers, the bytes touched
#else
constexpr bool kEnabled = false;
constexpr size_t kGuard = 0;
inline void begin_launch() {}
inline void begin_block(int) {}
inline void end_block() {}
inline void add_shared(const void*, size_t, const char*) {}
inline void read(int, const void*, size_t) {}
inline void write(int, const void*, size_t) {}
inline void async_write(int, const void*, size_t) {}
inline void in_flight(const void*, size_t, bool) {}
inline void barrier_arrive(int, int) {}
inline void barrier_complete(int) {}
inline void warp_sync(int, uint32_t) {}
inline void atomic(const void*, size_t) {}
inline void mbarrier_arrive(int, int) {}
inline void mbarrier_complete(int, uint32_t) {}
inline void mbarrier_acquire(int, int) {}
inline void proxy_fence(int) {}
inline void bulk_write(int, int, uint32_t, const void*, size_t) {}
inline void bulk_landed(const void*, size_t) {}
inline void async_read_begin(int, const void*, size_t) {}
inline void async_read_end(int, const void*, size_t) {}
inline void track(const void*, size_t, const char*, bool = false, bool = false) {}
inline void untrack(const void*) {}
inline void untrack_all() {}
inline Traffic traffic(const void*) { return {}; }
inline void reset_traffic() {}
inline uint64_t moved() { return 0; }
#endif

}  // namespace simt::check
