// mma.sync.m16n8k16 and ldmatrix, as warp collectives. Lane l has group g = l / 4 and column t = 2 (l % 4).
#include "simt.h"

namespace simt {

namespace {

constexpr int kLanes = 32;

typedef float Quad __attribute__((vector_size(16)));  // compiler vector, portable

// Registers of 16-bit pairs: element i of a fragment is half i % 2 of register i / 2.
uint16_t element(const uint32_t* registers, int i) { return static_cast<uint16_t>(registers[i / 2] >> (16 * (i % 2))); }

template <float (*Decode)(uint16_t)>
void mma_m16n8k16(void** operands, uint32_t mask) {
    if (mask != ~0u) fail("mma.sync needs the full warp");
    ++stats().mma;
    float a[16][16], b[16][8], c[16][8];
    for (int lane = 0; lane < kLanes; ++lane) {
        const Mma& mine = *static_cast<Mma*>(operands[lane]);
        const int g = lane / 4, t = lane % 4 * 2;
        // A, 8 elements: bit 0 of i picks the column, bit 1 rows 0-7 or 8-15, bit 2 columns 0-7 or 8-15.
        for (int i = 0; i < 8; ++i) a[g + 8 * (i / 2 % 2)][t + i % 2 + 8 * (i / 4)] = Decode(element(mine.a, i));
        for (int i = 0; i < 4; ++i) b[t + i % 2 + 8 * (i / 2)][g] = Decode(element(mine.b, i));
        for (int i = 0; i < 4; ++i) c[g + 8 * (i / 2)][t + i % 2] = mine.c[i];
    }
    for (int m = 0; m < 16; ++m) {
        Quad sums[2];
        std::memcpy(sums, c[m], sizeof(sums));
        for (int k = 0; k < 16; ++k) {
            Quad factors[2];
            std::memcpy(factors, b[k], sizeof(factors));
            sums[0] += a[m][k] * factors[0];
            sums[1] += a[m][k] * factors[1];
        }
        std::memcpy(c[m], sums, sizeof(sums));
    }
    for (int lane = 0; lane < kLanes; ++lane) {
        const int g = lane / 4, t = lane % 4 * 2;
        for (int i = 0; i < 4; ++i) static_cast<Mma*>(operands[lane])->d[i] = c[g + 8 * (i / 2)][t + i % 2];
    }
}

// The 8 rows of a matrix are read in one pass if they fall into 8 different groups of 4 banks.
void count_conflicts(void** operands, int matrix) {
    unsigned groups = 0;
    for (int row = 0; row < 8; ++row) {
        groups |=
            1u << (reinterpret_cast<uintptr_t>(static_cast<LoadMatrix*>(operands[matrix * 8 + row])->row) / 16 % 8);
    }
    stats().ldmatrix_conflicts += static_cast<uint64_t>(8 - __builtin_popcount(groups));
}

}  // namespace

void mma_m16n8k16_bf16(void** operands, uint32_t mask) { mma_m16n8k16<decode_bfloat16>(operands, mask); }
void mma_m16n8k16_f16(void** operands, uint32_t mask) { mma_m16n8k16<decode_half>(operands, mask); }

void load_matrix(void** operands, uint32_t mask) {
    if (mask != ~0u) fail("ldmatrix needs the full warp");
    const LoadMatrix& first = *static_cast<LoadMatrix*>(operands[0]);
    const int warp_start = running_thread() / kLanes * kLanes;
    uint16_t rows[kLanes][8];
    for (int lane = 0; lane < first.matrices * 8; ++lane) {  // lane i addresses row i % 8 of matrix i / 8
        const void* const row = static_cast<LoadMatrix*>(operands[lane])->row;
        require_shared(row, 16, "ldmatrix");
        if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix: row address is not 16-byte aligned");
        check::read(warp_start + lane, row, 16);
        std::memcpy(rows[lane], row, 16);
    }
    for (int matrix = 0; matrix < first.matrices; ++matrix) {
        count_conflicts(operands, matrix);
        for (int lane = 0; lane < kLanes; ++lane) {
            const int g = lane / 4, t = lane % 4 * 2;
            const uint16_t low = first.transposed ? rows[matrix * 8 + t][g] : rows[matrix * 8 + g][t];
            const uint16_t high = first.transposed ? rows[matrix * 8 + t + 1][g] : rows[matrix * 8 + g][t + 1];
            static_cast<LoadMatrix*>(operands[lane])->registers[matrix] = low | static_cast<uint32_t>(high) << 16;
        }
    }
}

}  // namespace simt
