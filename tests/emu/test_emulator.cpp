// Tests of the emulator: results of its collectives, fragment layouts against the strides published by CuTe, and
// detection of misuse.
#include <cmath>
#include <random>
#include <vector>

#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "expect.h"

namespace {

using neox::Max;
using neox::Sum;
using bf16 = __nv_bfloat16;

template <class Body>
void run(unsigned blocks, unsigned threads, size_t shared, const Body& body) {
    simt::run_grid(dim3(blocks), dim3(threads), shared, body);
}

void test_shuffles() {
    std::vector<int> by_xor(64), down(64), up(64), narrow(64);
    std::vector<unsigned> votes(64);
    run(1, 64, 0, [&] {
        const int t = static_cast<int>(threadIdx.x);
        by_xor[t] = __shfl_xor_sync(~0u, t, 5);
        down[t] = __shfl_down_sync(~0u, t, 3);
        up[t] = __shfl_up_sync(~0u, t, 3);
        narrow[t] = __shfl_sync(~0u, t, 2, 8);
        votes[t] = __ballot_sync(~0u, t % 3 == 0);
    });
    for (int t = 0; t < 64; ++t) {
        const int lane = t % 32, first = t - lane;
        unsigned expected = 0;
        for (int i = 0; i < 32; ++i) expected |= static_cast<unsigned>((first + i) % 3 == 0) << i;
        EXPECT(by_xor[t] == first + (lane ^ 5));
        EXPECT(down[t] == (lane + 3 < 32 ? t + 3 : t));
        EXPECT(up[t] == (lane >= 3 ? t - 3 : t));
        EXPECT(narrow[t] == first + lane / 8 * 8 + 2);
        EXPECT(votes[t] == expected);
    }
}

void test_half_warps_with_disjoint_masks() {
    std::vector<int> out(32);
    run(1, 32, 0, [&] {
        const int t = static_cast<int>(threadIdx.x);
        out[t] = t < 16 ? __shfl_xor_sync(0x0000ffffu, t, 1) : __shfl_xor_sync(0xffff0000u, t, 2);
    });
    for (int t = 0; t < 32; ++t) EXPECT(out[t] == (t ^ (t < 16 ? 1 : 2)));
}

void test_barriers() {
    std::vector<int> counts(96), order(64);
    int position = 0;
    run(1, 96, 0, [&] { counts[threadIdx.x] = __syncthreads_count(threadIdx.x % 5 == 0); });
    for (int t = 0; t < 96; ++t) EXPECT(counts[t] == 20);
    run(1, 128, 0, [&] {  // two named barriers with half of the block each
        const int t = static_cast<int>(threadIdx.x), half = t / 64;
        neox::named_barrier(1 + half, 64);
        if (half == 0) order[t] = position++;
        neox::named_barrier(1 + half, 64);
    });
    EXPECT(position == 64);
}

void test_block_reduce() {
    std::vector<float> sums(256), maxima(256);
    run(2, 128, 0, [&] {
        STATIC_SMEM(float, scratch, [4]);
        const int t = static_cast<int>(blockIdx.x * 128 + threadIdx.x);
        sums[t] = neox::block_reduce<Sum, 4>(static_cast<float>(t), scratch);
        maxima[t] = neox::block_reduce<Max, 4>(static_cast<float>(t % 100), scratch);
    });
    for (int t = 0; t < 256; ++t) {
        const int block = t / 128;
        EXPECT(sums[t] == static_cast<float>(128 * 127 / 2 + block * 128 * 128));
        EXPECT(maxima[t] == 99.0f);
    }
}

// Column-major indices from CuTe's MMA_Traits of SM80_16x8x16_F32BF16BF16F32_TN: A is [16, 16], B [8, 16], C [16, 8].
int index_of_a(int lane, int i) { return lane % 4 * 32 + lane / 4 + i % 2 * 16 + i / 2 % 2 * 8 + i / 4 * 128; }
int index_of_b(int lane, int i) { return lane % 4 * 16 + lane / 4 + i % 2 * 8 + i / 2 * 64; }
int index_of_c(int lane, int i) { return lane % 4 * 32 + lane / 4 + i % 2 * 16 + i / 2 * 8; }

void test_mma_layout() {
    std::mt19937 generator(1);
    std::normal_distribution<float> normal;
    std::vector<bf16> a(16 * 16), b(8 * 16);
    std::vector<float> c(16 * 8), out(16 * 8);
    for (auto& value : a) value = normal(generator);
    for (auto& value : b) value = normal(generator);
    for (auto& value : c) value = normal(generator);
    run(1, 32, 0, [&] {
        const int lane = static_cast<int>(threadIdx.x);
        bf16 fragment_a[8], fragment_b[4];
        float fragment_c[4];
        for (int i = 0; i < 8; ++i) fragment_a[i] = a[index_of_a(lane, i)];
        for (int i = 0; i < 4; ++i) fragment_b[i] = b[index_of_b(lane, i)];
        for (int i = 0; i < 4; ++i) fragment_c[i] = c[index_of_c(lane, i)];
        uint32_t registers_a[4], registers_b[2];
        std::memcpy(registers_a, fragment_a, sizeof(registers_a));
        std::memcpy(registers_b, fragment_b, sizeof(registers_b));
        neox::mma_m16n8k16<bf16>(fragment_c, registers_a, registers_b);
        for (int i = 0; i < 4; ++i) out[index_of_c(lane, i)] = fragment_c[i];
    });
    for (int m = 0; m < 16; ++m) {
        for (int n = 0; n < 8; ++n) {
            double expected = c[m + 16 * n];
            for (int k = 0; k < 16; ++k) expected += static_cast<double>(float(a[m + 16 * k])) * float(b[n + 8 * k]);
            EXPECT(std::abs(expected - out[m + 16 * n]) < 1e-5);
        }
    }
}

// CuTe's Copy_Traits of SM75_U32x4_LDSM_N and SM75_U16x8_LDSM_T; element e sits at bit 16 e.
void test_ldmatrix_layout() {
    std::vector<uint32_t> plain(32 * 4), transposed(32 * 4);
    run(1, 32, 512, [&] {
        DYNAMIC_SMEM(raw);
        auto* const elements = reinterpret_cast<uint16_t*>(raw);
        const int lane = static_cast<int>(threadIdx.x);
        for (int i = 0; i < 8; ++i) elements[lane * 8 + i] = static_cast<uint16_t>(lane * 8 + i);
        __syncthreads();
        uint32_t r[4];
        neox::ldmatrix_x4(r, neox::shared_address(elements + lane * 8));
        std::memcpy(&plain[static_cast<size_t>(lane) * 4], r, sizeof(r));
        neox::ldmatrix_x4<true>(r, neox::shared_address(elements + lane * 8));
        std::memcpy(&transposed[static_cast<size_t>(lane) * 4], r, sizeof(r));
    });
    for (int lane = 0; lane < 32; ++lane) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            for (int i = 0; i < 2; ++i) {
                const auto at = static_cast<size_t>(lane) * 4 + static_cast<size_t>(matrix);
                EXPECT(static_cast<int>(plain[at] >> (16 * i) & 0xffff) == (lane * 32 + i * 16 + matrix * 1024) / 16);
                EXPECT(static_cast<int>(transposed[at] >> (16 * i) & 0xffff) ==
                       (lane % 4 * 256 + lane / 4 * 16 + i * 128 + matrix * 1024) / 16);
            }
        }
    }
}

void test_cp_async() {
    std::vector<float> in(128, 3.0f), out(128);
    run(1, 32, 512, [&] {
        DYNAMIC_SMEM(raw);
        auto* const tile = reinterpret_cast<float*>(raw);
        const int t = static_cast<int>(threadIdx.x);
        neox::cp_async_16(tile + 4 * t, in.data() + 4 * t, t % 2 == 0);
        neox::cp_async_commit();
        neox::cp_async_wait<0>();
        __syncthreads();
        for (int i = 0; i < 4; ++i) out[(4 * t + i + 4) % 128] = tile[(4 * t + i + 4) % 128];
    });
    for (int i = 0; i < 128; ++i) EXPECT(out[i] == (i / 4 % 2 == 0 ? 3.0f : 0.0f));
}

void test_16_bit_floats() {
    for (uint32_t bits = 0; bits < 65536; ++bits) {  // every value survives a round trip through fp32
        const auto code = static_cast<uint16_t>(bits);
        const float as_half = simt::decode_half(code), as_bfloat16 = simt::decode_bfloat16(code);
        if (as_half == as_half) EXPECT(simt::encode_half(as_half) == code);
        if (as_bfloat16 == as_bfloat16) EXPECT(simt::encode_bfloat16(as_bfloat16) == code);
    }
    EXPECT(simt::encode_half(65519.9f) == 0x7bff);
    EXPECT(simt::encode_half(65520.0f) == 0x7c00);
    EXPECT(simt::encode_half(std::ldexp(1.0f, -25)) == 0);  // a tie with the smallest subnormal rounds to even
    EXPECT(simt::encode_half(std::ldexp(1.5f, -25)) == 1);
    EXPECT(simt::encode_bfloat16(1.00390625f) == 0x3f80);  // a tie rounds to even
    EXPECT(simt::encode_bfloat16(1.01171875f) == 0x3f82);
}

void test_bytes_moved() {
    if (!simt::check::kEnabled) return;
    std::vector<uint4> in(64), out(64), table(1);
    simt::check::track(in.data(), 64 * sizeof(uint4), "in");
    simt::check::track(out.data(), 64 * sizeof(uint4), "out");
    simt::check::track(table.data(), sizeof(uint4), "table", true);
    const auto copy = [&](int reads) {
        simt::check::reset_traffic();
        run(2, 32, 0, [&] {
            const unsigned at = blockIdx.x * 32 + threadIdx.x;
            const volatile unsigned* const source = &in[at].x;  // volatile, so that every read is performed
            unsigned keep = 0;
            for (int i = 0; i < reads; ++i) keep += *source;
            out[at] = uint4{keep + table[0].x, 0, 0, 0};
        });
        return simt::check::moved();
    };
    // one member of each element is read, every element written, the table read once
    EXPECT(copy(1) == 64 * 4 + 64 * 16 + 4);
    EXPECT(copy(3) == 3 * 64 * 4 + 64 * 16 + 4);
    EXPECT(simt::check::traffic(in.data()).touched == 64 * 4);
    simt::check::untrack(table.data());
    EXPECT(copy(1) == 64 * 4 + 64 * 16);
    simt::check::untrack_all();
}

void test_misuse() {
    EXPECT_ERROR([] { run(1, 32, 0, [] { threadIdx.x < 16 ? (void)__shfl_xor_sync(~0u, 1, 1) : __syncthreads(); }); },
                 "waits in");
    EXPECT_ERROR(
        [] {
            run(1, 32, 0, [] {
                if (threadIdx.x < 16) (void)__shfl_xor_sync(~0u, 1, 1);
            });
        },
        "exited");
    EXPECT_ERROR(
        [] { run(1, 32, 0, [] { threadIdx.x % 2 ? (void)__shfl_xor_sync(~0u, 1, 2) : (void)__ballot_sync(~0u, 1); }); },
        "divergent");
    EXPECT_ERROR(
        [] {
            run(1, 64, 0, [] {
                if (threadIdx.x < 32) __syncthreads();
            });
        },
        "exit");
    EXPECT_ERROR([] { run(1, 64, 0, [] { neox::named_barrier(threadIdx.x < 32 ? 1 : 2, 64); }); }, "deadlock");
    EXPECT_ERROR([] { run(1, 32, 0, [] { (void)__shfl_sync(0x1u, 1, 0); }); }, "mask that it passed");
    EXPECT_ERROR([] { run(1, 16, 0, [] { (void)__shfl_xor_sync(~0u, 1, 1); }); }, "does not exist");
    EXPECT_ERROR([] { run(1, 32, 0, [] { (void)__shfl_sync(threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u, 1, 0); }); },
                 "not in the mask");
    EXPECT_ERROR(
        [] {
            run(1, 32, 1024, [] {
                DYNAMIC_SMEM(raw);
                uint32_t r[4];
                neox::ldmatrix_x4(r, neox::shared_address(raw + 8));
            });
        },
        "aligned");
    EXPECT_ERROR(
        [] {
            run(1, 32, 256, [] {
                DYNAMIC_SMEM(raw);
                reinterpret_cast<uint2*>(raw)[threadIdx.x] = uint2{};
                __syncthreads();
                uint32_t r[4];
                neox::ldmatrix_x4(r, neox::shared_address(raw + 16 * threadIdx.x));
            });
        },
        "not in shared");
    EXPECT_ERROR([] { run(1, 32, 300 << 10, [] {}); }, "too much shared");
    EXPECT_ERROR([] { run(0, 32, 0, [] {}); }, "grid");
    EXPECT_ERROR([] { run(1, 2048, 0, [] {}); }, "block size");
    static uint4 source[33];
    EXPECT_ERROR(
        [] {
            run(1, 32, 512, [] {
                DYNAMIC_SMEM(raw);
                neox::cp_async_16(raw + 16 * threadIdx.x, &source[threadIdx.x]);
                neox::cp_async_commit();
            });
        },
        "in flight");
    EXPECT_ERROR(
        [] {
            run(1, 32, 512, [] {
                DYNAMIC_SMEM(raw);
                neox::cp_async_16(raw + 16 * threadIdx.x, reinterpret_cast<char*>(source) + 4);
            });
        },
        "misaligned");
}

// Packs of 16 bytes need an aligned pointer, and a stride and a size that are multiples of a pack.
template <class T>
void test_rows_that_packs_fit() {
    constexpr int64_t kPack = 16 / static_cast<int64_t>(sizeof(T));
    alignas(16) const unsigned char row[32] = {};
    EXPECT(neox::can_vectorize<T>(row, 0, 0) && neox::can_vectorize<T>(row, 3 * kPack, kPack));
    EXPECT(!neox::can_vectorize<T>(row + sizeof(T), 3 * kPack, kPack));
    for (int64_t rest = 1; rest < kPack; ++rest) {
        EXPECT(!neox::can_vectorize<T>(row, kPack + rest, kPack));
        EXPECT(!neox::can_vectorize<T>(row, kPack, kPack + rest));
    }
}

// As ex2.approx.ftz.f32.
void test_powers_flush_subnormals() {
    EXPECT(neox::fast_exp2(-126.0f) == 0x1p-126f);
    EXPECT(neox::fast_exp2(-127.0f) == 0.0f && neox::fast_exp2(-INFINITY) == 0.0f);
    EXPECT(std::isnan(neox::fast_exp2(NAN)));
}

}  // namespace

int main() {
    test_16_bit_floats();
    test_powers_flush_subnormals();
    test_rows_that_packs_fit<float>();
    test_rows_that_packs_fit<__nv_bfloat16>();
    for (const auto order : {simt::Order::kRoundRobin, simt::Order::kReverse, simt::Order::kRandom}) {
        simt::config().order = order;
        test_shuffles();
        test_half_warps_with_disjoint_masks();
        test_barriers();
        test_block_reduce();
        test_mma_layout();
        test_ldmatrix_layout();
        test_cp_async();
        test_bytes_moved();
        test_misuse();
    }
    return emu_test::tally.finish();
}
