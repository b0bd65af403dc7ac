// Happens-before checker and traffic counter behind gcc's -fsanitize=thread instrumentation.
//
// Kernels are compiled with -fsanitize=thread and linked without its runtime: check.cpp supplies the callbacks. It then finds in any
// one schedule: races through shared or tracked global memory (also between blocks), reads of shared memory that nobody wrote, and
// data of cp.async that is used before its wait. As in CUDA only barriers and __syncwarp order memory; shuffles and votes do not.
// In a build without SIMT_CHECK all of this is empty.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace simt::check {

// Bytes that threads asked for in one tracked buffer since it was tracked or reset; `touched` counts each byte once.
struct Traffic {
    std::string name;
    uint64_t read = 0, written = 0, touched = 0;
};

#ifdef SIMT_CHECK
constexpr bool kEnabled = true;
constexpr size_t kGuard = 64;  // bytes behind every shared array that belong to it and that no thread may touch
void begin_launch();
void begin_block(int num_threads);
void end_block();
void add_shared(const void* address, size_t bytes, const char* name);
void read(int thread, const void* address, size_t bytes);
void async_write(int thread, const void* address, size_t bytes);
void in_flight(const void* address, size_t bytes, bool on);
void barrier_arrive(int thread, int id);
void barrier_complete(int id);
void warp_sync(int warp, uint32_t mask);
void atomic(const void* address, size_t bytes);
// Tests register device buffers. `cached`: of parameters and tables that every row reads, only the first read goes to memory.
void track(const void* address, size_t bytes, const char* name, bool cached = false);
void untrack(const void* address);
void untrack_all();
Traffic traffic(const void* address);
void reset_traffic();
uint64_t moved();  // bytes that go to memory: all that was read and written, of cached buffers what was touched
#else
constexpr bool kEnabled = false;
constexpr size_t kGuard = 0;
inline void begin_launch() {}
inline void begin_block(int) {}
inline void end_block() {}
inline void add_shared(const void*, size_t, const char*) {}
inline void read(int, const void*, size_t) {}
inline void async_write(int, const void*, size_t) {}
inline void in_flight(const void*, size_t, bool) {}
inline void barrier_arrive(int, int) {}
inline void barrier_complete(int) {}
inline void warp_sync(int, uint32_t) {}
inline void atomic(const void*, size_t) {}
inline void track(const void*, size_t, const char*, bool = false) {}
inline void untrack(const void*) {}
inline void untrack_all() {}
inline Traffic traffic(const void*) { return {}; }
inline void reset_traffic() {}
inline uint64_t moved() { return 0; }
#endif

}  // namespace simt::check
