// Instructions without an equivalent in CUDA C++: inline PTX on the GPU, the emulator's model in the test build,
// nothing in nvcc's host pass. Layouts and operands: PTX ISA, sections on mma.m16n8k16, ldmatrix, cp.async and bar.
#pragma once

#include <cfloat>
#include <type_traits>

#include "common/device.cuh"

namespace neox {

// Address in shared memory, as used by ldmatrix and cp.async: 32 bits on the GPU, a host address in the emulator.
#if defined(__CUDA_ARCH__)
using SharedAddress = uint32_t;
#else
using SharedAddress = uintptr_t;
#endif

NEOX_DEVICE SharedAddress shared_address(const void* pointer) {
#if defined(__CUDA_ARCH__)
    return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
#else
    return reinterpret_cast<SharedAddress>(pointer);
#endif
}

// Hides from the compiler how an address was computed. Otherwise it recomputes each address from its parts instead of
// using immediate offsets.
NEOX_DEVICE SharedAddress opaque(SharedAddress address) {
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+r"(address));
#endif
    return address;
}

// Loads four 8x8 matrices of 16-bit elements from shared memory. Lane i supplies the address of row i % 8 of matrix i
// / 8.
template <bool kTransposed = false>
NEOX_DEVICE void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
#if defined(__CUDA_ARCH__)
    if constexpr (kTransposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(row)
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(row)
                     : "memory");
    }
#elif defined(SIMT_EMU)
    simt::LoadMatrix operands{reinterpret_cast<const void*>(row), r, 4, kTransposed};
    simt::warp_collective(simt::load_matrix, ~0u, &operands, "ldmatrix");
#endif
}

// d [16, 8] += a [16, 16] b [16, 8] with fp32 accumulation. T is __nv_bfloat16 or __half.
template <class T>
NEOX_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
#if defined(__CUDA_ARCH__)
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#elif defined(SIMT_EMU)
    simt::Mma operands{d, a, b, d};
    simt::warp_collective(std::is_same_v<T, __nv_bfloat16> ? simt::mma_m16n8k16_bf16 : simt::mma_m16n8k16_f16, ~0u,
                          &operands, "mma.sync");
#endif
}

NEOX_DEVICE void store_shared(SharedAddress to, uint32_t value) {
#if defined(__CUDA_ARCH__)
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(value) : "memory");
#else
    *reinterpret_cast<uint32_t*>(to) = value;
#endif
}

NEOX_DEVICE void store_shared(SharedAddress to, const float4& value) {
#if defined(__CUDA_ARCH__)
    asm volatile("st.shared.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(to), "f"(value.x), "f"(value.y), "f"(value.z),
                 "f"(value.w)
                 : "memory");
#else
    *reinterpret_cast<float4*>(to) = value;
#endif
}

NEOX_DEVICE float4 load_shared(SharedAddress from) {
#if defined(__CUDA_ARCH__)
    float4 value;
    asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                 : "r"(from)
                 : "memory");
    return value;
#else
    return *reinterpret_cast<const float4*>(from);
#endif
}

// Copies 16 bytes from global to shared memory asynchronously. If `predicate` is false, writes zeros and does not read.
NEOX_DEVICE void cp_async_16(SharedAddress shared, const void* global, bool predicate = true) {
#if defined(__CUDA_ARCH__)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(predicate ? 16 : 0)
                 : "memory");
#elif defined(SIMT_EMU)
    simt::cp_async(reinterpret_cast<void*>(shared), global, 16, predicate ? 16 : 0);
#endif
}

NEOX_DEVICE void cp_async_16(void* shared, const void* global, bool predicate = true) {
    cp_async_16(shared_address(shared), global, predicate);
}

NEOX_DEVICE void cp_async_commit() {
#if defined(__CUDA_ARCH__)
    asm volatile("cp.async.commit_group;" ::: "memory");
#elif defined(SIMT_EMU)
    simt::cp_async_commit();
#endif
}

// Waits until at most kPending committed groups of the calling thread are in flight. Other threads see the data after a
// barrier.
template <int kPending>
NEOX_DEVICE void cp_async_wait() {
#if defined(__CUDA_ARCH__)
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#elif defined(SIMT_EMU)
    simt::cp_async_wait(kPending);
#endif
}

// Synchronises `count` threads, a multiple of the warp size, at barrier `id` (1 to 15; 0 is __syncthreads).
NEOX_DEVICE void named_barrier(int id, int count) {
#if defined(__CUDA_ARCH__)
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
#elif defined(SIMT_EMU)
    simt::block_barrier(id, count, false, "bar.sync");
#endif
}

// to[0] += x, to[1] += y in global memory, each atomically; `to` is aligned to 8 bytes.
NEOX_DEVICE void atomic_add_pair(float* to, float x, float y) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x), "f"(y) : "memory");
#else
    atomicAdd(to, x);
    atomicAdd(to + 1, y);
#endif
}

// One access of 4, 8 or 16 bytes to global memory. nvcc may split a plain assignment into its components.
template <class Word>
NEOX_DEVICE void store_global(Word* pointer, const Word& word) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(Word) == 16) {
        asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(pointer), "r"(word.x), "r"(word.y), "r"(word.z),
                     "r"(word.w)
                     : "memory");
    } else if constexpr (sizeof(Word) == 8) {
        asm volatile("st.global.v2.b32 [%0], {%1,%2};" ::"l"(pointer), "r"(word.x), "r"(word.y) : "memory");
    } else {
        *pointer = word;
    }
#else
#if defined(SIMT_EMU)
    simt::require_aligned(pointer, sizeof(Word), "st.global");
#endif
    *pointer = word;
#endif
}

// Unlike __ldg, valid for memory that the same launch writes.
template <class Word>
NEOX_DEVICE Word load_global(const Word* pointer) {
#if defined(__CUDA_ARCH__)
    Word word;
    if constexpr (sizeof(Word) == 16) {
        asm volatile("ld.global.v4.b32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
                     : "l"(pointer)
                     : "memory");
    } else if constexpr (sizeof(Word) == 8) {
        asm volatile("ld.global.v2.b32 {%0,%1}, [%2];" : "=r"(word.x), "=r"(word.y) : "l"(pointer) : "memory");
    } else {
        word = *pointer;
    }
    return word;
#else
#if defined(SIMT_EMU)
    simt::require_aligned(pointer, sizeof(Word), "ld.global");
#endif
    return *pointer;
#endif
}

// Hides a value from the optimiser. Values derived from it are recomputed or reloaded after this point instead of
// occupying registers.
NEOX_DEVICE void make_opaque([[maybe_unused]] uint4& value) {
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+r"(value.x), "+r"(value.y), "+r"(value.z), "+r"(value.w));
#endif
}

NEOX_DEVICE void make_opaque([[maybe_unused]] int& value) {
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+r"(value));
#endif
}

template <class T>
NEOX_DEVICE void make_opaque([[maybe_unused]] const T*& pointer) {
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+l"(pointer));
#endif
}

// Reads blockIdx.x again. For a use at the end of a kernel the compiler would keep the first read in a register, and
// spill it.
NEOX_DEVICE unsigned reload_block_index() {
#if defined(__CUDA_ARCH__)
    unsigned index;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
    return index;
#else
    return blockIdx.x;
#endif
}

// 2^x with an error of a few ulp; subnormal results are flushed to zero.
NEOX_DEVICE float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    const float y = exp2f(x);
    return y < FLT_MIN ? 0.0f : y;
#endif
}

// 1 / x with an error of 1 ulp, for normal x and results.
NEOX_DEVICE float fast_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1.0f / x;
#endif
}

// Rounds (low, high) to a pair of 16-bit values in one register.
template <class T>
NEOX_DEVICE uint32_t pack_pair(float low, float high) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&pair);
    } else {
        const __half2 pair = __floats2half2_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&pair);
    }
}

}  // namespace neox
