// Executes PTX, the output of nvcc's front end, on the fibers of the SIMT emulator (tests/emu).
//
// The emulator runs the C++ of a kernel through a host compiler. This runs what nvcc makes of it for a GPU, and so
// checks what the emulator cannot: the strings of inline PTX (order of operands, modifiers, packing), code for
// __CUDA_ARCH__ only, and the alignment, bounds and read-only rule of every access. Kernels are interpreted: a
// translation to C++ would have to be compiled, and a planted fault would need it again.
//
// A PTX instruction becomes an Instruction: a handler and the offsets of its operands in the thread's registers.
// Immediates and addresses of variables are registers too, initialised once per thread.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "products.h"
#include "simt.h"

namespace ptx {

struct Thread;
struct Instruction;
// Executes an instruction. Returns the next one, null at the end of the kernel.
using Handler = const Instruction* (*)(Thread&, const Instruction&);

struct Instruction {
    Handler run;
    const int32_t* operands;      // offsets from Thread::registers; offsets of addresses and branches are values
    int line;                     // of the PTX file
    mutable int last_buffer = 0;  // index in simt::memory(), found by its last access to global memory
};

// A kernel parameter.
struct Parameter {
    std::string name;
    size_t offset, bytes;
};

struct Kernel {
    std::string name;  // mangled
    std::string file;  // path of the PTX
    std::vector<Parameter> parameters;
    size_t parameter_bytes = 0;
    size_t shared_bytes = 0;        // of static arrays, and padding before the dynamic one
    size_t max_threads = 1024;      // .maxntid
    std::vector<Instruction> code;  // ends with ret
    std::vector<int32_t> operands;
    std::vector<std::string> text;  // of each instruction, for messages
    std::vector<char> constants;    // first bytes of the registers of every thread
    size_t register_bytes = 0;
};

using simt::kSharedBase;

// What the threads of a launch share.
struct Machine {
    const Kernel& kernel;
    struct alignas(128) ParameterLine {  // aligned as a tensor map must be
        char bytes[128];
    };
    std::vector<ParameterLine> parameters;
    std::vector<char> registers;
    // For each byte of each buffer of simt::memory(): whether the launch wrote it, or read it with .nc.
    std::vector<std::vector<uint8_t>> touched;
    // An aligned instruction that lanes of a warp have reached, and their number: 0 once all have.
    struct Convergence {
        const Instruction* at = nullptr;
        int arrived = 0;
    };
    std::vector<Convergence> convergence;  // of each warp
    // The last instruction of any thread, for the reports of the race checker.
    const Instruction* last = nullptr;
    int warp_lanes(int warp) const;
    char* parameter_data() { return parameters.empty() ? nullptr : parameters.data()->bytes; }
};

struct Thread {
    char* registers;
    char* shared;
    size_t shared_bytes;
    int warp;
    Machine& machine;
    Products products;
    bool timed_out = false;  // the last mbarrier.try_wait returned false

    template <class T>
    T& at(int32_t offset) const {
        return *reinterpret_cast<T*>(registers + offset);
    }
    // The host's address of shared memory, whose bytes must exist.
    char* shared_at(const Instruction& instruction, uint32_t address, size_t bytes) const;
    // Ends the launch. `what` is followed by kernel, file, line and instruction.
    [[noreturn]] void fail(const Instruction& instruction, const std::string& what) const;
};

// Runs one launch of the emulator with the kernel's PTX instead of its C++.
void run(const Kernel& kernel, const simt::Launch& launch);

// Fails unless all lanes of the warp execute this .aligned instruction before one of them executes another.
void require_converged(Thread& thread, const Instruction& instruction);

}  // namespace ptx
