// The operators' tests (tests/emu/test_<op>.cpp) with nvcc's PTX instead of the kernels' C++:
//
//   test_ptx_ops [--op OP] FILE...            results against fp64, in one schedule
//   test_ptx_ops --all FILE...                the same for every kernel; one that no test launches is an error
//   test_ptx_ops --exact [--all] FILE...      each launch also runs the C++ from the same memory, and must leave the
//                                             same bits; for PTX of nvcc -fmad=false, because the emulated C++ has no
//                                             fused multiply-adds
//
// test_ptx_ops_check also finds races, reads of unwritten shared memory and missing proxy fences (tests/emu/check.h).
#include <algorithm>
#include <chrono>
#include <cstring>
#include <set>

#include "library.h"
#include "op_test.h"
#include "symbols.h"

namespace {

struct Options {
    bool exact = false, all = false;
    const char* op = nullptr;
    std::vector<std::string> files;
};

struct Run {
    ptx::Library library;
    std::set<const ptx::Kernel*> ran, differ;
    size_t launches = 0;
};

using Image = std::vector<std::vector<char>>;

Image save() {
    Image image;
    for (const simt::Memory& memory : simt::memory()) image.emplace_back(memory.begin, memory.begin + memory.bytes);
    return image;
}

void restore(const Image& image) {
    for (size_t i = 0; i < image.size(); ++i) std::copy(image[i].begin(), image[i].end(), simt::memory()[i].begin);
}

// Logarithms are compared as numbers: they come from CUDA's library in the PTX and from the host's in C++, which may
// differ in the last bit. Bits that are a subnormal number may be an integer, and must be equal.
bool same_logarithms(const std::vector<char>& image, const simt::Memory& memory) {
    for (size_t at = 0; at + sizeof(float) <= image.size(); at += sizeof(float)) {
        float want, got;
        std::memcpy(&want, image.data() + at, sizeof(want));
        std::memcpy(&got, memory.begin + at, sizeof(got));
        if (!std::memcmp(&want, &got, sizeof(want))) continue;
        const bool numbers = std::isnormal(want) && std::isnormal(got);
        if (!numbers || !(std::abs(want - got) <= 2.4e-7f * std::max(1.0f, std::abs(want)))) return false;
    }
    return true;
}

// The first difference between memory and the image, empty if there is none.
std::string difference(const Image& image) {
    for (size_t i = 0; i < image.size(); ++i) {
        const simt::Memory& memory = simt::memory()[i];
        // the workspace of a forward whose keys are split has the logarithms of the splits
        const bool logarithms = !std::strcmp(memory.name, "lse") || !std::strcmp(memory.name, "workspace");
        if (logarithms && same_logarithms(image[i], memory)) continue;
        const auto [want, got] = std::mismatch(image[i].begin(), image[i].end(), memory.begin);
        if (want != image[i].end())
            return std::string(memory.name) + " + " + std::to_string(want - image[i].begin()) + " bytes";
    }
    return "";
}

void run_launch(Run& run, const Options& options, const simt::Launch& launch, const std::function<void()>& body) {
    const auto run_emulated = [&] { simt::run_grid(launch.grid, launch.block, launch.shared_bytes, body); };
    const ptx::Kernel* const kernel = run.library.find(launch.kernel);
    if (!kernel) return run_emulated();
    run.ran.insert(kernel);
    ++run.launches;
    if (!options.exact) return ptx::run(*kernel, launch);
    const Image before = save();
    const simt::Stats counted = simt::stats();  // tests count the work of one launch
    run_emulated();
    simt::stats() = counted;
    const Image after = save();
    restore(before);
    ptx::run(*kernel, launch);
    const std::string at = difference(after);
    if (!at.empty() && run.differ.insert(kernel).second) {
        emu_test::tally.check(false, "PTX and C++ leave the same bits", __FILE__, __LINE__,
                              ptx::demangle(kernel->name) + ": " + at);
    }
}

Options parse_options(int argc, char** argv) {
    Options options;
    for (int i = 1; i < argc; ++i) {
        if (!std::strcmp(argv[i], "--exact")) {
            options.exact = true;
        } else if (!std::strcmp(argv[i], "--op") && i + 1 < argc) {
            options.op = argv[++i];
        } else if (!std::strcmp(argv[i], "--all")) {
            options.all = true;
        } else {
            options.files.push_back(argv[i]);
        }
    }
    return options;
}

// A kernel with its file, unless it is a template of a header, which is the same in every file that has it.
std::string name_of(const ptx::Kernel& kernel) {
    const std::string name = ptx::demangle(kernel.name);
    const bool local = name.find("(anonymous namespace)") != std::string::npos;
    return local ? kernel.file.substr(kernel.file.rfind('/') + 1) + ": " + name : name;
}

void report(const Run& run, const Options& options) {
    std::set<std::string> names, ran;
    for (const auto& kernel : run.library.kernels()) names.insert(name_of(*kernel));
    for (const ptx::Kernel* kernel : run.ran) ran.insert(name_of(*kernel));
    std::printf("%zu launches of %zu kernels, of %zu in the PTX\n", run.launches, ran.size(), names.size());
    for (const std::string& name : names) {
        if (options.all && !ran.count(name))
            emu_test::tally.check(false, "every kernel is launched", __FILE__, __LINE__, name);
    }
}

void run_operator(const emu_test::Operator& op, const Options& options) {
    const auto start = std::chrono::steady_clock::now();
    const auto run = [&](void (*test)()) {
        const std::string failure = emu_test::error_of(test);
        emu_test::tally.check(failure.empty(), op.name, __FILE__, __LINE__, failure);
    };
    run(op.sample && !options.all && !options.op ? op.sample : op.values);
    if (options.all && op.instances) run(op.instances);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%-24s %6.1f s\n", op.name, seconds.count());
}

}  // namespace

int main(int argc, char** argv) {
    const Options options = parse_options(argc, argv);
    Run run;
    const std::string error = emu_test::error_of([&] {
        for (const std::string& file : options.files) run.library.load(file);
    });
    emu_test::tally.check(error.empty(), "the PTX is understood", __FILE__, __LINE__, error);
    if (!error.empty()) return emu_test::tally.finish();
    simt::launcher() = [&](const simt::Launch& launch, const auto& body) { run_launch(run, options, launch, body); };
    for (const emu_test::Operator* op : emu_test::Operator::all()) {
        if (options.op && std::strcmp(options.op, op->name)) continue;
        run_operator(*op, options);
    }
    report(run, options);
    return emu_test::tally.finish();
}
