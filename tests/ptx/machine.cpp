#include "machine.h"

#include <algorithm>

namespace ptx {
namespace {

std::string where(const Kernel& kernel, const Instruction& instruction) {
    const auto index = static_cast<size_t>(&instruction - kernel.code.data());
    return "; where=" + kernel.file + ":" + std::to_string(instruction.line) + ": " + kernel.text[index] + ", in " +
           kernel.name;
}

// The arguments, laid out as the kernel declares its parameters.
std::vector<Machine::ParameterLine> parameters_of(const Kernel& kernel, const simt::Launch& launch) {
    if (launch.arguments.size() != kernel.parameters.size()) {
        simt::fail(kernel.name + ": number of arguments; got=" + std::to_string(launch.arguments.size()) +
                   "; want=" + std::to_string(kernel.parameters.size()));
    }
    std::vector<Machine::ParameterLine> lines((kernel.parameter_bytes + 127) / 128);
    for (size_t i = 0; i < launch.arguments.size(); ++i) {
        const Parameter& parameter = kernel.parameters[i];
        if (launch.arguments[i].bytes != parameter.bytes) {
            simt::fail(kernel.name + ": size of argument " + std::to_string(i) + "; got=" +
                       std::to_string(launch.arguments[i].bytes) + " bytes; want=" + std::to_string(parameter.bytes) +
                       "; do=compare the host's layout of the type with nvcc's");
        }
        std::memcpy(lines.data()->bytes + parameter.offset, launch.arguments[i].data, parameter.bytes);
    }
    return lines;
}

void run_thread(Machine& machine, size_t shared_bytes) {
    const Kernel& kernel = machine.kernel;
    const int index = simt::running_thread();
    char* const registers = machine.registers.data() + static_cast<size_t>(index) * kernel.register_bytes;
    std::copy(kernel.constants.begin(), kernel.constants.end(), registers);
    std::memset(registers + kernel.constants.size(), 0xff, kernel.register_bytes - kernel.constants.size());
    Thread thread{registers,    shared_bytes ? static_cast<char*>(simt::dynamic_shared()) : nullptr,
                  shared_bytes, index / 32,
                  machine,      {}};
    const Instruction* next = kernel.code.data();
    const Instruction* current = next;
    try {
        while (next) {
            current = next;
            if constexpr (simt::check::kEnabled) machine.last = current;
            next = current->run(thread, *current);
        }
    } catch (const simt::Error& error) {
        const std::string what = error.what();
        if (what.find("; where=") != std::string::npos) throw;
        thread.fail(*current, what);
    }
}

}  // namespace

void Thread::fail(const Instruction& instruction, const std::string& what) const {
    simt::fail(what + where(machine.kernel, instruction));
}

char* Thread::shared_at(const Instruction& instruction, uint32_t address, size_t bytes) const {
    if (address < kSharedBase || address - kSharedBase + bytes > shared_bytes) {
        fail(instruction, "an access outside the shared memory of the block; got=" + std::to_string(bytes) +
                              " bytes at " + std::to_string(address));
    }
    return shared + (address - kSharedBase);
}

int Machine::warp_lanes(int warp) const {
    const int threads = static_cast<int>(blockDim.x * blockDim.y * blockDim.z);
    return std::min(32, threads - 32 * warp);
}

void require_converged(Thread& thread, const Instruction& instruction) {
    Machine::Convergence& convergence = thread.machine.convergence[static_cast<size_t>(thread.warp)];
    if (convergence.arrived && convergence.at != &instruction) {
        thread.fail(instruction, "an aligned instruction in divergent code; got=other lanes of the warp are at line " +
                                     std::to_string(convergence.at->line));
    }
    convergence.at = &instruction;
    if (++convergence.arrived == thread.machine.warp_lanes(thread.warp)) convergence.arrived = 0;
}

void run(const Kernel& kernel, const simt::Launch& launch) {
    const size_t threads = static_cast<size_t>(launch.block.x) * launch.block.y * launch.block.z;
    if (threads > kernel.max_threads) {
        simt::fail(kernel.name + ": threads of a block; got=" + std::to_string(threads) + "; want=at most " +
                   std::to_string(kernel.max_threads) + ", the kernel's __launch_bounds__");
    }
    const size_t shared_bytes = kernel.shared_bytes + launch.shared_bytes;
    Machine machine{kernel,
                    parameters_of(kernel, launch),
                    std::vector<char>(threads * kernel.register_bytes),
                    {},
                    std::vector<Machine::Convergence>((threads + 31) / 32)};
    for (const simt::Memory& memory : simt::memory()) machine.touched.emplace_back(memory.bytes);
    try {
        simt::run_grid(launch.grid, launch.block, shared_bytes, [&] { run_thread(machine, shared_bytes); });
    } catch (const simt::Error& error) {
        const std::string what = error.what();
        if (!machine.last || what.find("; where=") != std::string::npos) throw;
        simt::fail(what + where(kernel, *machine.last));
    }
}

}  // namespace ptx
