// Tests of the emulator's asynchronous units (async.h): bulk copies at the edges of a tensor, matrices of wgmma in
// every form against plain loops, phases of mbarriers, and misuse.
#include <vector>

#include "common/hopper.cuh"
#include "expect.h"

namespace {

using bf16 = __nv_bfloat16;

template <class Body>
void run(unsigned threads, size_t shared, const Body& body) {
    simt::run_grid(dim3(1), dim3(threads), shared, body);
}

float value(int64_t i) { return static_cast<float>(i * 7 % 11 - 5); }

// A box of a tensor [2, 3, 20, 70], at every edge: elements, zeros outside, and the swizzle.
void test_bulk_copies() {
    constexpr int64_t kSizes[4] = {70, 20, 3, 2}, kStrides[4] = {1, 72, 72 * 20, 72 * 20 * 3};
    std::vector<bf16> data(static_cast<size_t>(2 * kStrides[3]));
    for (size_t i = 0; i < data.size(); ++i) data[i] = value(static_cast<int64_t>(i));
    neox::TensorBox box{data.data(), {}, {}, {64, 8, 2, 1}};
    for (int i = 0; i < 4; ++i) box.sizes[i] = kSizes[i], box.strides[i] = kStrides[i];
    neox::TensorMap map;
    EXPECT(neox::make_tensor_map<bf16>(map, box) == cudaSuccess);
    for (const auto& at : std::vector<std::vector<int>>{
             {0, 0, 0, 0}, {64, 16, 1, 1}, {8, -3, 0, 1}, {-8, 4, -1, 0}, {0, 0, 2, 0}, {0, 0, 0, 2}, {72, 0, 0, 0}}) {
        size_t wrong = 0;
        run(32, 64 * 8 * 2 * 2 + 8, [&] {
            DYNAMIC_SMEM(shared);
            auto* const barrier = reinterpret_cast<uint64_t*>(shared + 64 * 8 * 2 * 2);
            if (threadIdx.x) return;
            neox::mbarrier_init(barrier, 1);
            neox::fence_mbarrier_init();
            neox::mbarrier_arrive_expect(barrier, 64 * 8 * 2 * 2);
            neox::bulk_load(shared, &map, barrier, at[0], at[1], at[2], at[3]);
            neox::mbarrier_wait(barrier, 0);
            for (int i = 0; i < 64 * 8 * 2; ++i) {
                const int64_t x[4] = {at[0] + i % 64, at[1] + i / 64 % 8, at[2] + i / 512, at[3]};
                float expected = 0.0f;
                bool inside = true;
                int64_t source = 0;
                for (int d = 0; d < 4; ++d)
                    inside = inside && x[d] >= 0 && x[d] < kSizes[d], source += x[d] * kStrides[d];
                if (inside) expected = value(source);
                const int row = i / 64, swizzled = row * 64 + ((i % 64 / 8) ^ row % 8) * 8 + i % 8;
                wrong += static_cast<float>(reinterpret_cast<const bf16*>(shared)[swizzled]) != expected;
            }
        });
        EXPECT(wrong == 0);
    }
}

// Index of element (row, column) of a matrix of `rows` rows of M or N and 16 columns of K, at K step `step` of 64.
int at(int rows, int row, int column, bool transposed) {
    const int line = transposed ? column : row, element = transposed ? row : column;
    const int panel = element / 64 * (transposed ? 64 : rows) * 64;
    return panel + line * 64 + ((element % 64 / 8) ^ line % 8) * 8 + element % 8;
}

// d += a b over 64 of K in 4 steps, for a and b in both orders and a also in registers.
template <class T, bool kATransposed, bool kBTransposed, int kParts>
void test_product(bool registers) {
    constexpr int kN = kParts * 8, kDepth = 64;
    size_t wrong = 0;
    run(128, (64 + kN) * kDepth * 2, [&] {
        DYNAMIC_SMEM(shared);
        T* const a = reinterpret_cast<T*>(shared);
        T* const b = a + 64 * kDepth;
        const int t = static_cast<int>(threadIdx.x), lane = t % 32;
        for (int i = t; i < 64 * kDepth; i += 128) a[at(64, i / kDepth, i % kDepth, kATransposed)] = T(value(i));
        for (int i = t; i < kN * kDepth; i += 128)
            b[at(kN, i / kDepth, i % kDepth, kBTransposed)] = T(value(3 * i + 1));
        neox::fence_proxy_async();
        __syncthreads();
        float d[kParts][4];
        for (auto& part : d) {
            for (float& sum : part) sum = 2.0f;
        }
        uint32_t fragments[4][4];
        for (int i = 0; i < 16; ++i) {
            const auto element = [&](int which) {
                const int row = t / 32 * 16 + lane / 4 + i % 4 % 2 * 8,
                          column = i / 4 * 16 + lane % 4 * 2 + i % 4 / 2 * 8 + which;
                return value(row * kDepth + column);
            };
            fragments[i / 4][i % 4] = neox::pack_pair<T>(element(0), element(1));
        }
        const uint64_t a_matrix = neox::matrix_descriptor(a, 64 * 128), b_matrix = neox::matrix_descriptor(b, 64 * 128);
        neox::wgmma_fence();
        for (int step = 0; step < 4; ++step) {
            const uint64_t b_step = neox::advance(b_matrix, static_cast<unsigned>(step * (kBTransposed ? 2048 : 32)));
            if (registers) {
                neox::wgmma<T, kBTransposed>(d, fragments[step], b_step, true);
            } else {
                neox::wgmma<T, kATransposed, kBTransposed>(
                    d, neox::advance(a_matrix, static_cast<unsigned>(step * (kATransposed ? 2048 : 32))), b_step, true);
            }
        }
        neox::wgmma_commit();
        neox::wgmma_wait<0>();
        for (int i = 0; i < kParts * 4; ++i) {
            const int row = t / 32 * 16 + lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
            float expected = 2.0f;
            for (int k = 0; k < kDepth; ++k) expected += value(row * kDepth + k) * value(3 * (column * kDepth + k) + 1);
            wrong += d[i / 4][i % 4] != expected;
        }
    });
    EXPECT(wrong == 0);
}

void test_products() {
    test_product<bf16, false, false, 8>(false);
    test_product<bf16, true, false, 16>(false);
    test_product<bf16, false, true, 16>(false);
    test_product<__half, true, true, 8>(false);
    test_product<bf16, false, true, 8>(true);
    test_product<__half, false, false, 16>(true);
}

// Threads pass in the order of the phases, and a wait for the phase before the current one returns at once.
void test_phases() {
    std::vector<int> order;
    run(64, 16, [&] {
        DYNAMIC_SMEM(shared);
        auto* const barrier = reinterpret_cast<uint64_t*>(shared);
        if (threadIdx.x == 0) {
            neox::mbarrier_init(barrier, 32);
            neox::fence_mbarrier_init();
        }
        __syncthreads();
        if (threadIdx.x < 32) {
            neox::mbarrier_wait(barrier, 1);
            for (unsigned phase = 0; phase < 3; ++phase) {
                if (threadIdx.x == 0) order.push_back(static_cast<int>(phase));
                neox::mbarrier_arrive(barrier);
                neox::mbarrier_wait(barrier, phase & 1);
            }
        } else if (threadIdx.x == 32) {
            neox::mbarrier_wait(barrier, 0);
            order.push_back(10);
        }
    });
    EXPECT(order.size() == 4 && order[0] == 0 && order.back() != 0);
}

// Runs body(barrier) with one thread and an mbarrier for one arrival.
template <class Body>
void with_barrier(const Body& body) {
    run(1, 2048, [&] {
        DYNAMIC_SMEM(shared);
        auto* const barrier = reinterpret_cast<uint64_t*>(shared + 1024);
        neox::mbarrier_init(barrier, 1);
        neox::fence_mbarrier_init();
        body(barrier);
    });
}

void test_misuse() {
    std::vector<bf16> data(64 * 8);
    neox::TensorMap map;
    EXPECT(neox::make_tensor_map<bf16>(map, {data.data(), {64, 8, 1, 1}, {1, 64, 8, 8}, {64, 8, 1, 1}}) == cudaSuccess);
    const auto near = [](uint64_t* barrier, int bytes) { return reinterpret_cast<char*>(barrier) - 1024 + bytes; };
    EXPECT_ERROR([&] { with_barrier([](uint64_t* b) { neox::mbarrier_arrive(b + 1); }); }, "no mbarrier");
    EXPECT_ERROR([&] { with_barrier([](uint64_t* b) { neox::mbarrier_init(b, 1); }); }, "initialised already");
    EXPECT_ERROR([&] { with_barrier([](uint64_t* b) { neox::mbarrier_wait(b, 0); }); }, "parity 0");
    EXPECT_ERROR([&] { with_barrier([&](uint64_t* b) { neox::bulk_load(near(b, 64), &map, b, 0, 0, 0, 0); }); },
                 "aligned to 128");
    EXPECT_ERROR([&] { with_barrier([&](uint64_t* b) { neox::bulk_load(near(b, 1152), &map, b, 0, 0, 0, 0); }); },
                 "not in shared memory");
    EXPECT_ERROR([&] { with_barrier([&](uint64_t* b) { simt::bulk_load(near(b, 0), &map, b, nullptr, 3); }); },
                 "3 coordinates");
    EXPECT_ERROR([&] { with_barrier([&](uint64_t* b) { neox::bulk_load(near(b, 0), &map, b, 0, 0, 0, 0); }); },
                 "bulk copy in flight");
    const auto release_more = [] {
        neox::release_registers<40>();
        neox::release_registers<48>();
    };
    EXPECT_ERROR([&] { run(128, 1024, release_more); }, "setmaxnreg.dec: 48 from 40");
    const auto release_of_one_warp = [] {
        if (threadIdx.x < 32) neox::release_registers<40>();
    };
    EXPECT_ERROR([&] { run(128, 1024, release_of_one_warp); }, "the same setmaxnreg");
    // Of three warpgroups with 168 registers per thread one releases 72. The file has another 8 per thread of a
    // warpgroup, which are not the block's.
    const auto move_registers = [](auto count) {
        run(384, 1024, [] {
            if (threadIdx.x < 128) neox::acquire_registers<decltype(count)::value>();
            if (threadIdx.x >= 256) neox::release_registers<96>();
        });
    };
    EXPECT(emu_test::error_of([&] { move_registers(std::integral_constant<int, 240>{}); }).empty());
    EXPECT_ERROR([&] { move_registers(std::integral_constant<int, 248>{}); }, "setmaxnreg.inc");
    EXPECT_ERROR([] { run(128, 1024, [] { neox::release_registers<20>(); }); }, "multiple of 8");
    EXPECT_ERROR(
        [] {
            run(128, 1024, [] {
                float d[8][4] = {};
                DYNAMIC_SMEM(shared);
                neox::wgmma_fence();
                neox::wgmma<bf16, false, false>(d, neox::matrix_descriptor(shared + 128, 0), 0, false);
            });
        },
        "pattern of 1024 bytes");
}

// Each limit of a tensor map, and one that holds all of them.
void test_tensor_maps() {
    alignas(16) bf16 data[8];
    const neox::TensorBox good{data, {64, 8, 1, 1}, {1, 64, 8, 8}, {64, 8, 1, 1}};
    EXPECT(!neox::tensor_map_problem(good));
    const auto broken = [&](auto change) {
        neox::TensorBox box = good;
        change(box);
        return neox::tensor_map_problem(box) != nullptr;
    };
    EXPECT(broken([&](neox::TensorBox& box) { box.data = data + 1; }));
    EXPECT(broken([](neox::TensorBox& box) { box.sizes[1] = 0; }));
    EXPECT(broken([](neox::TensorBox& box) { box.strides[1] = 68; }));
    EXPECT(broken([](neox::TensorBox& box) { box.strides[3] = -8; }));
    EXPECT(broken([](neox::TensorBox& box) { box.strides[2] = 0; }));
    EXPECT(broken([](neox::TensorBox& box) { box.box[1] = 257; }));
    EXPECT(broken([](neox::TensorBox& box) { box.box[0] = 32; }));
}

}  // namespace

int main() {
    for (const auto order : {simt::Order::kRoundRobin, simt::Order::kReverse, simt::Order::kRandom}) {
        simt::config().order = order;
        test_bulk_copies();
        test_products();
        test_phases();
    }
    simt::config().order = simt::Order::kRoundRobin;
    test_misuse();
    test_tensor_maps();
    return emu_test::tally.finish();
}
