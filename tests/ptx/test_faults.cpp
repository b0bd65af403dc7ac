// Plants faults in nvcc's PTX, one at a time: a wrong operand, modifier, predicate, lane, shift, address, barrier,
// descriptor or fence. The operator's test, with the race checker, must fail with each of them.
//
//   test_ptx_faults [--op OP] FILE...
#include <cstring>
#include <map>
#include <regex>
#include <sstream>

#include "library.h"
#include "op_test.h"
#include "symbols.h"

namespace {

struct Fault {
    const char* name;
    const char *op, *file, *kernel;  // the operator whose test runs; its PTX; a part of the kernel's readable name
    const char* pattern;             // of a line
    int count;                       // which of the lines that match gets the fault; 0: all
    const char* replacement;
    const char* found_by;  // a part of the error, or null for wrong results
};

constexpr char kForward[] = "forward_kernel<__nv_bfloat16, neox::attention::ForwardShapeOf<64, false>";
constexpr char kKeys[] = "backward_keys_kernel<__nv_bfloat16, neox::attention::KeysShapeOf<64, false>";
constexpr char kForwardFile[] = "attention_forward_bf16_cuda", kKeysFile[] = "attention_backward_keys_bf16_cuda";
constexpr char kHopperOp[] = "attention_hopper", kHopper[] =
                                                     "hopper_forward_kernel<__nv_bfloat16, "
                                                     "neox::attention::HopperShape<64, 8>";
constexpr char kHopperBackward[] =
    "hopper_backward_kernel<__nv_bfloat16, neox::attention::HopperBackwardShape<64, 128>";
constexpr char kHopperFile[] = "attention_forward_bf16_hopper_cuda",
               kHopperBackwardFile[] = "attention_backward_bf16_hopper_cuda";

const Fault kFaults[] = {
    {"mma: swapped registers of A", "attention", kForwardFile, kForward,
     R"((mma\.sync\S+ \{[^}]*\}, )\{(%r\d+),(%r\d+),)", 1, "$1{$3,$2,", nullptr},
    {"mma: fp16 instead of bf16", "attention", kForwardFile, kForward, R"(f32\.bf16\.bf16\.f32)", 1, "f32.f16.f16.f32",
     nullptr},
    {"ldmatrix: no .trans", "attention", kForwardFile, kForward, R"(x4\.trans)", 1, "x4", nullptr},
    {"ldmatrix: rows of the next chunk", "attention", kForwardFile, kForward, R"((ldmatrix.*\[%r\d+)\])", 1, "$1+16]",
     nullptr},
    {"cvt.bf16x2: swapped halves", "attention", kForwardFile, kForward,
     R"((cvt\.rn\.bf16x2\.f32 %r\d+), (%f\d+), (%f\d+))", 1, "$1, $3, $2", nullptr},
    {"cp.async: waits for too few groups", "attention", kForwardFile, kForward, R"(cp\.async\.wait_group \d+)", 1,
     "cp.async.wait_group 9", nullptr},
    {"cp.async: no predicate", "attention", kForwardFile, kForward, R"(selp\.b32 (\s*%r\d+), 16, 0, %p\d+)", 1,
     "mov.b32 $1, 16", "outside every buffer"},
    {"a missing barrier", "bias_gelu", "bias_gelu_cuda", "add_stripes<__nv_bfloat16>", R"(bar\.sync\s+0;)", 1, "",
     nullptr},
    {"a barrier in divergent code", "bias_gelu", "bias_gelu_cuda", "add_stripes<__nv_bfloat16>", R"(bar\.sync\s+0;)", 1,
     "@%p1 bar.sync 0;", nullptr},
    {"shfl: another lane", "norm", "norm_cuda", "forward<__nv_bfloat16, true, 1>",
     R"((shfl\.sync\.bfly\.b32\s+\S+ %r\d+), %r\d+,)", 0, "$1, 8,", nullptr},
    {"shfl: a mask of one lane", "norm", "norm_cuda", "forward<__nv_bfloat16, true, 1>", R"((shfl\.sync\..*), %r\d+;)",
     0, "$1, 1;", "mask"},
    {"a wrong shift", "rotary", "rotary_cuda", "rotate<__nv_bfloat16, 8>", R"((shl\.b64\s+%rd\d+, %rd\d+), 1;)", 1,
     "$1, 2;", nullptr},
    {"a wrong mask", "bias_gelu", "bias_gelu_cuda", "add_stripes<__nv_bfloat16>", R"((and\.b32\s+%r\d+, %r\d+), 31;)",
     1, "$1, 15;", nullptr},
    {"an address off by one vector", "bias_gelu", "bias_gelu_cuda", "forward<__nv_bfloat16, true, 8>",
     R"((ld\.global\.nc\.v4\.u32 .*\[%rd\d+)\])", 1, "$1+16]", nullptr},
    {"a misaligned vector", "bias_gelu", "bias_gelu_cuda", "forward<__nv_bfloat16, true, 8>",
     R"((ld\.global\.nc\.v4\.u32 .*\[%rd\d+)\])", 1, "$1+8]", "misaligned"},
    {"swapped halves of a register", "bias_gelu", "bias_gelu_cuda", "forward<__half, true, 8>",
     R"(mov\.b32(\s+)\{(%rs\d+), (%rs\d+)\})", 1, "mov.b32$1{$3, $2}", nullptr},
    {"cvt: fp16 instead of bf16", "rotary", "rotary_cuda", "rotate<__nv_bfloat16, 1>", R"(cvt\.f32\.bf16)", 1,
     "cvt.f32.f16", nullptr},
    {"fma: swapped operands", "rotary", "rotary_cuda", "rotate<__nv_bfloat16, 8>",
     R"((fma\.rn\.f32\s+%f\d+, %f\d+), (%f\d+), (%f\d+);)", 1, "$1, $3, $2;", nullptr},
    {"ld.global.nc of memory that the launch writes", "cross_entropy", "cross_entropy_cuda", "<__nv_bfloat16",
     R"(ld\.global\.v4\.b32)", 1, "ld.global.nc.v4.b32", "ld.global.nc"},
    {"st.v4: swapped registers", "bias_gelu", "bias_gelu_cuda", "forward<__nv_bfloat16, true, 8>",
     R"((st\.global\.v4\.b32 \[%rd\d+\], )\{(%r\d+),(%r\d+),)", 1, "$1{$3,$2,", nullptr},
    {"red.v2: swapped registers", "attention", kKeysFile, kKeys,
     R"((red\.global\.add\.v2\.f32 \[%rd\d+\]), \{(%f\d+), (%f\d+)\})", 1, "$1, {$3, $2}", nullptr},
    {"wgmma: swapped descriptors", kHopperOp, kHopperFile, kHopper, R"(\}, (%rd\d+), (%rd\d+), p,)", 1, "}, $2, $1, p,",
     nullptr},
    {"wgmma: swapped registers of A", kHopperOp, kHopperFile, kHopper, R"(\}, \{(%r\d+), (%r\d+),)", 1, "}, {$2, $1,",
     nullptr},
    {"wgmma: swapped accumulators", kHopperOp, kHopperFile, kHopper, R"((wgmma\.mma_async\S+) \{(%f\d+), (%f\d+),)", 1,
     "$1 {$3, $2,", "accumulators"},
    {"wgmma: B is not transposed", kHopperOp, kHopperFile, kHopper, R"(p, 1, 1, 1;)", 1, "p, 1, 1, 0;", nullptr},
    {"wgmma: A is not transposed", kHopperOp, kHopperBackwardFile, kHopperBackward, R"(p, 1, 1, 1, 1;)", 1,
     "p, 1, 1, 0, 1;", nullptr},
    {"wgmma: fp16 instead of bf16", kHopperOp, kHopperFile, kHopper, R"(f32\.bf16\.bf16)", 1, "f32.f16.f16", nullptr},
    {"wgmma: adds to the old sums", kHopperOp, kHopperFile, kHopper, R"(setp\.ne\.b32 p,)", 1, "setp.eq.b32 p,",
     nullptr},
    {"wgmma: a descriptor 32 bytes further", kHopperOp, kHopperFile, kHopper, R"(4611686293305294848)", 1,
     "4611686293305294850", nullptr},
    {"wgmma: a descriptor with half of the stride", kHopperOp, kHopperFile, kHopper, R"(4611686293305294848)", 1,
     "4611686155866341376", nullptr},
    {"wgmma: a descriptor without swizzle", kHopperOp, kHopperFile, kHopper, R"(4611686293305294848)", 1,
     "274877906944", "swizzle"},
    {"wgmma.fence: missing", kHopperOp, kHopperFile, kHopper, R"(wgmma\.fence\.sync\.aligned;)", 1, "", "wgmma.fence"},
    {"wgmma.commit_group: missing", kHopperOp, kHopperFile, kHopper, R"(wgmma\.commit_group\.sync\.aligned;)", 1, "",
     "not been committed"},
    {"wgmma.wait_group: one group too few", kHopperOp, kHopperFile, kHopper, R"(wgmma\.wait_group\.sync\.aligned 0)", 1,
     "wgmma.wait_group.sync.aligned 1", nullptr},
    {"mbarrier.init: one arrival too many", kHopperOp, kHopperFile, kHopper, R"((mbarrier\.init\S+ \[%r\d+\]), %r\d+)",
     1, "$1, 2", "deadlock"},
    {"mbarrier.try_wait: the other parity", kHopperOp, kHopperFile, kHopper,
     R"((mbarrier\.try_wait\S+ p, \[%r\d+\]), %r\d+)", 1, "$1, 1", "before its wait"},
    {"mbarrier.try_wait: not repeated", kHopperOp, kHopperFile, kHopper, R"(selp\.u32 (%r\d+), 1, 0, p)", 1,
     "selp.u32 $1, 1, 1, p", "before its wait"},
    {"mbarrier.arrive: missing", kHopperOp, kHopperBackwardFile, kHopperBackward,
     R"(mbarrier\.arrive\.release\S+ _, .*)", 1, "", "deadlock"},
    {"mbarrier.arrive.expect_tx: too few bytes", kHopperOp, kHopperFile, kHopper,
     R"((mbarrier\.arrive\.expect_tx\S+ _, \[%r\d+\]), %r\d+)", 1, "$1, 8192", "more bytes than expected"},
    {"cp.async.bulk.tensor: swapped coordinates", kHopperOp, kHopperFile, kHopper,
     R"((cp\.async\.bulk\S+ \[%r\d+\], \[%rd\d+, )\{(%r\d+), (%r\d+),)", 1, "$1{$3, $2,", nullptr},
    {"cp.async.bulk.tensor: the next mbarrier", kHopperOp, kHopperFile, kHopper, R"((cp\.async\.bulk.*\[%r\d+)\];)", 1,
     "$1+8];", nullptr},
    {"fence.proxy.async: missing after cp.async", kHopperOp, kHopperFile, kHopper,
     R"(fence\.proxy\.async\.shared::cta;)", 1, "", "fence.proxy.async"},
    {"fence.proxy.async: missing after st.shared", kHopperOp, kHopperBackwardFile, kHopperBackward,
     R"(fence\.proxy\.async\.shared::cta;)", 2, "", "fence.proxy.async"},
    {"fence.mbarrier_init: missing", kHopperOp, kHopperFile, kHopper, R"(fence\.mbarrier_init\S+;)", 1, "",
     "fence.mbarrier_init"},
    {"setmaxnreg: inc instead of dec", kHopperOp, kHopperFile, kHopper, R"(setmaxnreg\.dec)", 1, "setmaxnreg.inc",
     "setmaxnreg"},
    {"setmaxnreg: more registers than there are", kHopperOp, kHopperFile, kHopper, R"(setmaxnreg\.inc(\S+) 232)", 1,
     "setmaxnreg.inc$1 240", "deadlock"},
    {"setmaxnreg: in divergent code", kHopperOp, kHopperFile, kHopper, R"(setmaxnreg\.inc)", 1, "@%p12 setmaxnreg.inc",
     "divergent"},
};

// The text before the first kernel, and that of each kernel by its readable name.
struct File {
    std::string path, head;
    std::vector<std::pair<std::string, std::string>> kernels;
};

File split_kernels(const std::string& path) {
    File file{path, "", {}};
    std::istringstream text(ptx::read_text(path));
    for (std::string line; std::getline(text, line);) {
        const size_t entry = line.find(".entry ");
        if (entry != std::string::npos) {
            const std::string name = line.substr(entry + 7, line.find('(') - entry - 7);
            file.kernels.emplace_back(ptx::demangle(name), "");
        }
        std::string& part = file.kernels.empty() ? file.head : file.kernels.back().second;
        part += line + "\n";
    }
    return file;
}

// The kernel's text with the fault; empty if no line matches.
std::string planted(const std::string& text, const Fault& fault) {
    const std::regex pattern(fault.pattern);
    std::istringstream lines(text);
    std::string result;
    int matches = 0;
    for (std::string line; std::getline(lines, line);) {
        if (std::regex_search(line, pattern) && (++matches == fault.count || !fault.count))
            line = std::regex_replace(line, pattern, fault.replacement, std::regex_constants::format_first_only);
        result += line + "\n";
    }
    return matches < std::max(fault.count, 1) ? "" : result;
}

// The first failure of the operator's test, empty if it passes.
std::string failure(const char* op_name, ptx::Library& library) {
    simt::launcher() = [&](const simt::Launch& launch, const auto& body) {
        const ptx::Kernel* const kernel = library.find(launch.kernel);
        if (kernel) return ptx::run(*kernel, launch);
        simt::run_grid(launch.grid, launch.block, launch.shared_bytes, body);
    };
    emu_test::tally.on_failure = [](const std::string& message) { simt::fail(message); };
    std::string message;
    for (const emu_test::Operator* op : emu_test::Operator::all()) {
        if (!std::strcmp(op->name, op_name)) message = emu_test::error_of(op->sample ? op->sample : op->values);
    }
    emu_test::tally.on_failure = nullptr;
    simt::launcher() = nullptr;
    return message;
}

void test(const Fault& fault, const std::vector<File>& files) {
    std::string message;
    bool matches = false;
    for (const File& file : files) {
        if (file.path.find(std::string("/") + fault.file + ".") == std::string::npos) continue;
        for (const auto& [name, text] : file.kernels) {
            if (!message.empty() || name.find(fault.kernel) == std::string::npos) continue;
            const std::string with_fault = planted(text, fault);
            if (with_fault.empty()) continue;
            matches = true;
            ptx::Library library(/*complete=*/false);
            const std::string error = emu_test::error_of([&] { library.add(file.path, file.head + with_fault); });
            if (!error.empty()) return emu_test::tally.check(false, fault.name, __FILE__, __LINE__, error);
            message = failure(fault.op, library);
        }
    }
    const bool found = !message.empty() && (!fault.found_by || message.find(fault.found_by) != std::string::npos);
    emu_test::tally.check(found, "a planted fault is found", __FILE__, __LINE__,
                          std::string(fault.name) + ": " + (matches ? message : "no line matches"));
    std::printf("%-50s %s\n", fault.name, message.substr(0, 110).c_str());
}

}  // namespace

int main(int argc, char** argv) {
    const bool one_op = argc > 2 && !std::strcmp(argv[1], "--op");
    std::vector<File> files;
    for (int i = one_op ? 3 : 1; i < argc; ++i) files.push_back(split_kernels(argv[i]));
    for (const Fault& fault : kFaults) {
        if (!one_op || !std::strcmp(fault.op, argv[2])) test(fault, files);
    }
    return emu_test::tally.finish();
}
