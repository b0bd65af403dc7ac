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
    const int32_t* operands;  // bytes from Thread::registers; immediates of addresses and branches as they are
    int line;                 // of the PTX file
    mutable int region = 0;   // where the last access to global memory was found
};

// A kernel parameter, or an array in shared memory: where it is in the kernel's parameters or shared memory.
struct Variable {
    std::string name;
    size_t offset, bytes;
};

struct Kernel {
    std::string name, file;  // mangled; path of the PTX
    std::vector<Variable> parameters;
    size_t parameter_bytes = 0;
    size_t shared_bytes = 0;        // of static arrays, and padding before the dynamic one
    size_t max_threads = 1024;     // .maxntid
    std::vector<Instruction> code;  // ends with ret
    std::vector<int32_t> operands;
    std::vector<std::string> text;  // of each instruction, for messages
    std::vector<char> constants;    // first registers
    size_t register_bytes = 0;
};

using simt::kSharedBase;

// What the threads of a launch share.
struct Machine {
    const Kernel& kernel;
    // Aligned as a tensor map must be.
    struct alignas(128) ParameterLine {
        char bytes[128];
    };
    std::vector<ParameterLine> parameters;
    std::vector<char> registers;
    // For each byte of each buffer (simt::memory()): whether the launch wrote it or read it with .nc.
    std::vector<std::vector<uint8_t>> touched;
    // The aligned instruction that some lanes of a warp have reached and others have not, and how many.
    struct Meeting {
        const Instruction* at = nullptr;
        int arrived = 0;
    };
    std::vector<Meeting> meetings;  // of warps
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
    bool timed_out = false;  // the last mbarrier.try_wait

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

// All lanes of the warp must execute the same .aligned instruction before one of them executes another.
void require_converged(Thread& thread, const Instruction& instruction);

}  // namespace ptx
