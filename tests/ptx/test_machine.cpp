// The PTX machine against the PTX ISA: one small kernel per rule that is easy to get wrong, and one per error that it
// must find.
#include <cmath>
#include <vector>

#include "expect.h"
#include "machine.h"
#include "parser.h"

namespace {

using simt::bits_of;
using Words = std::vector<uint32_t>;

constexpr char kHead[] = ".version 9.0\n.target sm_90a\n.address_size 64\n";
constexpr char kRegisters[] =
    ".reg .pred %p<8>;\n.reg .b16 %rs<8>;\n.reg .b32 %r<16>;\n.reg .f32 %f<8>;\n.reg .b64 %rd<8>;\n"
    "ld.param.u64 %rd1, [k_param_0];\nld.param.u64 %rd2, [k_param_1];\n";

std::string kernel_text(const std::string& body, const std::string& limits = "", const std::string& before = "") {
    return kHead + before + ".visible .entry k(\n.param .u64 k_param_0,\n.param .u64 k_param_1\n)\n" + limits + "{\n" +
           kRegisters + body + "\nret;\n}\n";
}

// Runs a kernel with one block. %rd1 points to `out`, %rd2 to `in`.
void run(const std::string& text, Words& out, Words& in, unsigned threads = 32, size_t shared_bytes = 0) {
    const auto kernels = ptx::parse("k.ptx", text);
    uint32_t *out_data = out.data(), *in_data = in.data();
    simt::add_memory(out_data, 4 * out.size(), "out");
    simt::add_memory(in_data, 4 * in.size(), "in");
    struct Cleanup {
        const void *out, *in;
        ~Cleanup() { simt::remove_memory(out), simt::remove_memory(in); }
    } cleanup{out_data, in_data};
    ptx::run(*kernels.at(0), {nullptr, dim3(1), dim3(threads), shared_bytes, {{&out_data, 8}, {&in_data, 8}}});
}

// The value of %r1 at the end of a body.
uint32_t result(const std::string& body) {
    Words out(1), in{0x3f800000, 0x40000000, 0xffffffff, 7};
    run(kernel_text(body + "\nst.global.u32 [%rd1], %r1;"), out, in, 1);
    return out[0];
}

// The value of %f1 at the end of a body that may use two inputs as %f2 and %f3.
float result(const std::string& body, float a, float b = 0) {
    Words out(1), in{bits_of(a), bits_of(b)};
    run(kernel_text("ld.global.f32 %f2, [%rd2];\nld.global.f32 %f3, [%rd2+4];\n" + body +
                    "\nst.global.f32 [%rd1], %f1;"),
        out, in, 1);
    return simt::float_of(out[0]);
}

bool holds(const std::string& comparison, float a, float b) {
    return result(comparison + " %p1, %f2, %f3;\nselp.f32 %f1, 0f3F800000, 0f00000000, %p1;", a, b) == 1.0f;
}

std::string error(const std::string& body, unsigned threads = 32, size_t shared_bytes = 0) {
    Words out(64), in(64);
    return emu_test::error_of([&] { run(kernel_text(body), out, in, threads, shared_bytes); });
}

#define EXPECT_FAILS(message, word) \
    emu_test::tally.check((message).find(word) != std::string::npos, word, __FILE__, __LINE__, message)

void integers() {
    EXPECT(result("mov.u32 %r2, -1;\nsetp.lt.s32 %p1, %r2, 1;\nselp.b32 %r1, 1, 0, %p1;") == 1);
    EXPECT(result("mov.u32 %r2, -1;\nsetp.lt.u32 %p1, %r2, 1;\nselp.b32 %r1, 1, 0, %p1;") == 0);
    EXPECT(result("mov.u32 %r2, 5;\nshl.b32 %r1, %r2, 32;") == 0);
    EXPECT(result("mov.u32 %r2, -5;\nshr.u32 %r1, %r2, 33;") == 0);
    EXPECT(result("mov.u32 %r2, -5;\nshr.s32 %r1, %r2, 40;") == ~0u);
    EXPECT(result("mov.u32 %r2, -8;\nshr.s32 %r1, %r2, 1;") == static_cast<uint32_t>(-4));
    EXPECT(result("mov.u32 %r2, -2;\nmul.hi.s32 %r1, %r2, 3;") == ~0u);
    EXPECT(result("mov.u32 %r2, -2;\nmul.hi.u32 %r1, %r2, 3;") == 2);
    EXPECT(result("mov.u32 %r2, -2;\nmul.wide.s32 %rd3, %r2, 3;\nshr.u64 %rd4, %rd3, 32;\ncvt.u32.u64 %r1, %rd4;") ==
           ~0u);
    EXPECT(result("mov.u32 %r2, -2;\nmul.wide.u32 %rd3, %r2, 3;\nshr.u64 %rd4, %rd3, 32;\ncvt.u32.u64 %r1, %rd4;") ==
           2);
    EXPECT(result("mov.u32 %r2, 7;\nmad.lo.s32 %r1, %r2, -3, 1;") == static_cast<uint32_t>(-20));
    EXPECT(result("mov.u32 %r2, -2147483648;\nmov.u32 %r3, -1;\ndiv.s32 %r1, %r2, %r3;") == 0x80000000);
    EXPECT(result("mov.u32 %r2, -7;\nrem.s32 %r1, %r2, 4;") == static_cast<uint32_t>(-3));
    EXPECT_FAILS(error("mov.u32 %r2, 0;\ndiv.u32 %r1, 5, %r2;"), "division by zero");
    EXPECT(result("mov.u32 %r2, -1;\ncvt.s64.s32 %rd3, %r2;\nshr.u64 %rd4, %rd3, 60;\ncvt.u32.u64 %r1, %rd4;") == 15);
    EXPECT(result("mov.u32 %r2, -1;\ncvt.u64.u32 %rd3, %r2;\nshr.u64 %rd4, %rd3, 60;\ncvt.u32.u64 %r1, %rd4;") == 0);
    EXPECT(result("mov.u32 %r2, 6;\nbrev.b32 %r1, %r2;") == 0x60000000);
    EXPECT(result("mov.u32 %r2, 6;\nbfind.shiftamt.u32 %r1, %r2;") == 29);
    EXPECT(result("mov.u32 %r2, 0;\nbfind.shiftamt.u32 %r1, %r2;") == ~0u);
    EXPECT(result("mov.u32 %r2, 5;\nmov.u32 %r3, -1;\nbfi.b32 %r1, %r2, %r3, 4, 8;") == 0xfffff05f);
    EXPECT(result("mov.u32 %r2, 5;\nmov.u32 %r3, -1;\nbfi.b32 %r1, %r2, %r3, 32, 8;") == ~0u);
}

void registers() {
    // the first of a pair is the lower half, in both directions
    EXPECT(result("mov.b32 {%rs1, %rs2}, 65538;\nmov.b32 %r1, {%rs2, %rs1};") == 0x00020001);
    EXPECT(result("mov.u64 %rd3, 4294967298;\n{\n.reg .b32 %temp;\nmov.b64 {%temp, %r1}, %rd3;\n}") == 1);
    EXPECT(result("mov.u64 %rd3, 4294967298;\n{ .reg .b32 %temp; mov.b64 {%r1, %temp}, %rd3; }") == 2);
    EXPECT(result("ld.global.nc.u8 %r1, [%rd2+8];") == 255);
    // a register may be wider than the type: loads extend, stores and conversions take the low bits
    EXPECT(result("ld.global.s8 %rd3, [%rd2+8];\nshr.u64 %rd4, %rd3, 60;\ncvt.u32.u64 %r1, %rd4;") == 15);
    EXPECT(result("ld.global.u16 %rd3, [%rd2+8];\nshr.u64 %rd4, %rd3, 16;\ncvt.u32.u64 %r1, %rd4;") == 0);
    EXPECT(
        result("mov.u64 %rd3, 4294967290;\ncvt.s64.s32 %rd4, %rd3;\nshr.s64 %rd5, %rd4, 1;\ncvt.u32.u64 %r1, %rd5;") ==
        static_cast<uint32_t>(-3));
    EXPECT(result("mov.u32 %r1, 0;\nmov.u32 %r2, 327685;\nst.global.u16 [%rd2], %r2;\nld.global.u16 %r1, [%rd2];") ==
           5);
    EXPECT(result("mov.pred %p1, -1;\nmov.pred %p2, 0;\nnot.pred %p3, %p2;\nand.pred %p4, %p1, %p3;\nselp.b32 %r1, 3, "
                  "4, %p4;") == 3);
}

void floats() {
    const float nan = NAN, inf = INFINITY;
    EXPECT(result("max.f32 %f1, %f2, %f3;", nan, 1) == 1 && result("min.f32 %f1, %f2, %f3;", 1, nan) == 1);
    EXPECT(bits_of(result("max.f32 %f1, %f2, %f3;", nan, nan)) == 0x7fffffff);
    EXPECT(!std::signbit(result("max.f32 %f1, %f2, %f3;", -0.0f, 0.0f)));
    EXPECT(std::signbit(result("min.f32 %f1, %f2, %f3;", 0.0f, -0.0f)));
    // one rounding: (1 + e)(1 - e) - 1 = -e^2
    EXPECT(result("fma.rn.f32 %f1, %f2, %f3, 0fBF800000;", 1 + 0x1p-13f, 1 - 0x1p-13f) == -0x1p-26f);
    EXPECT(result("mul.f32 %f4, %f2, %f3;\nadd.f32 %f1, %f4, 0fBF800000;", 1 + 0x1p-13f, 1 - 0x1p-13f) == 0);
    EXPECT(result("ex2.approx.ftz.f32 %f1, %f2;", -130) == 0 && result("ex2.approx.f32 %f1, %f2;", -130) == 0x1p-130f);
    EXPECT(result("ex2.approx.ftz.f32 %f1, %f2;", -inf) == 0 &&
           std::isnan(result("ex2.approx.ftz.f32 %f1, %f2;", nan)));
    EXPECT(result("rcp.approx.ftz.f32 %f1, %f2;", 0x1p-130f) == inf &&
           result("rcp.approx.ftz.f32 %f1, %f2;", 0x1p127f) == 0);
    EXPECT(result("rcp.rn.f32 %f1, %f2;", 0x1p127f) == 0x1p-127f);
    EXPECT(result("div.approx.f32 %f1, %f2, %f3;", 1, 0x1.8p126f) == 0 &&
           result("div.rn.f32 %f1, %f2, %f3;", 1, 0x1.8p126f) > 0);
    EXPECT(result("mul.f32 %f1, %f2, %f3;", 0x1p-130f, 1) == 0x1p-130f);  // no .ftz
}

void comparisons() {
    for (const float a : {1.0f, NAN}) {
        const bool number = a == a;
        EXPECT(holds("setp.eq.f32", a, 1) == number && holds("setp.equ.f32", a, 1));
        EXPECT(!holds("setp.ne.f32", a, 1) && holds("setp.neu.f32", a, 1) == !number);
        EXPECT(!holds("setp.lt.f32", a, 1) && holds("setp.ltu.f32", a, 1) == !number);
        EXPECT(holds("setp.le.f32", a, 1) == number && holds("setp.leu.f32", a, 1));
        EXPECT(!holds("setp.gt.f32", a, 1) && holds("setp.gtu.f32", a, 1) == !number);
        EXPECT(holds("setp.ge.f32", a, 1) == number && holds("setp.geu.f32", a, 1));
        EXPECT(holds("setp.num.f32", a, 1) == number && holds("setp.nan.f32", a, 1) == !number);
    }
}

void conversions() {
    const std::string inputs = "ld.global.f32 %f2, [%rd2];\nld.global.f32 %f3, [%rd2+4];\n";  // 1 and 2
    EXPECT(result(inputs + "cvt.rn.bf16x2.f32 %r1, %f2, %f3;") == 0x3f804000);
    EXPECT(result(inputs + "cvt.rn.f16x2.f32 %r1, %f2, %f3;") == 0x3c004000);
    // to nearest even: 1 + 2^-8 is between two bf16 numbers; NaN is canonical
    EXPECT(result("mov.f32 %f2, 0f3F808000;\ncvt.rn.bf16.f32 %rs1, %f2;\ncvt.u32.u16 %r1, %rs1;") == 0x3f80);
    EXPECT(result("mov.f32 %f2, 0f3F818000;\n{ cvt.rn.bf16.f32 %rs1, %f2;}\ncvt.u32.u16 %r1, %rs1;") == 0x3f82);
    EXPECT(result("mov.f32 %f2, 0fFFC12345;\ncvt.rn.bf16.f32 %rs1, %f2;\ncvt.u32.u16 %r1, %rs1;") == 0x7fff);
    EXPECT(result("mov.f32 %f2, 0f47800000;\ncvt.rn.f16.f32 %rs1, %f2;\ncvt.u32.u16 %r1, %rs1;") == 0x7c00);
    EXPECT(result("mov.u16 %rs1, 16256;\ncvt.f32.bf16 %f2, %rs1;\nmov.b32 %r1, %f2;") == 0x3f800000);
    EXPECT(result("mov.u16 %rs1, 1;\ncvt.f32.f16 %f2, %rs1;\nmov.b32 %r1, %f2;") == bits_of(0x1p-24f));
}

void memory() {
    EXPECT(error("setp.eq.s32 %p1, 0, 1;\nmov.u64 %rd3, 0;\n@%p1 ld.global.u32 %r1, [%rd3];").empty());
    EXPECT_FAILS(error("setp.eq.s32 %p1, 0, 1;\nmov.u64 %rd3, 0;\n@!%p1 ld.global.u32 %r1, [%rd3];"),
                 "outside every buffer");
    EXPECT_FAILS(error("ld.global.u32 %r1, [%rd2+256];"), "outside every buffer");
    EXPECT_FAILS(error("ld.global.v2.u32 {%r1, %r2}, [%rd2+4];"), "misaligned");
    EXPECT_FAILS(error("ld.global.u16 %rs1, [%rd2+1];"), "misaligned");
    EXPECT_FAILS(error("st.global.u32 [%rd2], 0;\nld.global.nc.u32 %r1, [%rd2];"), "ld.global.nc of memory");
    EXPECT_FAILS(error("ld.global.nc.u32 %r1, [%rd2];\nred.global.add.v2.f32 [%rd2], {%f1, %f2};"),
                 "ld.global.nc of memory");
    EXPECT(error("ld.global.nc.u32 %r1, [%rd2];\nst.global.u32 [%rd2+4], 0;").empty());
    EXPECT_FAILS(error("ld.param.u64 %rd3, [k_param_1+8];"), "the kernel's parameters");
    EXPECT_FAILS(error("st.shared.u32 [0], 0;"), "does not take");
    EXPECT_FAILS(error("mov.u32 %r1, 0;\nst.shared.u32 [%r1], 0;", 1, 16), "outside the shared memory");
    EXPECT(error("mov.u32 %r1, 1036;\nst.shared.u32 [%r1], 0;", 1, 16).empty());
    EXPECT_FAILS(error("mov.u32 %r1, 1036;\nst.shared.v2.u32 [%r1], {0, 0};", 1, 16), "misaligned");
    EXPECT_FAILS(error("mov.u32 %r1, 1040;\nst.shared.u32 [%r1], 0;", 1, 16), "outside the shared memory");
}

// Static arrays come before the dynamic one, each at its alignment.
void shared_arrays() {
    Words out(3), in(1);
    const std::string arrays =
        ".shared .align 4 .b8 first[20];\n.shared .align 16 .b8 second[4];\n.shared .b8 unused[64];\n"
        ".extern .shared .align 1024 .b8 dynamic[];\n";
    run(kernel_text("mov.u32 %r1, first;\nmov.u32 %r2, second;\nmov.u32 %r3, dynamic;\nst.shared.u32 [dynamic+4], 7;\n"
                    "st.global.u32 [%rd1], %r1;\nst.global.u32 [%rd1+4], %r2;\nst.global.u32 [%rd1+8], %r3;",
                    "", arrays),
        out, in, 1, 8);
    EXPECT(out == (Words{1024, 1056, 2048}));
}

void collectives() {
    Words out(64), in(1);
    const std::string address = "mov.u32 %r9, %tid.x;\nmul.wide.u32 %rd3, %r9, 4;\nadd.s64 %rd4, %rd1, %rd3;\n";
    run(kernel_text(address + "shfl.sync.bfly.b32 %r1|%p1, %r9, 1, 31, -1;\nst.global.u32 [%rd4], %r1;"), out, in);
    EXPECT(out[0] == 1 && out[31] == 30);
    // segments of 4 lanes, of which the last is 1: lanes 2 and 3 are outside
    run(kernel_text(address + "shfl.sync.bfly.b32 %r1|%p1, %r9, 1, 7169, -1;\nselp.b32 %r2, %r1, 99, %p1;\n"
                              "st.global.u32 [%rd4], %r2;"),
        out, in);
    EXPECT(out[0] == 1 && out[1] == 0 && out[2] == 99 && out[3] == 99 && out[4] == 5);
    // lane 2 of each segment of 8 lanes: c is 31 with the segment's mask, 24, in the second byte
    run(kernel_text(address + "shfl.sync.idx.b32 %r1|%p1, %r9, 2, 6175, -1;\nst.global.u32 [%rd4], %r1;"), out, in);
    EXPECT(out[0] == 2 && out[7] == 2 && out[8] == 10 && out[31] == 26);
    run(kernel_text(address +
                    "setp.lt.u32 %p1, %r9, 3;\nvote.sync.ballot.b32 %r1, %p1, -1;\n"
                    "vote.sync.any.pred %p2, %p1, -1;\nselp.b32 %r2, %r1, 0, %p2;\nst.global.u32 [%rd4], %r2;"),
        out, in);
    EXPECT(out[5] == 7);
    const std::string half = "mov.u32 %r9, %tid.x;\nsetp.lt.u32 %p1, %r9, 16;\n@%p1 bra $L_1;\n";
    EXPECT_FAILS(error(half + "bar.sync 0;\nbra.uni $L_2;\n$L_1:\nbar.sync 0;\n$L_2:"), "divergent code");
    EXPECT_FAILS(error(half + "bar.sync 1, 32;\nbra.uni $L_2;\n$L_1:\nbar.sync 2, 32;\n$L_2:", 32), "divergent code");
    EXPECT_FAILS(error(half + "bar.sync 0;\n$L_1:"), "exit");
    EXPECT(error("bar.sync 0;\nbar.sync 3, 64;", 64).empty());
    EXPECT_FAILS(error("shfl.sync.bfly.b32 %r1|%p1, %r9, 1, 31, 1;"), "not in the mask");
    EXPECT_FAILS(error("cp.async.cg.shared.global [%r1], [%rd2], 8, %r2;", 1, 16), "sizes of cp.async");
}

// The rest of the 16 bytes is zero, and nothing is read where there is nothing to read.
void copies() {
    Words out(4), in{1, 2, 3, 4};
    const std::string copy =
        "mov.u32 %r1, 1024;\nmov.u32 %r2, 8;\ncp.async.cg.shared.global [%r1], [%rd2], 16, %r2;\n"
        "cp.async.commit_group;\ncp.async.wait_group 0;\nld.shared.v4.u32 {%r3, %r4, %r5, %r6}, [%r1];\n"
        "st.global.v4.u32 [%rd1], {%r3, %r4, %r5, %r6};";
    run(kernel_text(copy), out, in, 1, 16);
    EXPECT(out == (Words{1, 2, 0, 0}));
    EXPECT(
        error(
            "mov.u64 %rd3, 0;\nmov.u32 %r1, 1024;\nmov.u32 %r2, 0;\ncp.async.cg.shared.global [%r1], [%rd3], 16, %r2;\n"
            "cp.async.commit_group;\ncp.async.wait_group 0;",
            1, 16)
            .empty());
}

// A wait returns at once if the phase is complete; else it may return without it once.
void mbarriers() {
    const std::string init =
                          "mov.u32 %r2, 1024;\nmbarrier.init.shared::cta.b64 [%r2], 1;\n"
                          "fence.mbarrier_init.release.cluster;\n",
                      wait = "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 %p1, [%r2], ",
                      arrive = "mbarrier.arrive.release.cta.shared::cta.b64 _, [%r2];\n";
    const auto outcome = [](int bit) {
        return "selp.b32 %r4, " + std::to_string(1 << bit) + ", 0, %p1;\nor.b32 %r1, %r1, %r4;\n";
    };
    Words out(1), in(1);
    run(kernel_text("mov.u32 %r1, 0;\n" + init + wait + "1;\n" + outcome(0) + wait + "0;\n" + outcome(1) + arrive +
                    wait + "0;\n" + outcome(2) + "st.global.u32 [%rd1], %r1;"),
        out, in, 1, 8);
    EXPECT(out[0] == 5);
    EXPECT_FAILS(error(init + wait + "0;\n" + wait + "0;", 1, 8), "deadlock");
    EXPECT_FAILS(error(init + wait + "2;", 1, 8), "parity");
    EXPECT_FAILS(error("mov.u32 %r2, 1024;\n" + arrive, 1, 8), "no mbarrier");
    EXPECT_FAILS(error(init, 1, 0), "outside the shared memory");
}

// d[m][n] = m n by a product of which only the first column of A and the first row of B are not zero, in 128 threads.
// After `issue`, %f3 is read.
std::string product(const std::string& instruction, const std::string& issue) {
    std::string sums, text =
                          "{\n.reg .f32 %d<32>;\nmov.u32 %r2, %tid.x;\nshl.b32 %r3, %r2, 7;\nadd.s32 %r3, %r3, 1024;\n"
                          "setp.gt.u32 %p1, %r2, 63;\n@%p1 bra $L_filled;\n";
    for (int i = 0; i < 8; ++i) {
        text += "st.shared.v4.b32 [%r3+" + std::to_string(16 * i) + "], {0, 0, 0, 0};\n";
    }
    for (int i = 0; i < 32; ++i) sums += (i ? ", %d" : "%d") + std::to_string(i);
    text +=
        "and.b32 %r4, %r2, 7;\nshl.b32 %r4, %r4, 4;\nadd.s32 %r4, %r3, %r4;\n"  // the swizzle
        "cvt.rn.f32.u32 %f1, %r2;\ncvt.rn.bf16.f32 %rs1, %f1;\nst.shared.u16 [%r4], %rs1;\n"
        "$L_filled:\nfence.proxy.async.shared::cta;\nbar.sync 0;\n"
        "shr.u32 %r4, %r2, 5;\nshl.b32 %r4, %r4, 4;\nshr.u32 %r5, %r2, 2;\nand.b32 %r5, %r5, 7;\n"
        "add.s32 %r4, %r4, %r5;\ncvt.rn.f32.u32 %f1, %r4;\ncvt.rn.bf16.f32 %rs1, %f1;\n"
        "add.s32 %r4, %r4, 8;\ncvt.rn.f32.u32 %f1, %r4;\ncvt.rn.bf16.f32 %rs2, %f1;\n"
        "and.b32 %r6, %r2, 3;\nsetp.ne.s32 %p1, %r6, 0;\ncvt.u32.u16 %r7, %rs1;\ncvt.u32.u16 %r8, %rs2;\n"
        "selp.b32 %r7, 0, %r7, %p1;\nselp.b32 %r8, 0, %r8, %p1;\nmov.u32 %r9, 0;\nsetp.ne.b32 %p2, %r9, 0;\n";
    const uint64_t descriptor = 1024 >> 4 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
    text += "mov.u64 %rd3, " + std::to_string(descriptor) + ";\nwgmma.fence.sync.aligned;\n" + instruction + " {" +
            sums + "}, {%r7, %r8, %r9, %r9}, %rd3, %p2, " + issue + "wgmma.wait_group.sync.aligned 0;\n";
    text +=
        "shl.b32 %r4, %r2, 7;\ncvt.u64.u32 %rd4, %r4;\nadd.s64 %rd4, %rd1, %rd4;\nshl.b32 %r5, %r2, 2;\n"
        "cvt.u64.u32 %rd5, %r5;\nadd.s64 %rd5, %rd1, %rd5;\nst.global.f32 [%rd5+16384], %f3;\n";
    for (int i = 0; i < 32; ++i)
        text += "st.global.f32 [%rd4+" + std::to_string(4 * i) + "], %d" + std::to_string(i) + ";\n";
    return text + "}";
}

void products() {
    const std::string wgmma = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16",
                      commit = "wgmma.commit_group.sync.aligned;\n";
    const auto failure = [](const std::string& body) {
        Words out(4224), in(1);
        return emu_test::error_of([&] { run(kernel_text(body), out, in, 128, 8192); });
    };
    Words out(4224), in(1);
    run(kernel_text(product(wgmma, "1, 1, 0;\n" + commit + "mov.f32 %f3, %d1;\n")), out, in, 128, 8192);
    size_t wrong = 0;
    for (uint32_t thread = 0; thread < 128; ++thread) {
        for (uint32_t i = 0; i < 32; ++i) {
            const uint32_t m = thread / 32 * 16 + thread % 32 / 4 + 8 * (i / 2 % 2),
                           n = i / 4 * 8 + thread % 4 * 2 + i % 2;
            wrong += simt::float_of(out[32 * thread + i]) != static_cast<float>(m * n);
        }
        wrong += !std::isnan(simt::float_of(out[4096 + thread]));  // before the wait
    }
    EXPECT(wrong == 0);
    EXPECT_FAILS(failure(product(wgmma, "1, -1, 0;\n" + commit)), "a negated operand");
    EXPECT_FAILS(failure(product(wgmma, "1, 1, 0;\n")), "not been committed");
    EXPECT_FAILS(failure(product(wgmma, "1, 1, 0;\n" + commit + "mov.f32 %d7, %f1;\n")), "accumulator changed");
    EXPECT_FAILS(failure(product(wgmma, "1, 1, 0;\n" + commit + "mov.u32 %r8, 1;\n")), "operand in registers changed");
    EXPECT_FAILS(failure(product("@%p1 " + wgmma, "1, 1, 0;\n" + commit)), "divergent");
    EXPECT_FAILS(failure(product("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", "1, 1, 0;")),
                 "does not take");
    EXPECT_FAILS(error("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r1], [%rd1, "
                       "{%r1, %r1, %r1, %r1}], [%r1];"),
                 "not a kernel parameter");
}

void text() {
    EXPECT_FAILS(error("prmt.b32 %r1, %r2, %r3, %r4;"), "unknown opcode; got=prmt.b32");
    EXPECT_FAILS(error("prmt.b32 %r1, %r2, %r3, %r4;"), "where=k.ptx:");
    EXPECT_FAILS(error("add.s32 %r1, %r2, %rd3;"), "operands that add.s32 does not take");
    EXPECT_FAILS(error("add.f32 %f1, %f2, 0d3FF0000000000000;"), "does not take");
    EXPECT_FAILS(error("@%p1 bra.uni $L_1;\n$L_1:"), "bra.uni with a guard");
    EXPECT_FAILS(error("bra $L_9;"), "unknown label");
    EXPECT_FAILS(error(".local .b8 stack[8];"), "unknown directive");
    EXPECT_FAILS(emu_test::error_of([] { ptx::parse("k.ptx", std::string(kHead) + ".func f() {}\n"); }),
                 "unknown directive");
    Words out(1), in(1);
    EXPECT_FAILS(emu_test::error_of([&] { run(kernel_text("", ".maxntid 32, 1, 1\n"), out, in, 64); }),
                 "__launch_bounds__");
    const auto kernels = ptx::parse("k.ptx", kernel_text(""));
    uint32_t* pointer = out.data();
    EXPECT_FAILS(emu_test::error_of([&] { ptx::run(*kernels[0], {nullptr, 1, 1, 0, {{&pointer, 8}}}); }),
                 "number of arguments");
    EXPECT_FAILS(emu_test::error_of([&] { ptx::run(*kernels[0], {nullptr, 1, 1, 0, {{&pointer, 8}, {&pointer, 4}}}); }),
                 "size of argument 1");
}

}  // namespace

int main() {
    integers();
    registers();
    floats();
    comparisons();
    conversions();
    memory();
    shared_arrays();
    collectives();
    copies();
    mbarriers();
    products();
    text();
    return emu_test::tally.finish();
}
