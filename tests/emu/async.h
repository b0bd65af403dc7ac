// The emulator's model of Hopper's asynchronous units: mbarriers, bulk tensor copies (TMA), proxies, warpgroup products
// (wgmma) and the reallocation of registers (setmaxnreg).
//
// Each unit behaves as adversely as PTX allows:
//   - A part of a bulk copy lands only when no thread can run, in random order; until then its target is NaN. With a
//     random schedule it may land at any time.
//   - The sums of a wgmma appear at the wait for its group and are NaN before. It reads shared memory at any time
//     between issue and wait, in the default schedule as late as possible.
//   - A parity names the phase that a wait is for, as in hardware: a wrong one returns at once, or never.
//   - setmaxnreg.inc waits until the block has released enough registers.
// The launch ends with an error if a register operand or an accumulator changes under a wgmma, if the first wgmma of a
// group has no wgmma.fence before it, if the warps of a warpgroup issue different wgmma or setmaxnreg, or if a copy
// brings more bytes than its barrier expects. check.h lists what the race checker adds.
//
// Not modelled: clusters, caches of tensor maps, registers written between wgmma.fence and wgmma.
#pragma once

#include <cstddef>
#include <cstdint>

namespace simt {

// A CUtensorMap for 16-bit elements, of the size and alignment that it has in CUDA 13. Dimension 0 is contiguous.
struct alignas(128) TensorMap {
    static constexpr int kMaxDimensions = 5;
    const char* data;
    int dimensions;
    uint64_t sizes[kMaxDimensions];    // in elements
    uint64_t strides[kMaxDimensions];  // in bytes; strides[0] is 2
    uint32_t box[kMaxDimensions];      // in elements
    bool swizzled;                     // 128-byte swizzle
};
static_assert(sizeof(TensorMap) == 128);

void mbarrier_init(uint64_t* barrier, int arrivals);
void fence_mbarrier_init();
void mbarrier_arrive(uint64_t* barrier, uint32_t expected_bytes);
void mbarrier_wait(uint64_t* barrier, uint32_t parity);
bool mbarrier_test(uint64_t* barrier, uint32_t parity);  // whether a wait would return at once
void fence_proxy_async();

// Copies the box at `coordinates` to shared memory and reports its bytes to the barrier. Coordinates may be outside of
// the tensor, whose missing elements are zeros.
void bulk_load(void* shared, const TensorMap* map, uint64_t* barrier, const int* coordinates, int dimensions);

// The 32-bit address in the block's window of shared memory, as in .shared instructions. The bytes must exist.
uint32_t window_address(const void* address, size_t bytes, const char* what);
void set_registers(int count, bool increase);  // setmaxnreg

// d [64, n] (+)= a [64, 16] b [16, n] of a warpgroup; this thread's part. The operands in registers are read until the
// wait, so that their arrays must live until then.
struct Wgmma {
    float* d;                             // [n / 8][4]
    const uint32_t* a;                    // [4], or null: a_descriptor
    uint64_t a_descriptor, b_descriptor;  // PTX ISA, "Matrix Descriptor Format"
    int n;
    bool a_transposed, b_transposed;  // M-major, N-major
    bool accumulate;
    float (*decode)(uint16_t);
};
void wgmma_issue(const Wgmma& operands);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);

}  // namespace simt
