// Barriers, shuffles, votes, matrix instructions and the groups of cp.async, as the emulator has them.
#include "forms.h"

namespace ptx {
namespace {

// shfl.sync: c holds the last lane of a segment in bits 0-4, and the mask that gives its first lane in bits 8-12. A
// lane whose source is outside its segment gets its own value, and the predicate is false.
template <bool kXor>
const Instruction* shuffle(Thread& t, const Instruction& i) {
    const auto value = t.at<uint32_t>(i.operands[2]), by = t.at<uint32_t>(i.operands[3]) & 31,
               c = t.at<uint32_t>(i.operands[4]), mask = t.at<uint32_t>(i.operands[5]);
    const auto lane = static_cast<uint32_t>(simt::lane_id());
    const uint32_t segment = c >> 8 & 31, last = (lane & segment) | (c & 31 & ~segment);
    const uint32_t wanted = kXor ? lane ^ by : (lane & segment) | (by & ~segment);
    const bool inside = wanted <= last;
    const auto source = static_cast<int>(inside ? wanted : lane);
    t.at<uint32_t>(i.operands[0]) = simt::shuffle(mask, value, source, kXor ? "shfl.sync.bfly" : "shfl.sync.idx");
    t.at<Predicate>(i.operands[1]) = inside;
    return &i + 1;
}

const Instruction* vote_any(Thread& t, const Instruction& i) {
    const uint32_t mask = t.at<uint32_t>(i.operands[2]);
    t.at<Predicate>(i.operands[0]) = simt::ballot(mask, t.at<Predicate>(i.operands[1]), "vote.sync.any") != 0;
    return &i + 1;
}

const Instruction* vote_ballot(Thread& t, const Instruction& i) {
    const uint32_t mask = t.at<uint32_t>(i.operands[2]);
    t.at<uint32_t>(i.operands[0]) = simt::ballot(mask, t.at<Predicate>(i.operands[1]), "vote.sync.ballot");
    return &i + 1;
}

const Instruction* warp_barrier(Thread& t, const Instruction& i) {
    simt::sync_warp(t.at<uint32_t>(i.operands[0]));
    return &i + 1;
}

// bar.sync a{, b}, which is barrier.sync.aligned: the lanes of a warp arrive together.
template <bool kCounted>
const Instruction* barrier(Thread& t, const Instruction& i) {
    require_converged(t, i);
    const auto id = t.at<int32_t>(i.operands[0]);
    const int count = kCounted ? t.at<int32_t>(i.operands[1]) : -1;
    if (kCounted && count < 0) t.fail(i, "a negative number of threads");
    simt::block_barrier(id, count, false, "bar.sync");
    return &i + 1;
}

template <simt::WarpFunction kMultiply>
const Instruction* multiply(Thread& t, const Instruction& i) {
    require_converged(t, i);
    float c[4], d[4];
    uint32_t a[4], b[2];
    for (int k = 0; k < 4; ++k) a[k] = t.at<uint32_t>(i.operands[4 + k]);
    for (int k = 0; k < 2; ++k) b[k] = t.at<uint32_t>(i.operands[8 + k]);
    for (int k = 0; k < 4; ++k) c[k] = t.at<float>(i.operands[10 + k]);
    simt::Mma operands{d, a, b, c};
    simt::warp_collective(kMultiply, ~0u, &operands, "mma.sync");
    for (int k = 0; k < 4; ++k) t.at<float>(i.operands[k]) = d[k];
    return &i + 1;
}

template <bool kTransposed>
const Instruction* load_matrices(Thread& t, const Instruction& i) {
    require_converged(t, i);
    const uint32_t address = t.at<uint32_t>(i.operands[4]) + static_cast<uint32_t>(i.operands[5]);
    uint32_t loaded[4];
    simt::LoadMatrix operands{t.shared_at(i, address, 16), loaded, 4, kTransposed};
    simt::warp_collective(simt::load_matrix, ~0u, &operands, "ldmatrix");
    for (int k = 0; k < 4; ++k) t.at<uint32_t>(i.operands[k]) = loaded[k];
    return &i + 1;
}

const Instruction* commit(Thread&, const Instruction& i) {
    simt::cp_async_commit();
    return &i + 1;
}

const Instruction* wait(Thread& t, const Instruction& i) {
    simt::cp_async_wait(t.at<int32_t>(i.operands[0]));
    return &i + 1;
}

}  // namespace

void add_collectives(Forms& forms) {
    forms.add("shfl.sync.bfly.b32", "w|pwwww", shuffle<true>);
    forms.add("shfl.sync.idx.b32", "w|pwwww", shuffle<false>);
    forms.add("vote.sync.any.pred", "ppw", vote_any);
    forms.add("vote.sync.ballot.b32", "wpw", vote_ballot);
    forms.add("bar.warp.sync", "w", warp_barrier);
    forms.add("bar.sync", "w", barrier<false>);
    forms.add("bar.sync", "ww", barrier<true>);
    constexpr char kOperands[] = "{wwww}{wwww}{ww}{wwww}";
    forms.add("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", kOperands, multiply<simt::mma_m16n8k16_bf16>);
    forms.add("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", kOperands, multiply<simt::mma_m16n8k16_f16>);
    forms.add("ldmatrix.sync.aligned.m8n8.x4.shared.b16", "{wwww}S", load_matrices<false>);
    forms.add("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", "{wwww}S", load_matrices<true>);
    forms.add("cp.async.commit_group", "", commit);
    forms.add("cp.async.wait_group", "w", wait);
}

}  // namespace ptx
