// SIMT emulator: runs CUDA kernel sources on the CPU, every CUDA thread of a block as a fiber on one OS thread.
//
// It models what determines the correctness of a kernel: block and warp barriers, warp collectives with their masks,
// shared memory initialised to NaN, cp.async that completes as late as allowed, tensor-core fragments, limits of grid,
// block and shared memory. Misuse (a divergent collective, a deadlock, an exited lane in a mask, a misaligned or
// invalid address) ends the launch with simt::Error, which names block, threads and what they wait for. Not modelled:
// time, caches, occupancy, registers, concurrent blocks.
#pragma once

#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "types.h"

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace simt {

struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The order in which runnable threads, and blocks, are scheduled.
enum class Order { kRoundRobin, kReverse, kRandom };

struct Config {
    Order order = Order::kRoundRobin;
    uint64_t seed = 1;        // of kRandom
    bool late_copies = true;  // cp.async completes at its wait (true) or immediately (false); kRandom mixes both
    size_t stack_bytes = 256 << 10;
    size_t shared_limit = 227 << 10;
    int multiprocessors = 4;  // returned by cudaDeviceGetAttribute
    int compute_capability = 9;
};
Config& config();

struct Stats {
    uint64_t launches = 0, blocks = 0, switches = 0, collectives = 0, barriers = 0;
    uint64_t mma = 0;                 // per warp
    uint64_t wgmma = 0;               // per warp, four for an instruction of a warpgroup
    uint64_t ldmatrix_conflicts = 0;  // rows of an 8x8 matrix that share a bank group with another of its rows
};
Stats& stats();

[[noreturn]] void fail(const std::string& message);            // throws Error
[[noreturn]] void abandon_launch(const std::string& message);  // does not throw: leaves the thread's stack as it is
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread_main);

// What a launcher receives that runs something else than the kernel's C++ (tests/ptx), or observes launches.
struct Argument {
    const void* data;
    size_t bytes;
};
struct Launch {
    const void* kernel;
    dim3 grid, block;
    size_t shared_bytes;
    std::vector<Argument> arguments;
};
using Launcher = std::function<void(const Launch&, const std::function<void()>& thread_main)>;
Launcher& launcher();  // null: run_grid
void launch(const Launch& launch, const std::function<void()>& thread_main);

// The memory that a test gives to kernels, for a launcher that checks or compares it.
struct Memory {
    const char* name;
    char* begin;
    size_t bytes;
};
const std::vector<Memory>& memory();
void add_memory(void* begin, size_t bytes, const char* name);
void remove_memory(const void* begin);

// Addresses in shared memory start here: sm_90 reserves the first 1 KiB, and address 0 is invalid.
constexpr uint32_t kSharedBase = 1024;

int lane_id();
int running_thread();  // index in the block; -1 outside of kernels
void* dynamic_shared();
void* static_shared(const void* key, size_t bytes, const char* name);  // one array per key and block
void require_shared(const void* address, size_t bytes, const char* what);

// A GPU rejects an access whose address is not a multiple of its size.
inline void require_aligned(const void* address, size_t bytes, const char* what) {
    if (reinterpret_cast<uintptr_t>(address) % bytes)
        fail(std::string(what) + ": misaligned access of " + std::to_string(bytes) + " bytes");
}

// Synchronises all lanes of `mask`. The last lane to arrive calls run(operands, mask) once for the warp; operands[lane]
// is null outside the mask.
using WarpFunction = void (*)(void** operands, uint32_t mask);
void warp_collective(WarpFunction run, uint32_t mask, void* operands, const char* what);
void sync_warp(uint32_t mask);

// Synchronises `count` threads (the full block if negative) at barrier `id`. Returns for how many of them the predicate
// held.
int block_barrier(int id, int count, bool predicate, const char* what);

void cp_async(void* shared, const void* global, int bytes, int bytes_read);
void cp_async_commit();
void cp_async_wait(int pending);

// Tensor cores. Fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16" and "ldmatrix".
struct Mma {
    float* d;
    const uint32_t *a, *b;
    const float* c;
};
void mma_m16n8k16_bf16(void** operands, uint32_t mask);
void mma_m16n8k16_f16(void** operands, uint32_t mask);

struct LoadMatrix {
    const void* row;
    uint32_t* registers;
    int matrices;
    bool transposed;
};
void load_matrix(void** operands, uint32_t mask);

template <class T>
struct Shuffle {
    T in, out;
    int source;
};

template <class T>
void run_shuffle(void** operands, uint32_t) {
    for (int lane = 0; lane < 32; ++lane) {
        auto* mine = static_cast<Shuffle<T>*>(operands[lane]);
        if (!mine) continue;
        if (!operands[mine->source])
            fail("shuffle reads lane " + std::to_string(mine->source) + ", which is not in the mask");
        mine->out = static_cast<Shuffle<T>*>(operands[mine->source])->in;
    }
}

template <class T>
T shuffle(uint32_t mask, T value, int source, const char* what) {
    Shuffle<T> operands{value, value, source};
    warp_collective(&run_shuffle<T>, mask, &operands, what);
    return operands.out;
}

uint32_t ballot(uint32_t mask, bool predicate, const char* what);

}  // namespace simt

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? static_cast<int>(simt::config().shared_limit)
             : attribute == cudaDevAttrComputeCapabilityMajor     ? simt::config().compute_capability
                                                                  : simt::config().multiprocessors;
    return cudaSuccess;
}

inline void __syncthreads() { simt::block_barrier(0, -1, false, "__syncthreads"); }
inline int __syncthreads_count(int p) { return simt::block_barrier(0, -1, p != 0, "__syncthreads_count"); }
inline int __syncthreads_or(int p) { return simt::block_barrier(0, -1, p != 0, "__syncthreads_or") != 0; }
inline int __syncthreads_and(int p) { return simt::block_barrier(0, -1, p == 0, "__syncthreads_and") == 0; }
inline void __syncwarp(unsigned mask = ~0u) { simt::sync_warp(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}

// Lanes of a shuffle of width w stay within their aligned group of w. A lane whose source is outside the group gets its
// input back.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int w = 32) {
    const int lane = simt::lane_id();
    return simt::shuffle(mask, value, (lane & ~(w - 1)) + (source & (w - 1)), "__shfl_sync");
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int w = 32) {
    const int lane = simt::lane_id(), source = lane ^ bits;
    return simt::shuffle(mask, value, source > (lane | (w - 1)) ? lane : source, "__shfl_xor_sync");
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int w = 32) {
    const int lane = simt::lane_id(), source = lane + static_cast<int>(delta);
    return simt::shuffle(mask, value, source > (lane | (w - 1)) ? lane : source, "__shfl_down_sync");
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int w = 32) {
    const int lane = simt::lane_id(), source = lane - static_cast<int>(delta);
    return simt::shuffle(mask, value, source < (lane & ~(w - 1)) ? lane : source, "__shfl_up_sync");
}
inline unsigned __ballot_sync(unsigned mask, int p) { return simt::ballot(mask, p != 0, "__ballot_sync"); }
inline int __any_sync(unsigned mask, int p) { return simt::ballot(mask, p != 0, "__any_sync") != 0; }
inline int __all_sync(unsigned mask, int p) { return simt::ballot(mask, p != 0, "__all_sync") == mask; }

template <class T>
T __ldg(const T* address) {
    simt::require_aligned(address, sizeof(T), "__ldg");
    return *address;
}

// One OS thread runs all fibers, so that ordinary code is atomic. It is not instrumented; the race checker is notified
// instead.
#define SIMT_ATOMIC(name, result)                                             \
    template <class T, class U>                                               \
    __attribute__((noinline, no_sanitize("thread"))) T name(T* target, U u) { \
        simt::check::atomic(target, sizeof(T));                               \
        const T old = *target, operand = static_cast<T>(u);                   \
        *target = result;                                                     \
        return old;                                                           \
    }
SIMT_ATOMIC(atomicAdd, T(old + operand))
SIMT_ATOMIC(atomicMax, std::max(old, operand))
SIMT_ATOMIC(atomicMin, std::min(old, operand))
SIMT_ATOMIC(atomicExch, operand)
SIMT_ATOMIC(atomicOr, T(old | operand))
#undef SIMT_ATOMIC
template <class T, class U, class V>
__attribute__((noinline, no_sanitize("thread"))) T atomicCAS(T* target, U expected, V desired) {
    simt::check::atomic(target, sizeof(T));
    const T old = *target;
    if (old == static_cast<T>(expected)) *target = static_cast<T>(desired);
    return old;
}
