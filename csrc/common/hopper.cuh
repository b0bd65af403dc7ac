// Hopper's asynchronous instructions (sm_90a): mbarriers, bulk tensor copies (TMA), warpgroup products (wgmma), proxy
// fences and the reallocation of registers. As in ptx.cuh: PTX on the GPU, the emulator's model in the test build.
// Layouts and operands: PTX ISA, sections on mbarrier, cp.async.bulk.tensor, wgmma and setmaxnreg.
#pragma once

#include "common/ptx.cuh"
#include "common/tensor_map.cuh"
#if defined(SIMT_EMU)
#include "async.h"
#endif

namespace neox {

// Kernels for sm_90a are compiled for that target only; a pass for another one gets empty bodies.
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define NEOX_SM90A 1
#endif

constexpr int kWarpgroupSize = 128;

// An object in shared memory that threads and copies signal. A phase is complete after `arrivals` arrivals and the
// bytes that they announced. Waits name the parity of the phase: 0 for the first one.
NEOX_DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
#if defined(__CUDA_ARCH__)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
#elif defined(SIMT_EMU)
    simt::mbarrier_init(barrier, arrivals);
#endif
}

// Makes the initialisation of mbarriers by this thread visible to bulk copies, and after a barrier to other threads.
NEOX_DEVICE void fence_mbarrier_init() {
#if defined(__CUDA_ARCH__)
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#elif defined(SIMT_EMU)
    simt::fence_mbarrier_init();
#endif
}

NEOX_DEVICE void mbarrier_arrive(uint64_t* barrier) {
#if defined(__CUDA_ARCH__)
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#elif defined(SIMT_EMU)
    simt::mbarrier_arrive(barrier, 0);
#endif
}

// Arrives, and announces the bytes that copies will bring in this phase.
NEOX_DEVICE void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes) {
#if defined(__CUDA_ARCH__)
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
#elif defined(SIMT_EMU)
    simt::mbarrier_arrive(barrier, bytes);
#endif
}

// Waits until the phase of this parity is complete. A new barrier passes a wait for parity 1.
NEOX_DEVICE void mbarrier_wait(uint64_t* barrier, unsigned parity) {
#if defined(__CUDA_ARCH__)
    unsigned done;
    do {
        asm volatile(
            "{.reg .pred p;\n"
            "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;}"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    } while (!done);
#elif defined(SIMT_EMU)
    simt::mbarrier_wait(barrier, parity);
#endif
}

// Orders this thread's accesses to shared memory before later asynchronous ones (wgmma, bulk copies), by this thread
// and by those that synchronise with it afterwards.
NEOX_DEVICE void fence_proxy_async() {
#if defined(__CUDA_ARCH__)
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#elif defined(SIMT_EMU)
    simt::fence_proxy_async();
#endif
}

// Copies the box of a 4-dimensional tensor map at these coordinates to shared memory. Its bytes, also those of missing
// elements, which become zeros, count at the barrier. Called by one thread.
NEOX_DEVICE void bulk_load(void* shared, const TensorMap* map, uint64_t* barrier, int x, int y, int z, int w) {
#if defined(__CUDA_ARCH__)
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, "
        "%5}], "
        "[%6];" ::"r"(shared_address(shared)),
        "l"(map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(shared_address(barrier))
        : "memory");
#elif defined(SIMT_EMU)
    const int coordinates[] = {x, y, z, w};
    simt::bulk_load(shared, map, barrier, coordinates, 4);
#endif
}

// Registers that the launch gives every thread of a block that has a multiprocessor for itself.
constexpr int launched_registers(int threads) { return 65536 / threads / 8 * 8; }

// Changes the number of registers per thread, by all warps of a warpgroup. Together the threads of a block must stay
// within what it was launched with: an increase waits for registers that other warps of the block release.
template <int kRegisters>
NEOX_DEVICE void release_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#elif defined(SIMT_EMU)
    simt::set_registers(kRegisters, false);
#endif
}

template <int kRegisters>
NEOX_DEVICE void acquire_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#elif defined(SIMT_EMU)
    simt::set_registers(kRegisters, true);
#endif
}

// A matrix of 16-bit elements in shared memory as wgmma reads it: rows of 128 bytes (64 elements), swizzled by 128
// bytes as bulk copies write them, 8 rows per 1024 bytes. The matrix starts at a multiple of 1024 bytes, or at a
// multiple of 32 within the first row of one. panel_bytes: distance of the next 64 elements, for a matrix whose rows
// are those of K (transposed); 0 otherwise.
NEOX_DEVICE uint64_t matrix_descriptor(const void* matrix, unsigned panel_bytes) {
#if defined(SIMT_EMU)
    const uint32_t address = simt::window_address(matrix, 16, "matrix descriptor");
#else
    const auto address = static_cast<uint32_t>(shared_address(matrix));
#endif
    return static_cast<uint64_t>((address & 0x3ffff) >> 4) | static_cast<uint64_t>(panel_bytes >> 4) << 16 |
           uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// The matrix `bytes` further.
NEOX_DEVICE uint64_t advance(uint64_t descriptor, unsigned bytes) { return descriptor + (bytes >> 4); }

// Before the first wgmma of a group: orders this thread's writes to its registers before it.
NEOX_DEVICE void wgmma_fence() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#elif defined(SIMT_EMU)
    simt::wgmma_fence();
#endif
}

NEOX_DEVICE void wgmma_commit() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#elif defined(SIMT_EMU)
    simt::wgmma_commit();
#endif
}

// Waits until at most kPending committed groups are in flight.
template <int kPending>
NEOX_DEVICE void wgmma_wait() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#elif defined(SIMT_EMU)
    simt::wgmma_wait(kPending);
#endif
}

// Keeps the compiler from moving accesses to registers of a wgmma across this point, and from reusing them before it.
// Used after the wait.
template <class Word, int kColumns, int kPart>
NEOX_DEVICE void pin([[maybe_unused]] Word (&registers)[kColumns][kPart]) {
#if defined(__CUDA_ARCH__)
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int i = 0; i < kPart; ++i) {
            if constexpr (std::is_same_v<Word, float>) {
                asm volatile("" : "+f"(registers[n][i])::"memory");
            } else {
                asm volatile("" : "+r"(registers[n][i])::"memory");
            }
        }
    }
#endif
}

#if defined(SIMT_EMU)
template <class T>
constexpr float (*kDecode)(uint16_t) = std::is_same_v<T, __nv_bfloat16> ? simt::decode_bfloat16 : simt::decode_half;
#endif

#define NEOX_SUMS(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define NEOX_SUMS_4(n) NEOX_SUMS(n), NEOX_SUMS(n + 1), NEOX_SUMS(n + 2), NEOX_SUMS(n + 3)
#define NEOX_SUMS_64 NEOX_SUMS_4(0), NEOX_SUMS_4(4)
#define NEOX_SUMS_128 NEOX_SUMS_64, NEOX_SUMS_4(8), NEOX_SUMS_4(12)
#define NEOX_NAMES_64                                                                                            \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NEOX_NAMES_128                                                                             \
    NEOX_NAMES_64                                                                                  \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
    "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
// The operands after the sums are numbered from 32 (n = 64) or 64 (n = 128).
#define NEOX_WGMMA_SHARED(n, type, a, b, accumulate, a_transposed_, b_transposed_)                          \
    asm volatile("{.reg .pred p;\nsetp.ne.b32 p, %" accumulate ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n \
                 "k16.f32." type "." type " " NEOX_NAMES_##n "}, %" a ", %" b ", p, 1, 1, %" a_transposed_  \
                                                             ", %" b_transposed_ ";}"                       \
                 : NEOX_SUMS_##n                                                                            \
                 : "l"(a_descriptor), "l"(b_descriptor), "r"(static_cast<int>(add)),                        \
                   "n"(static_cast<int>(kATransposed)), "n"(static_cast<int>(kBTransposed)))
#define NEOX_WGMMA_REGISTERS(n, type, a0, a1, a2, a3, b, accumulate, b_transposed_)                           \
    asm volatile("{.reg .pred p;\nsetp.ne.b32 p, %" accumulate ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n   \
                 "k16.f32." type "." type " " NEOX_NAMES_##n "}, {%" a0 ", %" a1 ", %" a2 ", %" a3 "}, %" b   \
                                                             ", p, 1, 1, %" b_transposed_ ";}"                \
                 : NEOX_SUMS_##n                                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_descriptor), "r"(static_cast<int>(add)), \
                   "n"(static_cast<int>(kBTransposed)))

// d [64, kN] = a [64, 16] b [16, kN], plus d if `add`, by the four warps of a warpgroup. A warp's rows of d are laid
// out as the accumulators of mma.m16n8k16, 8 columns after 8 columns. a and b are matrices in shared memory: rows of M
// or N whose columns are K, or if transposed rows of K.
template <class T, bool kATransposed, bool kBTransposed, int kParts>
NEOX_DEVICE void wgmma(float (&d)[kParts][4], uint64_t a_descriptor, uint64_t b_descriptor, bool add) {
    static_assert(kParts == 8 || kParts == 16);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        if constexpr (kParts == 8) {
            NEOX_WGMMA_SHARED(64, "bf16", "32", "33", "34", "35", "36");
        } else {
            NEOX_WGMMA_SHARED(128, "bf16", "64", "65", "66", "67", "68");
        }
    } else {
        if constexpr (kParts == 8) {
            NEOX_WGMMA_SHARED(64, "f16", "32", "33", "34", "35", "36");
        } else {
            NEOX_WGMMA_SHARED(128, "f16", "64", "65", "66", "67", "68");
        }
    }
#elif defined(SIMT_EMU)
    simt::wgmma_issue(
        {d[0], nullptr, a_descriptor, b_descriptor, kParts * 8, kATransposed, kBTransposed, add, kDecode<T>});
#endif
}

// The same with a in registers, as A of mma.m16n8k16 for each warp.
template <class T, bool kBTransposed, int kParts>
NEOX_DEVICE void wgmma(float (&d)[kParts][4], const uint32_t (&a)[4], uint64_t b_descriptor, bool add) {
    static_assert(kParts == 8 || kParts == 16);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        if constexpr (kParts == 8) {
            NEOX_WGMMA_REGISTERS(64, "bf16", "32", "33", "34", "35", "36", "37", "38");
        } else {
            NEOX_WGMMA_REGISTERS(128, "bf16", "64", "65", "66", "67", "68", "69", "70");
        }
    } else {
        if constexpr (kParts == 8) {
            NEOX_WGMMA_REGISTERS(64, "f16", "32", "33", "34", "35", "36", "37", "38");
        } else {
            NEOX_WGMMA_REGISTERS(128, "f16", "64", "65", "66", "67", "68", "69", "70");
        }
    }
#elif defined(SIMT_EMU)
    simt::wgmma_issue({d[0], a, 0, b_descriptor, kParts * 8, false, kBTransposed, add, kDecode<T>});
#endif
}

#undef NEOX_SUMS
#undef NEOX_SUMS_4
#undef NEOX_SUMS_64
#undef NEOX_SUMS_128
#undef NEOX_NAMES_64
#undef NEOX_NAMES_128
#undef NEOX_WGMMA_SHARED
#undef NEOX_WGMMA_REGISTERS

}  // namespace neox
