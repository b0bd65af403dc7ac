// Small kernels with one injected bug each. Every class of bug must be found, and the same kernel without the bug must
// pass.
//
//   test_planted_bugs        runs all bugs that the build can find: by the race checker (SIMT_CHECK), or by wrong
//                            results in several schedules
//   test_planted_bugs NAME   runs one; under AddressSanitizer, invalid accesses must end the process
#include <vector>

#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "op_test.h"
#include "planted.h"

namespace {

using neox::kFullWarp;

enum class Bug {
    kNone,
    kMissingBarrierAfterWrite,
    kMissingBarrierBeforeReuse,
    kMissingWarpBarrier,
    kUnwrittenShared,
    kMissingCopyWait,
    kSharedOverrun,
    kGlobalOverrun,
    kMisalignedLoad,
    kMisalignedDereference,
    kDivergentShuffle,
    kWrongMask,
    kDivergentBarrier,
    kPlainStoreFromTwoBlocks,
    kPlainStoreAmongAtomics,
    kMissingNamedBarrier,
    kWrongBarrierCount,
    kExitedLane,
};

constexpr int kThreads = 128;

// y[block] = sum of a row of 4 kThreads elements, twice, staged through shared memory. Each bug is one line missing or
// one line wrong.
__global__ void staged_sum(const float* x, float* y, int bug_code) {
    const Bug bug = static_cast<Bug>(bug_code);
    STATIC_SMEM(float, tile, [4 * kThreads]);
    STATIC_SMEM(float, parts, [kThreads / 32]);
    STATIC_SMEM(float, neighbours, [kThreads]);
    STATIC_SMEM(float, halves, [kThreads]);
    STATIC_SMEM(int, rounds, [1]);
    const int t = static_cast<int>(threadIdx.x), warp = t / 32, lane = t % 32;
    const float* const row = x + static_cast<int64_t>(blockIdx.x) * 4 * kThreads;
    float total = 0.0f;
    for (int pass = 0; pass < 2; ++pass) {
        if (bug != Bug::kUnwrittenShared || t != 5) neox::cp_async_16(tile + 4 * t, row + 4 * t);
        neox::cp_async_commit();
        if (bug != Bug::kMissingCopyWait) neox::cp_async_wait<0>();
        if (bug != Bug::kMissingBarrierAfterWrite && (bug != Bug::kDivergentBarrier || warp)) __syncthreads();
        const int from = kThreads - 1 - t;  // another thread's part of the tile
        float value = tile[4 * from] + tile[4 * from + 1] + tile[4 * from + 2] + tile[4 * from + 3];
        if (bug == Bug::kMissingCopyWait) neox::cp_async_wait<0>();

        neighbours[t] = value;  // the value of the neighbouring lane, through shared memory
        if (bug != Bug::kMissingWarpBarrier) __syncwarp();
        value = neighbours[t ^ 1];

        halves[t] = value;  // the value of the other warp of this half of the block
        if (bug != Bug::kMissingNamedBarrier)
            neox::named_barrier(1 + t / 64, bug == Bug::kWrongBarrierCount ? 128 : 64);
        value = halves[t ^ 32];

        if (bug == Bug::kExitedLane && t == 37) return;
        const uint32_t mask = bug == Bug::kWrongMask && lane >= 16 ? 0xffff0000u : kFullWarp;
        if (bug == Bug::kDivergentShuffle && lane == 7) {
            value += 0.0f * static_cast<float>(__ballot_sync(kFullWarp, 1));
        } else {
            for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(mask, value, offset);
        }
        if (lane == 0) parts[warp] = value;
        if (t == 0) rounds[0] = 0;
        __syncthreads();
        atomicAdd(&rounds[0], 1);
        if (bug == Bug::kPlainStoreAmongAtomics && t == 50) rounds[0] = 0;
        const int overrun = bug == Bug::kSharedOverrun ? 1 : 0;
        for (int i = 0; i < kThreads / 32 + overrun; ++i) total += parts[i];
        if (bug != Bug::kMissingBarrierBeforeReuse) __syncthreads();
        if (rounds[0] != kThreads) total += 1.0f;
        if (lane == 0) parts[warp] = 0.0f;  // the scratch is reused
    }
    if (bug == Bug::kGlobalOverrun && t == 0) total += row[4 * kThreads * (gridDim.x - blockIdx.x)];
    if (bug == Bug::kMisalignedDereference) {
        const uint4 pack = *reinterpret_cast<const uint4*>(row + 1);
        total += 0.0f * (__uint_as_float(pack.x) + __uint_as_float(pack.w));
    }
    if (bug == Bug::kMisalignedLoad) total += 0.0f * __uint_as_float(__ldg(reinterpret_cast<const uint4*>(row + 1)).x);
    if (t == 0) y[bug == Bug::kPlainStoreFromTwoBlocks ? 0 : blockIdx.x] = total;
}

emu_test::Outcome run(Bug bug) {
    constexpr int kBlocks = 3;
    emu_test::Buffer<float> x("x", kBlocks * 4 * kThreads), y("y", kBlocks);
    std::vector<double> expected(kBlocks, 0.0);
    for (size_t i = 0; i < x.size(); ++i) {
        x[i] = static_cast<float>(i % 13) + 0.25f;
        expected[i / (4 * kThreads)] += 2.0 * x[i];
    }
    emu_test::Outcome outcome;
    outcome.error = emu_test::error_of([&] {
        neox::launch(staged_sum, dim3(kBlocks), dim3(kThreads), 0, nullptr, x.data(), y.data(), static_cast<int>(bug));
    });
    for (size_t i = 0; i < kBlocks; ++i) outcome.right = outcome.right && y[i] == static_cast<float>(expected[i]);
    return outcome;
}

const emu_test::Planted<Bug> kPlanted[] = {
    {Bug::kMissingBarrierAfterWrite, "missing_barrier_after_write", "never written"},
    {Bug::kMissingBarrierBeforeReuse, "missing_barrier_before_reuse", "race", true},
    {Bug::kMissingWarpBarrier, "missing_warp_barrier", "neighbours", true},
    {Bug::kUnwrittenShared, "unwritten_shared", "never written"},
    {Bug::kMissingCopyWait, "missing_copy_wait", "cp.async"},
    {Bug::kSharedOverrun, "shared_overrun", "out of bounds", true},
    {Bug::kGlobalOverrun, "global_overrun", "out of bounds", true},
    {Bug::kMisalignedLoad, "misaligned_load", "misaligned"},
    {Bug::kMisalignedDereference, "misaligned_dereference", "misaligned", true},
    {Bug::kDivergentShuffle, "divergent_shuffle", "divergent"},
    {Bug::kWrongMask, "wrong_mask", "divergent"},
    {Bug::kDivergentBarrier, "divergent_barrier", "never written"},
    {Bug::kPlainStoreFromTwoBlocks, "plain_store_from_two_blocks", "another block", true},
    {Bug::kPlainStoreAmongAtomics, "plain_store_among_atomics", "race", true},
    {Bug::kMissingNamedBarrier, "missing_named_barrier", "halves"},
    {Bug::kWrongBarrierCount, "wrong_barrier_count", "deadlock"},
    {Bug::kExitedLane, "exited_lane", "exit"},
};

}  // namespace

int main(int argc, char** argv) { return emu_test::run_planted(argc, argv, kPlanted, run); }
