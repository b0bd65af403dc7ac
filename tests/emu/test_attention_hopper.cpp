// The Hopper kernels of attention against fp64: every mask they take, grouped heads, splits of the keys, and what they
// refuse. The same bits in every schedule, and only tiles with a visible pair are multiplied.
#include "attention_case.h"

namespace {

using emu_test::Case;
using emu_test::Expected;
using emu_test::Run;
using emu_test::with;

// {batch, queries, keys, groups, heads, dim}, causal
std::vector<Case> cases() {
    return {{1, 1, 1, 1, 1, 64},
            {1, 129, 129, 2, 1, 64},
            {1, 130, 700, 1, 1, 128},  // more tiles than slots of the ring
            {1, 130, 600, 1, 1, 64},
            {1, 200, 17, 1, 1, 128},  // a block of rows sees no key
            {2, 1, 600, 1, 4, 64},    // decoding: splits of the keys
            {1, 70, 70, 1, 3, 128},   // a block starts in the middle of a group of heads
            with({1, 150, 270, 1, 1, 64}, [](Case& c) { c.window = 100; }),
            with({2, 150, 150, 1, 2, 128}, [](Case& c) { c.boundaries = {40, 41, 131}; }),
            with({1, 300, 300, 1, 1, 64}, [](Case& c) { c.causal = false, c.boundaries = {100, 290}; }),
            // maxima that grow from tile to tile
            with({1, 64, 400, 1, 1, 64}, [](Case& c) { c.scale = 1.5f, c.causal = false, c.gap = 8; })};
}

// lse where it is finite; rows without keys have minus infinity.
void check_lse(const emu_test::Buffer<float>& got, const std::vector<double>& expected, const std::string& what) {
    size_t wrong = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
        if (std::isinf(expected[i])) {
            wrong += !std::isinf(got[i]) || got[i] > 0;
        } else {
            wrong += !(std::abs(static_cast<double>(got[i]) - expected[i]) <= 1e-4);
        }
    }
    emu_test::tally.check(wrong == 0, (what + " lse").c_str(), __FILE__, __LINE__);
}

template <class T>
void check(Case c, size_t index) {
    static std::vector<Expected> known;  // of every case, computed once for all schedules
    const std::string what = "hopper case " + std::to_string(index) + " " + emu_test::name_of<T>();
    c.hopper = true;
    simt::config().multiprocessors = c.queries == 1 ? 4 : 1;  // splits of the keys for decoding, none for two blocks
    Run<T> run(c);
    if (known.size() <= index) known.resize(index + 1);
    if (known[index].out.empty()) known[index] = expected_of(run);
    run.forward();
    EXPECT_NEAR(run.out, known[index].out, what + " out");
    check_lse(run.lse, known[index].lse, what);
    EXPECT_SAME_BITS(run.out, what + " out");
    run.backward(false);
    EXPECT_NEAR(run.dqkv, known[index].dqkv, what + " dqkv");
}

// Only tiles with a visible pair are multiplied. Forward: per warp, kDim / 16 products for the scores of 128 keys and 8
// for the values. Backward: per warp and 64 rows, 2 kDim / 16 for p and dp, 2 x 4 for dv and dk; per warp and tile, 8
// for dq.
void work(Case c, uint64_t tiles, uint64_t backward_tiles) {
    c.hopper = true;
    Run<__nv_bfloat16> run(c);
    uint64_t before = simt::stats().wgmma;
    run.forward();
    const auto steps = static_cast<uint64_t>(c.dim / 16), row_steps = static_cast<uint64_t>(c.dim == 64 ? 2 : 1);
    EXPECT(simt::stats().wgmma - before == tiles * 8 * (steps + 8));
    before = simt::stats().wgmma;
    run.backward(false);
    EXPECT(simt::stats().wgmma - before == backward_tiles * 8 * (row_steps * (2 * steps + 8) + 8));
}

std::string refusal(const Case& of, void (*change)(neox::Attention&)) {
    Run<__nv_bfloat16> run(of);
    neox::Attention in = run.task();
    in.hopper = true;
    change(in);
    const char* const problem = neox::attention_hopper_problem_cuda(in);
    const char* const launched = neox::attention_forward_cuda(in, run.out.data(), run.lse.data(), nullptr, nullptr);
    EXPECT(!problem || (launched && !std::strcmp(problem, launched)));
    return problem ? problem : "";
}

void refusals() {
    const Case good{1, 4, 4, 1, 1, 64};
    const auto names = [&](const char* word, void (*change)(neox::Attention&)) {
        emu_test::tally.check(refusal(good, change).find(word) != std::string::npos, word, __FILE__, __LINE__);
    };
    names("head_dim must be 64 or 128", [](neox::Attention& in) { in.head_dim = 56; });
    names("bfloat16 or float16", [](neox::Attention& in) { in.dtype = neox::DType::kFloat32; });
    names("softcap", [](neox::Attention& in) { in.softcap = 30.0f; });
    names("scale that is not positive", [](neox::Attention& in) { in.scale = -1.0f; });
    names("multiples of 16 bytes", [](neox::Attention& in) { in.k = static_cast<const char*>(in.k) + 2; });
    names("multiples of 16 bytes", [](neox::Attention& in) { in.v_strides.sequence = 68; });
    names("must not be expanded", [](neox::Attention& in) { in.k_strides.sequence = 0; });
    names("must not be expanded", [](neox::Attention& in) { in.batch = 2, in.v_strides.batch = 0; });
    simt::config().compute_capability = 8;
    names("compute capability 9.0", [](neox::Attention&) {});
    simt::config().compute_capability = 9;
}

void values() {
    size_t index = 0;
    for (const Case& c : cases()) {
        if (index % 3 == 1) {
            check<__half>(c, index);
        } else {
            check<__nv_bfloat16>(c, index);
        }
        ++index;
    }
    simt::config().multiprocessors = 4;
    work({1, 300, 300, 1, 1, 64}, 6, 6);
    work(with({1, 384, 400, 1, 1, 128}, [](Case& c) { c.window = 60; }), 8, 11);
    work(with({1, 384, 384, 1, 1, 64}, [](Case& c) { c.boundaries = {128, 256}; }), 3, 3);
    refusals();
}

// Three tiles of keys with documents, head_dim 64.
void sample() {
    check<__nv_bfloat16>(with({1, 140, 300, 1, 1, 64}, [](Case& c) { c.boundaries = {40, 200}; }), cases().size());
    simt::config().multiprocessors = 4;
}

const emu_test::Operator registered{"attention_hopper", values, nullptr, nullptr, sample};

}  // namespace
