// Bugs with Hopper's asynchronous instructions, injected one at a time into a small kernel. Each must be found, and the
// kernel without a bug must pass.
//
//   test_planted_async_bugs [NAME]   runs all bugs that the build can find, or one
#include <vector>

#include "common/hopper.cuh"
#include "planted.h"

namespace {

using neox::kWarpgroupSize;
using neox::kWarpSize;
using bf16 = __nv_bfloat16;

enum class Bug {
    kNone,
    kMissingWait,
    kLateWait,
    kWrongParity,
    kMissingProxyFence,
    kEarlyProxyFence,
    kLateProxyFence,
    kTooFewBytes,
    kTooManyBytes,
    kUnswizzledCopy,
    kWrongStride,
    kWrongPanel,
    kWrongStep,
    kWrongTransposition,
    kRegisterChanged,
    kAccumulatorRead,
    kAccumulatorChanged,
    kMissingCommit,
    kMissingFence,
    kMissingRelease,
    kEarlyRelease,
    kExtraRelease,
    kMissingEmptyWait,
    kMissingInitFence,
    kMissingInitBarrier,
    kRegistersNotReleased,
    kDivergentWarps,
    kExitInFlight,
    kSwappedCoordinates,
};

constexpr int kTiles = 5, kSlots = 3, kRows = 64, kDim = 128;  // tiles of keys, and of values
constexpr unsigned kPanelBytes = kRows * 128, kTileBytes = kDim / 64 * kPanelBytes;
constexpr int kChunks = kDim / 8;

struct Task {
    const bf16* q;         // [kRows, kDim]
    neox::TensorMap k, v;  // [1, 1, kTiles * kRows, kDim]
    float* out;            // [kRows, kDim]
    Bug bug;
};

struct Ring {
    unsigned char* tiles;
    uint64_t *full, *empty;
    int slot;
    unsigned parity;

    void advance() {
        slot = (slot + 1) % kSlots;
        parity ^= slot == 0;
    }
};

void produce(const Task& task, Ring ring) {
    const Bug bug = task.bug;
    for (int i = 0; i < 2 * kTiles; ++i) {
        const neox::TensorMap& map = i % 2 ? task.v : task.k;
        if (bug != Bug::kMissingEmptyWait) neox::mbarrier_wait(ring.empty + ring.slot, ring.parity ^ 1);
        const unsigned wrong = bug == Bug::kTooFewBytes ? -kPanelBytes : bug == Bug::kTooManyBytes ? kPanelBytes : 0;
        neox::mbarrier_arrive_expect(ring.full + ring.slot, kTileBytes + wrong);
        for (int panel = 0; panel < kDim / 64; ++panel) {
            const int row = i / 2 * kRows, channel = panel * 64;
            const bool swapped = bug == Bug::kSwappedCoordinates;
            neox::bulk_load(ring.tiles + ring.slot * kTileBytes + panel * kPanelBytes, &map, ring.full + ring.slot,
                            swapped ? row : channel, swapped ? channel : row, 0, 0);
        }
        ring.advance();
    }
}

void copy_queries(const Task& task, bf16* tile) {
    for (int at = static_cast<int>(threadIdx.x); at < kRows * kChunks; at += kWarpgroupSize) {
        const int row = at / kChunks, chunk = at % kChunks;
        bf16* const to = tile + chunk / 8 * (kRows * 64) + row * 64 + (chunk % 8 ^ row % 8) * 8;
        neox::cp_async_16(to, task.q + row * kDim + chunk * 8);
    }
    neox::cp_async_commit();
    if (task.bug == Bug::kEarlyProxyFence) neox::fence_proxy_async();
    neox::cp_async_wait<0>();
    const bool fences =
        task.bug != Bug::kMissingProxyFence && task.bug != Bug::kEarlyProxyFence && task.bug != Bug::kLateProxyFence;
    if (fences) neox::fence_proxy_async();
    neox::named_barrier(1, kWarpgroupSize);
    if (task.bug == Bug::kLateProxyFence) neox::fence_proxy_async();
}

uint64_t with_stride(uint64_t descriptor, unsigned bytes) {
    return (descriptor & ~(uint64_t{0x3fff} << 32)) | static_cast<uint64_t>(bytes / 16) << 32;
}

// The next tile, complete.
int take(const Task& task, Ring& ring) {
    const int at = ring.slot;
    const bool waits = task.bug != Bug::kMissingWait && task.bug != Bug::kLateWait;
    if (waits) neox::mbarrier_wait(ring.full + at, ring.parity ^ (task.bug == Bug::kWrongParity));
    return at;
}

void release(const Task& task, Ring& ring, int at) {
    if (task.bug == Bug::kLateWait) neox::mbarrier_wait(ring.full + at, ring.parity);
    const int lanes = task.bug == Bug::kExtraRelease ? 2 : task.bug == Bug::kMissingRelease ? 0 : 1;
    if (static_cast<int>(threadIdx.x) % kWarpSize < lanes) neox::mbarrier_arrive(ring.empty + at);
    ring.advance();
}

// out = sum over tiles of (q k^T) v, in bf16 between the products.
void consume(const Task& task, const bf16* queries, Ring ring) {
    const Bug bug = task.bug;
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize, warp = static_cast<int>(threadIdx.x) / kWarpSize;
    const uint64_t q = neox::matrix_descriptor(queries, 0);
    float out[kDim / 8][4] = {};
    for (int tile = 0; tile < kTiles; ++tile) {
        float s[kRows / 8][4];
        uint32_t p[kRows / 16][4];
        int at = take(task, ring);
        uint64_t k = neox::matrix_descriptor(ring.tiles + at * kTileBytes, 0);
        if (bug == Bug::kWrongStride) k = with_stride(k, 512);
        if (bug == Bug::kDivergentWarps && warp == 3) k = neox::advance(k, 32);
        neox::wgmma_fence();
        for (int i = 0; i < kDim / 16; ++i) {
            const unsigned offset = i / 4 * kPanelBytes + i % 4 * (bug == Bug::kWrongStep ? 16 : 32);
            neox::wgmma<bf16, false, false>(s, neox::advance(q, offset), neox::advance(k, offset), i > 0);
        }
        neox::wgmma_commit();
        const float early = s[1][0];
        if (bug == Bug::kEarlyRelease) {
            release(task, ring, at);
            neox::wgmma_wait<0>();
        } else {
            neox::wgmma_wait<0>();
            release(task, ring, at);
        }
        if (bug == Bug::kAccumulatorRead) s[1][0] = early;
        for (int i = 0; i < kRows / 16; ++i) {
            for (int j = 0; j < 4; ++j)
                p[i][j] = neox::pack_pair<bf16>(s[2 * i + j / 2][j % 2 * 2], s[2 * i + j / 2][j % 2 * 2 + 1]);
        }
        at = take(task, ring);
        const uint64_t v =
            neox::matrix_descriptor(ring.tiles + at * kTileBytes, bug == Bug::kWrongPanel ? kTileBytes : kPanelBytes);
        if (bug != Bug::kMissingFence) neox::wgmma_fence();
        for (int i = 0; i < kRows / 16; ++i) {
            if (bug == Bug::kWrongTransposition) {
                neox::wgmma<bf16, false>(out, p[i], neox::advance(v, i % 4 * 32), true);
            } else {
                neox::wgmma<bf16, true>(out, p[i], neox::advance(v, i * 2048), true);
            }
        }
        if (bug != Bug::kMissingCommit) neox::wgmma_commit();
        if (bug == Bug::kRegisterChanged) p[1][0] += tile == 2;
        if (bug == Bug::kAccumulatorChanged && tile == 2) out[1][0] *= 2.0f;
        if (bug == Bug::kExitInFlight && tile + 1 == kTiles) break;
        neox::wgmma_wait<0>();
        release(task, ring, at);
    }
    for (int n = 0; n < kDim / 8; ++n) {
        for (int i = 0; i < 4; ++i)
            task.out[(warp * 16 + lane / 4 + i / 2 * 8) * kDim + n * 8 + lane % 4 * 2 + i % 2] = out[n][i];
    }
}

__global__ void two_products(Task task) {
    DYNAMIC_SMEM(shared);
    bf16* const queries = reinterpret_cast<bf16*>(shared);
    unsigned char* const tiles = shared + kTileBytes;
    uint64_t* const barriers = reinterpret_cast<uint64_t*>(tiles + kSlots * kTileBytes);
    const Ring ring{tiles, barriers, barriers + kSlots, 0, 0};
    if (threadIdx.x == 0) {
        for (int i = 0; i < kSlots; ++i) {
            neox::mbarrier_init(ring.full + i, 1);
            neox::mbarrier_init(ring.empty + i, 4);
        }
        if (task.bug != Bug::kMissingInitFence) neox::fence_mbarrier_init();
    }
    if (task.bug != Bug::kMissingInitBarrier) __syncthreads();
    if (threadIdx.x >= kWarpgroupSize) {
        if (task.bug != Bug::kRegistersNotReleased) neox::release_registers<24>();
        if (threadIdx.x == kWarpgroupSize) produce(task, ring);
        return;
    }
    neox::acquire_registers<240>();
    copy_queries(task, queries);
    consume(task, queries, ring);
}

neox::TensorMap map_of(const std::vector<bf16>& rows, bool swizzled) {
    neox::TensorMap map;
    neox::make_tensor_map<bf16>(map, {rows.data(), {kDim, kTiles * kRows, 1, 1}, {1, kDim, 8, 8}, {64, kRows, 1, 1}});
    map.swizzled = swizzled;
    return map;
}

emu_test::Outcome run(Bug bug) {
    const auto size = [](int rows) { return static_cast<size_t>(rows) * kDim; };
    std::vector<bf16> q(size(kRows)), k(size(kTiles * kRows)), v(size(kTiles * kRows));
    // small integers, of which every product and sum is exact
    for (size_t i = 0; i < q.size(); ++i) q[i] = static_cast<float>(static_cast<int>(i * 7 % 13 % 5) - 2);
    for (size_t i = 0; i < k.size(); ++i) k[i] = static_cast<float>(static_cast<int>(i * 11 % 17 % 3) - 1);
    for (size_t i = 0; i < v.size(); ++i) v[i] = static_cast<float>(static_cast<int>(i * 5 % 19 % 7) - 3);
    std::vector<float> out(size(kRows), -1.0f);
    simt::check::untrack_all();
    simt::check::track(out.data(), out.size() * sizeof(float), "out");
    const Task task{q.data(), map_of(k, bug != Bug::kUnswizzledCopy), map_of(v, bug != Bug::kUnswizzledCopy),
                    out.data(), bug};
    emu_test::Outcome outcome;
    outcome.error = emu_test::error_of([&] {
        neox::launch(two_products, dim3(1), dim3(3 * kWarpgroupSize), (1 + kSlots) * kTileBytes + 2 * kSlots * 8,
                     nullptr, task);
    });
    simt::check::untrack_all();
    std::vector<float> expected(kDim);
    for (int row = 0; row < kRows; ++row) {
        std::fill(expected.begin(), expected.end(), 0.0f);
        for (int key = 0; key < kTiles * kRows; ++key) {
            float score = 0.0f;
            for (int d = 0; d < kDim; ++d) score += q[row * kDim + d] * k[key * kDim + d];
            for (int d = 0; d < kDim; ++d) expected[d] += static_cast<float>(bf16(score)) * v[key * kDim + d];
        }
        for (int d = 0; d < kDim; ++d) outcome.right = outcome.right && out[row * kDim + d] == expected[d];
    }
    return outcome;
}

const emu_test::Planted<Bug> kPlanted[] = {
    {Bug::kMissingWait, "missing_wait", "before its wait"},
    {Bug::kLateWait, "late_wait", "before its wait"},
    {Bug::kWrongParity, "wrong_parity", ""},
    {Bug::kMissingProxyFence, "missing_proxy_fence", "fence.proxy.async", true},
    {Bug::kEarlyProxyFence, "early_proxy_fence", "fence.proxy.async", true},
    {Bug::kLateProxyFence, "late_proxy_fence", "fence.proxy.async", true},
    {Bug::kTooFewBytes, "too_few_bytes", "more bytes than expected"},
    {Bug::kTooManyBytes, "too_many_bytes", "8192 bytes pending"},
    {Bug::kUnswizzledCopy, "unswizzled_copy", ""},
    {Bug::kWrongStride, "wrong_stride", ""},
    {Bug::kWrongPanel, "wrong_panel", ""},
    {Bug::kWrongStep, "wrong_step", ""},
    {Bug::kWrongTransposition, "wrong_transposition", ""},
    {Bug::kRegisterChanged, "register_changed", "in registers changed"},
    {Bug::kAccumulatorRead, "accumulator_read", ""},
    {Bug::kAccumulatorChanged, "accumulator_changed", "accumulator changed"},
    {Bug::kMissingCommit, "missing_commit", "not been committed"},
    {Bug::kMissingFence, "missing_fence", "wgmma.fence"},
    {Bug::kMissingRelease, "missing_release", "deadlock"},
    {Bug::kEarlyRelease, "early_release", "bulk copy"},
    {Bug::kExtraRelease, "extra_release", ""},
    {Bug::kMissingEmptyWait, "missing_empty_wait", ""},
    {Bug::kMissingInitFence, "missing_init_fence", "fence.mbarrier_init"},
    {Bug::kMissingInitBarrier, "missing_init_barrier", ""},
    {Bug::kRegistersNotReleased, "registers_not_released", "deadlock"},
    {Bug::kDivergentWarps, "divergent_warps", "warps of a warpgroup disagree"},
    {Bug::kExitInFlight, "exit_in_flight", "wgmma in flight"},
    {Bug::kSwappedCoordinates, "swapped_coordinates", ""},
};

}  // namespace

int main(int argc, char** argv) { return emu_test::run_planted(argc, argv, kPlanted, run); }
