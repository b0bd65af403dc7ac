// The registers of a thread that wgmma reads and writes while it is in flight.
//
// The emulator's wgmma (tests/emu/wgmma.cpp) works on arrays: accumulators that are NaN until the wait, operands that
// must not change before it. In PTX both are registers, in any order. Each product in flight has arrays here, which are
// copied from and to its registers at every wgmma instruction.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

namespace ptx {

struct Thread;

class Products {
  public:
    // Accumulators of products in flight.
    struct Sums {
        const int32_t* registers;  // offsets from Thread::registers, `values.size()` of them
        std::vector<float> values;
        int uses = 0;  // of products in flight
    };
    struct Product {
        std::shared_ptr<Sums> sums;
        const int32_t* operand_registers;  // of A; null if it is in shared memory
        uint32_t operand[4];
    };

    // Adds a product to the open group and loads its arrays. Null if it shares some, but not all, of its accumulators
    // with another product in flight.
    Product* issue(const Thread& thread, const int32_t* sums, size_t count, const int32_t* operand);
    void commit();
    void load(const Thread& thread);         // from registers to arrays, before the emulator reads them
    void store(const Thread& thread) const;  // from arrays to registers
    void retire(int pending);                // forgets the groups that a wait for `pending` groups has completed

  private:
    using Group = std::vector<std::unique_ptr<Product>>;

    std::vector<std::shared_ptr<Sums>> sums_;
    Group open_;
    std::deque<Group> groups_;
};

}  // namespace ptx
