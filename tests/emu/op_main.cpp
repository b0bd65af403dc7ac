// Runs the linked operator tests: test_ops_<variant> [OP] [--all|--bytes].
#include <algorithm>
#include <cstring>

#include "op_test.h"

namespace {

// Orders of threads and blocks. One is enough for the race checker and the sanitizers, which see every access in any
// order.
std::vector<simt::Order> schedules() {
#if defined(__SANITIZE_ADDRESS__)
    return {simt::Order::kRoundRobin};
#else
    if (simt::check::kEnabled) return {simt::Order::kRandom};
    return {simt::Order::kRoundRobin, simt::Order::kReverse, simt::Order::kRandom};
#endif
}

void run(const char* operator_name, void (*test)()) {
    const std::string error = emu_test::error_of(test);
    emu_test::tally.check(error.empty(), operator_name, __FILE__, __LINE__, error);
}

}  // namespace

int main(int argc, char** argv) {
    const bool bytes_only = argc > 1 && !std::strcmp(argv[argc - 1], "--bytes"),
               all = argc > 1 && !std::strcmp(argv[argc - 1], "--all");
    const char* const only = argc > 1 && argv[1][0] != '-' ? argv[1] : nullptr;
    auto operators = emu_test::Operator::all();
    std::sort(operators.begin(), operators.end(), [](auto* a, auto* b) { return std::strcmp(a->name, b->name) < 0; });
    if (bytes_only)
        std::printf("%-36s %-28s %12s %12s %7s\n", "bytes of global memory", "setting", "moved", "floor", "ratio");
    for (const emu_test::Operator* op : operators) {
        if (only && std::strcmp(only, op->name)) continue;
        if (!bytes_only) {
            for (const simt::Order order : schedules()) {
                simt::config().order = order;
                run(op->name, op->values);
                if (all && op->instances) run(op->name, op->instances);
            }
        }
        simt::config().order = simt::Order::kRoundRobin;
        if (simt::check::kEnabled && bytes_only && op->bytes) run(op->name, op->bytes);
    }
    if (!emu_test::tally.passed && !emu_test::tally.failed)
        emu_test::tally.check(false, "no operator of this name", __FILE__, __LINE__, only ? only : "");
    return emu_test::tally.finish();
}
