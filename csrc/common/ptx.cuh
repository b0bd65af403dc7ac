// Every instruction that has no spelling in CUDA C++: PTX on the GPU, the emulator's model in the test build. nvcc's host pass sees
// neither. Layouts and operands: PTX ISA, sections on mma.m16n8k16, ldmatrix, cp.async, bar.
#pragma once

#include <type_traits>

#include "common/device.cuh"

namespace neox {

NEOX_DEVICE unsigned shared_address([[maybe_unused]] const void* pointer) {
#if defined(__CUDA_ARCH__)
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
#else
    return 0;
#endif
}

// Four 8x8 matrices of 16-bit elements from shared memory; lane i supplies the address of row i % 8 of matrix i / 8.
template <bool kTransposed = false>
NEOX_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#if defined(__CUDA_ARCH__)
    if constexpr (kTransposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(row))
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(row))
                     : "memory");
    }
#elif defined(SIMT_EMU)
    simt::LoadMatrix operands{row, r, 4, kTransposed};
    simt::warp_collective(simt::load_matrix, ~0u, &operands, "ldmatrix");
#endif
}

// d [16, 8] += a [16, 16] b [16, 8], fp32 sums; T is __nv_bfloat16 or __half.
template <class T>
NEOX_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
#if defined(__CUDA_ARCH__)
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#elif defined(SIMT_EMU)
    simt::Mma operands{d, a, b, d};
    simt::warp_collective(std::is_same_v<T, __nv_bfloat16> ? simt::mma_m16n8k16_bf16 : simt::mma_m16n8k16_f16, ~0u, &operands, "mma.sync");
#endif
}

// Copies 16 bytes from global to shared memory in the background; without `predicate` it writes zeros and does not read.
NEOX_DEVICE void cp_async_16(void* shared, const void* global, bool predicate = true) {
#if defined(__CUDA_ARCH__)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(predicate ? 16 : 0) : "memory");
#elif defined(SIMT_EMU)
    simt::cp_async(shared, global, 16, predicate ? 16 : 0);
#endif
}

NEOX_DEVICE void cp_async_commit() {
#if defined(__CUDA_ARCH__)
    asm volatile("cp.async.commit_group;" ::: "memory");
#elif defined(SIMT_EMU)
    simt::cp_async_commit();
#endif
}

// Waits until at most kPending of the calling thread's committed groups are still in flight. Other threads see the data after a barrier.
template <int kPending>
NEOX_DEVICE void cp_async_wait() {
#if defined(__CUDA_ARCH__)
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#elif defined(SIMT_EMU)
    simt::cp_async_wait(kPending);
#endif
}

// Meets `count` threads, whole warps, at barrier `id` (1 to 15; 0 is __syncthreads).
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

// One access of 4, 8 or 16 bytes to global memory: nvcc splits an assignment of such a value when it sees its parts.
template <class Word>
NEOX_DEVICE void store_global(Word* pointer, const Word& word) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(Word) == 16) {
        asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(pointer), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w) : "memory");
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

// Unlike __ldg also right for memory that the same launch writes.
template <class Word>
NEOX_DEVICE Word load_global(const Word* pointer) {
#if defined(__CUDA_ARCH__)
    Word word;
    if constexpr (sizeof(Word) == 16) {
        asm volatile("ld.global.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w) : "l"(pointer) : "memory");
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

// Makes the compiler forget what it knows of a value: what follows from it is computed or loaded again, and does not stay in registers.
NEOX_DEVICE void forget([[maybe_unused]] uint4& value) {
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+r"(value.x), "+r"(value.y), "+r"(value.z), "+r"(value.w));
#endif
}

template <class T>
NEOX_DEVICE void forget([[maybe_unused]] const T*& pointer) {
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+l"(pointer));
#endif
}

// blockIdx.x, read again: the compiler would keep what it read at the start of a kernel, and spill it, for a use at the end.
NEOX_DEVICE unsigned block_index_again() {
#if defined(__CUDA_ARCH__)
    unsigned index;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
    return index;
#else
    return blockIdx.x;
#endif
}

// 2^x, a few ulp, flushes subnormal results.
NEOX_DEVICE float fast_exp2(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// 1 / x, 1 ulp, for normal x and results.
NEOX_DEVICE float fast_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1.0f / x;
#endif
}

// The 16-bit pair (low, high) as a register.
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
