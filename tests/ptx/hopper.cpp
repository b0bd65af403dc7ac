// Instructions of sm_90a: mbarriers, bulk tensor copies, proxy fences, wgmma and setmaxnreg, as the emulator has them
// (tests/emu/async.h).
#include "async.h"
#include "forms.h"

namespace ptx {
namespace {

char* shared_data(Thread& t, const Instruction& i, int at, size_t bytes) {
    return t.shared_at(i, t.at<uint32_t>(i.operands[at]) + static_cast<uint32_t>(i.operands[at + 1]), bytes);
}

uint64_t* mbarrier(Thread& t, const Instruction& i, int at) {
    return reinterpret_cast<uint64_t*>(shared_data(t, i, at, sizeof(uint64_t)));
}

const Instruction* initialise(Thread& t, const Instruction& i) {
    simt::mbarrier_init(mbarrier(t, i, 0), t.at<int32_t>(i.operands[2]));
    return &i + 1;
}

const Instruction* fence_initialisation(Thread&, const Instruction& i) {
    simt::fence_mbarrier_init();
    return &i + 1;
}

template <bool kExpects>
const Instruction* arrive(Thread& t, const Instruction& i) {
    simt::mbarrier_arrive(mbarrier(t, i, 0), kExpects ? t.at<uint32_t>(i.operands[2]) : 0);
    return &i + 1;
}

// PTX leaves the time limit of a try_wait to the machine. Here the first one returns at once, and the next one waits.
const Instruction* try_wait(Thread& t, const Instruction& i) {
    uint64_t* const barrier = mbarrier(t, i, 1);
    const auto parity = t.at<uint32_t>(i.operands[3]);
    const bool waits = t.timed_out || simt::mbarrier_test(barrier, parity);
    if (waits) simt::mbarrier_wait(barrier, parity);
    t.timed_out = !waits;
    t.at<Predicate>(i.operands[0]) = waits;
    return &i + 1;
}

const Instruction* fence_proxy(Thread&, const Instruction& i) {
    simt::fence_proxy_async();
    return &i + 1;
}

// The tensor map must be a kernel parameter, as with __grid_constant__.
const Instruction* copy_box(Thread& t, const Instruction& i) {
    const uint64_t map = t.at<uint64_t>(i.operands[2]) + static_cast<uint64_t>(int64_t{i.operands[3]});
    const auto first = reinterpret_cast<uint64_t>(t.machine.parameter_data());
    if (map < first || map + sizeof(simt::TensorMap) > first + t.machine.kernel.parameter_bytes)
        t.fail(i, "a tensor map that is not a kernel parameter");
    int coordinates[4];
    for (int k = 0; k < 4; ++k) coordinates[k] = t.at<int32_t>(i.operands[4 + k]);
    simt::bulk_load(shared_data(t, i, 0, 16), reinterpret_cast<const simt::TensorMap*>(map), mbarrier(t, i, 8),
                    coordinates, 4);
    return &i + 1;
}

template <bool kIncrease>
const Instruction* set_registers(Thread& t, const Instruction& i) {
    require_converged(t, i);
    simt::set_registers(t.at<int32_t>(i.operands[0]), kIncrease);
    return &i + 1;
}

const Instruction* fence_registers(Thread& t, const Instruction& i) {
    require_converged(t, i);
    simt::wgmma_fence();
    return &i + 1;
}

const Instruction* commit(Thread& t, const Instruction& i) {
    require_converged(t, i);
    simt::wgmma_commit();
    t.products.commit();
    return &i + 1;
}

const Instruction* wait(Thread& t, const Instruction& i) {
    require_converged(t, i);
    const int pending = t.at<int32_t>(i.operands[0]);
    t.products.load(t);
    simt::wgmma_wait(pending);
    t.products.store(t);
    t.products.retire(pending);
    return &i + 1;
}

// wgmma.mma_async. Its operands: d, a, b, the predicate of accumulation, scales of a and b, and whether A, if it is in
// shared memory, and B are transposed.
template <int kColumns, bool kBfloat16, bool kOperandInRegisters>
const Instruction* multiply(Thread& t, const Instruction& i) {
    require_converged(t, i);
    constexpr int kSums = kColumns / 2;
    const int32_t* const a = i.operands + kSums;
    const int32_t* const b = a + (kOperandInRegisters ? 4 : 1);
    if (t.at<int32_t>(b[2]) != 1 || t.at<int32_t>(b[3]) != 1) t.fail(i, "a negated operand; want=scales of 1");
    const auto transposed = [&](int at) {
        const auto value = t.at<uint32_t>(b[at]);
        if (value > 1) t.fail(i, "a transposition that is neither 0 nor 1");
        return value == 1;
    };
    auto* const product = t.products.issue(t, i.operands, kSums, kOperandInRegisters ? a : nullptr);
    if (!product) t.fail(i, "accumulators that are in part those of another wgmma in flight");
    simt::Wgmma operands{};
    operands.d = product->sums->values.data();
    operands.a = kOperandInRegisters ? product->operand : nullptr;
    operands.a_descriptor = kOperandInRegisters ? 0 : t.at<uint64_t>(a[0]);
    operands.b_descriptor = t.at<uint64_t>(b[0]);
    operands.n = kColumns;
    operands.a_transposed = !kOperandInRegisters && transposed(4);
    operands.b_transposed = transposed(kOperandInRegisters ? 4 : 5);
    operands.accumulate = t.at<Predicate>(b[1]);
    operands.decode = kBfloat16 ? simt::decode_bfloat16 : simt::decode_half;
    simt::wgmma_issue(operands);
    t.products.store(t);
    return &i + 1;
}

template <int kColumns, bool kBfloat16>
void add_products(Forms& forms) {
    const std::string type = kBfloat16 ? ".bf16.bf16" : ".f16.f16";
    const std::string opcode = "wgmma.mma_async.sync.aligned.m64n" + std::to_string(kColumns) + "k16.f32" + type;
    const std::string sums = "{" + std::string(kColumns / 2, 'w') + "}";
    forms.add(opcode, sums + "xxpwwww", multiply<kColumns, kBfloat16, false>);
    forms.add(opcode, sums + "{wwww}xpwww", multiply<kColumns, kBfloat16, true>);
}

}  // namespace

void add_hopper(Forms& forms) {
    forms.add("mbarrier.init.shared::cta.b64", "Sw", initialise);
    forms.add("fence.mbarrier_init.release.cluster", "", fence_initialisation);
    forms.add("mbarrier.arrive.release.cta.shared::cta.b64", "_S", arrive<false>);
    forms.add("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64", "_Sw", arrive<true>);
    forms.add("mbarrier.try_wait.parity.acquire.cta.shared::cta.b64", "pSw", try_wait);
    forms.add("fence.proxy.async.shared::cta", "", fence_proxy);
    forms.add("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes", "ST{wwww}S",
              copy_box);
    forms.add("setmaxnreg.inc.sync.aligned.u32", "w", set_registers<true>);
    forms.add("setmaxnreg.dec.sync.aligned.u32", "w", set_registers<false>);
    forms.add("wgmma.fence.sync.aligned", "", fence_registers);
    forms.add("wgmma.commit_group.sync.aligned", "", commit);
    forms.add("wgmma.wait_group.sync.aligned", "w", wait);
    add_products<64, true>(forms);
    add_products<64, false>(forms);
    add_products<128, true>(forms);
    add_products<128, false>(forms);
}

}  // namespace ptx
