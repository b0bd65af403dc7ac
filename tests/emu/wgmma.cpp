// wgmma.mma_async of the emulator: each warp computes its 16 rows of d. See async.h. Layouts: PTX ISA, sections on
// "Register Fragments and Shared Memory Matrix Layouts" of wgmma.
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "async.h"
#include "scheduler.h"
#include "simt.h"

namespace simt {
namespace {

constexpr int kLanes = 32, kRows = 16, kDepth = 16, kMaxColumns = 256;
constexpr uint32_t kPoison = 0xffbfffff;  // a signalling NaN, which any arithmetic changes

// The sums of a warp for one array of accumulators, while a wgmma writes it.
struct Sums {
    float* d[kLanes];
    int n;
    int uses = 0;  // of operations in flight
    std::vector<float> values;
};

struct Operation {
    Wgmma operands;
    const uint32_t* a[kLanes];
    uint32_t a_values[kLanes][4];
    std::shared_ptr<Sums> sums;
    bool computed = false;
};

struct WarpUnit {
    std::deque<std::vector<Operation>> groups;
    std::vector<Operation> open_group;
    std::vector<std::shared_ptr<Sums>> sums;
    bool fenced = false;
    size_t issued = 0;
};

struct Signature {
    uint64_t a, b;
    int n;
    bool registers, a_transposed, b_transposed, accumulate;
    bool operator==(const Signature& other) const {
        return a == other.a && b == other.b && n == other.n && registers == other.registers &&
               a_transposed == other.a_transposed && b_transposed == other.b_transposed &&
               accumulate == other.accumulate;
    }
};

std::vector<WarpUnit> units;
std::vector<std::vector<Signature>> issued;  // by each warpgroup, in order
std::mt19937_64 random_bits;

WarpUnit& unit() { return units[static_cast<size_t>(running_thread() / kLanes)]; }
int first_lane() { return running_thread() / kLanes * kLanes; }

// A matrix in shared memory. Rows are those of the dimension M or N, columns those of K.
struct Descriptor {
    uint32_t start, leading, stride;
    bool transposed;

    Descriptor(uint64_t bits, bool is_transposed)
        : start(static_cast<uint32_t>(bits & 0x3fff) << 4),
          leading(static_cast<uint32_t>(bits >> 16 & 0x3fff) << 4),
          stride(static_cast<uint32_t>(bits >> 32 & 0x3fff) << 4),
          transposed(is_transposed) {
        if (bits >> 62 != 1) fail("wgmma: the emulator supports descriptors with a 128-byte swizzle only");
        if (bits >> 49 & 7) fail("wgmma: the emulator supports descriptors with base offset 0 only");
        if (start >> 7 & 7) fail("wgmma: the matrix must start in the first row of a swizzled pattern of 1024 bytes");
    }
    // Address of 8 consecutive elements: columns of a row, or rows of a column if transposed.
    uint32_t chunk(int row, int column) const {
        uint32_t address = start;
        if (transposed) {
            address += static_cast<uint32_t>(row / 64) * leading + static_cast<uint32_t>(row % 64 * 2) +
                       static_cast<uint32_t>(column / 8) * stride + static_cast<uint32_t>(column % 8 * 128);
        } else {
            address += static_cast<uint32_t>(row / 8) * stride + static_cast<uint32_t>(row % 8 * 128 + column * 2);
        }
        return address ^ (address >> 7 & 7) << 4;
    }
};

// Calls body(row, column, 8 elements) for each chunk of rows [first, end).
template <class Body>
void for_each_chunk(const Descriptor& matrix, int first, int end, const Body& body) {
    const int row_step = matrix.transposed ? 8 : 1, column_step = matrix.transposed ? 1 : 8;
    for (int column = 0; column < kDepth; column += column_step) {
        for (int row = first; row < end; row += row_step) {
            body(row, column, window_data(matrix.chunk(row, column), 16, "wgmma"));
        }
    }
}

template <class Body>
void for_each_operand_chunk(const Operation& operation, int warp_in_group, const Body& body) {
    const Wgmma& of = operation.operands;
    if (!of.a) {
        for_each_chunk(Descriptor(of.a_descriptor, of.a_transposed), warp_in_group * kRows, (warp_in_group + 1) * kRows,
                       body);
    }
    for_each_chunk(Descriptor(of.b_descriptor, of.b_transposed), 0, of.n, body);
}

void load_a(const Operation& operation, int warp_in_group, float (&a)[kRows][kDepth]) {
    const Wgmma& of = operation.operands;
    if (!of.a) {
        const Descriptor matrix(of.a_descriptor, of.a_transposed);
        const int first = warp_in_group * kRows;
        for_each_chunk(matrix, first, first + kRows, [&](int row, int column, const char* data) {
            uint16_t elements[8];
            std::memcpy(elements, data, sizeof(elements));
            for (int i = 0; i < 8; ++i)
                a[row - first + (of.a_transposed ? i : 0)][column + (of.a_transposed ? 0 : i)] = of.decode(elements[i]);
        });
        return;
    }
    for (int lane = 0; lane < kLanes; ++lane) {  // as A of mma.m16n8k16
        const int g = lane / 4, t = lane % 4 * 2;
        for (int i = 0; i < 8; ++i) {
            a[g + 8 * (i / 2 % 2)][t + i % 2 + 8 * (i / 4)] =
                of.decode(static_cast<uint16_t>(operation.a_values[lane][i / 2] >> (16 * (i % 2))));
        }
    }
}

void compute(Operation& operation, int warp_in_group) {
    if (operation.computed) return;
    operation.computed = true;
    const Wgmma& of = operation.operands;
    static float b[kDepth][kMaxColumns];
    float a[kRows][kDepth];
    load_a(operation, warp_in_group, a);
    for_each_chunk(Descriptor(of.b_descriptor, of.b_transposed), 0, of.n, [&](int row, int column, const char* data) {
        uint16_t elements[8];
        std::memcpy(elements, data, sizeof(elements));
        for (int i = 0; i < 8; ++i)
            b[column + (of.b_transposed ? 0 : i)][row + (of.b_transposed ? i : 0)] = of.decode(elements[i]);
    });
    for (int m = 0; m < kRows; ++m) {
        float* const sums = operation.sums->values.data() + m * of.n;
        if (!of.accumulate) std::fill(sums, sums + of.n, 0.0f);
        for (int k = 0; k < kDepth; ++k) {
            for (int n = 0; n < of.n; ++n) sums[n] += a[m][k] * b[k][n];
        }
    }
}

// Element of a lane's accumulators -> row and column.
template <class Body>
void for_each_sum(int n, const Body& body) {
    for (int lane = 0; lane < kLanes; ++lane) {
        for (int i = 0; i < n / 2; ++i)
            body(lane, i, (lane / 4 + i / 2 % 2 * 8) * n + i / 4 * 8 + lane % 4 * 2 + i % 2);
    }
}

std::shared_ptr<Sums> sums_of(WarpUnit& warp, void** operands, int n) {
    const auto d_of = [&](int lane) { return static_cast<Wgmma*>(operands[lane])->d; };
    for (const auto& known : warp.sums) {
        if (known->d[0] == d_of(0) && known->n == n) return known;
        if (known->d[0] < d_of(0) + n / 2 && d_of(0) < known->d[0] + known->n / 2)
            fail("wgmma: its accumulators overlap with others in flight");
    }
    auto sums = std::make_shared<Sums>();
    sums->n = n;
    sums->values.resize(static_cast<size_t>(kRows * n));
    for (int lane = 0; lane < kLanes; ++lane) sums->d[lane] = d_of(lane);
    for_each_sum(n, [&](int lane, int i, int at) {
        sums->values[static_cast<size_t>(at)] = sums->d[lane][i];
        std::memcpy(sums->d[lane] + i, &kPoison, sizeof(kPoison));
    });
    warp.sums.push_back(sums);
    return sums;
}

void check_operands(void** operands) {
    const Wgmma& first = *static_cast<Wgmma*>(operands[0]);
    if (first.n % 8 || first.n < 8 || first.n > kMaxColumns) fail("wgmma: n must be a multiple of 8 up to 256");
    for (int lane = 1; lane < kLanes; ++lane) {
        const Wgmma& of = *static_cast<Wgmma*>(operands[lane]);
        if (of.a_descriptor != first.a_descriptor || of.b_descriptor != first.b_descriptor || of.n != first.n ||
            of.accumulate != first.accumulate || !of.a != !first.a)
            fail("wgmma: the lanes of a warp disagree on its operands");
    }
    const Signature signature{first.a ? 0 : first.a_descriptor,
                              first.b_descriptor,
                              first.n,
                              first.a != nullptr,
                              first.a_transposed,
                              first.b_transposed,
                              first.accumulate};
    auto& log = issued[static_cast<size_t>(running_thread() / (4 * kLanes))];
    const size_t index = unit().issued++;
    if (index == log.size()) log.push_back(signature);
    if (!(log[index] == signature)) fail("wgmma: the warps of a warpgroup disagree on its operands");
}

void issue(void** operands, uint32_t mask) {
    if (mask != ~0u) fail("wgmma needs the full warp");
    WarpUnit& warp = unit();
    if (!warp.fenced) fail("wgmma: the first one of a group needs a wgmma.fence before it");
    check_operands(operands);
    ++stats().wgmma;
    Operation operation;
    operation.operands = *static_cast<Wgmma*>(operands[0]);
    for (int lane = 0; lane < kLanes && operation.operands.a; ++lane) {
        operation.a[lane] = static_cast<Wgmma*>(operands[lane])->a;
        std::memcpy(operation.a_values[lane], operation.a[lane], sizeof(operation.a_values[lane]));
    }
    operation.sums = sums_of(warp, operands, operation.operands.n);
    ++operation.sums->uses;
    const int warp_in_group = running_thread() / kLanes % 4;
    for_each_operand_chunk(operation, warp_in_group,
                           [](int, int, const char* data) { check::async_read_begin(first_lane(), data, 16); });
    warp.open_group.push_back(operation);
    if (config().order == Order::kRandom && random_bits() % 2) {  // with all before it, whose sums it may add to
        for (auto& group : warp.groups) {
            for (Operation& earlier : group) compute(earlier, warp_in_group);
        }
        for (Operation& earlier : warp.open_group) compute(earlier, warp_in_group);
    }
}

void retire(WarpUnit& warp, Operation& operation) {
    const int warp_in_group = running_thread() / kLanes % 4;
    compute(operation, warp_in_group);
    for_each_operand_chunk(operation, warp_in_group,
                           [](int, int, const char* data) { check::async_read_end(first_lane(), data, 16); });
    for (int lane = 0; lane < kLanes && operation.operands.a; ++lane) {
        if (std::memcmp(operation.a[lane], operation.a_values[lane], sizeof(operation.a_values[lane])))
            fail("wgmma: an operand in registers changed before the wait");
    }
    Sums& sums = *operation.sums;
    if (--sums.uses) return;
    for_each_sum(sums.n, [&](int lane, int i, int at) {
        if (std::memcmp(sums.d[lane] + i, &kPoison, sizeof(kPoison)))
            fail("wgmma: an accumulator changed before the wait");
        sums.d[lane][i] = sums.values[static_cast<size_t>(at)];
    });
    for (size_t i = 0; i < warp.sums.size(); ++i) {
        if (warp.sums[i] == operation.sums) warp.sums.erase(warp.sums.begin() + static_cast<ptrdiff_t>(i));
    }
}

void retire_groups(void** operands, uint32_t mask) {
    if (mask != ~0u) fail("wgmma.wait_group needs the full warp");
    WarpUnit& warp = unit();
    if (!warp.open_group.empty()) fail("wgmma.wait_group: a wgmma before it has not been committed");
    while (static_cast<int>(warp.groups.size()) > *static_cast<int*>(operands[0])) {
        for (Operation& operation : warp.groups.front()) retire(warp, operation);
        warp.groups.pop_front();
    }
    warp.fenced = false;
}

}  // namespace

namespace wgmma {

void begin_block(int num_threads) {
    units.assign(static_cast<size_t>(num_threads + kLanes - 1) / kLanes, WarpUnit{});
    issued.assign(units.size() / 4 + 1, {});
    random_bits.seed(config().seed);
}

std::string in_flight_at_exit(int thread) {
    const WarpUnit& warp = units[static_cast<size_t>(thread / kLanes)];
    if (!warp.groups.empty() || !warp.open_group.empty()) return " exits with a wgmma in flight";
    const bool complete = warp.issued == issued[static_cast<size_t>(thread / (4 * kLanes))].size();
    return complete ? "" : " exits before its warp has issued all wgmma of its warpgroup";
}

}  // namespace wgmma

void wgmma_issue(const Wgmma& operands) {
    Wgmma mine = operands;
    warp_collective(issue, ~0u, &mine, "wgmma");
}

void wgmma_fence() {
    warp_collective([](void**, uint32_t) { unit().fenced = true; }, ~0u, nullptr, "wgmma.fence");
}

void wgmma_commit() {
    const auto commit = [](void**, uint32_t) {
        WarpUnit& warp = unit();
        warp.groups.push_back(std::exchange(warp.open_group, {}));
        warp.fenced = false;
    };
    warp_collective(commit, ~0u, nullptr, "wgmma.commit_group");
}

void wgmma_wait(int pending) { warp_collective(retire_groups, ~0u, &pending, "wgmma.wait_group"); }

}  // namespace simt
